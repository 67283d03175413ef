# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Turns the bases of one parameter that are wanted, one matrix at a time, and carries its inner state over.

A loop whose length is the number of matrices wanted takes each out of the stack, makes its new basis, transports its moments
and puts them back: the other matrices cost nothing, the workspace is that of one matrix, and the factorisation is compiled
once a parameter.  (``vmap`` over the stack would turn each ``lax.cond`` inside into both of its branches.)  Where explicit mesh
axes cut a stack and no matrix in it, each device turns the bases of its own matrices.  A new basis that is not finite, or not
orthonormal where its projector promises that, is rejected: the old one stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import sharding
from galore_jax._core import coordinates as subspace
from galore_jax._core.basis import Basis, Storage
from galore_jax._core.orthonormal import defect
from galore_jax.matrix_view import MatrixView
from galore_jax.projectors import Projector, ProjectorInput
from galore_jax.transport import Carrier

_TOLERANCE = 1e-3  # of max |PᵀP - I|


class Subspace(NamedTuple):
    """What belongs to the subspaces of one parameter; every array has the batch axes in front."""

    left: Basis  # MaskedNode where there is none
    right: Basis
    low_rank: jax.Array  # the gradient in these bases
    moments: tuple[Any, ...]  # leaves of the inner state that turn with the bases, arrays or coded arrays


class Turned(NamedTuple):
    """The subspaces after a refresh."""

    subspace: Subspace
    turned: jax.Array  # [*batch] bool; which have new bases
    overlap: (
        jax.Array
    )  # [*batch] float32; ‖P_newᵀP_old‖² / r where turned, the mean of both sides for "full"; -1 without an old one


def turn(
    projector: Projector,
    view: MatrixView,
    key: jax.Array,
    step: jax.Array,
    matrices: jax.Array,
    current: Subspace,
    carriers: tuple[Carrier, ...],
    wanted: jax.Array,
    axis_name: Any = None,
) -> Turned:
    """New bases for the matrices that are wanted.

    Args:
      projector: makes one basis from one matrix.
      view: of the parameter.
      key: the PRNG key of this update, the same for every matrix, so that a stacked leaf equals separate leaves.
      step: the number of this update.
      matrices: the gradient, (*batch, m, n), in its own dtype.
      current: the subspaces, with ``low_rank`` of this gradient.
      carriers: one for each array of ``current.moments``.
      wanted: [*batch] bool, the matrices to refresh: finite and not zero.
      axis_name: of the devices over which the gradient is to be averaged first; the same matrices are wanted on all of them.

    Returns:
      The subspaces, in the shapes, dtypes and shardings of ``current``.  To differentiation a refresh is a constant: see
      :func:`coordinates_in_constant_bases`.
    """
    batch = len(view.batch_shape)
    nothing = Turned(current, jnp.zeros(wanted.shape, bool), jnp.full(wanted.shape, -1, jnp.float32))

    def turn_one(key: jax.Array, step: jax.Array, matrix: jax.Array, one: Turned) -> Turned:
        current = one.subspace
        if axis_name is not None:
            matrix, low_rank = jax.lax.pmean((matrix, current.low_rank), axis_name)
            current = current._replace(low_rank=low_rank)
        turned = _turn_one(projector, view, key, step, matrix, current, carriers)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), turned, one)

    def turn_wanted(key: jax.Array, step: jax.Array, matrices: jax.Array, nothing: Turned, wanted: jax.Array) -> Turned:
        def now() -> Turned:
            constant = jax.lax.stop_gradient((matrices, nothing))
            one = functools.partial(turn_one, key, step)
            return _one_by_one(one, wanted, *constant) if batch else one(*constant)

        return jax.lax.cond(jnp.any(wanted), now, lambda: nothing)

    stacks = (matrices, nothing, wanted)
    if sharding.cut_by_stack(matrices, batch):
        return sharding.by_stack(turn_wanted, (key, step), stacks, nothing, batch)
    return sharding.by_partitioner(turn_wanted, nothing)(key, step, *stacks)


