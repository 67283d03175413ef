# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""When a basis is recomputed, and what keeps a bad gradient out of it.

All bases are refreshed together, at updates 0, T, 2T, ... (T = ``update_proj_gap``), each from the gradient it then projects.
A basis that no good gradient has reached yet is all zeros and is refreshed at the first good one.  The predicate is one
scalar a parameter and the batch of matrices is inside the branch: ``vmap`` of a ``lax.cond`` would run both branches.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax import sharding
from galore_jax.projectors import Projector


def check_gap(update_proj_gap: Any) -> None:
    """Raises unless ``update_proj_gap`` is a positive int or an injected hyperparameter."""
    if isinstance(update_proj_gap, jax.Array):
        return
    if isinstance(update_proj_gap, bool) or not isinstance(update_proj_gap, (int, np.integer)) or update_proj_gap < 1:
        raise ValueError(
            f"update_proj_gap is {update_proj_gap!r}: write a positive int, the updates between two refreshes."
        )


def is_due(count: jax.Array, update_proj_gap: int | jax.Array) -> jax.Array:
    """Whether the update number ``count`` (int32 scalar, from 0) refreshes the bases: a bool scalar."""
    return count % jnp.asarray(update_proj_gap).astype(count.dtype) == 0


def refresh_basis(
    projector: Projector,
    key: jax.Array,
    gradient: jax.Array,
    basis: jax.Array,
    side: str,
    *,
    due: jax.Array,
    peak: jax.Array,
    good: jax.Array,
) -> jax.Array:
    """The basis for this update: a new one for every matrix that is due and good, else the old one.

    Args:
      projector: makes one basis from one matrix.
      key: the PRNG key of this refresh, the same for every matrix, so that a stacked leaf equals separate leaves.
      gradient: (*batch, m, n).
      basis: (*batch, m, r) for side "left", (*batch, n, r) for "right"; all zeros before the first refresh.
      side: "left" or "right".
      due: bool scalar.
      peak: (*batch,) the largest magnitude in each matrix.
      good: (*batch,) whether each matrix is finite and not zero.

    Returns:
      The basis, in the shape, dtype and sharding of ``basis``.
    """
    wanted = good & (due | ~jnp.any(basis[..., 0] != 0, axis=-1))  # [*batch]

    def recompute() -> jax.Array:
        safe_peak = jnp.where(good, peak, 1)
        scaled = jnp.where(good[..., None, None], gradient / safe_peak[..., None, None], 0)
        refresh = functools.partial(projector.refresh, side=side)
        for _ in range(good.ndim):
            refresh = jax.vmap(refresh, in_axes=(None, 0, 0))
        new = refresh(key, sharding.gather(scaled), sharding.gather(basis)).astype(basis.dtype)
        usable = wanted & jnp.all(jnp.isfinite(new), axis=(-2, -1))
        return jnp.where(usable[..., None, None], sharding.like(new, basis), basis)

    return jax.lax.cond(jnp.any(wanted), recompute, lambda: basis)
