# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A function of one matrix, applied to a stack in place, so that its workspace is one matrix and not the stack."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from galore_jax import sharding

Carried = TypeVar("Carried")


def matrix_by_matrix(function: Callable[[Carried, Any], Carried], carried: Carried, given: Any, batch: int) -> Carried:
    """``function(carried, given)`` of each matrix, in the place of ``carried``.

    A loop takes one matrix after the other.  Where explicit mesh axes shard the batch axes alone, each device loops over its
    own matrices.  Where they shard the matrices too, the function runs on all matrices at once.

    Args:
      function: of one matrix; its results have the shapes and dtypes of its first argument.
      carried: a pytree of arrays (*batch, ...), of which the first is the largest.
      given: a pytree of arrays (*batch, ...).
      batch: the number of batch axes.

    Returns:
      A pytree with the shapes, dtypes and sharding types of ``carried``.

    >>> matrix_by_matrix(lambda x, factor: factor * x, jnp.ones((3, 1, 2)), jnp.arange(3.0), batch=1)[:, 0]
    Array([[0., 0.],
           [1., 1.],
           [2., 2.]], dtype=float32)
    """
    first = jax.tree.leaves(carried)[0]
    spec = sharding.spec_of(first)
    if spec is None or not any(spec[:batch]):
        return _loop(function, carried, given, batch)
    if sharding.cut_by_stack(first, batch):
        return sharding.by_stack(
            lambda *both: _loop(function, both[0], both[1], batch), (), (carried, given), carried, batch
        )
    carried_alike, given = jax.tree.map(lambda x: _with_batch_of(spec, x, first, batch), (carried, given))
    for _ in range(batch):
        function = jax.vmap(function)
    return jax.tree.map(sharding.like, function(carried_alike, given), carried)


def matrix_by_matrix_anywhere(
    function: Callable[[Carried, Any], Carried], carried: Carried, given: Any, batch: int
) -> Carried:
    """:func:`matrix_by_matrix` for a function that cannot see the sharding of a matrix, such as a factorization.

    Where explicit mesh axes shard the matrices, they are automatic inside, and one matrix is worked on after the other there too.

    Args:
      function: as in :func:`matrix_by_matrix`; it must not close over any arrays.
      carried, given, batch: as in :func:`matrix_by_matrix`.

    >>> matrix_by_matrix_anywhere(lambda x, y: x + y, jnp.ones((2, 1, 1)), jnp.arange(2.0), batch=1)[:, 0, 0]
    Array([1., 2.], dtype=float32)
    """

    def run(carried: Carried, given: Any) -> Carried:
        return matrix_by_matrix(function, carried, given, batch)

    if not sharding.cut_by_stack(jax.tree.leaves(carried)[0], batch):
        run = sharding.by_partitioner(run, carried)
    return run(carried, given)


def _loop(function: Callable[[Carried, Any], Carried], carried: Carried, given: Any, batch: int) -> Carried:
    if batch == 0:
        return jax.tree.map(sharding.like, function(carried, given), carried)
    shape = jax.tree.leaves(carried)[0].shape[:batch]

    def start(x: jax.Array, index: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (*index, *(jnp.zeros_like(index[0]),) * (x.ndim - batch))

    def body(i: jax.Array, carried: Carried) -> Carried:
        index = jnp.unravel_index(i, shape)

        def take(x: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_slice(x, start(x, index), (1,) * batch + x.shape[batch:])
            return jax.lax.squeeze(one, range(batch))

        def put(x: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
            new = jax.lax.expand_dims(sharding.like(new, old), range(batch))
            return jax.lax.dynamic_update_slice(x, new, start(x, index))

        old = jax.tree.map(take, carried)
        return jax.tree.map(put, carried, old, function(old, jax.tree.map(take, given)))

    # A loop keeps the types of its carry, so inside shard_map all of it has to vary over the devices as the results do.
    zero = sharding.varying_zero((carried, given))
    carried = jax.tree.map(lambda x: x + zero.astype(x.dtype), carried)
    # A static number of rounds, so that reverse mode can go through.
    return jax.lax.fori_loop(0, math.prod(shape), body, carried)


def _with_batch_of(spec: tuple, x: jax.Array, first: jax.Array, batch: int) -> jax.Array:
    """``x`` with its batch axes sharded as in ``spec``, as ``vmap`` asks of all of its arguments."""
    own = sharding.spec_of(x) or (None,) * x.ndim
    return jax.sharding.reshard(x, sharding.named((*spec[:batch], *own[batch:]), first))
