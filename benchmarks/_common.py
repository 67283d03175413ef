# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: a LLaMA on real text, its gradients, programs compiled for a TPU that is not there, and tables."""

import functools
import os
import pathlib
import re
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from galore_jax.models import Llama, LlamaConfig
from galore_jax.planning.targets import devices_of, target
from galore_jax.planning.traffic import CALLED, arrays_of, bytes_of, computations_of, trips
from galore_jax.training.step import token_losses

FACTORISATIONS = ("svd", "eigh", "syev", "gesdd", "gesvd", "householder", "geqrf", "orgqr")


def language_text(data: str, batch: int, seq: int, tokenizer: str = "bytes", seed: int = 0):
    """The text as windows of ``seq`` + 1 tokens."""
    from galore_jax.training.data import load_data  # it needs Grain and tokenizers, which gpu.py does without

    return load_data(data, tokenizer=tokenizer, sequence_length=seq, batch_size=batch, seed=seed, vocab_size=4096)


def language_model(
    preset: str, batch: int, seq: int, layers: int | None = None, data: str = "python", tokenizer: str = "bytes"
):
    """(loss(params, tokens), init(), iterator of int32 [batch, seq + 1]) of a preset on a text."""
    text = language_text(data, batch, seq, tokenizer)
    overrides = {} if layers is None else {"num_hidden_layers": layers}
    config = LlamaConfig.preset(preset, vocab_size=text.tokenizer.vocab_size, **overrides)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
    del abstract

    def init():
        return nnx.to_pure_dict(nnx.split(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)[1])

    def loss(params, tokens):
        return jnp.mean(token_losses(graphdef, params, tokens))

    return loss, init, text.train_iterator()


def training_gradients(
    matrix: str, preset: str, layers: int, steps: list[int], batch: int, seq: int, data: str, tokenizer: str
) -> tuple[list[np.ndarray], list[float]]:
    """(the gradients [m, n] of the last layer's matrix, the losses) at the given steps of a real AdamW run.

    The run takes a part of each batch, at most an eighth, and the gradients are those of the whole, on the weights before the
    step.
    """
    loss, init, batches = language_model(preset, batch, seq, layers, data, tokenizer)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_constant_schedule(0.0, 1e-3, 1 + max(steps) // 10))
    )
    params = init()
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state, tokens):
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def measure(params, tokens):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        leaves = {
            jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(gradient)
        }
        return value, leaves[matrix][-1]

    gradients, losses = [], []
    for number in range(max(steps) + 1):
        tokens = jnp.asarray(next(batches))
        if number in steps:
            value, gradient = measure(params, tokens)
            gradients.append(np.asarray(gradient))
            losses.append(float(value))
            print(f"{preset}, step {number}: loss {losses[-1]:.3f}", file=sys.stderr, flush=True)
        params, state = train(params, state, tokens[: max(1, batch // 8)])
    return gradients, losses


def compile_for_tpu(function, *arguments, topology: str = "v5e:2x2"):
    """(compile seconds, compiled, HLO text) of a function of abstract arguments for one core of a TPU that is not attached.

    The seconds are those of the clock and those of all cores added up, which depend less on what else the machine does.  Needs
    the package libtpu, which lets one process at a time in; JAX_PLATFORMS=cpu keeps JAX itself from looking for a TPU.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[:1]
    mesh = jax.sharding.Mesh(np.array(devices), ("one",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(leaf):
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=placed)

    lowered = jax.jit(function).lower(*jax.tree.map(abstract, arguments))
    start = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return seconds, compiled, lowered.as_text() + compiled.as_text()


def compile_for_gpu(function, *arguments, name: str = "h100", donate: tuple[int, ...] = ()):
    """A function of abstract arguments compiled for a GPU that is not attached; needs the extra ``plan``."""
    mesh = jax.sharding.Mesh(np.array(devices_of(target(name))), ("one",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), arguments)
    return jax.jit(function, donate_argnums=donate).lower(*abstract).compile()


NO_LAUNCH = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
LAUNCHES = {"fusion": "fusions", "custom-call": "library calls", "copy": "copies", "copy-start": "copies"}


def launches_in(text: str) -> dict[str, dict[str, int]]:
    """What a program for a GPU launches, always and in all branches of its conditionals together.

    "fusions" are kernels that XLA wrote, "library calls" those of cuBLAS, cuSOLVER and the like, and "others" kernels for one
    operation; "conditionals" and "loops" wait for a number from the device.  What is in a loop counts once an iteration.
    "bytes" are those of the arguments and results of all of these, whole, also where a kernel takes a slice of them.
    """
    computations, entry = computations_of(text)
    counts = {"always": Counter(), "in branches": Counter()}

    def visit(name: str, times: int, into: Counter) -> None:
        sizes = {}
        for line in computations.get(name, ()):
            found = re.search(r" ([a-z][\w\-]*)\(", line)
            if found is not None:
                sizes[line.split(" = ")[0].split()[-1]] = sum(map(bytes_of, arrays_of(line[: found.start()])))
            if found is None or found[1] in NO_LAUNCH or found[1].endswith("-done"):
                continue
            if found[1] in ("while", "conditional", "call"):
                if found[1] != "call":
                    into["loops" if found[1] == "while" else "conditionals"] += times
                below = counts["in branches"] if found[1] == "conditional" else into
                for one, several in CALLED.findall(line):
                    for callee in re.findall(r"[\w.\-]+", one or several):
                        visit(callee, times * trips(line, computations), below)
            else:
                arguments = re.findall(r"%[\w.\-]+", line[found.end() :].split(")")[0])
                moved = sum(sizes.get(argument, 0) for argument in [line.split(" = ")[0].split()[-1], *arguments])
                into.update({LAUNCHES.get(found[1], "others"): times, "bytes": times * moved})

    visit(entry, 1, counts["always"])
    return {place: dict(sorted(found.items())) for place, found in counts.items()}


def factorisations_in(text: str) -> list[str]:
    """The names of matrix factorisations, Cholesky apart, that a program's text mentions as an operation.

    A program is StableHLO or HLO; a LAPACK routine counts by its name without the letter of its type.
    """
    operations = {name.lower() for name in re.findall(r"(?:custom_call_target=\"|@|stablehlo\.|= \S+ )([\w.]+)", text)}
    words = {word for name in operations for word in re.split(r"[^a-z]+", name)}
    return sorted({known for known in FACTORISATIONS for name in operations if known in name} | ({"qr"} & words))


def put_between(page: pathlib.Path, name: str, text: str) -> None:
    """Replaces the text of a page between its two markers of that name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
