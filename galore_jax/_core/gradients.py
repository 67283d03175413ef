# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Which gradients, and which answers to them, can be used, and what happens to the others.

The level of a matrix X is log Σ|x|, or log(1 + Σ|x|) where zeros are welcome.  It is finite if the matrix can be used: -inf for
zeros, and inf or NaN if an entry is not finite or if the sum overflows.
One number for each matrix keeps programs small, and lets each parameter be updated before the next one is projected.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax import codecs, sharding
from galore_jax._core.dtypes import state_dtype
from galore_jax._core.state_fields import NO_PARAMETER


def level_of(x: jax.Array, batch: int = 0, may_be_zero: bool = True) -> jax.Array:
    """[*batch] the level of each matrix behind the first ``batch`` axes.

    >>> level_of(jnp.array([[1.0, 0.0], [0.0, 0.0], [jnp.nan, 1.0]]), batch=1, may_be_zero=False), level_of(jnp.zeros(3))
    (Array([  0., -inf,  nan], dtype=float32), Array(0., dtype=float32))
    """
    total = _magnitude(x, batch)
    return jax.lax.log1p(total) if may_be_zero else jax.lax.log(total)


def is_sound(x: jax.Array, batch: int = 0) -> jax.Array:
    """[*batch] bool, whether the level of each matrix is finite, where zeros are welcome.

    >>> is_sound(jnp.array([[1.0, 0.0], [0.0, 0.0], [jnp.nan, 1.0]]), batch=1)
    Array([ True,  True, False], dtype=bool)
    """
    return jax.lax.is_finite(_magnitude(x, batch))


def _magnitude(x: jax.Array, batch: int) -> jax.Array:
    """[*batch] Σ|x|.  It calls ``jax.lax``, which traces in half of the time, because it runs for each parameter."""
    x = jax.lax.abs(x)  # real
    return jax.lax.reduce_sum(x.astype(state_dtype(x)), tuple(range(batch, x.ndim)))


def at_places(vector: jax.Array, places: np.ndarray) -> jax.Array:
    """The entries of a vector at static places."""
    if np.array_equal(places, np.arange(vector.size)):
        return vector
    return vector.at[places].get(mode="promise_in_bounds")


def chosen(flags: jax.Array, x: jax.Array, other: jax.Array) -> jax.Array:
    """``x`` where the flags [*batch] are set, and ``other`` elsewhere; both have one shape and one dtype."""
    if flags.ndim == 0:
        # One operation, where jnp.where makes a function of five.
        return jax.lax.select(flags, x, other)
    return jnp.where(flags.reshape(flags.shape + (1,) * (x.ndim - flags.ndim)), x, other)


def masked(flags: jax.Array, x: jax.Array) -> jax.Array:
    """``x`` where the flags [*batch] are set, and zeros elsewhere."""
    return chosen(flags, x, jax.lax.full_like(x, 0))


