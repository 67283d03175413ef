# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Orthonormal columns by shifted Cholesky-QR, the same program on every backend.

Scale the columns of Y in R^(m x r) to length 1, then repeat until ‖YᵀY - I‖_F <= 1/2, and once more with s = 0:

    Y <- Y L⁻ᵀ,   L Lᵀ = YᵀY + s I

All of the work is in matrix products and small Cholesky factorizations.  A Householder QR is a long sequential loop on an
accelerator.  On a CPU, LAPACK runs a batched QR on XLA's own threads and can deadlock when several devices share them.

A plain Cholesky-QR (s = 0) breaks down where YᵀY is singular to rounding, and squares the condition number into its error.  A
bound s on the rounding error of the Gram matrix (Fukaya et al. 2020, arXiv 1809.11085) divides the condition number by about
1/√s a round.  What is far from length 1 after two such rounds is below rounding: a direction that Y does not have, which is
filled with noise orthogonal to the rest.  L⁻ᵀ is triangular, so the leading k columns keep their span for every k.

Well-conditioned input takes one or two rounds, and rank-deficient input about five.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROUNDS = 24
# Largest matrix that is factorized as one.  On a CPU, LAPACK's threads wait for each other in larger ones.
_BLOCK = 128
# Computes float32 products in float32, also where a device would use bfloat16 or TF32.
_HIGHEST = jax.lax.Precision.HIGHEST


def orthonormal(x: jax.Array) -> jax.Array:
    """Returns orthonormal columns whose leading k columns span the leading k columns of x, for every k.

    Args:
      x: A finite matrix (m, r) with m >= r, of any scale and rank. A column that depends on earlier ones is replaced by an
        arbitrary direction orthogonal to the rest.

    Returns:
      (m, r) in the dtype of x; the computation is in at least float32.

    >>> q = orthonormal(jnp.array([[3.0, 3.0], [4.0, 4.0], [0.0, 0.0]]))  # rank 1
    >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6)), bool(jnp.allclose(q[:, 0], jnp.array([0.6, 0.8, 0.0]), atol=1e-5))
    (True, True)
    """
    y = _unit_columns(x)
    m, r = y.shape
    eps = float(jnp.finfo(y.dtype).eps)
    eye = jnp.eye(r, dtype=y.dtype)

    def round_(carry: tuple) -> tuple:
        i, y, _ = carry
        gram = _gram(y)
        far = jnp.sum(jnp.square(gram - eye)) > 0.25
        # Near 1 where a direction is missing, and near 0 where it is there.
        short = jnp.maximum(1 - jnp.sum(gram * eye, axis=0), 0)
        missing = far & (i % 3 == 2) & (jnp.max(short) > 0.5)
        shift = jnp.where(far, 2 * eps * (m * r) ** 0.5, 0)
        return i + 1, jax.lax.cond(missing, fill, orthogonalize, y, gram + shift * eye, short), far

    def orthogonalize(y: jax.Array, gram: jax.Array, short: jax.Array) -> jax.Array:
        return jnp.matmul(y, _inverse_factor(gram).T, precision=_HIGHEST)

    def fill(y: jax.Array, gram: jax.Array, short: jax.Array) -> jax.Array:
        new = noise(y.shape, y.dtype) * (3 / m) ** 0.5
        new = new - jnp.matmul(y, jnp.matmul(y.T, new, precision=_HIGHEST), precision=_HIGHEST)
        return y + new * short[None, :]

    def unfinished(carry: tuple) -> jax.Array:
        i, _, was_far = carry
        return was_far & (i < _ROUNDS)

    # Inside shard_map, a loop keeps the types of its carry, so the counter has to vary over the devices as the matrix does.
    start = jnp.zeros_like(y[0, 0], jnp.int32)
    return jax.lax.while_loop(unfinished, round_, (start, y, start == 0))[1].astype(x.dtype)


def defect(basis: jax.Array) -> jax.Array:
    """Returns max |PᵀP - I| of a basis (m, r), a scalar; NaN if the basis is not finite.

    >>> float(defect(jnp.eye(3)[:, :2]))
    0.0
    """
    error = jnp.abs(_gram(basis) - jnp.eye(basis.shape[1], dtype=basis.dtype))
    # XLA's maximum drops a NaN on CPU.
    return jnp.where(jnp.all(jnp.isfinite(error)), jnp.max(error), jnp.nan)


def noise(shape: tuple[int, ...], dtype: jnp.dtype, seed: int | jax.Array = 0) -> jax.Array:
    """Returns matrices (*batch, m, n) of numbers in [-1, 1], a hash of the seed and their positions in the matrix.

    It compiles to a tenth of the program of ``jax.random``, and is good enough to start a power iteration from, or as dither.  A
    seed may be an array (*batch,).
    """
    rows, columns = (jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - axis) for axis in (2, 1))
    start = jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    # From 1, because this hash of 0 is 0.
    x = 1 + rows * shape[-1] + columns + jnp.broadcast_to(start[..., None, None], shape)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return jax.lax.bitcast_convert_type(x ^ (x >> 16), jnp.int32).astype(dtype) * 2.0**-31


def _inverse_factor(gram: jax.Array) -> jax.Array:
    """L⁻¹ of L Lᵀ = gram (r, r), by halves."""
    r = gram.shape[0]
    if r <= _BLOCK:
        factor = jax.lax.linalg.cholesky(gram, symmetrize_input=False)
        return jax.lax.linalg.triangular_solve(factor, jnp.eye(r, dtype=gram.dtype), left_side=True, lower=True)
    half = (r + 1) // 2
    first = _inverse_factor(gram[:half, :half])
    below = jnp.matmul(gram[half:, :half], first.T, precision=_HIGHEST)
    last = _inverse_factor(gram[half:, half:] - jnp.matmul(below, below.T, precision=_HIGHEST))
    corner = -jnp.matmul(last, jnp.matmul(below, first, precision=_HIGHEST), precision=_HIGHEST)
    return jnp.block([[first, jnp.zeros((half, r - half), gram.dtype)], [corner, last]])


def _gram(y: jax.Array) -> jax.Array:
    return jnp.matmul(y.T, y, precision=_HIGHEST)


def _unit_columns(x: jax.Array) -> jax.Array:
    """Scales the columns to length 1 in at least float32; a column of zeros stays.

    The first of two steps divides by the largest entry, so that no square overflows or underflows.
    """
    x = x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
    peak = jnp.max(jnp.abs(x), axis=0)
    x = x / jnp.where(peak > 0, peak, 1)[None, :]
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=0))
    return x / jnp.where(length > 0, length, 1)[None, :]
