# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Refreshes the bases that are due, one matrix at a time, and carries the inner state into them.

Parameters whose matrices have the same shape, rank, sides and dtypes form a group, and each group has one loop:

    while a matrix of the group is due:   take it out of its parameter, with its bases and moments
                                          make the new basis, carry the moments over
                                          put them back

So one refresh is compiled for each shape, not for each parameter, matrices that are not due cost nothing, and the workspace is
that of one matrix.  (``vmap`` over a stack would turn each ``lax.cond`` inside into both of its branches.)  Where explicit mesh
axes cut a stack and no matrix in it, each device refreshes its own matrices.  If a gradient is zero or not finite, the old basis
is kept; so it is if the new one is not finite, or not orthonormal where its projector promises that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax import sharding
from galore_jax._core.basis import Basis, Storage
from galore_jax._core.gradients import Batches, at_places, chosen, level_of, masked
from galore_jax._core.orthonormal import defect
from galore_jax.matrix_view import MatrixView
from galore_jax.projectors import Projector, ProjectorInput
from galore_jax.transport import Carrier

_TOLERANCE = 1e-3  # of max |PᵀP - I|


class Subspace(NamedTuple):
    """What belongs to the subspaces of one parameter; every array has the batch axes in front."""

    left: Basis  # MaskedNode where there is none
    right: Basis
    moments: tuple[Any, ...]  # leaves of the inner state that are carried over, arrays or coded arrays


class Member(NamedTuple):
    """One parameter of a refresh."""

    view: MatrixView
    matrices: jax.Array  # the gradient, (*batch, m, n), in its own dtype
    subspace: Subspace
    carriers: tuple[Carrier, ...]  # one for each of the moments


class Outcome(NamedTuple):
    """What happened to each matrix of all parameters, one parameter after the other."""

    done: jax.Array  # [N] bool; has new bases
    rejected: jax.Array  # [N] bool; its gradient was good, but not its new bases
    # [N] float32; ‖P_newᵀP_old‖² over its largest possible value where done, the mean of both sides for "full"; -1 elsewhere
    # and where there was no basis before
    overlap: jax.Array


def refresh_all(
    projector: Projector,
    key: jax.Array,
    step: jax.Array,
    members: list[Member],
    wanted: jax.Array,
    axis_name: Any = None,
) -> tuple[list[Subspace], Outcome]:
    """New bases for the matrices that are wanted.

    Args:
      projector: Makes one basis from one matrix.
      key: The PRNG key of this update, the same for every matrix, so that a result does not depend on the group.
      step: The number of this update.
      members: The parameters.
      wanted: [N] bool, which matrices to refresh, of all parameters, one after the other.
      axis_name: The devices over which the gradients are averaged first; they all want the same matrices.

    Returns:
      The subspaces of each member, in the shapes, dtypes and shardings that they had, and the outcome.  A refresh is a constant
      to differentiation.
    """
    groups: dict[Any, list[int]] = {}
    for index, member in enumerate(members):
        groups.setdefault(_kind(member), []).append(index)
    places = np.split(np.arange(wanted.size), np.cumsum(_batches(members).sizes)[:-1])
    subspaces: dict[int, Subspace] = {}
    outcomes, order = [], []
    for indices in groups.values():
        own = np.concatenate([places[index] for index in indices])
        group = [members[index] for index in indices]
        found, outcome = _refresh_group(projector, key, step, group, at_places(wanted, own), axis_name)
        subspaces |= dict(zip(indices, found, strict=True))
        outcomes.append(outcome)
        order.append(own)
    back = np.argsort(np.concatenate(order))
    outcome = jax.tree.map(lambda *parts: at_places(jnp.concatenate(parts), back), *outcomes)
    done = _batches(members).split(outcome.done)
    return [_differentiable(subspaces[i], member.subspace, done[i]) for i, member in enumerate(members)], outcome


