# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The published relatives of GaLore as presets: their formulas in float64 NumPy, their bytes, and how they can be run."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import leniency, quick_compilation  # noqa: F401
from reference import Adam

import galore_jax
from galore_jax.accumulate import low_rank_mean, update_from_low_rank
from galore_jax.layerwise import BlockStack, layerwise
from galore_jax.presets import PRESETS

RANK, ALPHA = 4, 0.25
both_sides = pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def run(tx, gradients):
    """For each gradient: it, the update and the state after it, the gradient and update as float64."""
    params = {"w": jnp.zeros(gradients[0].shape)}
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update({"w": gradient}, state, params)
        seen.append((np.asarray(gradient, np.float64), np.asarray(updates["w"], np.float64), state))
    return seen


def as_wide(tall, seen):
    """A basis on the right of G is one on the left of its transpose."""
    return [(g.T, u.T, s[0].right["w"]) if tall else (g, u, s[0].left["w"]) for g, u, s in seen]


def gradients(tall, steps=5):
    return [normal(i, (20, 12) if tall else (12, 20)) * (1 + i) for i in range(steps)]


@both_sides
def test_grass_is_adam_on_the_largest_rows_which_starts_again_when_they_change(tall):
    tx = galore_jax.grass_adamw(1.0, rank=RANK, update_proj_gap=2, refresh="together")
    chosen = []
    for step, (g, update, basis) in enumerate(as_wide(tall, run(tx, gradients(tall)))):
        if step % 2 == 0:
            rows, adam = np.argsort(-np.sum(g * g, axis=1))[:RANK], Adam()
        chosen.append(np.asarray(basis.index))
        np.testing.assert_array_equal(chosen[-1], rows)
        expected = np.zeros_like(g)
        expected[rows] = -ALPHA * adam(g[rows])
        np.testing.assert_allclose(update, expected, atol=1e-5)
    assert np.array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[1], chosen[2])


@both_sides
def test_golore_carries_both_moments_into_a_random_subspace_that_no_gradient_decides(tall):
    tx = galore_jax.golore_adamw(1.0, random_from=4, rank=RANK, update_proj_gap=2, refresh="together")
    first = gradients(tall, 6)
    seen = as_wide(tall, run(tx, first))
    adam, bases = Adam(), []
    for g, update, basis in seen:
        p = np.asarray(basis, np.float64)
        if bases:
            q = p.T @ bases[-1]
            adam.m, shares = q @ adam.m, q * q
            missing = np.maximum(1 - np.sum(shares, axis=1, keepdims=True), 0)
            adam.v = shares @ adam.v + missing * np.mean(adam.v, axis=0, keepdims=True)
        bases.append(p)
        np.testing.assert_allclose(update, -ALPHA * p @ adam(p.T @ g), atol=2e-5)
    others = [jnp.roll(g, (1, 1), (0, 1)) if step in (2, 4) else g for step, g in enumerate(first)]
    other = [np.asarray(basis, np.float64) for _, _, basis in as_wide(tall, run(tx, others))]

    def same_span(a, b):
        return np.allclose(a @ a.T, b @ b.T, atol=1e-4)

    assert not same_span(bases[2], other[2])  # found in the gradient
    assert same_span(bases[4], other[4])  # drawn
    assert not same_span(bases[3], bases[4])


TREE = {"wide": (16, 24), "stack": (2, 30, 16), "norm": (16,), "embed": (20, 16)}
MATRICES = [(16, 24), (16, 30), (16, 30)]  # smaller and larger side of each
UNPROJECTED = 16 + 20 * 16
COUNTS = 4 * 4 + 4  # of galore, and Adam's


def dense(r, k, K):
    return 4 * r * (k + 2 * K)


# name: (bytes of a projected matrix of sides k <= K at rank r, bytes of the rest beyond two moments, arguments)
BYTES = {
    "galore_adamw": (dense, COUNTS, {}),
    "golore_adamw": (dense, COUNTS, {"random_from": 8}),
    "fira_adamw": (lambda r, k, K: dense(r, k, K) + 4, COUNTS, {}),
    "apollo_adamw": (lambda r, k, K: 8 * r * K + 8, COUNTS, {}),
    "apollo_mini": (lambda r, k, K: 8 * K + 8, COUNTS, {"rank": 1}),
    "grass_adamw": (lambda r, k, K: 8 * r * K + 8 * r + 4, COUNTS, {}),
    "ldadam": (lambda r, k, K: dense(r, k, K) + 4 * k * K, 2 * 4, {}),
}


