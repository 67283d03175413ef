# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One gradient as a batch of matrices, and which of them can be used."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import codecs
from galore_jax._core.dtypes import promoted
from galore_jax._core.state_fields import NO_PARAMETER
from galore_jax.matrix_view import MatrixView


class MatrixGradient(NamedTuple):
    """The gradient of one parameter, and whether it can be used."""

    view: MatrixView | None
    gradient: jax.Array
    matrices: jax.Array  # (*batch, m, n) in the dtype of the gradient; a leaf without a view in that of its state
    peak: jax.Array  # [*batch] largest magnitude
    finite: jax.Array  # [*batch]

    @property
    def good(self) -> jax.Array:
        """[*batch] whether it is :meth:`usable`, projected if there is a view"""
        return self.usable(self.view is not None)

    def usable(self, projected: bool) -> jax.Array:
        """[*batch] finite and, where it is projected, not zero"""
        return self.finite & (self.peak > 0) if projected else self.finite

    def over(self, flags: jax.Array) -> jax.Array:
        """[*batch] flags, to be broadcast over the matrices."""
        return flags if self.view is None else flags[..., None, None]

    def where_good(self, x: jax.Array) -> jax.Array:
        """x with a matrix for each of this gradient's, zeros where the gradient cannot be used."""
        return jnp.where(self.over(self.good), x, 0)

    def agreed(self, axis_name: Any) -> MatrixGradient:
        """With the flags of the mean over the devices along an axis: usable where theirs are finite and one is not zero."""
        if axis_name is None:
            return self
        bad, peak = jax.lax.pmax(((~self.finite).astype(jnp.int32), self.peak), axis_name)
        return self._replace(peak=peak, finite=bad == 0)


def measured(view: MatrixView | None, gradient: jax.Array, like: jax.Array | None = None) -> MatrixGradient:
    """A gradient; with ``like``, an array such as the update is to be, one that is projected already."""
    if like is None:
        matrices = promoted(gradient) if view is None else view.to_matrices(gradient)
    else:
        matrices, gradient = gradient, like
    axes = None if view is None else (-2, -1)
    peak = promoted(jnp.max(jnp.abs(matrices), axis=axes, initial=0))
    finite = jnp.all(jnp.isfinite(matrices), axis=axes)  # not read off the peak: XLA's maximum on CPU drops a NaN
    return MatrixGradient(view, gradient, matrices, peak, finite)


def any_of(flags: list[jax.Array]) -> jax.Array:
    """A scalar: whether any flag in any of the arrays is set; not if there is none.

    >>> bool(any_of([jnp.array([False, True]), jnp.array(False)])), bool(any_of([]))
    (True, False)
    """
    return jnp.any(jnp.stack([jnp.any(flag) for flag in flags])) if flags else jnp.array(False)


def hold_bad(owners: list[int], *, new: Any, old: Any, good: list[jax.Array]) -> Any:
    """``new``, but ``old`` wherever a leaf belongs to a parameter whose gradient is not good.

    Args:
      owners: for each leaf of the state, a coded array being one, the index of its parameter, or -1.
      new: the inner state after the update.
      old: the inner state before.
      good: for each parameter a bool array of its batch shape: () for one matrix or a whole leaf.

    Returns:
      The state to keep.  Leaves that belong to no parameter (counts) are new unless no parameter is good.  Where a state
      leaf does not begin with the batch axes of its parameter, one bad matrix holds the whole leaf.
    """
    any_good = any_of(good)

    def choose(owner: int, new_leaf: Any, old_leaf: Any) -> Any:
        flag = any_good if owner == NO_PARAMETER else good[owner]
        if any(jnp.shape(array)[: flag.ndim] != flag.shape for array in jax.tree.leaves(new_leaf)):
            flag = jnp.all(flag)

        def hold(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(flag.reshape(flag.shape + (1,) * (jnp.ndim(new) - flag.ndim)), new, old)

        return jax.tree.map(hold, new_leaf, old_leaf)

    leaves, treedef = codecs.flatten(new)
    return treedef.unflatten(map(choose, owners, leaves, treedef.flatten_up_to(old)))
