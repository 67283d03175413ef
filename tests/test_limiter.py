# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The bound on the growth of an update's norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quick_compilation  # noqa: F401

import galore_jax
from galore_jax import galore, residual

SIZES = (1.0, 3.0, 0.5, 0.504, 8.0)


def updates(step):
    """A matrix, a stack of two that grow at different times, and a vector."""
    size = SIZES[step]

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(10 * step + seed), shape)

    return {
        "w": size * normal(0, 4, 6),
        "stack": jnp.array([size, 1.0])[:, None, None] * normal(1, 2, 5, 3),
        "b": normal(2, 7),
    }


def of_a_matrix(x, before, gamma):
    norm = np.linalg.norm(x)
    if before is not None and norm > gamma * before:
        x, norm = x * gamma * before / norm, gamma * before
    return x, norm


@pytest.mark.parametrize("gamma", [1.01, 1.5])
def test_every_matrix_is_bounded_by_its_own_last_norm(gamma):
    tx = galore_jax.limit_norm_growth(gamma)
    state, update = tx.init(updates(0)), jax.jit(tx.update)
    before = {"w": [None], "stack": [None, None], "b": [None]}
    for step in range(len(SIZES)):
        found, state = update(updates(step), state)
        for name, leaf in updates(step).items():
            parts, results = (x if name == "stack" else [x] for x in (leaf, found[name]))
            for i, (part, result) in enumerate(zip(parts, results, strict=True)):
                wanted, before[name][i] = of_a_matrix(np.asarray(part, np.float64), before[name][i], gamma)
                np.testing.assert_allclose(result, wanted, rtol=1e-5)
            np.testing.assert_allclose(state.norm[name], np.squeeze(before[name]), rtol=1e-5)
    assert jax.tree.map(jnp.shape, state.norm) == {"w": (), "stack": (2,), "b": ()}


def test_what_is_zero_or_not_finite_is_handed_on_and_not_remembered():
    tx = galore_jax.limit_norm_growth()
    state, update = tx.init({"w": jnp.zeros((2, 3, 3))}), jax.jit(tx.update)
    ones = jnp.ones((2, 3, 3))
    _, first = update({"w": ones}, state)
    for bad in (0.0, jnp.nan, jnp.inf):
        spoilt = {"w": ones.at[1, 0, 0].set(bad) if bad else ones.at[1].set(0.0)}
        found, after = update(spoilt, first)
        np.testing.assert_array_equal(found["w"][1], spoilt["w"][1])
        np.testing.assert_array_equal(after.norm["w"], first.norm["w"])
        found, _ = update({"w": 100 * ones}, after)
        np.testing.assert_allclose(found["w"], 1.01, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(size):
    tx = galore_jax.limit_norm_growth(2.0)
    _, state = tx.update({"w": jnp.full((4, 4), size)}, tx.init({"w": jnp.zeros((4, 4))}))
    found, _ = tx.update({"w": jnp.full((4, 4), 8 * size)}, state)
    np.testing.assert_allclose(found["w"], 2 * size, rtol=1e-6)


def test_dtypes_stay_and_a_state_is_float32():
    tx = galore_jax.limit_norm_growth()
    params = {"w": jnp.ones((4, 6), jnp.bfloat16)}
    found, state = jax.jit(tx.update)(params, tx.init(params))
    assert (found["w"].dtype, state.norm["w"].dtype) == (jnp.bfloat16, jnp.float32)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, tx.init(params))


def test_after_galore_it_is_the_bound_inside_the_rule_of_apollo():
    """The scale is 1, so the update is what the rule bounds."""
    outside = optax.chain(
        galore(optax.scale_by_adam(), rank=3, scale=1.0, residual=residual.tensor(None)), galore_jax.limit_norm_growth()
    )
    inside = galore(optax.scale_by_adam(), rank=3, scale=1.0, residual="tensor")
    params = {"w": jnp.zeros((4, 6))}
    states = outside.init(params), inside.init(params)
    for step in range(len(SIZES)):
        gradient = {"w": updates(step)["w"]}
        one, first = jax.jit(outside.update)(gradient, states[0], params)
        two, second = jax.jit(inside.update)(gradient, states[1], params)
        np.testing.assert_allclose(one["w"], two["w"], rtol=1e-5)
        states = first, second


def test_a_factor_that_is_not_positive_is_named():
    with pytest.raises(ValueError, match=r"gamma is 0: write a positive factor, for example 1\.01"):
        galore_jax.limit_norm_growth(0)


def test_the_factor_can_be_injected():
    tx = optax.inject_hyperparams(galore_jax.limit_norm_growth)(gamma=2.0)
    params = {"w": jnp.ones((4, 6))}
    _, state = tx.update(params, tx.init(params))
    state.hyperparams["gamma"] = jnp.asarray(3.0)
    found, _ = tx.update({"w": 9 * params["w"]}, state)
    np.testing.assert_allclose(found["w"], 3.0, rtol=1e-6)
