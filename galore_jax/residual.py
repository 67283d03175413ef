# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Rules for the gradient outside the subspace, S = G - P R with R = PᵀG.  N is the reply of the inner transformation to R.

    fira          α P N + S diag(φ),  φ_j = ‖N_j‖ / ‖R_j‖           Chen et al. 2024, arXiv 2410.01623
    sgd           α P N + c S                                        FRUGAL, arXiv 2411.07837, with SGD outside
    sign          α P N + c sign(S)                                  FRUGAL with signSGD outside
    channel       α G diag(φ)                                        APOLLO, Zhu et al. 2024, arXiv 2412.05270
    tensor        α φ G,  φ = ‖N‖ / ‖R‖                              APOLLO-Mini, same paper
    orthogonal    α 0.2 √max(m, n) NS(P N + c S)                     Muon's step (K. Jordan 2024) from a low-rank momentum;
                                                                     with NorMuon's division of O = NS(...), if asked for:
                  v_j <- b v_j + (1 - b) mean_i O_ij²,   O_ij / √v_j at the norm of O         (arXiv 2510.05491)

The index j runs over the columns for a basis on the left, and over the rows for one on the right.  S is orthogonal to an
orthonormal P, and α does not scale it.  fira, channel and tensor bound the growth of the norm of what they scale, S diag(φ),
G diag(φ) or φ G, from one update to the next, matrix by matrix: see :mod:`galore_jax.limiter`.

NS is five steps of a Newton-Schulz iteration that moves all singular values to about 1.  Every rule needs the whole gradient, and
an inner transformation whose updates point along the gradient, with the learning rate outside: ``optax.scale_by_adam()``, not
``optax.adam(1e-3)``.

A rule is a function of one matrix, and :func:`combine` applies it to the stack of a parameter in the place of the gradient, one
matrix after the other.  A rule lifts as few matrices as it can, because each one is as large as the gradient: α P N + c S is
c G + P (α N - c R), with a single lift.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import sharding
from galore_jax._core import probe, trees
from galore_jax._core.dtypes import promoted
from galore_jax._core.matrix_loop import matrix_by_matrix
from galore_jax.limiter import GAMMA, check_growth, growth_factor, norm_of
from galore_jax.matrix_view import MatrixView

__all__ = ["Residual", "channel", "fira", "orthogonal", "sgd", "sign", "tensor"]

# The factors a, b, c of X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X in each step, and a factor of the norm that X starts from.
_NS_COEFFS = {
    "standard": (((3.4445, -4.7750, 2.0315),) * 5, 1.0),
    # The best polynomial for each step (Amsel et al. 2025, arXiv 2505.16932), rounded to four digits.
    "polar_express": (
        (
            (8.1566, -22.4833, 15.8788),
            (4.0429, -2.8089, 0.5000),
            (3.8917, -2.7725, 0.5061),
            (3.2858, -2.3681, 0.4645),
            (2.3465, -1.7098, 0.4232),
        ),
        1.02,
    ),
}


class Parts(NamedTuple):
    """The inputs of a rule for one matrix."""

    gradient: jax.Array  # G, (m, n), at least float32
    low_rank: jax.Array  # R, (r, n) for a basis on the left
    reply: jax.Array  # N, the same
    lift: Callable[[jax.Array], jax.Array]  # X -> P X, (m, n)
    alpha: jax.Array | float
    axis: int  # the axis of G that the basis acts on: -2 for a basis on the left, -1 on the right


class Residual(NamedTuple):
    """A rule: ``combine(parts, state)`` returns the update (m, n) of one matrix and the new state.

    ``init(view)`` returns the states of a parameter's matrices, arrays of (*batch, ...).
    """

    name: str
    combine: Callable[[Parts, Any], tuple[jax.Array, Any]]
    init: Callable[[MatrixView], Any] = lambda view: ()


def fira(growth: float | None = GAMMA) -> Residual:
    """The gradient outside, scaled channel by channel as the inner transformation scales inside.

    Args:
      growth: γ, the largest ratio of its norm to that of the update before; None for no bound.

    >>> fira().name
    'fira'
    """

    def combine(parts: Parts, norm: Any) -> tuple[jax.Array, Any]:
        ratio = _ratio(parts, parts.axis)
        # ‖S_j‖² = ‖G_j‖² - ‖R_j‖² would save the lift here, but it cancels where S is small beside G, and a basis in 4 or 16 bits
        # is not orthonormal enough for it.
        factor, norm = _bounded(lambda: parts.gradient * ratio - parts.lift(parts.low_rank * ratio), norm, growth)
        return _with_outside(parts, ratio * factor), norm

    return Residual("fira", combine, _norms(growth))