def _one_by_one(
    turn_one: Callable[[jax.Array, Turned], Turned], wanted: jax.Array, matrices: jax.Array, nothing: Turned
) -> Turned:
    """``nothing``, with what ``turn_one`` makes of a matrix in the place of each that is wanted."""

    def flat(array: jax.Array) -> jax.Array:
        return array.reshape(wanted.size, *array.shape[wanted.ndim :])

    todo = flat(wanted)
    order = jnp.argsort(~todo, stable=True)
    stack = flat(matrices)

    def body(i: jax.Array, turned: Turned) -> Turned:
        index = order[i]
        result = turn_one(*jax.tree.map(lambda x: x[index], (stack, turned)))
        return jax.tree.map(lambda whole, x: whole.at[index].set(x), turned, result)

    turned = jax.lax.fori_loop(0, jnp.sum(todo), body, jax.tree.map(flat, nothing))
    return jax.tree.map(lambda new, old: new.reshape(old.shape), turned, nothing)


def coordinates_in_constant_bases(
    storage: Storage, view: MatrixView, low_rank: jax.Array, matrices: jax.Array, left: Basis, right: Basis
) -> jax.Array:
    """``low_rank`` itself, with the derivative of projecting ``matrices`` onto bases that do not depend on them."""
    sides = jax.lax.stop_gradient(subspace.sides(view, left, right))

    @jax.custom_jvp
    def known(low_rank: jax.Array, matrices: jax.Array) -> jax.Array:
        return low_rank

    @known.defjvp
    def known_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        return primals[0], subspace.project(storage, tangents[1], *sides, view.rank)

    return known(low_rank, matrices)


def _turn_one(
    projector: Projector,
    view: MatrixView,
    key: jax.Array,
    step: jax.Array,
    matrix: jax.Array,
    old: Subspace,
    carriers: tuple[Carrier, ...],
) -> Turned:
    storage, rank = projector.storage, view.rank

    def refresh(basis: Basis, matrix: jax.Array, coordinates: jax.Array, transposed: bool) -> Any:
        old = storage.decode(basis, rank, coordinates.dtype)
        made, coordinates = projector.refresh(ProjectorInput(key, matrix, old, coordinates, step, transposed))
        made = jax.tree.map(lambda x, like: x.astype(like.dtype), made, old)
        new = storage.encode(made)
        if new is not made:  # coded: the coordinates are those in the decoded basis, which is also what lifts
            coordinates = storage.project(new, matrix, rank)
        overlap = storage.overlap(new, basis, matrix.shape[0], rank)
        return new, coordinates, overlap, _usable(storage, made)

    left, right, q_left, q_right = old.left, old.right, None, None
    usable = jnp.array(True)
    low_rank = old.low_rank
    if view.left:
        coordinates = storage.project(old.left, matrix, rank) if view.right else old.low_rank
        left, low_rank, q_left, good = refresh(old.left, matrix, coordinates, False)
        usable &= good
    if view.right:
        coordinates = storage.project(old.right, matrix.T, rank) if view.left else old.low_rank.T
        right, coordinates, q_right, good = refresh(old.right, matrix.T, coordinates, True)
        usable &= good
        # Of both sides: PᵀG Q, from PᵀG.
        low_rank = subspace.project(storage, low_rank, None, right, rank) if view.left else coordinates.T
    new = Subspace(
        left,
        right,
        low_rank,
        tuple(carrier.turn(m, q_left, q_right) for carrier, m in zip(carriers, old.moments, strict=True)),
    )
    sides = [q for q in (q_left, q_right) if q is not None]
    overlap = sum(jnp.sum(jnp.square(q)) for q in sides) / (rank * len(sides))
    kept = jax.tree.map(lambda new, old: jnp.where(usable, new.astype(old.dtype), old), new, old)
    replaced = usable & storage.exists(old.left if view.left else old.right)
    return Turned(kept, usable, jnp.where(replaced, overlap, -1).astype(jnp.float32))


def _usable(storage: Storage, basis: Basis) -> jax.Array:
    if storage.orthonormal and isinstance(basis, jax.Array) and basis.ndim == 2:
        return defect(basis) <= _TOLERANCE
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(basis)]
    return jnp.all(jnp.stack(finite))
