# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Bases from gradients: P in R^(m x r), for G in R^(m x n).

    svd          P = U[:, :r] of G = U S Vᵀ                      exact; slow, and minutes of compile time on TPU
    eigh         P = the r leading eigenvectors of G Gᵀ          exact; one m x m factorisation
    randomized   Q = orth(G Ω), then q times orth(G (QᵀG)ᵀ);     the r columns of most energy (Halko, Martinsson and Tropp
                                                                 2011, arXiv 0909.4061, Algorithm 4.4)
    power        P = orth(G (P_oldᵀG)ᵀ)                          a block power step from the basis in use; from a sketch and
                                                                 two such steps when there is none
    random       P uniform on the Stiefel manifold, or Gaussian  E[P Pᵀ] = (r/m) I, or I with entries of variance 1/r
    gaussian     the latter, of which the state has a seed only  (APOLLO, arXiv 2412.05270)
    rows         P = the r rows of largest norm, or drawn with   E[P Pᵀ] = I for the latter (Grass, arXiv 2406.17660)
                 probability q_i ∝ ‖G_i‖² and factor (r q_i)^-½
    sampled      r of the columns of U, without replacement,     (SARA, arXiv 2502.05790)
                 with probability ∝ σ
    switch       one projector, and from some step on another    (GoLore, arXiv 2410.11289)

Columns come in the order of the energy ‖p_jᵀG‖² they carry, largest first, and the entry of largest magnitude in each is
positive; a basis with a fixed order and sign is what lets moments be kept over a refresh.  Two exceptions: ``svd`` leaves the
signs to the routine, as the published implementations do, and a random basis that is not stored has no order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax._core.basis import Basis, Dense, RowBasis, Rows, Seeded, Storage
from galore_jax._core.dtypes import promoted
from galore_jax._core.orthonormal import orthonormal

_HIGHEST = jax.lax.Precision.HIGHEST


class ProjectorInput(NamedTuple):
    """What a projector is shown of one matrix; a basis on the right of a gradient is one on the left of its transpose.

    The gradient is finite and not zero, of any scale.
    """

    key: jax.Array  # PRNG key of this refresh
    gradient: jax.Array  # (m, n), at least float32 or bfloat16
    basis: Basis  # in use; zeros if there is none
    coordinates: jax.Array  # (r, n), the gradient in that basis, which the update step has at hand
    step: jax.Array  # scalar, int32
    transposed: bool  # whether the gradient is the transpose of the parameter's


class Projector(NamedTuple):
    """How a basis is made: ``refresh(observation)`` returns the new basis and the gradient's coordinates (r, n) in it.

    Pure functions on one matrix; :attr:`storage` has what is done with a basis (zeros, project, lift, overlap).
    """

    name: str
    refresh: Callable[[ProjectorInput], tuple[Basis, jax.Array]]
    storage: Storage = Dense()


def svd() -> Projector:
    """The exact leading left singular vectors, signs as the SVD routine returns them: the reference, not for large matrices."""

    def refresh(seen: ProjectorInput) -> tuple[jax.Array, jax.Array]:
        rank = seen.coordinates.shape[0]
        gradient = promoted(seen.gradient)
        if seen.transposed:
            basis = jnp.linalg.svd(gradient.T, full_matrices=False)[2].T[:, :rank]
        else:
            basis = jnp.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
        return basis, basis.T @ gradient

    return Projector("svd", refresh)


def eigh() -> Projector:
    """The exact leading left singular vectors by way of the m x m Gram matrix."""

    def refresh(seen: ProjectorInput) -> tuple[jax.Array, jax.Array]:
        vectors, _ = _gram_eigh(seen.gradient)
        basis = vectors[:, : seen.coordinates.shape[0]]
        return _by_energy(basis, basis.T @ promoted(seen.gradient))

    return Projector("eigh", refresh)


def randomized(power_iterations: int = 2, oversample: int = 8) -> Projector:
    """A randomized range finder, from scratch at each refresh: matmuls and small Cholesky factorisations only.

    Args:
      power_iterations: how often the sketch is multiplied by G Gᵀ; more come closer to ``svd``.
      oversample: extra columns of the sketch, dropped at the end.
    """
    if power_iterations < 0 or oversample < 0:
        raise ValueError(
            f"randomized() needs power_iterations >= 0 and oversample >= 0, got {power_iterations} and {oversample}."
        )

    def refresh(seen: ProjectorInput) -> tuple[jax.Array, jax.Array]:
        rank = seen.coordinates.shape[0]
        columns = min(rank + oversample, *seen.gradient.shape)  # the rank itself never exceeds the smaller side
        sketch = jax.random.normal(seen.key, (columns, seen.gradient.shape[1]), seen.coordinates.dtype)
        basis, coordinates = _power_steps(seen.gradient, sketch, 1 + power_iterations)
        return basis[:, :rank], coordinates[:rank]

    return Projector("randomized", refresh)


