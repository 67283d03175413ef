# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The optimizers that a run can name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import galore_states
from runs import small_tree, tiny_model

from galore_jax.presets import PRESETS
from galore_jax.training import report
from galore_jax.training.config import PretrainConfig
from galore_jax.training.optimizers import OPTIMIZERS, make_optimizer


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_float32_or_coded_state_for_bfloat16_parameters(name):
    config = PretrainConfig(optimizer=name, rank=4)
    params = small_tree(jnp.bfloat16)
    tx = make_optimizer(config, optax.constant_schedule(1e-3))
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    coded = {"uint8"} if name.endswith("bit") else set()
    bases = {"bfloat16"} if name == "galore_adamw_8bit" else set()
    seeds = {"uint32"} if "apollo" in name else set()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32"} | coded | bases | seeds
    for node in galore_states(state):  # bases may be in bfloat16, moments never
        assert "bfloat16" not in {leaf.dtype.name for leaf in jax.tree.leaves(node.inner_state)}
    # Ours answer in the dtype of the gradients, which the plain step hands over in float32.
    kept = "bfloat16" if name in PRESETS or coded else "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {kept}
    assert all(bool(jnp.all(jnp.isfinite(leaf))) and bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates))


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_weights_by_learning_rate_times_weight_decay(name):
    params = small_tree()
    config = PretrainConfig(optimizer=name, rank=4, weight_decay=0.1)
    tx = make_optimizer(config, optax.constant_schedule(0.5))
    updates, _ = jax.jit(tx.update)(optax.tree.zeros_like(params), tx.init(params), params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.05 * p, rtol=1e-6), updates, params)


@pytest.mark.slow
def test_gradients_are_clipped_before_the_optimizer_sees_them():
    params = small_tree()
    for clip, expected in ((1.0, 1.0), (0.0, float(optax.tree.norm(params)))):
        tx = make_optimizer(PretrainConfig(optimizer="adamw", clip=clip), optax.constant_schedule(1e-3))
        _, state = tx.update(params, tx.init(params), params)
        assert float(optax.tree.norm(optax.tree.get(state, "mu"))) == pytest.approx(0.1 * expected, rel=1e-5)


@pytest.mark.slow
def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam():
    params = small_tree()
    tx = make_optimizer(PretrainConfig(optimizer="muon"), optax.constant_schedule(1.0))
    updates, _ = tx.update(params, tx.init(params), params)
    values = jnp.linalg.svd(updates["layers"]["mlp"]["up_proj"]["kernel"], compute_uv=False)
    assert float(jnp.max(values) / jnp.min(values)) < 2  # Newton-Schulz brings them near one value
    values = jnp.linalg.svd(updates["lm_head"]["kernel"], compute_uv=False)
    assert float(jnp.max(values) / jnp.min(values)) > 2


@pytest.mark.slow
def test_galore_state_is_smaller_than_that_of_adamw():
    config, (_, params) = PretrainConfig(rank=4), tiny_model()
    state = jax.eval_shape(make_optimizer(config, optax.constant_schedule(1e-3)).init, params)
    sizes = report.memory(config, params, state, params)
    assert sizes["optimizer_state_bytes"] < sizes["adamw_state_bytes"]
    assert sizes["adamw_state_bytes"] == 2 * sizes["params_bytes"] + 2 * 4  # two moments, two counts


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'sgdd' is not known; choose one of galore_adamw, .*muon, .*"):
        make_optimizer(PretrainConfig(optimizer="sgdd"), optax.constant_schedule(1.0))
