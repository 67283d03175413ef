# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One gradient as a batch of matrices, and which of them can be used."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.dtypes import promoted
from galore_jax.matrix_view import MatrixView


class Leaf(NamedTuple):
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

    def agreed(self, axis_name: Any) -> Leaf:
        """With the flags of the mean over the devices along an axis: usable where theirs are finite and one is not zero."""
        if axis_name is None:
            return self
        bad, peak = jax.lax.pmax(((~self.finite).astype(jnp.int32), self.peak), axis_name)
        return self._replace(peak=peak, finite=bad == 0)


def measured(view: MatrixView | None, gradient: jax.Array, like: jax.Array | None = None) -> Leaf:
    """A gradient; with ``like``, an array such as the update is to be, one that is projected already."""
    if like is None:
        matrices = promoted(gradient) if view is None else view.to_matrices(gradient)
    else:
        matrices, gradient = gradient, like
    axes = None if view is None else (-2, -1)
    peak = promoted(jnp.max(jnp.abs(matrices), axis=axes, initial=0))
    finite = jnp.all(jnp.isfinite(matrices), axis=axes)  # not read off the peak: XLA's maximum on CPU drops a NaN
    return Leaf(view, gradient, matrices, peak, finite)
