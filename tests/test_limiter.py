# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The bound on the growth of an update's norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec as P
from problems import normal

import galore_jax
from galore_jax import galore, residual

SIZES = (1.0, 3.0, 0.5, 0.504, 8.0)


def updates(step):
    """A matrix, a stack of two that grow at different times, and a vector."""
    size = SIZES[step]

    def normal(seed, *shape):
        return jnp.asarray(np.random.default_rng(10 * step + seed).normal(size=shape))

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


@pytest.mark.covering(1)
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


@pytest.mark.covering(1)
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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match=r"gamma is 0; expected a positive factor\. Write, for example, 1\.01"):
        galore_jax.limit_norm_growth(0)


def test_the_factor_can_be_injected():
    tx = optax.inject_hyperparams(galore_jax.limit_norm_growth)(gamma=2.0)
    params = {"w": jnp.ones((4, 6))}
    _, state = tx.update(params, tx.init(params))
    state.hyperparams["gamma"] = jnp.asarray(3.0)
    found, _ = tx.update({"w": 9 * params["w"]}, state)
    np.testing.assert_allclose(found["w"], 3.0, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_complex_updates_are_bounded_by_their_moduli(dtype, size):
    """A turn of each number in the plane, which changes no modulus, turns what comes out."""
    with jax.enable_x64(dtype == "complex128"):
        tx = galore_jax.limit_norm_growth()
        turn = {
            name: np.exp(2j * np.pi * np.random.default_rng(0).uniform(size=x.shape)) for name, x in updates(0).items()
        }
        real_state = tx.init(updates(0))
        state = tx.init(jax.tree.map(lambda x: x.astype(dtype), updates(0)))
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
        for step in range(len(SIZES)):
            real = jax.tree.map(lambda x: size * x, updates(step))
            turned = jax.tree.map(lambda x, t: jnp.asarray(np.asarray(x) * t, dtype), real, turn)
            expected, real_state = tx.update(real, real_state)
            found, state = tx.update(turned, state)
            for name, leaf in found.items():
                assert leaf.dtype == dtype
                np.testing.assert_allclose(leaf, np.asarray(expected[name]) * turn[name], rtol=1e-4, atol=1e-5 * size)
                np.testing.assert_allclose(state.norm[name], real_state.norm[name], rtol=1e-5)


def test_a_number_among_the_parameters_is_a_scalar():
    tx = galore_jax.limit_norm_growth(1.5)
    found = {}
    for name, wrap in {"number": float, "array": jnp.asarray}.items():
        state = tx.init({"t": wrap(2.0)})
        found[name] = []
        for size in (1.0, 9.0, 2.0):
            reply, state = tx.update({"t": wrap(size)}, state, {"t": wrap(2.0)})
            found[name].append(float(reply["t"]))
    assert found["number"] == found["array"] == [1.0, 1.5, 2.0]


WRONG = {
    "missing": ({"a": {"w": (3, 4)}, "b": {}}, "b/w"),
    "one too many": ({"a": {"w": (3, 4), "x": (3,)}, "b": {"w": (2, 3, 4)}}, "a/x"),
    "other batch": ({"a": {"w": (3, 4)}, "b": {"w": (3, 4)}}, "b/w"),
}


@pytest.mark.parametrize("with_params", [True, False])
@pytest.mark.parametrize("case", WRONG)
def test_updates_of_another_structure_are_named(case, with_params):
    def tree(shapes):
        return jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))

    params = tree({"a": {"w": (3, 4)}, "b": {"w": (2, 3, 4)}})
    tx = galore_jax.limit_norm_growth()
    shapes, path = WRONG[case]
    with pytest.raises(ValueError, match=f"'{path}'"):
        tx.update(tree(shapes), tx.init(params), params if with_params else None)


def test_a_boxed_parameter_has_a_bare_norm_and_a_boxed_update():
    """The metadata of a box describe an array of the parameter's shape."""
    params = {"w": nn.Partitioned(jnp.ones((2, 3, 4)), (None, None, "model"))}
    tx = galore_jax.limit_norm_growth(1.5)
    state = tx.init(params)
    assert state.norm["w"].shape == (2,)
    for given in (params, None):
        found, after = tx.update(params, state, given)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (5,), ()])
def test_one_model_per_device_is_bounded_as_it_is_alone(shape):
    """The norms are the carry of a loop, whose type says over which mesh axes they vary."""
    tx = galore_jax.limit_norm_growth(1.5)
    models = normal(0, (2, *shape))

    def run(model):
        sizes = jnp.array([1.0, 9.0, 2.0])
        _, found = jax.lax.scan(
            lambda state, size: tx.update({"w": size * model}, state)[::-1], tx.init({"w": model}), sizes
        )
        return found["w"]

    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    on_devices = jax.shard_map(
        lambda model: run(model[0])[None], mesh=mesh, in_specs=P("model"), out_specs=P("model"), check_vma=True
    )
    np.testing.assert_array_equal(jax.jit(on_devices)(models), jnp.stack([jax.jit(run)(model) for model in models]))


def test_inside_galore_the_norms_outlast_a_refresh():
    """A basis is turned at each update; a bound on the coordinates holds across it."""
    inner = optax.chain(optax.scale(1.0), galore_jax.limit_norm_growth(1.5))
    tx = galore(inner, rank=3, scale=1.0, update_proj_gap=1, transport="rotate")
    params = {"stack": jnp.zeros((2, 4, 6))}
    state, norms = tx.init(params), []
    for step, size in enumerate((1.0, 9.0, 100.0)):
        gradient = size * normal(step, (2, 4, 6))
        found, state = jax.jit(tx.update)({"stack": gradient}, state, params)
        norms.append(np.linalg.norm(found["stack"], axis=(1, 2)))
    np.testing.assert_allclose(norms[1:], 1.5 * np.asarray(norms[:-1]), rtol=1e-4)