def _differentiable(new: Subspace, old: Subspace, done: jax.Array) -> Subspace:
    """``new``, whose moments have the derivative of the old ones where no basis was refreshed."""

    @jax.custom_jvp
    def carried(new: jax.Array, old: jax.Array) -> jax.Array:
        return new

    @carried.defjvp
    def carried_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        return primals[0], masked(~done, tangents[1])

    def of_floats(new: jax.Array, old: jax.Array) -> jax.Array:
        return carried(new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    return new._replace(moments=jax.tree.map(of_floats, new.moments, old.moments))


def _batches(members: list[Member]) -> Batches:
    return Batches(tuple(member.view.batch_shape for member in members))


def _kind(member: Member) -> Any:
    """What the members of a group have in common."""
    view, batch = member.view, member.view.batch
    spec = sharding.spec_of(member.matrices)
    arrays = [(x.shape[batch:], x.dtype) for x in jax.tree.leaves((member.matrices, member.subspace))]
    structure = jax.tree.structure(member.subspace)
    rules = tuple(carrier.turn for carrier in member.carriers)
    # A stack that is cut along a batch axis is refreshed by shard_map, which takes stacks with one number of batch axes.
    place = None if spec is None else (spec[batch:], spec[:batch] if any(spec[:batch]) else batch)
    return view.rank, view.left, view.right, tuple(arrays), structure, rules, place


def _refresh_group(
    projector: Projector, key: jax.Array, step: jax.Array, group: list[Member], wanted: jax.Array, axis_name: Any
) -> tuple[list[Subspace], Outcome]:
    first = group[0]

    def one(key: jax.Array, step: jax.Array, matrix: jax.Array, old: Subspace) -> tuple[Subspace, Outcome]:
        level = level_of(matrix, may_be_zero=False)
        nothing = old, _nothing(jnp.zeros_like(level, dtype=bool))
        if axis_name is not None:  # the same on all devices, so that they all send their gradients or none does
            level = jnp.log(jax.lax.psum(jnp.exp(level), axis_name))

        def refreshed() -> tuple[Subspace, Outcome]:
            gradient = matrix if axis_name is None else jax.lax.pmean(matrix, axis_name)
            found = _refresh_one(projector, first.view, key, step, gradient, old, first.carriers)
            return jax.tree.map(lambda new, old: new.astype(old.dtype), found, nothing)

        return jax.lax.cond(jnp.isfinite(level), refreshed, lambda: nothing)

    def loop(key: jax.Array, step: jax.Array, matrices: Any, subspaces: Any, wanted: jax.Array) -> tuple[Any, Outcome]:
        matrices, subspaces = jax.lax.stop_gradient((matrices, subspaces))
        # Loops and branches keep the types of what they carry, so all of it varies over a mesh as the inputs do together.
        zero = sharding.varying_zero((step, matrices, subspaces, wanted))
        subspaces = jax.tree.map(lambda x: x + zero.astype(x.dtype), subspaces)
        return _one_by_one(functools.partial(one, key, step), matrices, subspaces, wanted | zero.astype(bool))

    matrices = [member.matrices for member in group]
    subspaces = [member.subspace for member in group]
    if not sharding.cut_by_stack(first.matrices, first.view.batch):
        results = subspaces, _nothing(wanted)
        return sharding.by_partitioner(loop, results)(key, step, matrices, subspaces, wanted)

    def of_a_device(
        key: jax.Array, step: jax.Array, matrices: Any, subspaces: Any, wanted: list[jax.Array]
    ) -> tuple[Any, list[Outcome]]:
        own = Batches(tuple(map(jnp.shape, wanted)))
        subspaces, outcome = loop(key, step, matrices, subspaces, own.join(wanted))
        return subspaces, [Outcome(*fields) for fields in zip(*map(own.split, outcome), strict=True)]

    flags = _batches(group).split(wanted)
    stacks = matrices, subspaces, flags
    results = subspaces, [_nothing(flag) for flag in flags]
    found, outcomes = sharding.by_stack(of_a_device, (key, step), stacks, results, first.view.batch)
    return found, Outcome(*(_batches(group).join(fields) for fields in zip(*outcomes, strict=True)))


def _nothing(wanted: jax.Array) -> Outcome:
    no = jnp.zeros_like(wanted)
    return Outcome(no, no, jnp.full_like(wanted, -1, dtype=jnp.float32))


def _one_by_one(
    refresh_one: Callable[[jax.Array, Subspace], tuple[Subspace, Outcome]],
    matrices: list[jax.Array],
    subspaces: list[Subspace],
    wanted: jax.Array,
) -> tuple[list[Subspace], Outcome]:
    """Runs ``refresh_one`` on each matrix that is wanted, of each parameter (*batch, ...)."""
    sizes = [math.prod(x.shape[:-2]) for x in matrices]
    alone = len(sizes) == 1

    # (size, ...), or (...) where there is one matrix.
    def flat(tree: Any, batch: int, size: int) -> Any:
        return jax.tree.map(lambda x: x.reshape(x.shape[batch:] if size == 1 else (size, *x.shape[batch:])), tree)

    batches = [x.ndim - 2 for x in matrices]
    stacks, matrices = (list(map(flat, trees, batches, sizes)) for trees in (subspaces, matrices))
    # Of the matrices of all parameters, one after the other: which parameter's, and which of that parameter's.
    parameter = jnp.array(np.repeat(np.arange(len(sizes)), sizes), jnp.int32)
    place = jnp.array(np.concatenate([np.arange(size) for size in sizes]), jnp.int32)

    def body(carry: tuple) -> tuple:
        todo, outcome, stacks = carry
        index = jnp.argmax(todo)
        which, at = parameter[index], place[index]

        def taken(number: int) -> Callable[[], tuple[jax.Array, Subspace]]:
            if sizes[number] == 1:
                return lambda: (matrices[number], stacks[number])
            return lambda: (_read(matrices[number], at), jax.tree.map(lambda x: _at(x, at), stacks[number]))

        branches = list(map(taken, range(len(sizes))))
        matrix, old = branches[0]() if alone else jax.lax.switch(which, branches)
        new, found = refresh_one(matrix, old)

        def put(mine: jax.Array, size: int, stack: Subspace) -> Subspace:
            if size == 1:
                return jax.tree.map(functools.partial(chosen, mine), new, stack)
            own = jnp.where(mine, at, 0)
            return jax.tree.map(lambda whole, x: _with(whole, own, chosen(mine, x, _at(whole, own))), stack, new)

        if not alone:
            stacks = list(map(put, _one_hot(which, len(sizes)), sizes, stacks))
        elif sizes == [1]:
            stacks = [new]
        else:
            stacks = [jax.tree.map(lambda whole, x: _with(whole, at, x), stacks[0], new)]
        outcome = jax.tree.map(lambda whole, x: _with(whole, index, x), outcome, found)
        return _with(todo, index, jnp.zeros_like(index, dtype=bool)), outcome, stacks

    start = wanted, _nothing(wanted), stacks
    _, outcome, stacks = jax.lax.while_loop(lambda carry: jnp.any(carry[0]), body, start)
    shaped = [
        jax.tree.map(lambda x, like: x.reshape(like.shape), *pair) for pair in zip(stacks, subspaces, strict=True)
    ]
    return shaped, outcome


def _one_hot(which: jax.Array, count: int) -> list[jax.Array]:
    """Whether a number is 0, 1, 2, ..., a scalar each.

    XLA compiles a kernel for every constant that it can see, which would be most of the compile time of a model with many layers.
    It cannot see into the results of a reduction, so the digits of the number are found by one.
    """
    base = math.isqrt(count - 1) + 1
    digits = jnp.arange(base, dtype=which.dtype)
    places = [digits == number for number in range(base)]
    ones = [(digits == digit) & place for digit in (which // base, which % base) for place in places]
    start = [jnp.zeros((), bool)] * len(ones)
    hot = jax.lax.reduce(ones, start, lambda a, b: [x | y for x, y in zip(a, b, strict=True)], (0,))
    return [jax.lax.bitwise_and(hot[number // base], hot[base + number % base]) for number in range(count)]


def _at(stack: jax.Array, index: jax.Array) -> jax.Array:
    """The matrix number ``index`` of a stack (N, ...)."""
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def _read(stack: jax.Array, index: jax.Array) -> jax.Array:
    """:func:`_at`, of a stack that the loop only reads.

    On a GPU, XLA would copy a whole stack of gradients into the layout that suits the work on one matrix.  Flat, it has one
    layout.  A TPU stores arrays in tiles of their last two axes, so there flattening would copy it.
    """
    if not jax.sharding.get_abstract_mesh().empty:  # flat, it could lose its sharding
        return _at(stack, index)

    def flat(stack: jax.Array, index: jax.Array) -> jax.Array:
        return _at(stack.reshape(stack.shape[0], -1), index).reshape(stack.shape[1:])

    return jax.lax.platform_dependent(stack, index, tpu=_at, default=flat)


def _with(stack: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    """A stack (N, ...) with another matrix number ``index``."""
    return jax.lax.dynamic_update_index_in_dim(stack, x, index, 0)


def _refresh_one(
    projector: Projector,
    view: MatrixView,
    key: jax.Array,
    step: jax.Array,
    matrix: jax.Array,
    old: Subspace,
    carriers: tuple[Carrier, ...],
) -> tuple[Subspace, Outcome]:
    """The subspace of one matrix whose gradient is good."""
    storage, rank = projector.storage, view.rank

    def side(basis: Basis, matrix: jax.Array, transposed: bool) -> tuple[Basis, jax.Array, jax.Array, jax.Array]:
        known = storage.project(basis, matrix, rank)
        decoded = storage.decode(basis, rank, known.dtype)
        made = projector.refresh(ProjectorInput(key, matrix, decoded, known, step, transposed))
        made = jax.tree.map(lambda x, like: x.astype(like.dtype), made, decoded)
        new = storage.encode(made)
        q = storage.overlap(new, basis, matrix.shape[0], rank)
        return new, q, _relative(storage, q, new, basis, matrix.shape[0], rank), _usable(storage, made)

    made = {}
    if view.left:
        made["left"] = side(old.left, matrix, False)
    if view.right:
        made["right"] = side(old.right, matrix.T, True)
    left, right = (made[name][0] if name in made else getattr(old, name) for name in ("left", "right"))
    q_left, q_right = (made[name][1] if name in made else None for name in ("left", "right"))
    usable = functools.reduce(jnp.logical_and, [good for *_, good in made.values()])
    moments = tuple(carrier.turn(m, q_left, q_right) for carrier, m in zip(carriers, old.moments, strict=True))
    new = Subspace(left, right, moments)
    kept = jax.tree.map(lambda new, old: jnp.where(usable, new.astype(old.dtype), old), new, old)
    replaced = usable & storage.exists(old.left if view.left else old.right)
    overlap = sum(relative for _, _, relative, _ in made.values()) / len(made)
    return kept, Outcome(usable, ~usable, jnp.where(replaced, overlap, -1))


def _relative(storage: Storage, q: jax.Array, new: Basis, old: Basis, m: int, rank: int) -> jax.Array:
    """‖P_newᵀP_old‖² over its largest possible value, ‖P_newᵀP_new‖ ‖P_oldᵀP_old‖, which is r for orthonormal bases."""

    def norm(basis: Basis) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(storage.overlap(basis, basis, m, rank))))

    largest = rank if storage.orthonormal else norm(new) * norm(old)
    return jnp.sum(jnp.square(q)) / largest


def _usable(storage: Storage, basis: Basis) -> jax.Array:
    if storage.orthonormal and isinstance(basis, jax.Array) and basis.ndim == 2:
        return defect(basis) <= _TOLERANCE
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(basis)]
    return jnp.all(jnp.stack(finite))
