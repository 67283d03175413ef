# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""AdamW in 4 bits is Optax's AdamW where factoring loses nothing and nothing is rounded, and near a reference elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_full_muon import layer_by_layer_and_at_once, normal

import galore_jax
from galore_jax import MatrixCodec
from galore_jax.matrix_codec import CodedMatrix

SHAPES = {"w": (3, 64, 80), "query/kernel": (16, 4, 32), "norm": (64,)}


def test_where_squares_have_rank_one_it_is_adamw():
    """Below 4,096 numbers nothing is coded, and the product of the means is then the mean square itself."""
    params = {"w": normal(0, {"w": (2, 6, 10)})["w"], "norm": jnp.ones((5,))}
    settings = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    tx, adamw = galore_jax.adamw_4bit(0.1, **settings), optax.adamw(0.1, **settings)
    state, expected_state, update, expected = (
        tx.init(params),
        adamw.init(params),
        jax.jit(tx.update),
        jax.jit(adamw.update),
    )
    rows, columns = jnp.geomspace(0.1, 3, 12).reshape(2, 6, 1), jnp.geomspace(0.2, 5, 20).reshape(2, 1, 10)
    for step in range(4):
        signs = jnp.sign(normal(step, {"w": (2, 6, 10)})["w"])
        gradient = {"w": signs * rows * columns, "norm": normal(step, {"n": (5,)})["n"]}
        found, state = update(gradient, state, params)
        wanted, expected_state = expected(gradient, expected_state, params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), found, wanted)


def test_the_moments_are_those_of_a_reference_and_the_first_one_is_near_in_4_bits():
    tx, shape = galore_jax.adamw_4bit(1.0, b2=0.99), (3, 64, 80)
    params, update = normal(0, SHAPES), jax.jit(tx.update)
    state, mu, rows, columns = tx.init(params), np.zeros(shape), np.zeros(shape[:2]), np.zeros((3, 80))
    for step in range(1, 5):
        gradient = normal(step, SHAPES)
        updates, state = update(gradient, state, params)
        g = np.asarray(gradient["w"], np.float64)
        mu = 0.9 * mu + 0.1 * g
        rows, columns = (0.99 * old + 0.01 * np.square(g).mean(axis) for old, axis in ((rows, 2), (columns, 1)))
        variance = rows[:, :, None] * columns[:, None, :] / rows.mean(1)[:, None, None] / (1 - 0.99**step)
        direction = mu / (1 - 0.9**step) / (np.sqrt(variance) + 1e-8)
        if step == 1:
            np.testing.assert_allclose(updates["w"], -direction, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "v_row")["w"], rows, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "v_col")["w"], columns, rtol=1e-5)
    coded = optax.tree.get(state, "momentum")["w"]
    assert isinstance(coded, CodedMatrix)
    assert np.linalg.norm(coded.decode() - mu) < 0.2 * np.linalg.norm(mu)
    assert np.linalg.norm(updates["w"] + direction) < 0.2 * np.linalg.norm(direction)


def test_the_bytes_of_a_number_of_a_square_matrix():
    side = 4096
    params = {"w": jax.ShapeDtypeStruct((side, side), jnp.float32)}
    leading = 2 * (side * side // 16 + 2 * side // 16 + 2 * side)
    expected = side * side // 2 + 4 * side + 4 + leading + 8 * side
    # Beside two counts and the Adam of nothing.
    assert galore_jax.state_bytes(galore_jax.adamw_4bit(0.1), params) == expected + 12
    assert expected / side**2 == pytest.approx(0.63, abs=0.005)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 2e38], ids=str)
def test_a_gradient_whose_square_is_not_finite_leaves_a_matrix_as_it_is(bad):
    tx, params = galore_jax.adamw_4bit(0.1), normal(0, SHAPES)
    update = jax.jit(tx.update)
    _, state = update(normal(1, SHAPES), tx.init(params), params)
    gradient = normal(2, SHAPES)
    expected, good = update(gradient, state, params)
    updates, new = update(gradient | {"w": gradient["w"].at[1, 2, 3].set(bad)}, state, params)
    for name in ("momentum", "v_row", "v_col"):
        trees = (optax.tree.get(s, name)["w"] for s in (state, new, good))
        jax.tree.map(
            lambda old, new, good: np.testing.assert_array_equal(new, np.stack([good[0], old[1], good[2]])), *trees
        )
    assert not np.any(updates["w"][1])
    np.testing.assert_array_equal(updates["w"][::2], expected["w"][::2])


def test_zeros_do_not_move_and_are_no_error():
    tx, params = galore_jax.adamw_4bit(0.1), normal(0, SHAPES)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert np.all(np.isfinite(optax.tree.get(state, "v_row")["w"]))


def test_a_codec_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^codec is 'int4': write a galore_jax.MatrixCodec.$"):
        galore_jax.adamw_4bit(0.1, codec="int4")


@pytest.mark.slow
def test_layer_by_layer_it_is_the_same():
    tx = galore_jax.adamw_4bit(0.01, codec=MatrixCodec(leading=0))
    (found, _), (plain, _) = layer_by_layer_and_at_once(tx)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), found, plain)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(None, "a", "b"), P("a", None, None)], ids=str)
def test_it_is_the_same_sharded_and_types_are_stable(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    host, gradient = ({"w": normal(i, {"w": (2, 48, 96)})["w"]} for i in range(2))
    tx = galore_jax.adamw_4bit(0.1)
    expected, _ = jax.jit(tx.update)(gradient, tx.init(host), host)
    with jax.set_mesh(mesh):
        params, placed = (jax.device_put(tree, {"w": NamedSharding(mesh, spec)}) for tree in (host, gradient))
        state = tx.init(params)
        updates, new = jax.jit(tx.update)(placed, state, params)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    np.testing.assert_allclose(updates["w"], expected["w"], atol=1e-5)
