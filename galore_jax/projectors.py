# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Bases from gradients: P in R^(m x r), for G in R^(m x n).

    svd          P = U[:, :r] of G = U S Vᵀ                      exact; slow, and minutes of compile time on TPU
    eigh         P = the r leading eigenvectors of G Gᵀ          exact; one m x m factorization
    randomized   Q = orth(G Ω), then q times orth(G (QᵀG)ᵀ);     the r columns of most energy (Halko, Martinsson and Tropp
                                                                 2011, arXiv 0909.4061, Algorithm 4.4)
    power        P = orth(G (P_oldᵀG)ᵀ)                          block power steps from the basis in use, until the captured
                                                                 energy ‖PᵀG‖² has stopped growing
    random       P uniform on the Stiefel manifold, or Gaussian  E[P Pᵀ] = (r/m) I, or I with entries of variance 1/r
    gaussian     the latter, of which the state has a seed only  (APOLLO, arXiv 2412.05270)
    rows         P = the r rows of largest norm, or drawn with   E[P Pᵀ] = I for the latter (Grass, arXiv 2406.17660)
                 probability q_i ∝ ‖G_i‖² and factor (r q_i)^-½
    sampled      r of the columns of U, without replacement,     (SARA, arXiv 2502.05790)
                 with probability ∝ σ
    switch       one projector, and from some step on another    (GoLore, arXiv 2410.11289)

A refresh should move the basis no more than the gradient asks for, because by default the moments are kept as they are.
In a power step from a basis in use, the triangular factorization keeps each column near its predecessor, in place and in sign,
and brings it nearer to a singular vector, in whose coordinates Adam's second moments work best.  More steps find more of the
gradient, but also turn the columns within their span.  ``power`` therefore turns its last basis P back towards P_1, that of its
first step: P Q, where Q is the orthogonal matrix nearest to PᵀP_1 (orthogonal Procrustes).  ``eigh``, ``randomized`` and
``sampled`` start from scratch, so they order columns by energy, largest first, and make the entry of largest magnitude in each
positive.  ``svd`` leaves the signs to the routine, as the published implementations do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import sharding
from galore_jax._core.basis import Basis, Dense, RowBasis, Rows, Seeded, Storage
from galore_jax._core.dtypes import promoted
from galore_jax._core.orthonormal import noise, orthonormal

__all__ = ["Projector", "ProjectorInput", "eigh", "power", "random", "randomized", "rows", "sampled", "svd", "switch"]

_HIGHEST = jax.lax.Precision.HIGHEST
# Power steps end when the captured energy grows by at most 1%.  From one gradient to an unrelated one that is after two steps.
# One step would do where it captures nearly all of the gradient, but it leaves the weakest directions to rounding.
_GROWTH = 1.01**0.5
_MORE_STEPS = 5


class ProjectorInput(NamedTuple):
    """The inputs to a projector for one matrix; a basis on the right of a gradient is one on the left of its transpose.

    The gradient is finite and not zero, of any scale.
    """

    key: jax.Array  # PRNG key of this refresh
    gradient: jax.Array  # (m, n), at least float32 or bfloat16
    basis: Basis  # in use; zeros if there is none
    coordinates: jax.Array  # (r, n), the gradient in that basis, at least float32
    step: jax.Array  # scalar, int32
    transposed: bool  # whether the gradient is the transpose of the parameter's


class Projector(NamedTuple):
    """How a basis is made: ``refresh(ProjectorInput(...))`` returns the new basis.

    Pure functions on one matrix; :attr:`storage` has what is done with a basis (zeros, project, lift, overlap).
    """

    name: str
    refresh: Callable[[ProjectorInput], Basis]
    storage: Storage = Dense()


def svd() -> Projector:
    """The exact leading left singular vectors, signs as the SVD routine returns them: the reference, not for large matrices."""

    def refresh(seen: ProjectorInput) -> jax.Array:
        rank = seen.coordinates.shape[0]
        gradient = promoted(seen.gradient)
        if seen.transposed:
            return jnp.linalg.svd(gradient.T, full_matrices=False)[2].T[:, :rank]
        return jnp.linalg.svd(gradient, full_matrices=False)[0][:, :rank]

    return Projector("svd", refresh)


def eigh() -> Projector:
    """The exact leading left singular vectors by way of the m x m Gram matrix."""

    def refresh(seen: ProjectorInput) -> jax.Array:
        vectors, _ = _gram_eigh(seen.gradient)
        return _signed(vectors[:, : seen.coordinates.shape[0]])

    return Projector("eigh", refresh)


