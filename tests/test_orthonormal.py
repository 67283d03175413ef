# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Orthonormalisation that no input breaks: well-conditioned, rank-deficient, huge, tiny and zero, in float32 and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax._core.orthonormal import by_cholesky, by_householder, defect, orthonormal


@pytest.fixture(params=[by_householder, by_cholesky])  # a CPU's way, and that of every other device
def way(request):
    return request.param


@pytest.fixture
def orthonormalised(way):
    return jax.jit(way)


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
    "huge": lambda rng, m, r: np.clip(rng.normal(size=(m, r)), -3, 3) * 1e38,
    "tiny": lambda rng, m, r: rng.normal(size=(m, r)) * 1e-37,
    "denormal": lambda rng, m, r: rng.normal(size=(m, r)) * 1e-42,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(96, 32), (40, 40), (7, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_columns_are_orthonormal(kind, shape, dtype, orthonormalised):
    x = jnp.asarray(MATRICES[kind](np.random.default_rng(0), *shape), dtype)
    q = orthonormalised(x)
    assert q.dtype == x.dtype
    assert q.shape == shape
    gram = np.asarray(q, np.float64).T @ np.asarray(q, np.float64)
    # bfloat16 rounds each entry of an orthonormal matrix by up to 2^-9.
    np.testing.assert_allclose(gram, np.eye(shape[1]), atol=3e-6 if dtype == "float32" else 1.2e-2)


@pytest.mark.slow
def test_a_large_ill_conditioned_matrix(orthonormalised):
    """The size at which a plain Cholesky-QR was seen to return NaN: 2048 x 512, out of a warm start."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(decaying(rng, 2048, 512, 1e-10), jnp.float32)
    assert float(defect(orthonormalised(x))) < 3e-6


@pytest.mark.parametrize("smallest", [0.3, 1e-3])
def test_the_leading_columns_keep_their_span(smallest, orthonormalised):
    x = decaying(np.random.default_rng(1), 60, 12, smallest)
    q = np.asarray(orthonormalised(jnp.asarray(x, jnp.float32)), np.float64)
    for k in (1, 5, 12):
        exact = np.linalg.qr(x[:, :k])[0]
        np.testing.assert_allclose(q[:, :k] @ q[:, :k].T, exact @ exact.T, atol=2e-7 / smallest)


def test_independent_columns_survive_dependent_ones(orthonormalised):
    rng = np.random.default_rng(2)
    direction = rng.normal(size=(50, 1))
    q = np.asarray(orthonormalised(jnp.asarray(direction * np.array([[2.0, -1.0, 5.0]]), jnp.float32)), np.float64)
    cosine = abs(q[:, 0] @ direction[:, 0]) / np.linalg.norm(direction)
    assert 1 - cosine < 1e-7


def test_it_works_on_a_batch(way):
    """Under vmap every matrix runs as many rounds as the one that needs most."""
    rng = np.random.default_rng(3)
    batch = jnp.stack([jnp.asarray(MATRICES[kind](rng, 30, 8), jnp.float32) for kind in ("normal", "rank 1", "zero")])
    for q in jax.jit(jax.vmap(way))(batch):
        assert float(defect(q)) < 3e-6


def test_the_defect_of_a_basis_that_is_not_finite_is_nan():
    basis = jnp.eye(4)[:, :2]
    assert float(defect(basis * 1.5)) == 1.25
    assert np.isnan(float(defect(basis.at[0, 0].set(jnp.nan))))
    assert np.isnan(float(defect(basis.at[3, 1].set(jnp.inf))))


def test_only_a_cpu_takes_householder():
    traced = jax.jit(orthonormal).trace(jax.ShapeDtypeStruct((8, 3), jnp.float32))
    factorisations = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    found = {name: [kind for kind in ("geqrf", "cholesky") if kind in text] for name, text in factorisations.items()}
    assert found == {"cpu": ["geqrf"], "tpu": ["cholesky"]}