def sgd(factor: float = 1.0) -> Residual:
    """``factor`` times the gradient outside."""
    return Residual("sgd", lambda parts, state: (_with_outside(parts, factor), state))


def sign(factor: float = 1.0) -> Residual:
    """``factor`` times the sign of the gradient outside."""

    def combine(parts: Parts, state: Any) -> tuple[jax.Array, Any]:
        signs = jnp.sign(parts.gradient - parts.lift(parts.low_rank))
        return parts.lift(parts.alpha * parts.reply) + factor * signs, state

    return Residual("sign", combine)


def channel(growth: float | None = GAMMA) -> Residual:
    """The whole gradient, scaled channel by channel as the inner transformation scales inside; nothing is lifted."""
    return _scaled("channel", lambda parts: _ratio(parts, parts.axis), growth)


def tensor(growth: float | None = GAMMA) -> Residual:
    """The whole gradient, scaled as a whole as the inner transformation scales inside; nothing is lifted."""
    return _scaled("tensor", lambda parts: _ratio(parts, (-2, -1)), growth)


def orthogonal(
    factor: float | jax.Array = 16.0, neuron_decay: float | jax.Array | None = None, ns_coeffs: str = "standard"
) -> Residual:
    """The direction P N + ``factor`` S with all singular values moved to about 1, scaled to the root mean square of AdamW.

    With a momentum inside, N sums about 1/(1-β) gradients, so S needs a factor of that order.  With ``neuron_decay``, the part of
    each output neuron is divided as :func:`divided_by_neuron` does.  ``ns_coeffs`` is that of :func:`newton_schulz`.
    """
    check_ns_coeffs(ns_coeffs)

    def combine(parts: Parts, state: Any) -> tuple[jax.Array, Any]:
        whole, state = muon_step(_with_outside(parts._replace(alpha=1.0), factor), state, neuron_decay, ns_coeffs)
        return parts.alpha * whole, state

    return Residual("orthogonal", combine, lambda view: neuron_squares(view, neuron_decay))


RESIDUALS: dict[str, Callable[[], Residual]] = {
    "fira": fira,
    "sgd": sgd,
    "sign": sign,
    "channel": channel,
    "tensor": tensor,
    "orthogonal": orthogonal,
}


def get(residual: str | Residual | None) -> Residual | None:
    """Returns a rule by name, or the object itself.

    >>> get("channel").name
    'channel'
    """
    if residual is None or isinstance(residual, Residual):
        return residual
    if residual not in RESIDUALS:
        raise ValueError(
            f"residual is {residual!r}: write None, one of {', '.join(RESIDUALS)}, or a rule of galore_jax.residual."
        )
    return RESIDUALS[residual]()


def combine(
    rule: Residual,
    matrices: jax.Array,
    good: jax.Array,
    low_rank: jax.Array,
    replies: jax.Array,
    bases: Any,
    states: Any,
    *,
    lift: Callable[[jax.Array, Any], jax.Array],
    alpha: jax.Array | float,
    axis: int,
) -> tuple[jax.Array, Any]:
    """The updates of the matrices of one parameter, in the place of their gradients, and the new states of the rule.

    Args:
      rule: The rule.
      matrices: The gradients G, (*batch, m, n) in their own dtype.
      good: Bool [*batch].  Where False, the update is zero and the rule's state stays.
      low_rank: R, (*batch, r, n) for a basis on the left.
      replies: N, the same, zeros where not ``good``.
      bases: A pytree of arrays (*batch, ...).
      states: The rule's states, a pytree of arrays (*batch, ...).
      lift: ``lift(X, bases)`` is P X for the bases of one matrix.
      alpha: α.
      axis: The axis that the basis acts on, -2 or -1.

    Returns:
      The updates, in the shape, dtype and sharding type of ``matrices``, and the states.
    """

    def one(carried: tuple[jax.Array, Any], given: Any) -> tuple[jax.Array, Any]:
        matrix, state = carried
        good, low_rank, reply, bases = given
        parts = Parts(promoted(matrix), low_rank, reply, lambda x: lift(x, bases), alpha, axis)
        update, new = rule.combine(parts, state)
        # XLA would write a gradient that is masked first, for the second pass over it.
        update = jnp.where(good, update.astype(matrix.dtype), 0)
        return update, jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state)

    return matrix_by_matrix(one, (matrices, states), (good, low_rank, replies, bases), good.ndim)


