# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Orthonormalization that no input breaks: well-conditioned, rank-deficient, huge, tiny and zero, in float32 and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from galore_jax._core.orthonormal import defect, orthonormal

orthonormalized = jax.jit(orthonormal)


def decaying(rng, m, r, smallest):
    """Singular values from 1 down to ``smallest``, in no special basis."""
    u, v = (np.linalg.qr(rng.normal(size=(side, r)))[0] for side in (m, r))
    return u * np.geomspace(1, smallest, r) @ v.T


def with_a_zero_column(rng, m, r):
    x = rng.normal(size=(m, r))
    x[:, r // 2] = 0
    return x


MATRICES = {
    "normal": lambda rng, m, r: rng.normal(size=(m, r)),
    "orthonormal already": lambda rng, m, r: np.linalg.qr(rng.normal(size=(m, r)))[0],
    "condition 1e6": lambda rng, m, r: decaying(rng, m, r, 1e-6),
    "condition 1e12": lambda rng, m, r: decaying(rng, m, r, 1e-12),
    "columns of very different length": lambda rng, m, r: rng.normal(size=(m, r)) * np.geomspace(1e18, 1e-18, r),
    "rank 1": lambda rng, m, r: rng.normal(size=(m, 1)) * rng.normal(size=(1, r)),
    "half the rank": lambda rng, m, r: rng.normal(size=(m, (r + 1) // 2)) @ rng.normal(size=((r + 1) // 2, r)),
    "one column repeated": lambda rng, m, r: np.tile(rng.normal(size=(m, 1)), (1, r)),
    "one row": lambda rng, m, r: np.eye(m, 1) * rng.normal(size=(1, r)),
    "a column of zeros": with_a_zero_column,
    "zero": lambda rng, m, r: np.zeros((m, r)),
    "one-hot": lambda rng, m, r: np.eye(m)[:, rng.permutation(m)[:r]],
    "one-hot, repeated": lambda rng, m, r: np.eye(m)[:, rng.integers(0, m, r)],
    "one-hot, half of them zero": lambda rng, m, r: np.eye(m)[:, :r] * (np.arange(r) % 2),
    "huge": lambda rng, m, r: np.clip(rng.normal(size=(m, r)), -3, 3) * 1e38,
    "almost too huge": lambda rng, m, r: np.sign(rng.normal(size=(m, r))) * 3.3e38,
    "tiny": lambda rng, m, r: rng.normal(size=(m, r)) * 1e-37,
    "denormal": lambda rng, m, r: rng.normal(size=(m, r)) * 1e-42,
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(400, 150), (96, 32), (40, 40), (7, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_columns_are_orthonormal(kind, shape, dtype):
    x = jnp.asarray(MATRICES[kind](np.random.default_rng(0), *shape), dtype)
    q = orthonormalized(x)
    assert q.dtype == x.dtype
    assert q.shape == shape
    gram = np.asarray(q, np.float64).T @ np.asarray(q, np.float64)
    # bfloat16 rounds each entry of an orthonormal matrix by up to 2^-9.
    np.testing.assert_allclose(gram, np.eye(shape[1]), atol=3e-6 if dtype == "float32" else 1.2e-2)


@pytest.mark.slow
def test_a_large_ill_conditioned_matrix():
    """The size at which a plain Cholesky-QR was seen to return NaN: 2048 x 512, out of a warm start."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(decaying(rng, 2048, 512, 1e-10), jnp.float32)
    assert float(defect(orthonormalized(x))) < 3e-6


@pytest.mark.parametrize("smallest", [0.3, 1e-3])
def test_the_leading_columns_keep_their_span(smallest):
    x = decaying(np.random.default_rng(1), 60, 12, smallest)
    q = np.asarray(orthonormalized(jnp.asarray(x, jnp.float32)), np.float64)
    for k in (1, 5, 12):
        exact = np.linalg.qr(x[:, :k])[0]
        np.testing.assert_allclose(q[:, :k] @ q[:, :k].T, exact @ exact.T, atol=2e-7 / smallest)


def test_independent_columns_survive_dependent_ones():
    rng = np.random.default_rng(2)
    direction = rng.normal(size=(50, 1))
    q = np.asarray(orthonormalized(jnp.asarray(direction * np.array([[2.0, -1.0, 5.0]]), jnp.float32)), np.float64)
    cosine = abs(q[:, 0] @ direction[:, 0]) / np.linalg.norm(direction)
    assert 1 - cosine < 1e-7


@pytest.mark.parametrize("shape", [(300, 200), (60, 12), (40, 40), (7, 1)], ids=str)
def test_it_is_the_qr_with_a_positive_diagonal(shape):
    x = np.random.default_rng(4).normal(size=shape)
    x[: shape[1]] += 5 * np.eye(shape[1])
    q, triangle = np.linalg.qr(x)
    np.testing.assert_allclose(
        orthonormalized(jnp.asarray(x, jnp.float32)), q * np.sign(np.diagonal(triangle)), atol=2e-6
    )


def test_it_works_on_a_batch():
    """Under vmap every matrix runs as many rounds as the one that needs most."""
    rng = np.random.default_rng(3)
    batch = jnp.stack([jnp.asarray(MATRICES[kind](rng, 30, 8), jnp.float32) for kind in ("normal", "rank 1", "zero")])
    for q in jax.jit(jax.vmap(orthonormal))(batch):
        assert float(defect(q)) < 3e-6


def test_the_defect_of_a_basis_that_is_not_finite_is_nan():
    basis = jnp.eye(4)[:, :2]
    assert float(defect(basis * 1.5)) == 1.25
    assert np.isnan(float(defect(basis.at[0, 0].set(jnp.nan))))
    assert np.isnan(float(defect(basis.at[3, 1].set(jnp.inf))))


def test_each_device_has_a_matrix_of_its_own():
    """Inside shard_map with check_vma=True, every carry and branch has to vary over the devices as its input does."""
    mesh = jax.make_mesh((4,), ("device",), axis_types=(AxisType.Auto,))
    kinds = ("normal", "zero", "rank 1", "one-hot")
    matrices = jnp.stack([jnp.asarray(MATRICES[kind](np.random.default_rng(5), 30, 8), jnp.float32) for kind in kinds])
    mapped = jax.shard_map(
        lambda x: orthonormal(x[0])[None], mesh=mesh, in_specs=P("device"), out_specs=P("device"), check_vma=True
    )
    for found, x in zip(jax.jit(mapped)(matrices), matrices, strict=True):
        np.testing.assert_allclose(found, orthonormalized(x), atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_program_is_small_and_the_same_everywhere(platform):
    """No QR, and no ``jax.random``, whose generator is larger than all of the rest."""
    traced = jax.jit(orthonormal).trace(jax.ShapeDtypeStruct((64, 8), jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "geqrf" not in text
    assert "householder" not in text.lower()
    assert text.count(" = ") < 300
