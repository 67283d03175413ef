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
from problems import galore_states, leniency, normal
from reference import Adam

import galore_jax
from galore_jax.accumulate import low_rank_mean, update_from_low_rank
from galore_jax.layerwise import BlockStack, layerwise
from galore_jax.presets import FULL_RANK, PRESETS, WHOLE_GRADIENT

RANK, ALPHA = 4, 0.25
both_sides = pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])


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
    nodes = [galore_states(state)[0] for _, _, state in seen]
    triples = [(g, u, node) for (g, u, _), node in zip(seen, nodes, strict=True)]
    return [(g.T, u.T, node.right["w"]) if tall else (g, u, node.left["w"]) for g, u, node in triples]


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


@pytest.mark.covering(1)
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


def newton_schulz(x):
    """Five steps of the quintic of K. Jordan's Muon, on the side that is smaller."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@both_sides
def test_galore_muon_orthogonalises_a_momentum_inside_and_the_gradient_outside_together(tall):
    tx = galore_jax.galore_muon(-1.0, rank=RANK, update_proj_gap=2, refresh="together", momentum=0.8, factor=3.0)
    momentum, bases = np.zeros((RANK, 20)), []
    for g, update, basis in as_wide(tall, run(tx, gradients(tall))):
        p = np.asarray(basis, np.float64)
        momentum = p.T @ bases[-1] @ momentum if bases else momentum
        bases.append(p)
        r = p.T @ g
        momentum = 0.8 * momentum + r
        whole = p @ (r + 0.8 * momentum) + 3.0 * (g - p @ r)
        np.testing.assert_allclose(update, 0.2 * 20**0.5 * newton_schulz(whole), atol=2e-4)
    assert np.array_equal(bases[0], bases[1])
    assert not np.allclose(bases[1], bases[2])


def test_galore_muon_leaves_what_is_not_projected_to_adamw_at_its_own_scale():
    """Also a matrix whose rank would not be smaller than its side."""
    params = {
        "kernel": normal(0, (12, 20)),
        "small": normal(1, (4, 9)),
        "embed": normal(2, (9, 12)),
        "bias": normal(3, (20,)),
    }
    tx = galore_jax.galore_muon(0.1, rank=RANK, adam_scale=0.5, weight_decay=0.2)
    adamw = optax.adamw(0.05, weight_decay=0.4)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = jax.jit(adamw.update)(params, adamw.init(params), params)
    for name in ("small", "embed", "bias"):
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)
    decay = -0.1 * 0.2 * np.asarray(params["kernel"])
    values = np.linalg.svd((np.asarray(updates["kernel"]) - decay) / (0.1 * 0.2 * 20**0.5), compute_uv=False)
    assert 0.5 < values.min() < values.max() < 1.3


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
    "q_apollo_mini": (lambda r, k, K: 8 * K + 8, COUNTS + 4, {"rank": 1}),  # too small a tree for 8 bits
    "grass_adamw": (lambda r, k, K: 8 * r * K + 8 * r + 4, COUNTS, {}),
    "galore_muon": (lambda r, k, K: 4 * r * (k + K), COUNTS, {}),
    "ldadam": (lambda r, k, K: dense(r, k, K) + 4 * k * K, 2 * 4, {}),
    "muon": (lambda r, k, K: 4 * k * K, 2 * 4, {"neuron_decay": None}),
}


@pytest.mark.parametrize("name", BYTES)
def test_the_bytes_are_those_of_the_formula(name):
    of_a_matrix, rest, arguments = BYTES[name]
    arguments = ({} if name in FULL_RANK else {"rank": RANK}) | arguments
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in TREE.items()}
    expected = sum(of_a_matrix(arguments.get("rank"), k, K) for k, K in MATRICES) + 8 * UNPROJECTED + rest
    assert galore_jax.state_bytes(PRESETS[name](0.1, **arguments), params) == expected


def test_the_bytes_of_q_apollo_mini_where_moments_are_in_8_bits():
    """A byte each and 4 for each block of 256, of an embedding and of a matrix whose larger side, on its right, is 8,192."""
    params = {
        "embed": jax.ShapeDtypeStruct((100, 64), jnp.float32),
        "w": jax.ShapeDtypeStruct((3, 64, 8192), jnp.float32),
    }
    embed, moment = 100 * (64 + 4), 3 * (8192 + 4 * 8192 // 256)
    found = galore_jax.state_bytes(galore_jax.q_apollo_mini(0.1), params)
    assert found == 2 * (embed + moment) + 3 * 8 + COUNTS + 4


# One line a preset: what it is called with in the tests below.
FAMILY = {
    "fira_adamw": {},
    "apollo_adamw": {},
    "apollo_mini": {"rank": 1},
    "q_apollo_mini": {"rank": 1},
    "grass_adamw": {},
    "golore_adamw": {"random_from": 3},
    "ldadam": {},
    "galore_muon": {"factor": 4.0},
    "muon": {"neuron_decay": 0.9},
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


@pytest.mark.slow
@family
def test_it_learns_and_layer_by_layer_it_is_the_same(name):
    init, step = layerwise(STACK, preset(name), accumulate=2)
    params, state, step = PARAMS, init(PARAMS), jax.jit(step)
    for _ in range(5):
        params, state, _ = step(params, state, BATCH)
    assert float(whole_loss(trained(name))) < 0.9 * float(whole_loss(PARAMS))
    for leaf in PARAMS:
        np.testing.assert_allclose(params[leaf], trained(name)[leaf], atol=2e-4)


@pytest.mark.covering(1)
@family
def test_its_moments_can_be_kept_in_8_bits(name):
    """Of 64 x 4,200: also at rank 1 a moment is large enough."""
    tx = preset(name) if name == "q_apollo_mini" else galore_jax.quantize_state(preset(name))
    params = {"w": normal(0, (64, 4200))}
    state = jax.eval_shape(tx.init, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8]
    if name == "muon":
        assert sorted(leaf.size for leaf in moments) == [64 * 4200]
        return
    number = 1 if name == "galore_muon" else 2
    error = [64 * 4200] if name == "ldadam" else []
    assert sorted(leaf.size for leaf in moments) == [FAMILY[name].get("rank", RANK) * 4200] * number + error
    if name not in ("q_apollo_mini", "grass_adamw", "ldadam", "galore_muon"):  # one of each kind of state is run
        return
    with leniency():
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        plain = preset(name.removeprefix("q_"))
        exact, _ = jax.jit(plain.update)(params, plain.init(params), params)
    # The first update is read from moments that are not stored yet.
    np.testing.assert_allclose(updates["w"], exact["w"], atol=1e-6)


@pytest.mark.covering(3)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apollo_mini", "grass_adamw", "ldadam", "galore_muon", "muon"])
def test_sharded_it_is_the_same_and_types_are_stable(name):
    """On a mesh with explicit axes, where the sharding is part of each type; both kinds of side."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    host = {"wide": normal(0, (2, 16, 24)), "tall": normal(1, (24, 16)), "b": normal(2, (24,))}
    specs = {"wide": (None, "a", "b"), "tall": ("a", "b"), "b": ("b",)}
    tx = preset(name)
    expected, _ = jax.jit(tx.update)(host, tx.init(host), host)
    with jax.set_mesh(mesh):
        params = {path: jax.device_put(leaf, jax.P(*specs[path])) for path, leaf in host.items()}
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    for path in host:
        np.testing.assert_allclose(updates[path], expected[path], atol=1e-5)
