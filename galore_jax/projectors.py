# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Bases from gradients: P in R^(m x r) with PᵀP = I whose columns span the leading left singular directions of G.

    svd          P = U[:, :r] of G = U S Vᵀ                      exact, slow: O(m n min(m, n)), minutes of compile time on TPU
    eigh         P = the r leading eigenvectors of G Gᵀ          exact, one m x m factorisation
    randomized   Q = qr(G Ω), then q times Q = qr(G qr(GᵀQ));    matmuls and QR only (Halko, Martinsson and Tropp 2011,
                 P = the r columns of Q with the largest ‖qᵀG‖   arXiv 0909.4061, Algorithm 4.4)

Every projector is a pure function on one matrix; the caller scales the matrix so that its largest entry is 1, keeps zeros and
non-finite numbers away from it, and adds the batch.  A basis on the right of G (n x r) is one on the left of Gᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Projector(NamedTuple):
    """How a basis is made.

    ``refresh(key, gradient, basis, side)`` takes a PRNG key, a gradient (m, n), the basis in use, (m, r) for side "left" and
    (n, r) for "right" (all zeros at the first call), and returns the new basis, of the same shape.
    """

    name: str
    refresh: Callable[..., jax.Array]


def svd() -> Projector:
    """The exact leading left singular vectors, signs as the SVD routine returns them: the reference, not for large matrices."""

    def refresh(key: jax.Array, gradient: jax.Array, basis: jax.Array, side: str) -> jax.Array:
        del key
        u, _, vt = jnp.linalg.svd(gradient, full_matrices=False)  # [m, k], [k, n]
        return (u if side == "left" else vt.T)[:, : basis.shape[1]]

    return Projector("svd", refresh)


def eigh() -> Projector:
    """The exact leading left singular vectors by way of the m x m Gram matrix."""

    def refresh(key: jax.Array, gradient: jax.Array, basis: jax.Array, side: str) -> jax.Array:
        del key
        gradient = gradient if side == "left" else gradient.T
        gram = jnp.matmul(gradient, gradient.T, precision=jax.lax.Precision.HIGHEST)  # [m, m]
        _, vectors = jnp.linalg.eigh(gram)  # eigenvalues ascend
        return _fix_signs(vectors[:, ::-1][:, : basis.shape[1]])

    return Projector("eigh", refresh)


def randomized(power_iterations: int = 2, oversample: int = 8) -> Projector:
    """A randomized range finder: matmuls and QR only, the default.

    Args:
      power_iterations: how often the sketch is multiplied by G Gᵀ; more come closer to ``svd``.
      oversample: extra columns of the sketch, dropped at the end.

    >>> gradient = jax.random.normal(jax.random.key(0), (8, 16))
    >>> basis = randomized().refresh(jax.random.key(1), gradient, jnp.zeros((8, 2)), "left")
    >>> bool(jnp.allclose(basis.T @ basis, jnp.eye(2), atol=1e-6))
    True
    """
    if power_iterations < 0 or oversample < 0:
        raise ValueError(
            f"randomized() needs power_iterations >= 0 and oversample >= 0, got {power_iterations} and {oversample}."
        )

    def refresh(key: jax.Array, gradient: jax.Array, basis: jax.Array, side: str) -> jax.Array:
        gradient = gradient if side == "left" else gradient.T
        m, n = gradient.shape
        rank = basis.shape[1]
        columns = min(rank + oversample, m, n)  # the rank itself never exceeds the smaller side
        sketch = jax.random.normal(key, (n, columns), gradient.dtype)
        q = _orthonormal(gradient @ sketch)  # [m, columns]
        for _ in range(power_iterations):
            q = _orthonormal(gradient @ _orthonormal(gradient.T @ q))
        energy = jnp.sum(jnp.square(q.T @ gradient), axis=1)  # [columns]
        _, leading = jax.lax.top_k(energy, rank)
        return _fix_signs(q[:, leading])

    return Projector("randomized", refresh)


PROJECTORS: dict[str, Callable[[], Projector]] = {"svd": svd, "eigh": eigh, "randomized": randomized}


def get(projector: str | Projector) -> Projector:
    """A projector by name, or the object itself.

    >>> get("svd").name
    'svd'
    """
    if isinstance(projector, Projector):
        return projector
    if projector not in PROJECTORS:
        raise ValueError(
            f"projector is {projector!r}: write one of {', '.join(PROJECTORS)}, or a projector of galore_jax.projectors."
        )
    return PROJECTORS[projector]()


def _orthonormal(x: jax.Array) -> jax.Array:
    """An orthonormal basis that contains the columns of x in its span; Householder QR is finite even for rank-deficient x."""
    return jnp.linalg.qr(x)[0]


def _fix_signs(basis: jax.Array) -> jax.Array:
    """Makes the largest entry of each column positive: signs of singular vectors are otherwise the routine's whim."""
    largest = jnp.take_along_axis(basis, jnp.argmax(jnp.abs(basis), axis=0, keepdims=True), axis=0)
    return jnp.where(largest < 0, -basis, basis)
