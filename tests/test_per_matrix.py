# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""An inner state for each matrix: what a reset starts again, and what it leaves alone."""

import jax
import jax.numpy as jnp
import optax
import pytest
from inner_states import CARRIED, RATE, STRUCTURE, low_rank, optimizer, turn, views_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import (
    RANK,
    assert_trees_close,
    assert_trees_equal,
    leniency,
    tree,
)

from galore_jax._core.per_matrix import PerMatrixState, owners, per_matrix
from galore_jax.transport import carriers

CENTRED = {
    "centred": lambda: optax.rmsprop(RATE, centered=True, momentum=0.9),
    "centred, with count": lambda: optax.scale_by_stddev(bias_correction=True),
}
BY_NAME = ("masked", "partition")  # need all the names of the tree
RESET = [
    name for name in [*CARRIED, *CENTRED] if name not in (*BY_NAME, "inject", "sgd", "adamw", "nadam", "yogi", "lamb")
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", RESET)
def test_a_reset_matrix_goes_on_like_a_fresh_optimizer(name):
    """One matrix of the stack; the others, and the parameter that is not projected, like optimizers that never stopped."""
    inner = optax.with_extra_args_support((CARRIED | CENTRED)[name]())
    views = views_of()
    tx = per_matrix(inner, lambda _: views)
    params, start = low_rank(views, 0), 5  # in the middle of what accumulates over 2 and over 3 updates

    def parts(x):
        return {"bias": x["bias"], "kernel": x["kernel"], "first": x["stack"][0], "second": x["stack"][1]}

    @jax.jit
    def update(gradient, state):
        with leniency():
            return tx.update(gradient, state, params)

    @jax.jit
    def update_each(gradient, states):
        """A separate optimizer for each."""
        pairs = {}
        with leniency():
            for part, matrix in parts(gradient).items():
                pairs[part] = inner.update({"x": matrix}, states[part], {"x": parts(params)[part]})
        return {part: pair[0]["x"] for part, pair in pairs.items()}, {part: pair[1] for part, pair in pairs.items()}

    state = tx.init(params)
    states = {part: inner.init({"x": x}) for part, x in parts(params).items()}
    for step in range(start + 3):
        if step == start:
            found = carriers("reset", tx, state, STRUCTURE, views)
            fresh = turn(found, state, views, [(None, None)] * 3)
            stack = jax.tree.map(lambda old, new: old.at[1].set(new[1]), state.matrices[2], fresh.matrices[2])
            state = state._replace(matrices=(*state.matrices[:2], stack))
            states["second"] = inner.init({"x": parts(params)["second"]})
        updates, state = update(low_rank(views, step + 1), state)
        expected, states = update_each(low_rank(views, step + 1), states)
        assert_trees_close(parts(updates), expected, rtol=1e-4, atol=1e-6)
    assert any(jnp.any(x != 0) for x in expected.values())


def test_a_reset_leaves_schedules_and_hyperparameters_where_they_are():
    views = views_of()
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    inner = optax.chain(
        optax.scale_by_adam(), optax.scale_by_schedule(schedule), optax.inject_hyperparams(optax.scale)(step_size=2.0)
    )
    tx = per_matrix(inner, lambda _: views)
    state = tx.init(low_rank(views, 0))
    for step in range(3):
        _, state = tx.update(low_rank(views, step), state)
    state = turn(carriers("reset", tx, state, STRUCTURE, views), state, views, [(None, None)] * 3)
    adam, scheduled, injected = state.matrices[2]
    assert_trees_equal(adam, jax.tree.map(jnp.zeros_like, adam))
    assert scheduled.count.tolist() == [3, 3]
    assert injected.count.tolist() == [3, 3]
    gradient = low_rank(views, 9)
    updates, _ = tx.update(gradient, state)
    assert_trees_close(updates["stack"], 2 * 0.7 * jnp.sign(gradient["stack"]), rtol=1e-4)


@pytest.mark.covering(3)
@pytest.mark.parametrize("name", ["adam", "adamw", "inject", *BY_NAME])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_per_matrix_changes_nothing_for_what_treats_coordinates_alike(name, proj_type):
    """Two batch axes, params passed or not, trees of masks and labels."""
    full = tree(0) | {"stack": jnp.zeros((2, 3, 12, 8))}
    views = views_of(proj_type, full)
    inner, update = optimizer(name)
    tx = per_matrix(inner, lambda _: views)
    state, each = inner.init(low_rank(views, 0)), tx.init(low_rank(views, 0))
    assert isinstance(each, PerMatrixState)
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(each.matrices[2])} == {(2, 3)}
    assert jax.tree.leaves(each.matrices[0]) == []
    params = low_rank(views, 0) if name in ("adamw", "partition") else None
    for seed in range(1, 4):
        gradient = low_rank(views, seed)
        expected, state = update(gradient, state, params)
        with leniency():
            updates, each = jax.jit(tx.update)(gradient, each, params)
        assert_trees_close(updates, expected)


