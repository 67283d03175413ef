# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the inner optimizer's state as it was for parameters whose gradient is bad.

The inner state of any Optax transformation is copies of the parameter tree (moments) and the rest (counts, keys).
``optax.tree.map_params`` tells the two apart.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax import codecs

_REST = -1  # marks a leaf that belongs to no parameter


def parameter_index(inner: optax.GradientTransformation, state: Any, treedef: Any) -> list[int]:
    """For each leaf of ``state`` the index of the parameter it belongs to, or -1; a coded array is one leaf."""
    indices = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    tree = optax.tree.map_params(
        inner.init,
        lambda copy, indices: jax.tree.map(lambda i, leaves: jax.tree.map(lambda _: i, leaves), indices, copy),
        state,
        indices,
        transform_non_params=lambda leaf: jax.tree.map(lambda _: _REST, leaf),
        # A whole copy of the tree at once: in it a parameter may have several leaves (SM3) or none (masked).
        is_leaf=lambda _: True,
    )
    return [jax.tree.leaves(leaf)[0] for leaf in codecs.flatten(tree)[0]]


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
        flag = any_good if owner == _REST else good[owner]
        if any(jnp.shape(array)[: flag.ndim] != flag.shape for array in jax.tree.leaves(new_leaf)):
            flag = jnp.all(flag)

        def hold(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(flag.reshape(flag.shape + (1,) * (jnp.ndim(new) - flag.ndim)), new, old)

        return jax.tree.map(hold, new_leaf, old_leaf)

    leaves, treedef = codecs.flatten(new)
    return treedef.unflatten(map(choose, owners, leaves, treedef.flatten_up_to(old)))
