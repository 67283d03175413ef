# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A bound on the growth of the norm of an update, matrix by matrix (Chen et al. 2024, Fira, arXiv 2410.01623, section 4.3):

    ‖X_t‖ > γ ‖X_(t-1)‖   =>   X_t <- X_t γ ‖X_(t-1)‖ / ‖X_t‖          γ = 1.01, the norm that is kept is the bounded one

Where clipping needs to know how large an update may be, this needs to know only how fast one may become larger: a spike in the
gradient does not reach the weights, and a slow growth does.  X_t is the gradient outside the subspace in Fira and the whole
scaled gradient in APOLLO; see :mod:`galore_jax.residual`.  An update that is zero says nothing about the next and is not kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import sharding
from galore_jax._core.dtypes import promoted

GAMMA = 1.01


class LimitNormGrowthState(NamedTuple):
    """State of :func:`limit_norm_growth`."""

    norm: Any  # for each parameter float32 [*batch]: of the last update that was not zero; 0 before the first


def limit_norm_growth(gamma: float | jax.Array = GAMMA) -> optax.GradientTransformationExtraArgs:
    """Bounds how much the norm of each matrix's update grows from one update to the next.

    The last two axes of a parameter are the matrix and axes before them count matrices, each with a norm of its own; a vector
    has one norm.  A matrix with an entry that is not finite is handed on as it is, and its norm is not remembered.  It belongs
    before the learning rate, whose schedule would else be bounded too: ``optax.chain(optax.scale_by_adam(),
    limit_norm_growth(), optax.scale_by_learning_rate(schedule))``.

    Args:
      gamma: γ, the largest ratio of a norm to the one before.

    Returns:
      A transformation whose state is a :class:`LimitNormGrowthState`.

    Raises:
      ValueError: ``gamma`` is not positive.

    >>> tx = limit_norm_growth(1.5)
    >>> state = tx.init({"w": jnp.ones((2, 2))})
    >>> for size in (1.0, 9.0, 2.0):
    ...     updates, state = tx.update({"w": jnp.full((2, 2), size)}, state)
    ...     print(float(updates["w"][0, 0]), float(state.norm["w"]))
    1.0 2.0
    1.5 3.0
    2.0 4.0
    """
    check_growth(gamma, "gamma")

    def init(params: optax.Params) -> LimitNormGrowthState:
        return LimitNormGrowthState(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[:-2], jnp.float32), params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LimitNormGrowthState]:
        def limit(update: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
            axes = (-2, -1) if update.ndim > 1 else None
            finite = jnp.all(jnp.isfinite(update), axis=axes, keepdims=True)
            limited, norm = bounded(jnp.where(finite, promoted(update), 0), before, gamma)
            return jnp.where(finite, limited.astype(update.dtype), update), norm

        leaves, treedef = jax.tree.flatten(updates)
        pairs = [limit(*pair) for pair in zip(leaves, treedef.flatten_up_to(state.norm), strict=True)]
        limited, norms = (treedef.unflatten(pair[i] for pair in pairs) for i in range(2))
        return limited, LimitNormGrowthState(norms)

    return optax.GradientTransformationExtraArgs(init, update)


def check_growth(growth: Any, name: str) -> None:
    """Raises unless ``growth`` is a positive number or an injected hyperparameter."""
    if not isinstance(growth, jax.Array) and not growth > 0:
        raise ValueError(f"{name} is {growth}: write a positive factor, for example {GAMMA}.")


def bounded(x: jax.Array, before: jax.Array, growth: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finite (*batch, m, n), or (n,), with norms of at most ``growth`` times those ``before`` [*batch]; and the norms to keep."""
    norm = sharding.gather(norm_of(x, (-2, -1) if x.ndim > 1 else -1))  # replicated, as ``before`` is
    last = before.astype(norm.dtype).reshape(norm.shape)
    limit = jnp.where(last > 0, growth * last, norm)
    factor = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1), 1)
    kept = jnp.where(norm > 0, jnp.minimum(norm, limit), last)
    return x * factor, kept.reshape(before.shape).astype(before.dtype)


def norm_of(x: jax.Array, axes: int | tuple[int, int]) -> jax.Array:
    """Along the axes, which stay with size 1; in parts of the largest entry, so that no square over- or underflows."""
    peak = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    scaled = x / jnp.where(peak > 0, peak, 1)
    return peak * jnp.sqrt(jnp.sum(jnp.square(scaled), axis=axes, keepdims=True))