def test_per_matrix_passes_extra_arguments_and_one_matrix_at_a_time():
    views = views_of()
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append(jax.tree.map(jnp.shape, (updates, params)))
        return jax.tree.map(lambda u: u * value, updates), state

    tx = per_matrix(optax.GradientTransformationExtraArgs(lambda _: (), update), lambda _: views)
    x = low_rank(views, 0)
    updates, _ = tx.update(x, tx.init(x), x, value=jnp.float32(3))
    assert_trees_close(updates, jax.tree.map(lambda u: u * 3, x))
    hole = optax.MaskedNode()
    shapes = [
        {"bias": (10,), "kernel": hole, "stack": hole},
        {"bias": hole, "kernel": (RANK, 10), "stack": hole},
        {"bias": hole, "kernel": hole, "stack": (12, RANK)},
    ]
    assert seen == [(shape, shape) for shape in shapes]


def test_owners_are_those_of_the_parameters():
    views = views_of()
    x = low_rank(views, 0)
    tx = optax.adam(RATE)
    assert owners(tx, tx.init(x), STRUCTURE) == [-1, 0, 1, 2, 0, 1, 2]
    each = per_matrix(tx, lambda _: views)
    assert owners(each, each.init(x), STRUCTURE) == [1, 1, 1, 2, 2, 2, -1, 0, 0]


def test_the_state_of_per_matrix_keeps_its_structure_and_types():
    """In ``lax.cond``, under ``eval_shape``, through ``map_params`` and for an empty tree."""
    views = views_of()
    tx = per_matrix(
        optax.adafactor(RATE, min_dim_size_to_factor=2, momentum=0.9), lambda x: views if jax.tree.leaves(x) else []
    )
    x = low_rank(views, 0)
    state = tx.init(x)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(tx.init, x)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    types = jax.tree.map(jax.typeof, state)
    for take in (True, False):
        _, state = jax.jit(lambda take, s: jax.lax.cond(take, lambda: tx.update(x, s, x), lambda: (x, s)))(take, state)
        assert jax.tree.map(jax.typeof, state) == types
    assert_trees_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    nothing = tx.init({})
    updates, after = tx.update({}, nothing, {})
    assert updates == {}
    assert jax.tree.structure(after) == jax.tree.structure(nothing)
    assert carriers("reset", tx, nothing, jax.tree.structure({}), []) == [None] * len(jax.tree.leaves(nothing))


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["adam", "adafactor", "momentum"])
def test_the_state_of_per_matrix_keeps_its_sharding_types(name):
    inner, _ = optimizer(name)
    views = views_of(params=tree(0) | {"stack": jnp.zeros((4, 12, 8))})
    tx = per_matrix(inner, lambda _: views)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"bias": P("tp"), "kernel": P(None, "tp"), "stack": P("fsdp", "tp", None)}
    x = low_rank(views, 0)
    expected, _ = jax.jit(tx.update)(x, tx.init(x), x)
    with jax.set_mesh(mesh):
        x = {key: jax.device_put(leaf, NamedSharding(mesh, specs[key])) for key, leaf in x.items()}
        state = tx.init(x)
        assert {jax.typeof(leaf).sharding.spec[0] for leaf in jax.tree.leaves(state.matrices[2])} == {"fsdp"}
        updates, after = jax.jit(tx.update)(x, state, x)
    assert jax.tree.map(jax.typeof, (updates, after)) == jax.tree.map(jax.typeof, (x, state))
    assert_trees_close(updates, expected)