def check_scale(scale: Any) -> None:
    """Raises a ValueError unless ``scale`` is a finite number, "rms" or an injected hyperparameter."""
    if isinstance(scale, jax.Array) or (isinstance(scale, str) and scale == "rms"):
        return
    if isinstance(scale, (bool, str)) or not isinstance(scale, (int, float, np.number)) or not math.isfinite(scale):
        raise ValueError(f'scale is {scale!r}: write a finite number or "rms".')


def alpha(view: MatrixView, scale: Any, dtype: Any) -> jax.Array | float:
    """α of a parameter."""
    return rms_scale(view) if isinstance(scale, str) else jnp.asarray(scale).astype(dtype)


def rms_scale(view: MatrixView) -> float:
    """The α for which the update has the root mean square of the inner update.

    >>> from galore_jax.matrix_view import select
    >>> [view] = select({"w": jnp.zeros((64, 256))}, rank=16)
    >>> rms_scale(view)
    2.0
    """
    return math.sqrt(math.prod(view.matrix_shape) / math.prod(view.low_rank_shape[-2:]))


def check_direction(inner: optax.GradientTransformation, residual: Residual | None, low_rank_tree: Any) -> None:
    """Raises a ValueError if the updates of ``inner`` point against the gradient, so that the residual would go uphill.

    The check runs ``inner`` on a small tree of the same structure.  An ``inner`` that can't run on such a tree, because it needs
    extra arguments for example, passes.

    Args:
      inner: The inner transformation.
      residual: The rule, or None.
      low_rank_tree: The tree that ``inner`` is initialized with: arrays, tracers or ``jax.ShapeDtypeStruct``.
    """
    if residual is None:
        return
    gradients = probe.small(low_rank_tree, np.random.default_rng(0))
    # Two updates, because the learning rate of a warmup is zero in the first.
    replies = probe.first_replies(inner, gradients)
    if replies is None:
        return
    for path, gradient, *both in zip(trees.paths_of(gradients), jax.tree.leaves(gradients), *replies, strict=True):
        # A leaf without a matrix is not projected, so no residual is added to it.
        if gradient.ndim > 1 and sum(np.sum(gradient * reply) for reply in both) < 0:
            raise ValueError(
                f"residual={residual.name!r} adds to an inner transformation whose updates point along the gradient, but the "
                f"update of {path!r} by inner points against it: take the learning rate out, for example "
                "optax.chain(galore(optax.scale_by_adam(), ...), optax.scale_by_learning_rate(1e-3)) instead of "
                "galore(optax.adam(1e-3), ...)."
            )


def newton_schulz(matrices: jax.Array, ns_coeffs: str = "standard") -> jax.Array:
    """Matrices (*batch, m, n) with their singular values moved to between about 0.7 and 1.2; zeros stay zeros.

    Args:
      matrices: (*batch, m, n), at least float32.
      ns_coeffs: The coefficients of the five steps: ``"standard"``, those of Muon, or ``"polar_express"``, which move singular
        values nearer to 1.

    Products of float32 matrices are in bfloat16 on accelerators, as Muon has them, and in float32 on CPU.

    >>> x = jnp.diag(jnp.array([3.0, 0.3]))
    >>> bool(jnp.all(jnp.abs(jnp.diagonal(newton_schulz(x)) - 1) < 0.4))
    True
    """
    return matrix_by_matrix(lambda matrix, _: _orthogonalized(matrix, ns_coeffs), matrices, (), matrices.ndim - 2)


def check_ns_coeffs(ns_coeffs: str) -> None:
    """Raises a ValueError if ``ns_coeffs`` names no coefficients."""
    if ns_coeffs not in _NS_COEFFS:
        raise ValueError(f"ns_coeffs is {ns_coeffs!r}; expected one of {', '.join(_NS_COEFFS)}.")


def muon_step(
    direction: jax.Array, squares: Any, neuron_decay: float | jax.Array | None, ns_coeffs: str = "standard"
) -> tuple[jax.Array, Any]:
    """0.2 √max(m, n) NS(direction) of one matrix (m, n), and the mean squares of its neurons.

    The root mean square of the step is about that of AdamW's (arXiv 2502.16982, section 2.2).

    Args:
      direction: (m, n), at least float32.
      squares: The state that :func:`neuron_squares` makes for one matrix.
      neuron_decay: NorMuon's decay rate, or None.
      ns_coeffs: The coefficients of :func:`newton_schulz`.
    """
    whole = newton_schulz(direction, ns_coeffs)
    if neuron_decay is not None:
        whole, squares = divided_by_neuron(whole, squares, neuron_decay)
    return 0.2 * max(whole.shape) ** 0.5 * whole, squares


