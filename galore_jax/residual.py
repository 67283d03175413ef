# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What an update does with the gradient outside the subspace, S = G - P R, R = PᵀG; N is the inner transformation's answer to R.

    fira          α P N + S diag(φ),  φ_j = ‖N_j‖ / ‖R_j‖           Chen et al. 2024, arXiv 2410.01623
    sgd           α P N + c S                                        FRUGAL, arXiv 2411.07837, with SGD outside
    sign          α P N + c sign(S)                                  FRUGAL with signSGD outside
    channel       α G diag(φ)                                        APOLLO, Zhu et al. 2024, arXiv 2412.05270
    tensor        α φ G,  φ = ‖N‖ / ‖R‖                              APOLLO-Mini, the same
    orthogonal    α 0.2 √max(m, n) NS(P N + c S)                     Muon's step (K. Jordan 2024) from a low-rank momentum

j goes over the columns for a basis on the left, over the rows for one on the right.  S is orthogonal to an orthonormal P, and α
is not in it.  fira, channel and tensor bound the growth of the norm of what they scale, S diag(φ), G diag(φ) or φ G, from one
update to the next, matrix by matrix: see :mod:`galore_jax.limiter`.

NS is five steps of a Newton-Schulz iteration that moves all singular values to about 1.  Every rule needs the whole gradient, and
an inner transformation that answers in the direction of the gradient, with the learning rate outside: ``optax.scale_by_adam()``,
not ``optax.adam(1e-3)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import sharding
from galore_jax.limiter import GAMMA, bounded, check_growth, norm_of
from galore_jax.matrix_view import MatrixView

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class Parts(NamedTuple):
    """What a rule combines, of one parameter."""

    gradient: jax.Array  # G, (*batch, m, n)
    low_rank: jax.Array  # R, (*batch, r, n) for a basis on the left
    reply: jax.Array  # N, the same
    lift: Callable[[jax.Array], jax.Array]  # X -> P X, (*batch, m, n)
    alpha: jax.Array | float
    axis: int  # that the basis acts on: -2 for a basis on the left, -1 on the right


class Residual(NamedTuple):
    """``combine(parts, state)`` returns the update (*batch, m, n) and the new state, which starts as ``init(batch_shape)``."""

    name: str
    combine: Callable[[Parts, Any], tuple[jax.Array, Any]]
    init: Callable[[tuple[int, ...]], Any] = lambda batch_shape: ()


def fira(growth: float | None = GAMMA) -> Residual:
    """The gradient outside, scaled channel by channel as the inner transformation scales inside.

    Args:
      growth: γ, bound on the growth of its norm from one update to the next; None for no bound.

    >>> fira().name
    'fira'
    """

    def combine(parts: Parts, norm: Any) -> tuple[jax.Array, Any]:
        outside, norm = _bounded(_outside(parts) * _ratio(parts, parts.axis), norm, growth)
        return _inside(parts) + outside, norm

    return Residual("fira", combine, _norms(growth))


def sgd(factor: float = 1.0) -> Residual:
    """``factor`` times the gradient outside."""
    return Residual("sgd", lambda parts, state: (_inside(parts) + factor * _outside(parts), state))


def sign(factor: float = 1.0) -> Residual:
    """``factor`` times the sign of the gradient outside."""
    return Residual("sign", lambda parts, state: (_inside(parts) + factor * jnp.sign(_outside(parts)), state))


def channel(growth: float | None = GAMMA) -> Residual:
    """The whole gradient, scaled channel by channel as the inner transformation scales inside; nothing is lifted."""
    return _scaled("channel", lambda parts: _ratio(parts, parts.axis), growth)


def tensor(growth: float | None = GAMMA) -> Residual:
    """The whole gradient, scaled as a whole as the inner transformation scales inside; nothing is lifted."""
    return _scaled("tensor", lambda parts: _ratio(parts, (-2, -1)), growth)


def orthogonal(factor: float | jax.Array = 16.0) -> Residual:
    """The direction P N + ``factor`` S with all its singular values moved to about 1, in root mean square as AdamW's updates.

    With a momentum inside, N sums about 1/(1-β) gradients, and S wants a factor of that order.
    """

    def combine(parts: Parts, state: Any) -> tuple[jax.Array, Any]:
        whole = newton_schulz(parts.lift(parts.reply) + factor * _outside(parts))
        return parts.alpha * (0.2 * max(whole.shape[-2:]) ** 0.5) * whole, state

    return Residual("orthogonal", combine)