class Batches(NamedTuple):
    """The batch shapes of several arrays, of which one vector has all entries, one array after the other.

    >>> batches = Batches(((), (2,)))
    >>> vector = batches.join([jnp.array(1), jnp.array([2, 3])])
    >>> vector, batches.split(vector)
    (Array([1, 2, 3], dtype=int32), [Array(1, dtype=int32), Array([2, 3], dtype=int32)])
    """

    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each array."""
        return list(map(math.prod, self.shapes))

    def join(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """(*batch, ...) of each -> (N, ...), replicated."""
        flat = [
            sharding.gather(array).reshape(math.prod(shape), *array.shape[len(shape) :])
            for shape, array in zip(self.shapes, arrays, strict=True)
        ]
        return jnp.concatenate(flat)

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """The inverse of :meth:`join`."""
        parts, first = [], 0
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            part = jax.lax.slice_in_dim(vector, first, first + size)
            parts.append(part.reshape(*shape, *vector.shape[1:]))
            first += size
        return parts


def joined(arrays: Sequence[jax.Array]) -> jax.Array:
    """The entries of all arrays in one vector, replicated."""
    return Batches(tuple(map(jnp.shape, arrays))).join(arrays) if arrays else jnp.zeros((0,))


class Guarded(NamedTuple):
    """What :func:`update_guarded` returns."""

    low_rank: list[jax.Array]  # the gradients that the inner transformation was given, zeros where they are not good
    replies: list[jax.Array]  # its answers, zeros where the gradient is not good or an entry is not finite
    good: list[jax.Array]  # [*batch] bool of each parameter; whether the gradient is good
    answered: list[jax.Array]  # [*batch] bool of each parameter; whether the answer to a projected one is finite too
    inner_state: Any  # held where a gradient is not good
    moved: jax.Array  # scalar, int32; 1 if any gradient is good
    skipped: jax.Array  # scalar, int32; 1 if any gradient, or the answer to a good one that is projected, is not finite


def update_guarded(
    update: Callable[[list[jax.Array]], tuple[list[jax.Array], Any]],
    low_rank: list[jax.Array],
    batches: list[int],
    projected: list[bool],
    owners_of: Callable[[Any], list[int]],
    old: Any,
) -> Guarded:
    """One update of an inner transformation that no bad gradient reaches.

    Args:
      update: Gradients -> the answers of the inner transformation, and its new state.
      low_rank: The gradients, in their subspaces where they are projected.
      batches: The number of batch axes of each.
      projected: Whether each is projected; zeros are good where it is not.
      owners_of: Maps an inner state to the owners that :func:`hold_bad` takes.
      old: The inner state before the update.
    """
    levels = [
        level_of(x, batch, may_be_zero=not flag) for x, batch, flag in zip(low_rank, batches, projected, strict=True)
    ]
    good = list(map(jax.lax.is_finite, levels))
    low_rank = list(map(masked, good, low_rank))
    replies, new = update(low_rank)
    # An embedding's answer is as large as its gradient.  XLA would write it, to count over it, and read it again.
    answered = [
        jax.lax.bitwise_and(flag, is_sound(x, batch)) if of_matrices else flag
        for x, batch, flag, of_matrices in zip(replies, batches, good, projected, strict=True)
    ]
    # Entry by entry, because a decision over all entries would take a pass of its own too.
    zeros = [jax.lax.full_like(x, 0) for x in replies]
    finite = [jax.lax.select(jnp.isfinite(x), x, zero) for x, zero in zip(replies, zeros, strict=True)]
    replies = list(map(masked, good, finite))
    all_levels = joined(levels)
    all_good = jnp.isfinite(all_levels)
    lost = all_good & jnp.logical_not(joined(answered))
    return Guarded(
        low_rank,
        replies,
        good,
        answered,
        hold_bad(owners_of(new), new=new, old=old, good=good),
        jnp.any(all_good).astype(jnp.int32),
        jnp.any(~(all_levels < jnp.inf) | lost).astype(jnp.int32),
    )


def hold_bad(owners: list[int], *, new: Any, old: Any, good: list[jax.Array]) -> Any:
    """``new``, but ``old`` wherever a leaf belongs to a parameter whose gradient is not good.

    Args:
      owners: For each leaf of the state, the index of its parameter or -1; a coded array counts as one leaf.
      new: The inner state after the update.
      old: The inner state before it.
      good: For each parameter a bool array of its batch shape: () for one matrix or a whole leaf.

    Returns:
      The state to keep.  Leaves that belong to no parameter (counts) are new unless no parameter is good.  Where a leaf of the
      state does not begin with the batch axes of its parameter, one bad matrix holds the whole leaf.
    """
    any_good = jnp.any(joined(good))

    def choose(owner: int, new_leaf: Any, old_leaf: Any) -> Any:
        flag = any_good if owner == NO_PARAMETER else good[owner]
        if any(jnp.shape(array)[: flag.ndim] != flag.shape for array in jax.tree.leaves(new_leaf)):
            flag = jnp.all(flag)

        return jax.tree.map(functools.partial(chosen, flag), new_leaf, old_leaf)

    leaves, treedef = codecs.flatten(new)
    return treedef.unflatten(map(choose, owners, leaves, treedef.flatten_up_to(old)))
