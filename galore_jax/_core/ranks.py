# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks that ``optax.inject_hyperparams`` has made arrays: a number in ``init``, and read off the bases in ``update``."""

from __future__ import annotations

from typing import Any

import jax

from galore_jax._core import trees
from galore_jax.matrix_view import Rank, check_rank

_REMEDY = 'with optax.inject_hyperparams write static_args=("rank",).'


def checked(rank: Rank | jax.Array) -> Rank | jax.Array:
    """``rank``, if it is valid or an array."""
    if not isinstance(rank, jax.Array):
        check_rank(rank)
    return rank


def at_init(rank: Rank | jax.Array) -> Rank:
    """The rank that fixes the shapes of a new state.

    >>> import jax.numpy as jnp
    >>> at_init(jnp.asarray(8)), at_init(0.25)
    (8, 0.25)
    """
    if isinstance(rank, jax.core.Tracer):
        raise TypeError(f"rank is traced, but it must be static because it fixes the shapes of the state: {_REMEDY}")
    if isinstance(rank, jax.Array):
        rank = rank.item()
        check_rank(rank)
    return rank


def in_update(rank: Rank | jax.Array, tree: Any, *bases: Any) -> Rank:
    """The rank of each leaf of ``tree``, read off its dense bases if ``rank`` is an array; None where there is no basis.

    Args:
      rank: The argument.
      tree: Gradients or parameters.
      *bases: Trees of bases in the structure of ``tree``, whose last arrays have as many columns or entries as the rank.
    """
    if not isinstance(rank, jax.Array):
        return rank
    _, treedef = trees.flatten(tree)
    rows = zip(*map(treedef.flatten_up_to, bases), strict=True)
    shapes = [next((array.shape for array in reversed(jax.tree.leaves(row))), None) for row in rows]
    if () in shapes:
        raise TypeError(f"rank is traced, and bases that are stored as seeds do not tell it: {_REMEDY}")
    columns = [shape[-1] if shape else None for shape in shapes]
    known = dict(zip(trees.paths_of(tree), columns, strict=True))
    return lambda path, shape: known[path]