def neuron_squares(view: MatrixView, neuron_decay: float | jax.Array | None) -> Any:
    """NorMuon's state of a parameter's matrices: float32 zeros (*batch, n); () without ``neuron_decay``."""
    return () if neuron_decay is None else jnp.zeros((*view.batch_shape, view.matrix_shape[1]), jnp.float32)


def divided_by_neuron(matrix: jax.Array, squares: jax.Array, decay: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides each column by the root of its mean square over time, and keeps the norm of the matrix (NorMuon, arXiv 2510.05491).

    A column of a kernel (inputs, outputs) is an output neuron.  The orthogonalization leaves rows and columns of different norms
    where a matrix is not square, or where singular values stay below 1.

    Args:
      matrix: (m, n).
      squares: (n,), the mean squares so far.
      decay: The decay rate of the mean squares.

    Returns:
      The matrix and the new mean squares.

    >>> divided, squares = divided_by_neuron(jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.zeros(2), 0.5)
    >>> [round(float(x), 3) for x in jnp.diagonal(divided)], squares.tolist()
    ([3.536, 3.536], [2.25, 4.0])
    """
    means = jnp.mean(jnp.square(matrix), axis=0)
    new = decay * squares.astype(means.dtype) + (1 - decay) * means
    factors = jax.lax.rsqrt(jnp.maximum(new, 1e-10))
    # Both norms follow from the columns', so the divided matrix is written once.
    after = jnp.sum(means * jnp.square(factors))
    scale = jnp.sqrt(jnp.sum(means) / jnp.where(after > 0, after, 1))
    return matrix * (factors * scale)[None, :], new.astype(squares.dtype)


@functools.partial(jax.jit, static_argnames="ns_coeffs")
def _orthogonalized(matrix: jax.Array, ns_coeffs: str) -> jax.Array:
    """:func:`newton_schulz` of one matrix.  It is jitted, so that the parameters of one shape share its program."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = sharding.gather(matrix.T if tall else matrix)
    coefficients, start = _NS_COEFFS[ns_coeffs]
    norm = norm_of(x, (-2, -1)) * start
    x = x / jnp.where(norm > 0, norm, 1)

    def steps(x: jax.Array) -> jax.Array:
        table = jnp.asarray(coefficients, x.dtype)

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            a, b, c = table[i]
            gram = x @ x.T
            return a * x + (b * gram + c * gram @ gram) @ x

        return jax.lax.fori_loop(0, len(coefficients), step, x)

    def in_bfloat16(x: jax.Array) -> jax.Array:
        return steps(x.astype(jnp.bfloat16)).astype(x.dtype)

    # Each step corrects the roundings of those before it, and accelerators multiply bfloat16 at a multiple of the speed.
    x = steps(x) if x.dtype != jnp.float32 else jax.lax.platform_dependent(x, cpu=steps, default=in_bfloat16)
    return x.T if tall else x


def _scaled(name: str, ratio: Callable[[Parts], jax.Array], growth: float | None) -> Residual:
    def combine(parts: Parts, norm: Any) -> tuple[jax.Array, Any]:
        ratios = ratio(parts)
        factor, norm = _bounded(lambda: parts.gradient * ratios, norm, growth)
        return parts.gradient * (parts.alpha * factor * ratios), norm

    return Residual(name, combine, _norms(growth))


def _with_outside(parts: Parts, factor: Any) -> jax.Array:
    """α P N + S diag(factor), with one lift."""
    return parts.gradient * factor + parts.lift(parts.alpha * parts.reply - parts.low_rank * factor)


def _ratio(parts: Parts, axes: int | tuple[int, int]) -> jax.Array:
    """‖N_j‖ / ‖R_j‖, 0 where R_j is zero."""
    ratio = _norm(parts.reply, axes) / _norm(parts.low_rank, axes)
    return jnp.where(jnp.isfinite(ratio), ratio, 0)


def _norm(x: jax.Array, axes: int | tuple[int, int]) -> jax.Array:
    """The norm along ``axes``, which keep size 1, in one pass: zero or infinite beyond the range of Adam's second moments."""
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x)), axis=axes, keepdims=True))


def _norms(growth: float | None) -> Callable[[MatrixView], Any]:
    """[*batch] float32, 0 before the first update; no state without a bound."""
    if growth is None:
        return lambda view: ()
    check_growth(growth, "growth")
    return lambda view: jnp.zeros(view.batch_shape, jnp.float32)


def _bounded(matrix: Callable[[], jax.Array], before: Any, growth: float | None) -> tuple[Any, Any]:
    """The factor, (1, 1), that bounds the growth of the norm of a matrix, and the norm to keep."""
    if growth is None:
        return 1.0, before
    return growth_factor(sharding.gather(_norm(matrix(), (-2, -1))), before, growth)