def power(iterations: int = 1) -> Projector:
    """A warm-started block power iteration: two matmuls with G and an orthonormalisation, the default.

    The coordinates of the gradient in the old basis, which the step computes anyway, are its first half.  Without an old
    basis it begins with a sketch and two iterations more.  Directions the old basis lacks come in by rounding and noise, a
    power of the ratio of singular values at each refresh.

    Args:
      iterations: at each refresh, at least 1.

    >>> gradient = jax.random.normal(jax.random.key(0), (8, 16)) / 4
    >>> seen = ProjectorInput(jax.random.key(1), gradient, jnp.zeros((8, 2)), jnp.zeros((2, 16)), jnp.int32(0), False)
    >>> basis, coordinates = power().refresh(seen)
    >>> bool(jnp.allclose(basis.T @ basis, jnp.eye(2), atol=1e-6)), bool(jnp.allclose(coordinates, basis.T @ gradient, atol=1e-5))
    (True, True)
    """
    if iterations < 1:
        raise ValueError(f"power() needs iterations >= 1, got {iterations}.")

    def refresh(seen: ProjectorInput) -> tuple[jax.Array, jax.Array]:
        warm = Dense().exists(seen.basis)
        shape, dtype = seen.coordinates.shape, seen.coordinates.dtype
        start = jax.lax.cond(warm, lambda: seen.coordinates, lambda: jax.random.normal(seen.key, shape, dtype))
        return _power_steps(seen.gradient, start, jnp.where(warm, iterations, iterations + 4))

    return Projector("power", refresh)


def random(kind: str = "stiefel", stored: bool = True) -> Projector:
    """A random basis that does not look at the gradient, a new one at each refresh.

    Args:
      kind: "stiefel" (orthonormal columns, uniformly distributed) or "gaussian" (independent entries of variance 1/r).
      stored: False keeps the seed only and draws the basis anew at each use, which costs time and saves its memory.

    >>> random("stiefel", stored=False).storage.zeros((3, 8, 2), jnp.float32, None, None).shape
    (3,)
    """
    if kind not in _DRAWS:
        raise ValueError(f"random() got kind={kind!r}: write one of {', '.join(_DRAWS)}.")
    draw = _DRAWS[kind]
    orthonormal_columns = kind == "stiefel"
    seeded = Seeded(draw, orthonormal_columns)

    def refresh_stored(seen: ProjectorInput) -> tuple[jax.Array, jax.Array]:
        basis = draw(seen.key, seen.basis.shape, seen.basis.dtype)
        return _by_energy(basis, basis.T @ promoted(seen.gradient))

    def refresh_seed(seen: ProjectorInput) -> tuple[jax.Array, jax.Array]:
        seed = jnp.maximum(jax.random.bits(seen.key, (), jnp.uint32), 1)
        return seed, seeded.project(seed, seen.gradient, seen.coordinates.shape[0])

    if stored:
        return Projector("random", refresh_stored, Dense(orthonormal_columns))
    return Projector("random", refresh_seed, seeded)


def rows(select: str = "top") -> Projector:
    """Rows of the gradient itself: projection is a gather, and the basis is r indices.

    Args:
      select: "top" (the rows of largest norm) or "sampled" (with replacement, probability ∝ squared norm, unbiased).
    """
    if select not in ("top", "sampled"):
        raise ValueError(f'rows() got select={select!r}: write "top" or "sampled".')
    storage = Rows()

    def refresh(seen: ProjectorInput) -> tuple[RowBasis, jax.Array]:
        rank = seen.coordinates.shape[0]
        energy = jnp.sum(jnp.square(_unit(promoted(seen.gradient))), axis=1)  # [m]
        if select == "top":
            index = jax.lax.top_k(energy, rank)[1]
            factor = jnp.ones((rank,), energy.dtype)
        else:
            index = jax.random.categorical(seen.key, jnp.log(energy), shape=(rank,))
            index = index[jnp.argsort(-energy[index])]
            factor = jax.lax.rsqrt(rank * (energy[index] / jnp.sum(energy)))
        basis = RowBasis(index.astype(jnp.int32), factor)
        return basis, storage.project(basis, seen.gradient, rank)

    return Projector("rows", refresh, storage)


