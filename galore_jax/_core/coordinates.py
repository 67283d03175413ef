# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Maps between a parameter and its low-rank coordinates: projection, its adjoint, and the zeros that initialize the state.

project   R = PᵀX,  X Q  or  PᵀX Q         X in R^(m x n)
lift      X = P R,  R Qᵀ or  P R Qᵀ        the adjoint of project
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from galore_jax import sharding
from galore_jax._core.basis import Basis, Storage
from galore_jax._core.dtypes import promoted, state_dtype
from galore_jax.matrix_view import MatrixView


def project(storage: Storage, matrices: jax.Array, left: Basis | None, right: Basis | None, rank: int) -> jax.Array:
    """Projects (*batch, m, n) to the low-rank shape.  Pass None for a side without a basis."""
    if left is not None:
        matrices = storage.project(left, matrices, rank)
    if right is not None:
        matrices = _transposed(storage.project(right, _transposed(matrices), rank))
    return matrices


def lift(
    storage: Storage, low_rank: jax.Array, left: Basis | None, right: Basis | None, shape: tuple[int, int]
) -> jax.Array:
    """Lifts the low-rank shape to (*batch, m, n), where ``shape`` is (m, n)."""
    if left is not None:
        low_rank = storage.lift(left, low_rank, shape[0])
    if right is not None:
        low_rank = _transposed(storage.lift(right, _transposed(low_rank), shape[1]))
    return low_rank


def sides(view: MatrixView, left: Any, right: Any) -> tuple[Basis | None, Basis | None]:
    """Returns the (left, right) bases of a parameter, with None for a side that has no basis."""
    return left if view.left else None, right if view.right else None


def zero_bases(storage: Storage, view: MatrixView | None, leaf: Any) -> tuple[Any, Any]:
    """Returns the initial (left, right) bases: all zeros, or ``optax.MaskedNode()`` for a side that has no basis."""
    if view is None:
        return optax.MaskedNode(), optax.MaskedNode()
    spec = matrix_spec(view, leaf)
    m, n = view.matrix_shape

    def zeros(side: int, axis: int) -> Basis:
        side_spec = spec and (*spec[:-2], spec[axis], None)
        return storage.zeros((*view.batch_shape, side, view.rank), state_dtype(leaf), side_spec, leaf)

    return zeros(m, -2) if view.left else optax.MaskedNode(), zeros(n, -1) if view.right else optax.MaskedNode()


def zero_coordinates(view: MatrixView | None, leaf: Any) -> Any:
    """Returns the input to the inner ``init``: zeros of the low-rank shape, or without a view the leaf in its state's dtype."""
    if view is None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, state_dtype(leaf), sharding=leaf.sharding)
        return promoted(leaf)
    spec = matrix_spec(view, leaf)
    if spec is not None:
        spec = (*spec[:-2], None if view.left else spec[-2], None if view.right else spec[-1])
    return sharding.zeros(view.low_rank_shape, state_dtype(leaf), spec, leaf)


def matrix_spec(view: MatrixView, leaf: Any) -> tuple | None:
    """Returns the explicit sharding of (*batch, m, n).  Axes that are merged into one lose their sharding."""
    spec = sharding.spec_of(leaf)
    if spec is None:
        return None
    sides = [[spec[axis] for axis in axes] for axes in (view.reduction_axes, view.output_axes)]
    return (*(spec[axis] for axis in view.batch_axes), *(side[0] if len(side) == 1 else None for side in sides))


def _transposed(matrices: jax.Array) -> jax.Array:
    *batch, m, n = range(matrices.ndim)
    return jax.lax.transpose(matrices, (*batch, n, m))
