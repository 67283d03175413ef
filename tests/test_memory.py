# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes of optimizer state against the closed formulas, and the documentation's table against the command that makes it."""

import importlib.util
import pathlib

import jax
import optax
import pytest
from flax import nnx
from problems import optimized_compilation  # noqa: F401

import galore_jax
from galore_jax.models import Llama, LlamaConfig

ROOT = pathlib.Path(__file__).parent.parent
F32 = 4
COUNTS = 5 * 4  # GaLoreState.count, .skipped, .kept and .rejected, and Adam's count: int32


def abstract_params(config):
    return nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)


def matrices(config):
    """(m, n) of the seven projected kernels of one layer, from the configuration alone."""
    d, f = config.hidden_size, config.intermediate_size
    return [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]


def elements(proj_type, m, n, r):
    """Basis and two moments of one matrix: P is side x r, each moment what the projection leaves."""
    k, K = min(m, n), max(m, n)
    return {"std": r * (k + 2 * K), "reverse_std": r * (K + 2 * k), "full": r * (m + n) + 2 * r * r}[proj_type]


@pytest.mark.covering(14)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize(
    ("model", "rank"),
    [("60m", 128), ("130m", 256), ("250m", 192), ("350m", 256), ("1b", 512), ("1b", 1024), ("3b", 640), ("7b", 1024)],
)
def test_state_bytes_equal_the_formula(model, rank, proj_type, param_dtype):
    config = LlamaConfig.preset(model, param_dtype=param_dtype)
    params = abstract_params(config)
    projected = [(m, n) for m, n in matrices(config) if rank < min(m, n)]
    assert len(projected) == 7
    full = config.num_params - config.num_hidden_layers * sum(m * n for m, n in projected)
    low_rank = config.num_hidden_layers * sum(elements(proj_type, m, n, rank) for m, n in projected)
    tx = galore_jax.galore_adamw(0.01, rank=rank, proj_type=proj_type)
    assert galore_jax.state_bytes(tx, params) == F32 * (low_rank + 2 * full) + COUNTS


def test_abstract_bytes_equal_those_of_live_arrays():
    params = {"w": jax.numpy.ones((64, 160)), "b": jax.numpy.ones((160,))}
    tx = galore_jax.galore_adamw(0.01, rank=8)
    assert galore_jax.state_bytes(tx, params) == sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))


def test_adamw_bytes_are_two_moments_and_a_count():
    config = LlamaConfig.preset("60m")
    assert galore_jax.state_bytes(optax.adamw(0.1), abstract_params(config)) == 2 * F32 * config.num_params + 4


def test_the_table_of_the_documentation_is_what_the_command_prints():
    spec = importlib.util.spec_from_file_location("optimizer_bytes", ROOT / "benchmarks" / "optimizer_bytes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() == module.PAGE.read_text()
