# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How well the subspaces do, matrix by matrix, at the cost of a few reductions a step.

captured energy   ‖PᵀG‖² / ‖G‖²                   the share of the gradient that the inner optimizer sees
overlap           ‖P_newᵀ P_old‖² / r             at the last refresh: 1, the same subspace; r/m, an unrelated one
update RMS        √(mean of ΔW²)                  of what galore returns; with an inner transformation that ends
                                                  before the learning rate, so does this
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax._core.dtypes import promoted
from galore_jax.matrix_view import MatrixView


class Diagnostics(NamedTuple):
    """Trees like the parameters of float32 arrays of the batch shape, ``optax.MaskedNode()`` where nothing is projected."""

    captured_energy: Any  # (*batch,); of the last update whose gradient was good
    overlap: Any  # (*batch,); -1 until a basis has replaced another
    update_rms: Any  # (*batch,)


def initial(views: list[MatrixView | None], treedef: Any) -> Diagnostics:
    """Before the first update."""

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
    """[*batch] float32"""
    return jnp.sqrt(jnp.mean(jnp.square(matrices.astype(jnp.float32)), axis=(-2, -1)))