def randomized(power_iterations: int = 2, oversample: int = 8) -> Projector:
    """A randomized range finder, from scratch at each refresh: matmuls and small Cholesky factorizations only.

    Args:
      power_iterations: How often the sketch is multiplied by G Gᵀ; more come closer to ``svd``.
      oversample: Extra columns of the sketch, dropped at the end.
    """
    if power_iterations < 0 or oversample < 0:
        raise ValueError(
            f"randomized() needs power_iterations >= 0 and oversample >= 0, got {power_iterations} and {oversample}."
        )

    def refresh(seen: ProjectorInput) -> jax.Array:
        rank = seen.coordinates.shape[0]
        columns = min(rank + oversample, *seen.gradient.shape)  # the rank itself never exceeds the smaller side
        sketch = jax.random.normal(seen.key, (columns, seen.gradient.shape[1]), seen.coordinates.dtype)
        start = _power_step(seen.gradient, _unit(sketch))
        basis, coordinates, _ = jax.lax.fori_loop(
            0, power_iterations, lambda _, found: _power_step(seen.gradient, found[1]), start
        )
        order = jnp.argsort(-jnp.sum(jnp.square(coordinates), axis=1))
        return _signed(basis[:, order[:rank]])

    return Projector("randomized", refresh)


def power(iterations: int = 1) -> Projector:
    """A warm-started block power iteration, the default: two matmuls with G and an orthonormalization for each step.

    A step multiplies the directions in use by G Gᵀ.  Steps go on while the captured energy grows by more than 1%, up to five
    beyond ``iterations``; where the basis captures nothing yet, it takes all of them.  Directions that the gradient has left are
    replaced by random ones in the first step, from which the next steps find the gradient again.  The result of several steps is
    then turned within its span to lie near the basis of the first, so that moments which are kept still belong to it.

    Args:
      iterations: Least number of steps at each refresh, at least 1.

    >>> gradient = jax.random.normal(jax.random.key(0), (8, 16)) / 4
    >>> seen = ProjectorInput(jax.random.key(1), gradient, jnp.zeros((8, 2)), jnp.zeros((2, 16)), jnp.int32(0), False)
    >>> basis = power().refresh(seen)
    >>> bool(jnp.allclose(basis.T @ basis, jnp.eye(2), atol=1e-6))
    True
    """
    if iterations < 1:
        raise ValueError(f"power() needs iterations >= 1, got {iterations}.")

    def refresh(seen: ProjectorInput) -> jax.Array:
        coordinates, norm = _unit_and_norm(seen.coordinates)
        least = jnp.where(norm > 0, iterations, iterations + _MORE_STEPS)

        def unfinished(carry: tuple) -> jax.Array:
            number, _, _, _, before, now = carry
            return (number < least) | ((number < iterations + _MORE_STEPS) & (now > _GROWTH * before))

        def step(carry: tuple) -> tuple:
            number, first, _, coordinates, _, now = carry
            basis, coordinates, norm = _power_step(seen.gradient, coordinates)
            return number + 1, jnp.where(number == 0, basis, first), basis, coordinates, now, norm

        start = jnp.zeros([], jnp.int32), seen.basis, seen.basis, coordinates, jnp.zeros_like(norm), norm
        number, first, basis, *_ = jax.lax.while_loop(unfinished, step, start)
        return jax.lax.cond((norm > 0) & (number > 1), _nearest, lambda basis, _: basis, basis, first)

    return Projector("power", refresh)


def random(kind: str = "stiefel", stored: bool = True) -> Projector:
    """A random basis that does not look at the gradient, a new one at each refresh.

    Args:
      kind: "stiefel" (orthonormal columns, uniformly distributed) or "gaussian" (independent entries of variance 1/r).
      stored: If False, keep the seed only and draw the basis anew at each use, which costs time and saves its memory.

    >>> random("stiefel", stored=False).storage.zeros((3, 8, 2), jnp.float32, None, None).shape
    (3,)
    """
    if kind not in _DRAWS:
        raise ValueError(f"random() got kind={kind!r}: write one of {', '.join(_DRAWS)}.")
    draw = _DRAWS[kind]
    orthonormal_columns = kind == "stiefel"

    def refresh_stored(seen: ProjectorInput) -> jax.Array:
        return _varying(draw(jax.random.bits(seen.key), seen.basis.shape, seen.basis.dtype), seen)

    def refresh_seed(seen: ProjectorInput) -> jax.Array:
        return _varying(jnp.maximum(jax.random.bits(seen.key), 1), seen)

    if stored:
        return Projector("random", refresh_stored, Dense(orthonormal_columns))
    return Projector("random", refresh_seed, Seeded(draw, orthonormal_columns))


