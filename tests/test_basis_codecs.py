# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Bases in bfloat16 and 4 bits: how far from orthonormal, and that one decoded basis serves projection, lift and moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import normal

from galore_jax import galore, projectors
from galore_jax._core.basis import Dense
from galore_jax._core.basis_codecs import BASIS_CODECS, Int4Basis, stored
from galore_jax.projectors import Projector

CODED = ("bfloat16", "int4")
SIDES = [("power", "left"), ("power", "right"), ("power", "full"), ("eigh", "full"), ("random", "left")]
coded = pytest.mark.parametrize("basis_codec", CODED)


@functools.cache
def storage(basis_codec):
    return stored(Dense(), basis_codec, "power")


def orthonormal_columns(seed, m, r):
    return jnp.asarray(np.linalg.qr(np.random.default_rng(seed).normal(size=(m, r)))[0], jnp.float32)


def decoded_of(basis_codec, p):
    store = storage(basis_codec)
    return np.asarray(jax.jit(lambda p: store.decode(store.encode(p), p.shape[1], jnp.float32))(p), np.float64)


@pytest.mark.covering(2)
@pytest.mark.parametrize(("m", "r"), [(512, 128), (1024, 256), (300, 5), (700, 301)])
def test_the_defect_of_four_bits_is_the_one_stated(m, r):
    """Unit columns; the rest of the defect, and the part of the subspace that is lost."""
    p = orthonormal_columns(0, m, r)
    got = decoded_of("int4", p)
    np.testing.assert_allclose(np.linalg.norm(got, axis=0), 1, rtol=1e-5)
    values = np.linalg.svd(got, compute_uv=False)
    spread = 0.2 * np.sqrt(r / m) + 0.02
    assert 1 - spread < values[-1] < values[0] < 1 + spread
    inside = np.linalg.norm(np.asarray(p, np.float64).T @ np.linalg.qr(got)[0]) ** 2 / r
    assert inside > 0.985


def test_bfloat16_is_orthonormal_to_its_precision():
    got = decoded_of("bfloat16", orthonormal_columns(0, 512, 128))
    np.testing.assert_allclose(got.T @ got, np.eye(128), atol=4e-4 * 4)


def test_rows_of_different_sizes_are_coded_alike():
    """A basis with most of its mass in a few rows: the others keep their own scales, so that none is rounded away."""
    rng = np.random.default_rng(0)
    p = np.linalg.qr(rng.normal(size=(400, 40)) * np.where(np.arange(400) < 60, 1, 1e-3)[:, None])[0]
    got = decoded_of("int4", jnp.asarray(p, jnp.float32))
    error = np.linalg.norm(got - p, axis=1) / np.linalg.norm(p, axis=1)
    assert np.max(error) < 0.2


@pytest.mark.covering(1)
@coded
@pytest.mark.parametrize("rank", [1, 2, 7, 300])
def test_shapes_and_slices(basis_codec, rank):
    """Odd ranks, more than one block; a slice along the batch axis is the basis of that matrix; zeros are no basis."""
    store = storage(basis_codec)
    p = jnp.stack([orthonormal_columns(seed, 320, rank) for seed in range(3)])
    stack = jax.vmap(store.encode)(p)
    none = store.zeros((3, 320, rank), jnp.float32, None, None)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stack) == jax.tree.map(lambda x: (x.shape, x.dtype), none)
    assert store.exists(stack).tolist() == [True] * 3
    assert store.exists(none).tolist() == [False] * 3
    x = normal(0, (3, 320, 11))
    project, lift = store.project(stack, x, rank), store.lift(stack, x[:, :rank], 320)
    for i in range(3):
        one = store.encode(p[i])
        jax.tree.map(lambda whole, part, i=i: np.testing.assert_allclose(whole[i], part, rtol=1e-6), stack, one)
        matrix = decoded_of(basis_codec, p[i])
        np.testing.assert_allclose(project[i], matrix.T @ np.asarray(x[i], np.float64), atol=2e-5)
        np.testing.assert_allclose(lift[i], matrix @ np.asarray(x[i, :rank], np.float64), atol=2e-5)
        np.testing.assert_allclose(store.overlap(one, one, 320, rank), matrix.T @ matrix, atol=1e-5)
    np.testing.assert_array_equal(store.project(none, x, rank), 0)


def test_a_column_of_zeros_and_one_entry_a_column():
    p = jnp.eye(64, 6).at[:, 3].set(0)
    np.testing.assert_array_equal(decoded_of("int4", p), p)