def sampled() -> Projector:
    """Singular vectors drawn without replacement with probability proportional to their singular values."""

    def refresh(seen: ProjectorInput) -> tuple[jax.Array, jax.Array]:
        vectors, values = _gram_eigh(seen.gradient)
        # The largest of log σ + Gumbel noise are such a draw; a σ of zero is taken only when nothing else is left.
        noise = jax.random.gumbel(seen.key, values.shape, values.dtype)
        tiny = jnp.finfo(values.dtype).tiny
        _, index = jax.lax.top_k(jnp.log(jnp.maximum(values, tiny)) / 2 + noise, seen.coordinates.shape[0])
        basis = vectors[:, jnp.sort(index)]
        return _by_energy(basis, basis.T @ promoted(seen.gradient))

    return Projector("sampled", refresh)


def switch(first: str | Projector, then: str | Projector, at: int | jax.Array) -> Projector:
    """``first`` for refreshes before the update number ``at``, ``then`` from there on.

    >>> switch("power", "random", at=8_000).name
    'switch'
    """
    first, then = get(first), get(then)
    if not isinstance(at, jax.Array) and (isinstance(at, bool) or not isinstance(at, int) or at < 0):
        raise ValueError(f"switch() got at={at!r}: write the number of an update, an int >= 0.")
    if first.storage != then.storage:
        raise ValueError(
            f"switch() cannot go from {first.name!r} to {then.name!r}, whose bases are stored differently "
            f"({first.storage} and {then.storage}): choose two that store theirs alike."
        )

    def refresh(seen: ProjectorInput) -> tuple[Basis, jax.Array]:
        # By closure: as an operand, the flag whether it is transposed would become an array.
        return jax.lax.cond(seen.step < at, lambda: first.refresh(seen), lambda: then.refresh(seen))

    return Projector("switch", refresh, first.storage)


PROJECTORS: dict[str, Callable[[], Projector]] = {
    "power": power,
    "randomized": randomized,
    "svd": svd,
    "eigh": eigh,
    "random": random,
    "gaussian": functools.partial(random, "gaussian", stored=False),
    "rows": rows,
    "sampled": sampled,
}


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


def _power_steps(gradient: jax.Array, start: jax.Array, steps: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """R <- PᵀG with P = orth(G Rᵀ), so many times, from R = ``start`` (r, n); then in the order of energy.

    A Gaussian start is a sketch of G, the coordinates in some basis a power step from that.
    """

    def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        wide = promoted(gradient)  # here, where XLA takes it into the products and holds no copy
        basis = orthonormal(wide @ _unit(carry[1]).T)
        return basis, basis.T @ wide

    nothing = jnp.zeros((gradient.shape[0], start.shape[0]), start.dtype)
    return _by_energy(*jax.lax.fori_loop(0, steps, step, (nothing, start)))


def _gram_eigh(gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All left singular vectors [m, m] and squared singular values [m] of a multiple of G, largest first."""
    gradient = _unit(promoted(gradient))
    values, vectors = jnp.linalg.eigh(jnp.matmul(gradient, gradient.T, precision=_HIGHEST))
    return vectors[:, ::-1], values[::-1]


def _by_energy(basis: jax.Array, coordinates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Columns by the energy they carry, largest first, the largest entry of each positive."""
    order = jnp.argsort(-jnp.sum(jnp.square(_unit(coordinates)), axis=1))
    sign = jnp.where(jnp.max(basis, axis=0) >= -jnp.min(basis, axis=0), 1, -1).astype(basis.dtype)
    return (basis * sign[None, :])[:, order], (coordinates * sign[:, None])[order]


def _unit(x: jax.Array) -> jax.Array:
    """x times a power of two, which rounds nothing, so that the largest entry lies in [1/2, 1) and squares do not overflow."""
    exponent = jnp.frexp(jnp.max(jnp.abs(x)))[1]
    half = exponent // 2  # 2^-exponent itself may overflow
    one = jnp.ones([], x.dtype)
    return x * jnp.ldexp(one, -half) * jnp.ldexp(one, half - exponent)


def _draw_stiefel(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return orthonormal(jax.random.normal(key, shape, dtype))


def _draw_gaussian(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * shape[1] ** -0.5


_DRAWS = {"stiefel": _draw_stiefel, "gaussian": _draw_gaussian}