def rows(select: str = "top") -> Projector:
    """Rows of the gradient itself: projection is a gather, and the basis is r indices.

    Args:
      select: "top" (the rows of largest norm) or "sampled" (with replacement, probability ∝ squared norm, unbiased).
    """
    if select not in ("top", "sampled"):
        raise ValueError(f'rows() got select={select!r}: write "top" or "sampled".')

    def refresh(seen: ProjectorInput) -> RowBasis:
        rank = seen.coordinates.shape[0]
        energy = jnp.sum(jnp.square(_unit(promoted(seen.gradient))), axis=1)  # [m]
        if select == "top":
            index = jax.lax.top_k(energy, rank)[1]
            factor = jnp.ones((rank,), energy.dtype)
        else:
            index = jax.random.categorical(seen.key, jnp.log(energy), shape=(rank,))
            index = index[jnp.argsort(-energy[index])]
            factor = jax.lax.rsqrt(rank * (energy[index] / jnp.sum(energy)))
        return RowBasis(index.astype(jnp.int32), factor)

    return Projector("rows", refresh, Rows())


def sampled() -> Projector:
    """Singular vectors drawn without replacement with probability proportional to their singular values."""

    def refresh(seen: ProjectorInput) -> jax.Array:
        vectors, values = _gram_eigh(seen.gradient)
        # The largest of log σ + Gumbel noise are such a draw; a σ of zero is taken only when nothing else is left.
        noise = jax.random.gumbel(seen.key, values.shape, values.dtype)
        tiny = jnp.finfo(values.dtype).tiny
        _, index = jax.lax.top_k(jnp.log(jnp.maximum(values, tiny)) / 2 + noise, seen.coordinates.shape[0])
        return _signed(vectors[:, jnp.sort(index)])

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

    def refresh(seen: ProjectorInput) -> Basis:
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


def _power_step(gradient: jax.Array, coordinates: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """P = orth(G Rᵀ), a multiple of PᵀG as :func:`_unit` makes it, and ‖PᵀG‖.

    A Gaussian R makes a sketch of G, and coordinates in a basis a power step from that basis; the largest entry of R is 1.
    """
    # Promoted here, where XLA fuses it into the products and holds no copy.
    wide = promoted(gradient)
    basis = orthonormal(wide @ coordinates.T)
    return basis, *_unit_and_norm(basis.T @ wide)


def _nearest(basis: jax.Array, other: jax.Array) -> jax.Array:
    """Returns P Q, nearly the basis in the span of P that is nearest to another one, P_1: Q is about U Vᵀ of PᵀP_1 = U S Vᵀ.

    Newton-Schulz steps drive the cosines S of the angles between the spans towards 1.  The factorization then makes Q orthogonal
    to rounding, also where an angle is a right one.
    """
    cosines = jnp.matmul(basis.T, other, precision=_HIGHEST)
    for _ in range(4):
        gram = jnp.matmul(cosines.T, cosines, precision=_HIGHEST)
        cosines = 1.5 * cosines - 0.5 * jnp.matmul(cosines, gram, precision=_HIGHEST)
    return jnp.matmul(basis, orthonormal(cosines), precision=_HIGHEST)


def _gram_eigh(gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All left singular vectors [m, m] and squared singular values [m] of a multiple of G, largest first."""
    gradient = _unit(promoted(gradient))
    values, vectors = jnp.linalg.eigh(jnp.matmul(gradient, gradient.T, precision=_HIGHEST))
    return vectors[:, ::-1], values[::-1]


def _signed(basis: jax.Array) -> jax.Array:
    """Columns whose entry of largest magnitude is positive."""
    return basis * jnp.where(jnp.max(basis, axis=0) >= -jnp.min(basis, axis=0), 1, -1).astype(basis.dtype)[None, :]


def _unit(x: jax.Array) -> jax.Array:
    """x over its largest magnitude, so that squares neither over- nor underflow; zeros stay."""
    return _unit_and_norm(x)[0]


def _unit_and_norm(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`_unit` of a matrix, and its Frobenius norm, a scalar."""
    peak = jnp.max(jnp.abs(x))
    unit = x / jnp.where(peak > 0, peak, 1)
    return unit, peak * jnp.sqrt(jnp.sum(jnp.square(unit)))


def _varying(basis: jax.Array, seen: ProjectorInput) -> jax.Array:
    """A basis that does not depend on the gradient, with the type inside ``jax.shard_map`` of one that does."""
    return basis + sharding.varying_zero((seen.gradient, seen.basis)).astype(basis.dtype)


def _draw_stiefel(seed: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return orthonormal(jax.random.normal(jax.random.key(seed), shape, dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_gaussian(seed: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    # It is drawn at each use for each parameter, so its program is a tenth of that of jax.random, and parameters of one shape
    # share it.
    uniform = noise(shape, dtype, seed) * (1 - float(jnp.finfo(dtype).eps))
    return jax.lax.erf_inv(uniform) * (2 / shape[1]) ** 0.5


_DRAWS = {"stiefel": _draw_stiefel, "gaussian": _draw_gaussian}
