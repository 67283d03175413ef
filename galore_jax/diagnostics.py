# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How well the subspace of each matrix works, at the cost of a few reductions per step.

captured energy   ‖PᵀG‖² / ‖G‖²                   the share of the gradient that the inner optimizer sees
overlap           ‖P_newᵀ P_old‖² / r             at the last refresh; 1 for the same subspace, r/m for an unrelated one
update RMS        √(mean of ΔW²)                  of the update that galore returns, which has no learning rate if the
                                                  inner transformation has none
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax._core.dtypes import promoted
from galore_jax.matrix_view import MatrixView

__all__ = ["Diagnostics"]


class Diagnostics(NamedTuple):
    """Trees like the parameters, of float32 arrays (*batch,); ``optax.MaskedNode()`` for a parameter that is not projected."""

    # At the last update with a good gradient.
    captured_energy: Any
    # -1 until a basis has replaced another.
    overlap: Any
    update_rms: Any


def initial(views: list[MatrixView | None], treedef: Any) -> Diagnostics:
    """The diagnostics before the first update."""

    def tree(value: float) -> Any:
        return treedef.unflatten(
            optax.MaskedNode() if view is None else jnp.full(view.batch_shape, value, jnp.float32) for view in views
        )

    return Diagnostics(tree(0), tree(-1), tree(0))


def captured_energy(low_rank: jax.Array, matrices: jax.Array) -> jax.Array:
    """[*batch] float32"""
    peak = jnp.max(jnp.abs(promoted(matrices)), axis=(-2, -1), keepdims=True)
    scale = jnp.where(peak > 0, peak, 1)
    whole = jnp.sum(jnp.square(promoted(matrices) / scale), axis=(-2, -1))
    inside = jnp.sum(jnp.square(low_rank / scale), axis=(-2, -1))
    return (inside / jnp.where(whole > 0, whole, 1)).astype(jnp.float32)


def root_mean_square(matrices: jax.Array) -> jax.Array:
    """Returns [*batch] float32."""
    return jnp.sqrt(jnp.mean(jnp.square(matrices.astype(jnp.float32)), axis=(-2, -1)))
