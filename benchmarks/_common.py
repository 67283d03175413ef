# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: a LLaMA on real text, its gradients, and programs compiled for a TPU that is not there."""

import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from galore_jax.models import Llama, LlamaConfig
from galore_jax.training.data import load_data
from galore_jax.training.step import token_losses

FACTORISATIONS = ("svd", "eigh", "syev", "gesdd", "gesvd", "householder", "geqrf", "qr")


def language_model(preset: str, batch: int, seq: int, layers: int | None = None, data: str = "python"):
    """(loss(params, tokens), init(), iterator of int32 [batch, seq + 1]) of a preset on the bytes of a text."""
    text = load_data(data, tokenizer="bytes", sequence_length=seq, batch_size=batch, seed=0, vocab_size=256)
    overrides = {} if layers is None else {"num_hidden_layers": layers}
    config = LlamaConfig.preset(preset, vocab_size=text.tokenizer.vocab_size, **overrides)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
    del abstract

    def init():
        return nnx.to_pure_dict(nnx.split(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)[1])

    def loss(params, tokens):
        return jnp.mean(token_losses(graphdef, params, tokens))

    return loss, init, text.train_iterator()


def training_gradients(preset: str, layers: int, steps: list[int], batch: int, seq: int, data: str) -> dict:
    """{"path@step": the gradient [m, n] of the last layer's matrix} at the given steps of a real AdamW run."""
    loss, init, batches = language_model(preset, batch, seq, layers, data)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_constant_schedule(0.0, 1e-3, 1 + max(steps) // 10))
    )
    params = init()
    state = tx.init(params)

    @jax.jit
    def step(params, state, tokens):
        gradient = jax.grad(loss)(params, tokens)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, gradient

    kept = {}
    for number in range(max(steps) + 1):
        params, state, gradient = step(params, state, jnp.asarray(next(batches)))
        if number in steps:
            for path, leaf in jax.tree.leaves_with_path(gradient):
                if leaf.ndim == 3:
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    kept[f"{name}@{number}"] = np.asarray(leaf[-1])
    return kept


def compile_for_tpu(function, *arguments, topology: str = "v5e:2x2"):
    """(compile seconds, compiled, HLO text) of a function of abstract arguments for one core of a TPU that is not attached.

    Needs the package libtpu, which lets one process at a time in.
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
    start = time.perf_counter()
    compiled = lowered.compile()
    return time.perf_counter() - start, compiled, lowered.as_text() + compiled.as_text()


def factorisations_in(text: str) -> list[str]:
    """The names of matrix factorisations, Cholesky apart, that a program's text mentions as an operation."""
    operations = {name.lower() for name in re.findall(r"(?:custom_call_target=\"|@|stablehlo\.|= \S+ )([\w.]+)", text)}
    return sorted({word for word in FACTORISATIONS for name in operations if word in re.split(r"[^a-z]+", name)})
