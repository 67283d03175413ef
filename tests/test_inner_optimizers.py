# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Optax's optimizers inside ``galore``: each sees an ordinary, smaller problem, and a bad gradient leaves its moments alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    LOW_RANK_SHAPES,
    RANK,
    assert_projected,
    assert_trees_close,
    assert_trees_equal,
    tree,
)

import galore_jax

RATE = 0.1
INNERS = {
    "sgd": lambda: optax.sgd(RATE),
    "momentum": lambda: optax.sgd(RATE, momentum=0.9),
    "nesterov": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(RATE),
    "adamw": lambda: optax.adamw(RATE, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=2),
    "lion": lambda: optax.lion(RATE),
    "lamb": lambda: optax.lamb(RATE),
    "lars": lambda: optax.lars(RATE, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(RATE, momentum=0.9),
    "adagrad": lambda: optax.adagrad(RATE),
    "novograd": lambda: optax.novograd(RATE),
    "radam": lambda: optax.radam(RATE),
    "adabelief": lambda: optax.adabelief(RATE),
    "yogi": lambda: optax.yogi(RATE),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "nadam": lambda: optax.nadam(RATE),
    "sm3": lambda: optax.sm3(RATE),
}
SCALE = 0.5

inners = pytest.mark.parametrize("name", INNERS)


@functools.cache
def wrapped(name):
    """The inner optimizer and ``galore`` of it, compiled once for all tests: (inner's init, inner's update, init, update)."""
    inner = INNERS[name]()
    tx = galore_jax.galore(inner, rank=RANK, scale=SCALE, update_proj_gap=2, projector="svd")
    return inner.init, jax.jit(inner.update), tx.init, jax.jit(tx.update)


def after_two_updates(name, params):
    """A state with moments in it, whose next update is due to refresh the bases."""
    *_, init, update = wrapped(name)
    state = init(params)
    for seed in (1, 2):
        _, state = update(tree(seed), state, params)
    return state


def down(x, left, right):
    """PᵀX for the kernel, X Q for the stack, the bias as it is."""
    return {
        "kernel": np.asarray(left["kernel"]).T @ np.asarray(x["kernel"]),
        "stack": np.asarray(x["stack"]) @ np.asarray(right["stack"]),
        "bias": np.asarray(x["bias"]),
    }


def up(x, left, right):
    """α P X for the kernel, α X Qᵀ for the stack, the bias as it is."""
    return {
        "kernel": SCALE * np.asarray(left["kernel"]) @ np.asarray(x["kernel"]),
        "stack": SCALE * np.asarray(x["stack"]) @ np.asarray(right["stack"]).transpose(0, 2, 1),
        "bias": np.asarray(x["bias"]),
    }


@pytest.mark.covering(1)
@inners
def test_the_inner_optimizer_sees_the_low_rank_problem(name):
    """Step by step equal to the inner optimizer run by hand on PᵀG with params PᵀW, its update lifted by α P."""
    inner_init, inner_update, init, update = wrapped(name)
    params = tree(0)
    state = init(params)
    by_hand_state = inner_init({k: jnp.zeros(shape) for k, shape in LOW_RANK_SHAPES.items()})
    for step in range(5):
        gradient = tree(step + 1)
        updates, state = update(gradient, state, params)
        node = assert_projected(state)
        low_gradient, low_params = (
            jax.tree.map(jnp.asarray, down(x, node.left, node.right)) for x in (gradient, params)
        )
        low_updates, by_hand_state = inner_update(low_gradient, by_hand_state, low_params)
        assert_trees_close(updates, up(low_updates, node.left, node.right), rtol=2e-4, atol=1e-5)
        assert_trees_close(state.inner_state, by_hand_state, rtol=2e-4, atol=1e-5)
        params = optax.apply_updates(params, updates)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))
    assert int(state.count) == 5
    assert int(state.skipped) == 0


def of_parameter(state, name):
    """The leaves of an inner state that stand under a parameter's name."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
        if name in [getattr(key, "key", None) for key in path]
    }


STATELESS = ("sgd",)


@pytest.mark.covering(6)
@inners
@pytest.mark.parametrize(("bad", "parameter"), [(np.nan, "kernel"), (0.0, "kernel"), (np.inf, "bias")])
def test_a_bad_gradient_leaves_that_parameters_moments_alone(name, bad, parameter):
    *_, update = wrapped(name)
    params = tree(0)
    before = after_two_updates(name, params)
    gradient = tree(3)
    gradient[parameter] = gradient[parameter] * 0 if bad == 0 else gradient[parameter].at[..., 1].set(bad)
    updates, after = update(gradient, before, params)

    for other in ("kernel", "stack", "bias"):
        old, new = of_parameter(before.inner_state, other), of_parameter(after.inner_state, other)
        assert bool(old) == (name not in STATELESS)
        if other == parameter:
            assert_trees_equal(new, old)
            assert not jnp.any(updates[other])
        else:
            assert all(jnp.any(updates[other] != 0, axis=-1).reshape(-1))
            assert not old or any(np.any(new[path] != old[path]) for path in old)
    assert bool(jnp.any(after.left["kernel"] != before.left["kernel"])) == (parameter != "kernel")
    assert jnp.any(after.right["stack"] != before.right["stack"])
    assert int(after.skipped) == (0 if bad == 0 else 1)
    assert int(after.count) == 3
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((updates, after)))


@pytest.mark.covering(6)
@inners
def test_one_bad_matrix_of_a_stack_is_held_alone(name):
    """Where the moments keep the batch axis the good matrix goes on; a statistic of the whole leaf is held."""
    *_, update = wrapped(name)
    params = tree(0)
    before = after_two_updates(name, params)
    gradient = tree(3)
    gradient["stack"] = gradient["stack"].at[0, 3, 3].set(np.nan)
    updates, after = update(gradient, before, params)
    assert not jnp.any(updates["stack"][0])
    assert jnp.all(jnp.any(updates["stack"][1] != 0, axis=-1))
    old, new = of_parameter(before.inner_state, "stack"), of_parameter(after.inner_state, "stack")
    for path in old:
        if np.shape(old[path])[:1] == (2,):
            assert_trees_equal(new[path][0], old[path][0])
            assert np.any(new[path][1] != old[path][1]) or np.shape(old[path]) != (2, 12, RANK)
        else:
            assert_trees_equal(new[path], old[path])
    assert int(after.skipped) == 1


def test_nothing_moves_when_every_gradient_is_bad():
    *_, update = wrapped("adam")
    params = tree(0)
    before = after_two_updates("adam", params)
    updates, after = update(jax.tree.map(lambda g: g * np.nan, params), before, params)
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert_trees_equal(after._replace(skipped=before.skipped, kept=before.kept), before)
    assert int(after.skipped) == 1
    assert int(after.kept) == 3  # the kernel's basis and the two of the stack
