# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes between devices, of programs whose collectives are known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from problems import optimized_compilation  # noqa: F401

from galore_jax.planning.traffic import host_traffic, traffic

FLOATS = 64  # on each device


def text_of(function, mesh_shape=(8,), names=("a",)):
    mesh = jax.make_mesh(mesh_shape, names, axis_types=(AxisType.Auto,) * len(names))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(names), P()), out_specs=P(names), check_vma=False)
    shapes = jax.ShapeDtypeStruct((8 * FLOATS,), "float32"), jax.ShapeDtypeStruct((), "int32")
    return jax.jit(mapped).lower(*shapes).compile().as_text()


COLLECTIVES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "a"), 2 * 4 * FLOATS * 7 // 8),
    "all-gather": (lambda x: jax.lax.all_gather(x, "a", tiled=True)[:FLOATS] + x, 4 * 8 * FLOATS * 7 // 8),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "a", tiled=True), 4 * FLOATS // 8 * 7),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 8) for i in range(8)]), 4 * FLOATS),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_one_collective_has_the_bytes_of_a_ring(kind):
    function, size = COLLECTIVES[kind]
    found = traffic(text_of(lambda x, n: function(x)), 8)
    assert found.always == dict.fromkeys(found.always, 0) | {kind: size}
    assert sum(found.in_branches.values()) == 0


def test_a_loop_counts_its_turns_and_a_branch_apart():
    def function(x, n):
        x = jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(jax.lax.psum(x, "a")), x)
        return jax.lax.cond(n > 0, functools.partial(jax.lax.psum, axis_name="a"), lambda x: x, x)

    one = 2 * 4 * FLOATS * 7 // 8
    found = traffic(text_of(function), 8)
    assert (found.always["all-reduce"], found.in_branches["all-reduce"]) == (5 * one, one)


@pytest.mark.parametrize(("bound", "turns"), [("constant(5)", 5), ("get-tuple-element(%tuple), index=2", 1)])
def test_a_loop_without_a_count_turns_as_often_as_its_condition_says(bound, turns):
    """As compilers for TPUs write it; a bound that is not known counts once."""
    text = f"""
%condition (tuple: (s32[], f32[8])) -> pred[] {{
  %bound.1 = s32[]{{:T(128)}} {bound}
  %tuple = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%tuple), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %bound.1), direction=LT, metadata={{op_name="jit(step)/while/cond/lt"}}
}}

%body (tuple: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %sum = f32[8]{{0:T(256)}} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %while = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) while(%start), condition=%condition, body=%body, metadata={{op_name="while"}}
}}
"""
    assert traffic(text, 8).always["all-reduce"] == turns * 2 * 4 * 8 * 7 // 8


def test_a_group_is_the_devices_along_the_axes_that_are_reduced():
    found = traffic(text_of(lambda x, n: jax.lax.psum(x, "a"), (2, 4), ("a", "b")), 8)
    assert found.always["all-reduce"] == 2 * 4 * FLOATS * 1 // 2


@pytest.mark.parametrize(
    ("instruction", "kind", "size"),
    [
        ("((f32[64]), f32[8]) reduce-scatter-start(%x), replica_groups=[1,8]<=[8]", "reduce-scatter", 4 * 8 * 7),
        ("(f32[8], f32[64]) all-gather-start(%x), replica_groups=[1,8]<=[8]", "all-gather", 4 * 64 * 7 // 8),
        ("((f32[8], s8[8]), (f32[16], s8[16])) all-gather-start(%x, %y), replica_groups={}", "all-gather", 5 * 14),
        ("(f32[8], f32[8], u32[], u32[]) collective-permute-start(%x)", "collective-permute", 4 * 8),
        ("bf16[64]{0} all-reduce-start(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}", "all-reduce", 2 * 2 * 64 // 2),
    ],
)
def test_a_collective_that_is_begun_counts_its_result_alone(instruction, kind, size):
    found = traffic(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %r = {instruction}\n}}", 8)
    assert found.always == dict.fromkeys(found.always, 0) | {kind: size}


def test_a_collective_in_several_fusions_counts_once():
    """As compilers for TPUs write one that runs beside other work: its parts have one chain, and each loop sends anew."""
    text = """
%part.1 (x: f32[8]) -> f32[64] {
  ROOT %g.1 = f32[64]{0} all-gather(%x), channel_id=1, dimensions={0}, frontend_attributes={chain_id="7"}
}

%part.2 (x: f32[8]) -> f32[64] {
  ROOT %g.2 = f32[64]{0} all-gather(%x), channel_id=1, dimensions={0}, frontend_attributes={chain_id="7"}
}

%part.3 (x: f32[8]) -> f32[64] {
  ROOT %g.3 = f32[64]{0} all-gather(%x), channel_id=1, dimensions={0}, frontend_attributes={chain_id="8"}
}

%body (x: f32[8]) -> f32[8] {
  %first = f32[64]{0} fusion(%x), kind=kCustom, calls=%part.1
  %second = f32[64]{0} fusion(%x), kind=kCustom, calls=%part.2
  ROOT %other = f32[64]{0} fusion(%x), kind=kCustom, calls=%part.3
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %one = f32[8]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %two = f32[8]{0} while(%one), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"2"}}
}
"""
    assert traffic(text, 8).always["all-gather"] == 7 * 2 * 4 * 64 * 7 // 8


STREAMED = """
%body (t: (s32[], f32[4,256])) -> (s32[], f32[4,256]) {
  %t = (s32[], f32[4,256]{1,0:S(5)}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %stack = f32[4,256]{1,0:S(5)} get-tuple-element(%t), index=1
  %slice = ((f32[4,256]{1,0:S(5)}, s32[]), f32[1,256]{1,0}, u32[]) fusion-start(%stack, %i), calls=%take
  %layer = f32[1,256]{1,0} fusion-done(%slice)
  %put = ((f32[4,256]{1,0:S(5)}, f32[1,256]{1,0}, s32[]), f32[4,256]{1,0:S(5)}, u32[]) fusion-start(%stack, %layer, %i), calls=%p
  %new = f32[4,256]{1,0:S(5)} fusion-done(%put)
  ROOT %both = (s32[], f32[4,256]{1,0:S(5)}) tuple(%i, %new)
}
ENTRY %main (x: f32[4,256], y: bf16[8], z: f32[16]) -> f32[4,256] {
  %x = f32[4,256]{1,0:S(5)} parameter(0)
  %y = bf16[8]{0:S(5)} parameter(1)
  %z = f32[16]{0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,256]{1,0:S(5)}) tuple(%zero, %x)
  %loop = (s32[], f32[4,256]{1,0:S(5)}) while(%start), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %in = (bf16[8]{0}, bf16[8]{0:S(5)}, u32[]) copy-start(%y)
  %there = bf16[8]{0} copy-done(%in)
  %out = (f32[16]{0:S(5)}, f32[16]{0}, u32[]) copy-start(%z)
  %read = f32[8]{0} fusion(%y, %z), kind=kLoop, calls=%kernel
  ROOT %r = f32[4,256]{1,0:S(5)} get-tuple-element(%loop), index=1
}
"""


def test_what_crosses_the_bus_is_slices_copies_and_what_a_kernel_reads_by_itself():
    layers, copied, read = 4 * 4 * 256, 2 * 8, 2 * 8
    assert host_traffic(STREAMED) == (layers + copied + read, layers + 4 * 16)


def test_nothing_crosses_the_bus_without_an_array_on_the_host():
    assert host_traffic(STREAMED.replace(":S(5)", "")) == (0, 0)
