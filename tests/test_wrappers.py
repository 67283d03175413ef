# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore inside the wrappers and training states people put around Optax transformations."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from problems import (
    LOW_RANK_SHAPES,
    RANK,
    assert_projected,
    assert_trees_close,
    assert_trees_equal,
    galore_states,
    leniency,
    strictly,
    tree,
)

import galore_jax


def adamw(learning_rate=0.01, **kwargs):
    return galore_jax.galore_adamw(learning_rate, rank=RANK, update_proj_gap=2, projector="svd", **kwargs)


def run(tx, params, steps=3, seed=1):
    """``steps`` jitted updates on random gradients: (updates of the last one, its state)."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update({k: v for k, v in tree(seed + step).items() if k in params}, state, params)
    return updates, state


@pytest.mark.slow
def test_multi_steps_inside_a_partition_updates_every_second_step():
    """One group accumulates gradients, the other moves at every step."""
    params = tree(0)
    groups = {"kernel": "galore", "stack": "galore", "bias": "adam"}
    accumulating = optax.MultiSteps(strictly(adamw()), every_k_schedule=2).gradient_transformation()
    tx = optax.partition({"galore": accumulating, "adam": optax.adam(0.01)}, groups)
    state = tx.init(params)
    moved = []
    for seed in (1, 2):
        with leniency():
            updates, state = tx.update(tree(seed), state, params)
        moved.append({name: bool(jnp.any(leaf != 0)) for name, leaf in updates.items()})
    assert moved == [
        {"kernel": False, "stack": False, "bias": True},
        {"kernel": True, "stack": True, "bias": True},
    ]
    assert int(assert_projected(state).count) == 1


def test_partition_runs_galore_on_its_group_and_adam_on_the_rest():
    params = tree(0)
    tx = optax.partition(
        {"galore": adamw(0.02), "adam": optax.adam(0.01)}, {"kernel": "galore", "stack": "adam", "bias": "adam"}
    )
    updates, state = run(tx, params)
    (node,) = galore_states(state)
    assert jax.tree.map(jnp.shape, jax.tree.leaves((node.left, node.right))) == [(6, RANK)]

    alone, _ = run(adamw(0.02), {"kernel": params["kernel"]})
    plain, _ = run(optax.adam(0.01), {"stack": params["stack"], "bias": params["bias"]})
    assert_trees_close(updates, alone | plain)


def test_masked_leaves_the_other_gradients_alone():
    params = tree(0)
    updates, state = run(optax.masked(adamw(), {"kernel": True, "stack": False, "bias": False}), params)
    alone, _ = run(adamw(), {"kernel": params["kernel"]})
    assert_trees_close(updates, tree(3) | alone)
    assert len(jax.tree.leaves((galore_states(state)[0].left, galore_states(state)[0].right))) == 1


def test_masked_inside_galore_masks_the_low_rank_tree():
    """An inner transformation that keeps no moments for some parameters."""
    params = tree(0)
    inner = optax.masked(optax.trace(0.9), {"kernel": True, "stack": False, "bias": False})
    _, state = run(galore_jax.galore(inner, rank=RANK, projector="svd"), params)
    assert_projected(state)
    assert [leaf.shape for leaf in jax.tree.leaves(state.inner_state)] == [LOW_RANK_SHAPES["kernel"]]


def test_apply_if_finite_skips_and_recovers():
    params = tree(0)
    tx = optax.apply_if_finite(adamw(), max_consecutive_errors=3)
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(tree(1), state, params)
    bad = tree(2) | {"bias": jnp.full((10,), jnp.nan)}
    updates, skipped = update(bad, state, params)
    assert int(skipped.total_notfinite) == 1
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert_trees_equal(skipped.inner_state, state.inner_state)
    updates, after = update(tree(3), skipped, params)
    expected, expected_state = update(tree(3), state, params)
    assert_trees_equal(updates, expected)
    assert_trees_equal(after.inner_state, expected_state.inner_state)


def test_an_injected_learning_rate_can_be_set_by_hand():
    params = tree(0)
    tx = optax.inject_hyperparams(galore_jax.galore_adamw, static_args=("rank", "update_proj_gap"))(
        learning_rate=0.01, rank=RANK, update_proj_gap=2, projector="svd"
    )
    state, update = tx.init(params), jax.jit(tx.update)
    small, _ = update(tree(1), state, params)
    state.hyperparams["learning_rate"] = jnp.float32(0.03)
    large, _ = update(tree(1), state, params)
    assert_trees_close(large, jax.tree.map(lambda u: 3 * u, small), rtol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("preset", [galore_jax.galore_adamw, galore_jax.galore_muon, galore_jax.ldadam])
def test_an_injected_rank_is_read_off_the_state(preset):
    params = tree(0)
    tx, plain = optax.inject_hyperparams(preset)(learning_rate=0.01, rank=RANK), preset(0.01, rank=RANK)
    with leniency():
        state, plain_state = tx.init(params), plain.init(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(params, state, params)
            expected, plain_state = jax.jit(plain.update)(params, plain_state, params)
    assert_trees_close(updates, expected)


def test_an_injected_rank_that_no_basis_tells_says_what_to_write():
    tx = optax.inject_hyperparams(galore_jax.apollo_adamw)(learning_rate=0.01, rank=RANK)
    with leniency(), pytest.raises(TypeError, match=r'stored as seeds .* static_args=\("rank",\)'):
        jax.jit(tx.update)(tree(0), tx.init(tree(0)), tree(0))


def test_scan_equals_a_loop():
    params, tx = tree(0), adamw()
    gradients = [tree(seed) for seed in range(1, 6)]

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    state, updates = jax.lax.scan(step, tx.init(params), stacked)
    last, expected = run(tx, params, steps=5)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[-1], updates), last)
    assert_trees_close(state, expected, rtol=1e-4, atol=1e-5)
    assert int(assert_projected(state).count) == 5


def test_clipping_by_the_global_norm_comes_first():
    params = tree(0)
    plain = adamw(eps=1.0)  # lets Adam see the size of a gradient
    updates, state = run(optax.chain(optax.clip_by_global_norm(1.0), plain), params, steps=1)
    assert_projected(state)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in tree(1).values()))
    assert norm > 2
    expected, _ = jax.jit(plain.update)(jax.tree.map(lambda g: g / norm, tree(1)), plain.init(params), params)
    assert_trees_close(updates, expected, rtol=1e-4, atol=1e-7)


def test_map_params_without_a_change_is_no_change():
    params, tx = tree(0), adamw()
    _, state = run(tx, params)
    assert_trees_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)


def test_map_params_tells_moments_and_bases_from_counts():
    params, tx = tree(0), adamw()
    _, state = run(tx, params)
    marked = optax.tree.map_params(tx, lambda _: "parameter", state, transform_non_params=lambda _: "other")
    node = assert_projected(state)
    marked_node = marked[0]
    assert marked_node.left["kernel"] == marked_node.right["stack"] == "parameter"
    assert marked_node.inner_state.mu == marked_node.inner_state.nu == dict.fromkeys(params, "parameter")
    assert marked_node.count == marked_node.skipped == marked_node.inner_state.count == "other"
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    assert node.inner_state.mu["kernel"].shape == LOW_RANK_SHAPES["kernel"]


class Perceptron(nnx.Module):
    """Two layers, wide enough to be projected."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.out = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def regression():
    """Inputs [64, 8] and the outputs [64, 8] of a fixed linear map."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(x @ rng.normal(size=(8, 8)).astype(np.float32) / 4)


def test_flax_nnx_optimizer_trains():
    x, y = regression()
    model = Perceptron(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamw(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x) - y)))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    shapes = {leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState))}
    assert {(8, RANK), (RANK, 32), (32, RANK)} <= shapes
    assert (8, 32) not in shapes


def test_flax_train_state_trains():
    x, y = regression()
    params = nnx.to_pure_dict(nnx.state(Perceptron(nnx.Rngs(0))))

    def forward(params, x):
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        return hidden @ params["out"]["kernel"] + params["out"]["bias"][None]

    state = train_state.TrainState.create(apply_fn=forward, params=params, tx=adamw(0.05))

    @jax.jit
    def step(state):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean(jnp.square(state.apply_fn(p, x) - y)))(state.params)
        return state.apply_gradients(grads=gradient), loss

    losses = []
    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    assert galore_states(state.opt_state)[0].left["hidden"]["kernel"].shape == (8, RANK)


def test_a_bare_galore_in_a_plain_chain_warns_once():
    tx = optax.chain(galore_jax.galore(rank=RANK), optax.adam(0.01))
    with pytest.warns(galore_jax.GaLoreMemoryWarning, match="galore_jax.chain"):
        tx.init(tree(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = tx.init(tree(0))
    assert_projected(state)
