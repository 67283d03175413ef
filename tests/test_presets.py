# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a preset adds around galore(): plain optimizers on the rest, weight decay of the full weight, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "embed": {"embedding": normal(0, (50, 16))},
    "block": {"kernel": normal(1, (16, 24)), "norm": {"scale": normal(2, (16,))}},
    "lm_head": {"kernel": normal(3, (16, 50))},
}


def gradients(steps=4):
    return [jax.tree.map(lambda p, s=s: normal(s, p.shape), PARAMS) for s in range(10, 10 + steps)]


def train(tx, params=PARAMS, gradients=None):
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def without_kernel(tree):
    return {**tree, "block": {"norm": tree["block"]["norm"]}}


def test_embeddings_head_and_norms_are_on_plain_adamw_at_the_same_learning_rate():
    schedule = optax.cosine_decay_schedule(0.1, 10)
    ours, _ = train(galore_jax.galore_adamw(schedule, rank=4, weight_decay=0.1), gradients=gradients())
    theirs, _ = train(optax.adamw(schedule, weight_decay=0.1), gradients=gradients())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        without_kernel(ours),
        without_kernel(theirs),
    )
    assert not np.allclose(ours["block"]["kernel"], theirs["block"]["kernel"])


def test_embeddings_head_and_norms_are_on_plain_adafactor():
    ours, _ = train(galore_jax.galore_adafactor(0.1, rank=4, momentum=0.9), gradients=gradients())
    theirs, _ = train(optax.adafactor(0.1, multiply_by_parameter_scale=False, momentum=0.9), gradients=gradients())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        without_kernel(ours),
        without_kernel(theirs),
    )


def test_adafactor_scales_by_the_full_parameter_and_factors_the_low_rank_moment():
    params = {"w": 3 * normal(0, (256, 320))}
    gradient = [{"w": normal(1, (256, 320))}]
    plain, state = train(galore_jax.galore_adafactor(0.1, rank=128), params, gradient)
    scaled, _ = train(galore_jax.galore_adafactor(0.1, rank=128, multiply_by_parameter_scale=True), params, gradient)
    rms = float(jnp.sqrt(jnp.mean(params["w"] ** 2)))
    np.testing.assert_allclose(scaled["w"] - params["w"], rms * (plain["w"] - params["w"]), rtol=1e-4, atol=1e-5)
    assert optax.tree.get(state, "v_row")["w"].size == 128
    assert optax.tree.get(state, "v_col")["w"].size == 320


@pytest.mark.parametrize("preset", [galore_jax.galore_adamw, galore_jax.galore_adafactor])
def test_weight_decay_acts_on_the_full_weight_and_not_in_the_subspace(preset):
    """One step with decay minus one step without it is -learning_rate · decay · W, in every direction."""
    step = gradients(1)
    decayed, _ = train(preset(0.1, rank=4, weight_decay=0.5), gradients=step)
    plain, _ = train(preset(0.1, rank=4), gradients=step)
    jax.tree.map(lambda d, p, w: np.testing.assert_allclose(d - p, -0.1 * 0.5 * w, atol=1e-6), decayed, plain, PARAMS)


def test_a_weight_decay_mask_chooses_what_decays():
    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    step = gradients(1)
    tx = galore_jax.galore_adamw(0.1, rank=4, weight_decay=0.5, weight_decay_mask=matrices)
    masked, _ = train(tx, gradients=step)
    plain, _ = train(galore_jax.galore_adamw(0.1, rank=4), gradients=step)
    np.testing.assert_array_equal(masked["block"]["norm"]["scale"], plain["block"]["norm"]["scale"])
    assert not np.allclose(masked["block"]["kernel"], plain["block"]["kernel"])


@pytest.mark.parametrize(
    ("preset", "static"),
    [
        (galore_jax.galore_adamw, ("rank", "update_proj_gap")),
        (galore_jax.galore_adafactor, ("rank", "update_proj_gap", "min_dim_size_to_factor")),
    ],
)
def test_hyperparameters_can_be_injected_and_changed_during_training(preset, static):
    tx = optax.inject_hyperparams(preset, static_args=static)(learning_rate=0.1, rank=4)
    state = tx.init(PARAMS)
    [gradient] = gradients(1)
    update = jax.jit(tx.update)
    once, _ = update(gradient, state, PARAMS)
    state.hyperparams["learning_rate"] = state.hyperparams["learning_rate"] * 2
    twice, _ = update(gradient, state, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), once, twice)


def test_adafactor_treats_the_layers_of_a_stack_one_by_one():
    """A layer whose gradient is thirty times larger must not clip the others."""
    layers = [
        {"w": jnp.stack([normal(10 * s + i, (160, 200)) * (30.0 if i == s else 1.0) for i in range(3)])}
        for s in range(3)
    ]
    stacked, _ = train(galore_jax.galore_adafactor(0.1, rank=128), {"w": jnp.zeros((3, 160, 200))}, layers)
    separate, _ = train(
        galore_jax.galore_adafactor(0.1, rank=128), [jnp.zeros((160, 200))] * 3, [list(g["w"]) for g in layers]
    )
    np.testing.assert_allclose(stacked["w"], jnp.stack(separate), atol=2e-5)


def test_moments_are_float32_for_bfloat16_parameters_even_where_nothing_is_projected():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = galore_jax.galore_adamw(0.1, rank=1.0).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
