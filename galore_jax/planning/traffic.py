# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Computes the bytes that a compiled program sends between its devices, and between host and device, from the program's text.

A ring algorithm for a collective over a group of g devices, with S bytes of result on each device, sends from every device

    all-reduce  2 S (g-1)/g      all-gather, all-to-all  S (g-1)/g      reduce-scatter  S (g-1)      collective-permute  S

An instruction in a loop counts once per iteration, or once if the number of iterations is not known at compile time.
Collectives in the branches of a conditional count separately, because galore places its refreshes there and a training step
runs at most some of them.  TPU compilers split one collective across the fusions that run alongside it, and give all parts the
same chain ID.  Such a collective counts once.

Arrays in the host's memory have the memory space 5 in their layouts.  A copy, or a slice that is read or written, counts with
the bytes that it moves, and a kernel that reads such an array by itself with all of the array.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation|called_computations|branch_computations)"
    r"=(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_CHAIN = re.compile(r'chain_id="(\w+)"')
_HOST = "S(5)"
_PLACED = re.compile(r"\b(?:pred|[a-z]+\d+\w*)\[[\d,]*\](?:\{[^}]*\})?")
_OPERATION = re.compile(r"%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_MOVES_NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier"}
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Bytes that each device sends, for each kind of collective; 0 for a kind that does not occur."""

    always: dict[str, int]  # Bytes outside conditionals
    in_branches: dict[str, int]  # Bytes in the branches of conditionals, summed over all branches


class HostTraffic(NamedTuple):
    """Bytes that one execution moves over the bus between the host's memory and the device's."""

    to_device: int
    to_host: int


def host_traffic(text: str) -> HostTraffic:
    """Returns what one execution moves between host and device; all branches of conditionals count.

    Args:
      text: The text of a compiled program, from ``jax.stages.Compiled.as_text``.

    >>> text = '''
    ... ENTRY %main (x: f32[8,64]) -> f32[64] {
    ...   %x = f32[8,64]{1,0:S(5)} parameter(0)
    ...   %i = s32[] constant(3)
    ...   %d = ((f32[8,64]{1,0:S(5)}, s32[]), f32[1,64]{1,0}, u32[]) fusion-start(%x, %i), calls=%slice
    ...   %done = f32[1,64]{1,0} fusion-done(%d)
    ...   ROOT %r = f32[64]{0} bitcast(%done)
    ... }'''
    >>> host_traffic(text)
    HostTraffic(to_device=256, to_host=0)
    """
    computations, entry = computations_of(text)
    moved: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        types: dict[str, str] = {}
        for line in computations.get(name, ()):
            found = _OPERATION.search(line)
            if found is None:
                continue
            own, kind, operation, rest = found.groups()
            types[own] = kind
            if operation in ("while", "conditional", "call"):
                for one, several in CALLED.findall(line):
                    for callee in re.findall(r"[\w.\-]+", one or several):
                        visit(callee, times * trips(line, computations))
            if operation in _MOVES_NOTHING or operation.endswith("-done"):
                continue
            results = _PLACED.findall(kind)
            operands = [types.get(name, "") for name in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
            if operation == "copy-start":  # (result, operand, context)
                results = results[:1]
            elif operation.endswith("-start"):  # ((operands), result, context)
                results = results[-2:-1]
            read = [array for array in operands if _HOST in array and not array.startswith("(")]
            written = [array for array in results if _HOST in array]
            if written:
                # An array of the host that is updated in place gets what the other operands hold.
                parts = [array for array in operands if _HOST not in array] if read else written
                moved["to_host"] += times * _bytes(parts)
            elif read:
                moved["to_device"] += times * _bytes(results if operation.endswith("-start") else read)

    visit(entry, 1)
    return HostTraffic(moved["to_device"], moved["to_host"])


def traffic(text: str, devices: int) -> Traffic:
    """Returns the traffic of one execution.

    Args:
      text: The text of a compiled program, from ``jax.stages.Compiled.as_text``.
      devices: The number of devices that the program runs on.

    >>> text = '''
    ... %body (x: f32[8]) -> f32[8] {
    ...   ROOT %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
    ... }
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   ROOT %w = f32[8]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
    ... }'''
    >>> traffic(text, 4).always["all-reduce"]  # 5 times 2 · 32 bytes · 1/2
    160
    """
    computations, entry = computations_of(text)
    always, in_branches = Counter(), Counter()

    def visit(name: str, times: int, into: Counter, counted: set[str]) -> None:
        for line in computations.get(name, ()):
            found = _INSTRUCTION.search(line)
            if found is not None:
                chain = _CHAIN.search(line)
                if chain is None or chain[1] not in counted:
                    into[found[2]] += times * _sent(found, line, devices)
                if chain is not None:
                    counted.add(chain[1])
                # A collective calls only its reduction, which sends nothing.
                continue
            is_branch = " conditional(" in line
            turns = times * trips(line, computations)
            for one, several in CALLED.findall(line):
                for callee in re.findall(r"[\w.\-]+", one or several):
                    visit(callee, turns, in_branches if is_branch else into, counted if " fusion(" in line else set())

    visit(entry, 1, always, set())
    return Traffic(*({kind: counted[kind] for kind in _KINDS} for counted in (always, in_branches)))


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, by name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def trips(line: str, computations: dict[str, list[str]]) -> int:
    """Returns how many times an instruction runs the computations that it calls.

    A loop with the condition i < N runs N times, because JAX's loops count from 0.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    if known is not None:
        return int(known[1])
    # TPU compilers do not record a trip count.
    condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], ()) if condition is not None else ()
    for text in lines:
        bound = re.search(r"ROOT .* compare\(.*?%?([\w.\-]+)\), direction=LT", text)
        if bound is not None:
            constant = re.compile(rf"%?{re.escape(bound[1])} = s\d+\[\]\S* constant\((\d+)\)")
            return next((int(match[1]) for match in map(constant.search, lines) if match is not None), 1)
    return 1


def arrays_of(kind: str) -> list[tuple[int, str]]:
    """The bits of a number and the shape of each array that a type names."""
    return [(int(bits or 8), shape) for _, bits, shape in _ARRAY.findall(kind)]


def bytes_of(array: tuple[int, str]) -> int:
    bits, shape = array
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _bytes(kinds: list[str]) -> int:
    """Of all arrays in some types, but for numbers alone: the places of slices."""
    return sum(bytes_of(array) for kind in kinds for array in arrays_of(kind) if array[1])


def _sent(found: re.Match, line: str, devices: int) -> int:
    kind, group = found[2], _group_size(line, devices)
    arrays = arrays_of(found[1])
    # The start of an asynchronous collective lists its operands before its results.
    if found[3] and kind != "all-reduce":
        arrays = [array for array in arrays if array[1] or kind != "collective-permute"]
        arrays = arrays[len(arrays) // 2 :]
    size = sum(map(bytes_of, arrays))
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (group - 1)
    return size * (group - 1) * (2 if kind == "all-reduce" else 1) // group


def _group_size(line: str, devices: int) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed is not None:
        return len(listed[1].split(","))
    shaped = re.search(r"replica_groups=\[([\d,]+)\]", line)
    if shaped is not None:
        return int(shaped[1].split(",")[-1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
    if named is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return devices