@pytest.mark.parametrize("name", BYTES)
def test_the_bytes_are_those_of_the_formula(name):
    of_a_matrix, rest, arguments = BYTES[name]
    arguments = {"rank": RANK} | arguments
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in TREE.items()}
    expected = sum(of_a_matrix(arguments["rank"], k, K) for k, K in MATRICES) + 8 * UNPROJECTED + rest
    assert galore_jax.state_bytes(PRESETS[name](0.1, **arguments), params) == expected


# One line a preset: what it is called with in the tests below.
FAMILY = {
    "fira_adamw": {},
    "apollo_adamw": {},
    "apollo_mini": {"rank": 1},
    "grass_adamw": {},
    "golore_adamw": {"random_from": 3},
    "ldadam": {},
}
family = pytest.mark.parametrize("name", FAMILY)


def preset(name, learning_rate=0.02, **arguments):
    chosen = {"rank": RANK, "update_proj_gap": 2} | FAMILY[name] | arguments
    taken = inspect.signature(PRESETS[name]).parameters.keys()
    return PRESETS[name](learning_rate, **{argument: chosen[argument] for argument in chosen.keys() & taken})


STACK = BlockStack(
    split=lambda p: ({"w": p["w"]}, {"head": p["head"]}),
    join=lambda layers, rest: layers | rest,
    embed=lambda rest, batch: batch["x"],
    block=lambda layer, x: x + jnp.tanh(x @ layer["w"]),
    loss=lambda rest, x, batch: jnp.mean((x @ rest["head"] - batch["y"]) ** 2),
)
PARAMS = {"w": normal(0, (3, 12, 12)) / 8, "head": normal(1, (12, 4)) / 4}
BATCH = {"x": normal(2, (16, 12)), "y": normal(3, (16, 4))}


def whole_loss(params, batch=BATCH):
    x = batch["x"]
    for i in range(3):
        x = STACK.block({"w": params["w"][i]}, x)
    return STACK.loss(params, x, batch)


def train(tx, steps=5):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(whole_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@functools.cache
def trained(name):
    return train(preset(name))[0]


@family
def test_it_learns_and_layer_by_layer_it_is_the_same(name):
    init, step = layerwise(STACK, preset(name), accumulate=2)
    params, state, step = PARAMS, init(PARAMS), jax.jit(step)
    for _ in range(5):
        params, state, _ = step(params, state, BATCH)
    assert float(whole_loss(trained(name))) < 0.9 * float(whole_loss(PARAMS))
    for leaf in PARAMS:
        np.testing.assert_allclose(params[leaf], trained(name)[leaf], atol=2e-4)


@family
def test_its_moments_can_be_kept_in_8_bits(name):
    """Of 64 x 4,200: also at rank 1 a moment is large enough."""
    tx = galore_jax.quantize_state(preset(name))
    params = {"w": normal(0, (64, 4200))}
    state = jax.eval_shape(tx.init, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8]
    error = [64 * 4200] if name == "ldadam" else []
    assert sorted(leaf.size for leaf in moments) == [FAMILY[name].get("rank", RANK) * 4200] * 2 + error
    with leniency():
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        exact, _ = jax.jit(preset(name).update)(params, preset(name).init(params), params)
    # The first update is read from moments that are not stored yet.
    np.testing.assert_allclose(updates["w"], exact["w"], atol=1e-6)


WHOLE_GRADIENT = {"fira_adamw", "apollo_adamw", "apollo_mini", "ldadam"}


@family
def test_micro_batches_are_summed_in_the_subspaces_or_it_is_said_why_not(name):
    """Of multiples of one gradient, in which all of them find the same bases."""
    tx, params = preset(name), {"w": PARAMS["w"]}
    state, gradient = tx.init(params), normal(5, (3, 12, 12))
    if name in WHOLE_GRADIENT:
        with pytest.raises(ValueError, match="needs the whole gradient, which low-rank accumulation does not keep"):
            update_from_low_rank(tx, {"w": jnp.zeros((3, RANK, 12))}, state, params)
        return

    @jax.jit
    def accumulated(state):
        parts = jnp.array([1.5, 0.25, 1.25])
        _, mean, state = low_rank_mean(tx, lambda part: (0, {"w": part * gradient}), parts, state, params)
        return update_from_low_rank(tx, mean, state, params)[0]

    expected, _ = jax.jit(tx.update)({"w": gradient}, state, params)
    np.testing.assert_allclose(accumulated(state)["w"], expected["w"], atol=1e-5)