def test_two_numbers_share_a_byte():
    state = galore(optax.sgd(1.0), rank=33, basis_codec="int4").init({"w": jnp.zeros((2, 64, 100))})
    basis = state.left["w"]
    assert isinstance(basis, Int4Basis)
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), basis) == Int4Basis(
        ((2, 64, 17), "uint8"), ((2, 64, 1), "float32"), ((2, 33), "float32")
    )
    state = galore(optax.sgd(1.0), rank=33, basis_codec="bfloat16").init({"w": jnp.zeros((2, 64, 100))})
    assert (state.left["w"].shape, state.left["w"].dtype) == ((2, 64, 33), jnp.bfloat16)


@pytest.mark.covering(1)
@coded
@pytest.mark.parametrize(("projector", "proj_type"), SIDES)
def test_the_coordinates_of_a_refresh_are_those_of_the_decoded_basis(basis_codec, projector, proj_type):
    """What reaches the inner transformation at update 0, and at the next refresh, is P̂ᵀG Q̂ of the new bases that are kept, and
    the update is those bases times what comes back."""
    tx = galore(
        optax.trace(0.0),
        rank=9,
        update_proj_gap=2,
        refresh="together",
        transport="keep",
        scale=1.0,
        projector=projector,
        proj_type=proj_type,
        basis_codec=basis_codec,
    )
    params = {"w": normal(0, (2, 40, 50))}
    state, update = tx.init(params), jax.jit(tx.update)
    store = storage(basis_codec)
    for step in range(3):
        gradient = normal(step + 1, (2, 40, 50))
        updates, state = update({"w": gradient}, state, params)
        left = np.asarray(store.decode(state.left["w"], 9, jnp.float32)) if proj_type != "right" else None
        right = np.asarray(store.decode(state.right["w"], 9, jnp.float32)) if proj_type != "left" else None
        for i in range(2):
            low = np.asarray(gradient[i], np.float64)
            low = low if left is None else left[i].T @ low
            low = low if right is None else low @ right[i]
            np.testing.assert_allclose(state.inner_state.trace["w"][i], low, rtol=1e-4, atol=1e-4)
            lifted = low if left is None else left[i] @ low
            lifted = lifted if right is None else lifted @ right[i].T
            np.testing.assert_allclose(updates["w"][i], lifted, rtol=1e-4, atol=1e-4)


@pytest.mark.covering(1)
@coded
def test_training_is_close_to_that_with_a_float32_basis(basis_codec):
    """Noisy least squares in 16 of 32 directions: the distance to the minimum after 60 steps."""
    target = normal(0, (32, 16)) @ normal(1, (16, 64)) / 4

    def distance(codec):
        tx = galore(optax.adam(0.05), rank=16, update_proj_gap=10, scale=1.0, basis_codec=codec)

        def step(carry, key):
            params, state = carry
            gradient = {"w": params["w"] - target + 0.1 * jax.random.normal(key, target.shape)}
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": jnp.zeros_like(target)}
        keys = jax.random.split(jax.random.key(2), 60)
        (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, tx.init(params)))
        assert int(state.rejected) == 0
        return float(jnp.linalg.norm(params["w"] - target) / jnp.linalg.norm(target))

    assert distance(basis_codec) < 1.1 * distance("float32") + 0.01


@pytest.mark.covering(1)
@coded
def test_a_basis_is_checked_before_it_is_coded(basis_codec):
    """One that is not orthonormal is rejected; one that is, is taken, although its code is not."""

    def made(factor):
        power = projectors.power()

        def refresh(seen):
            return power.refresh(seen) * factor

        return Projector("made", refresh)

    params = {"w": normal(0, (40, 50))}
    for factor, rejected in ((1.0, 0), (1.01, 1)):
        tx = galore(optax.sgd(1.0), rank=9, projector=made(factor), basis_codec=basis_codec)
        _, state = jax.jit(tx.update)(params, tx.init(params))
        assert int(state.rejected) == rejected


@coded
@pytest.mark.parametrize("projector", ["rows", projectors.random(stored=False)], ids=["rows", "seed"])
def test_what_is_not_dense_has_no_codec(basis_codec, projector):
    with pytest.raises(
        ValueError, match=rf"basis_codec is '{basis_codec}', but the projector '(rows|random)' stores no dense"
    ):
        galore(optax.sgd(1.0), projector=projector, basis_codec=basis_codec)


def test_an_unknown_codec_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^basis_codec is 'int8': write one of float32, bfloat16, int4\.$"):
        galore(optax.sgd(1.0), basis_codec="int8")
    assert list(BASIS_CODECS) == ["float32", "bfloat16", "int4"]