RESIDUALS: dict[str, Callable[[], Residual]] = {
    "fira": fira,
    "sgd": sgd,
    "sign": sign,
    "channel": channel,
    "tensor": tensor,
    "orthogonal": orthogonal,
}


def get(residual: str | Residual | None) -> Residual | None:
    """A rule by name, or the object itself.

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


def check_scale(scale: Any) -> None:
    """Raises unless ``scale`` is a finite number, "rms" or an injected hyperparameter."""
    if isinstance(scale, jax.Array) or (isinstance(scale, str) and scale == "rms"):
        return
    if isinstance(scale, (bool, str)) or not isinstance(scale, (int, float, np.number)) or not math.isfinite(scale):
        raise ValueError(f'scale is {scale!r}: write a finite number or "rms".')


def alpha(view: MatrixView, scale: Any, dtype: Any) -> jax.Array | float:
    """α of a parameter."""
    return rms_scale(view) if isinstance(scale, str) else jnp.asarray(scale).astype(dtype)


def rms_scale(view: MatrixView) -> float:
    """The α that keeps the root mean square of the inner update.

    >>> from galore_jax.matrix_view import select
    >>> [view] = select({"w": jnp.zeros((64, 256))}, rank=16)
    >>> rms_scale(view)
    2.0
    """
    return math.sqrt(math.prod(view.matrix_shape) / math.prod(view.low_rank_shape[-2:]))


def check_direction(inner: optax.GradientTransformation, residual: Residual | None) -> None:
    """Raises a ValueError if ``inner`` answers against the gradient, so that a residual would go uphill.

    Of an inner transformation with traced hyperparameters nothing is known: ``optax.inject_hyperparams`` makes one anew in each
    traced update, after one with numbers in ``init``.
    """
    if residual is None:
        return
    # On no mesh: that of the arrays around it may be abstract, on which nothing can be computed.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.ensure_compile_time_eval():
        ones = {"w": jnp.ones((2, 2))}
        [reply] = jax.tree.leaves(inner.update(ones, inner.init(ones), ones)[0])
        total = jnp.sum(reply)
        uphill = not isinstance(total, jax.core.Tracer) and bool(total < 0)
    if uphill:
        raise ValueError(
            f"residual={residual.name!r} adds up with an inner transformation that answers in the direction of the gradient, but "
            "inner goes against it: take the learning rate out, for example optax.chain(galore(optax.scale_by_adam(), ...), "
            "optax.scale_by_learning_rate(1e-3)) instead of galore(optax.adam(1e-3), ...)."
        )


def newton_schulz(matrices: jax.Array) -> jax.Array:
    """Matrices (*batch, m, n) with their singular values moved to between about 0.7 and 1.2; zeros stay.

    >>> x = jnp.diag(jnp.array([3.0, 0.3]))
    >>> bool(jnp.all(jnp.abs(jnp.diagonal(newton_schulz(x)) - 1) < 0.4))
    True
    """
    matrices = sharding.gather(matrices, (matrices.ndim - 2, matrices.ndim - 1))
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = jnp.swapaxes(matrices, -1, -2) if tall else matrices
    norm = norm_of(x, (-2, -1))
    x = x / jnp.where(norm > 0, norm, 1)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_STEPS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def _scaled(name: str, ratio: Callable[[Parts], jax.Array], growth: float | None) -> Residual:
    def combine(parts: Parts, norm: Any) -> tuple[jax.Array, Any]:
        scaled, norm = _bounded(parts.gradient * ratio(parts), norm, growth)
        return parts.alpha * scaled, norm

    return Residual(name, combine, _norms(growth))


def _inside(parts: Parts) -> jax.Array:
    return parts.alpha * parts.lift(parts.reply)


def _outside(parts: Parts) -> jax.Array:
    return parts.gradient - parts.lift(parts.low_rank)


def _ratio(parts: Parts, axes: int | tuple[int, int]) -> jax.Array:
    """‖N_j‖ / ‖R_j‖, 0 where R_j is zero."""
    below = norm_of(parts.low_rank, axes)
    return jnp.where(below > 0, norm_of(parts.reply, axes) / jnp.where(below > 0, below, 1), 0)


def _norms(growth: float | None) -> Callable[[tuple[int, ...]], Any]:
    """[*batch] float32, 0 before the first update; no state without a bound."""
    if growth is None:
        return lambda batch_shape: ()
    check_growth(growth, "growth")
    return lambda batch_shape: jnp.zeros(batch_shape, jnp.float32)


def _bounded(x: jax.Array, before: Any, growth: float | None) -> tuple[jax.Array, Any]:
    return (x, before) if growth is None else bounded(x, before, growth)
