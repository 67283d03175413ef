# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Orthonormal columns, fast and safe.

On a CPU by Householder QR, which LAPACK does in about the time of two matrix products.  On every other device, where a QR is
a long sequential loop to run and to compile, out of matrix products and small Cholesky factorisations: for Y in R^(m x r) with
columns scaled to length 1, repeat until max |YᵀY - I| is a few roundings:

    Y <- Y L⁻ᵀ,   L Lᵀ = YᵀY + s I

A plain Cholesky-QR (s = 0) breaks down where YᵀY is singular to rounding.  As long as ‖YᵀY - I‖_F > 1/2, s is a bound on the
rounding error of the Gram matrix (Fukaya et al. 2020, arXiv 1809.11085), which divides the condition number by about 1/√s a
round, and directions that Y does not have at all are filled with noise orthogonal to the rest.  Then s = 0, and the error is
squared away.  L⁻ᵀ is triangular, so the span of the leading k columns is kept for every k.

Well-conditioned input takes two rounds, a rank-deficient one about five.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROUNDS = 12
_HIGHEST = jax.lax.Precision.HIGHEST  # float32 products in float32, also where a device would take bfloat16 or TF32


def orthonormal(x: jax.Array) -> jax.Array:
    """Orthonormal columns whose leading k span the leading k columns of x, for every k.

    Args:
      x: finite, (m, r) with m >= r, of any scale and rank; the columns that depend on earlier ones are replaced by arbitrary
        directions orthogonal to the rest.

    Returns:
      (m, r) in the dtype of x; computed in at least float32.

    >>> q = orthonormal(jnp.array([[3.0, 3.0], [4.0, 4.0], [0.0, 0.0]]))  # rank 1
    >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6)), bool(jnp.allclose(q[:, 0], jnp.array([0.6, 0.8, 0.0]), atol=1e-5))
    (True, True)
    """
    return jax.lax.platform_dependent(x, cpu=by_householder, default=by_cholesky)


def by_householder(x: jax.Array) -> jax.Array:
    """:func:`orthonormal` by Householder QR, with the signs of Cholesky-QR: a positive diagonal of the triangular factor."""
    q, triangle = jnp.linalg.qr(_unit_columns(x))
    sign = jnp.where(jnp.diagonal(triangle) < 0, -1, 1).astype(q.dtype)
    return (q * sign[None, :]).astype(x.dtype)


def by_cholesky(x: jax.Array) -> jax.Array:
    """:func:`orthonormal` by shifted Cholesky-QR."""
    y = _unit_columns(x)
    m, r = y.shape
    eps = jnp.finfo(y.dtype).eps
    eye = jnp.eye(r, dtype=y.dtype)

    def round_(carry: tuple) -> tuple:
        i, y, gram = carry
        far = jnp.sqrt(jnp.sum(jnp.square(gram - eye))) > 0.5
        shift = jnp.where(far, 2 * eps * (m * r) ** 0.5, 0).astype(y.dtype)
        # The second round that is still far off has met a direction that is missing.
        y, gram = jax.lax.cond(far & (i > 0), fill, lambda y, gram: (y, gram), y, gram)
        factor = jnp.linalg.cholesky(gram + shift * eye, symmetrize_input=False)
        inverse = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
        y = jnp.matmul(y, inverse.T, precision=_HIGHEST)
        return i + 1, y, _gram(y)

    def fill(y: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = jax.random.normal(jax.random.key(0), (m, r), y.dtype) * (1e-3 * m**-0.5)
        noise = noise - jnp.matmul(y, jnp.matmul(y.T, noise, precision=_HIGHEST), precision=_HIGHEST)
        short = jnp.maximum(1 - jnp.diagonal(gram), 0)  # near 1 where a direction is missing, near 0 where it is there
        y = y + noise * short[None, :]
        return y, _gram(y)

    def unfinished(carry: tuple) -> jax.Array:
        i, _, gram = carry
        return (i < _ROUNDS) & (jnp.max(jnp.abs(gram - eye)) > 16 * eps)

    _, y, _ = jax.lax.while_loop(unfinished, round_, (jnp.zeros([], jnp.int32), y, _gram(y)))
    return y.astype(x.dtype)


def defect(basis: jax.Array) -> jax.Array:
    """max |PᵀP - I| of a basis (m, r), a scalar; NaN where the basis is not finite.

    >>> float(defect(jnp.eye(3)[:, :2]))
    0.0
    """
    error = jnp.abs(_gram(basis) - jnp.eye(basis.shape[1], dtype=basis.dtype))
    return jnp.where(jnp.all(jnp.isfinite(error)), jnp.max(error), jnp.nan)  # XLA's maximum on CPU drops a NaN


def _gram(y: jax.Array) -> jax.Array:
    return jnp.matmul(y.T, y, precision=_HIGHEST)


def _unit_columns(x: jax.Array) -> jax.Array:
    """Columns of length 1 in at least float32, in two steps so that no square over- or underflows; a column of zeros stays."""
    x = x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
    peak = jnp.max(jnp.abs(x), axis=0)
    x = x / jnp.where(peak > 0, peak, 1)[None, :]
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=0))
    return x / jnp.where(length > 0, length, 1)[None, :]
