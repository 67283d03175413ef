# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizer state in 8 or 16 bits: stores the large arrays of any Optax transformation in a codec between updates.

    update     state  ->  decode  ->  inner.update in float32  ->  encode  ->  state        leaf by leaf, within one program

``"int8"`` stores one byte per number and one float32 per block of 256.  Second moments use the unsigned map, which never rounds a
positive number to 0, so Adam never divides by 0.  All other arrays use the signed map.  ``"bf16"`` rounds stochastically.  With
rounding to nearest, a second moment would stop moving, because 0.999 v rounds to v in bfloat16.  See :mod:`galore_jax.codecs`.

A :class:`galore_jax.MatrixCodec` stores what is linear in the gradient, such as a momentum, in 8 to 2 bits, if it is a matrix
or a stack of matrices; all else is stored as with ``"int8"``.  Then each matrix is decoded, updated and encoded before the next.

An array is encoded if it is float32, has at least 4,096 elements and a last axis of at least 16, and is in a field that
:mod:`galore_jax._core.state_fields` knows.  bitsandbytes has the same lower bound on the size, because encoding a small tensor
saves little.  Unknown fields stay in float32: 8 bits are too few for a copy of the parameters, and the signed map is wrong for a
second moment under another name.  The mean beside a centered second moment stays too, because their difference must not turn
negative.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import codecs
from galore_jax._core import coordinates as subspace, seeds
from galore_jax._core.dtypes import promoted
from galore_jax._core.folding import hidden_zero
from galore_jax._core.matrix_loop import matrix_by_matrix_anywhere
from galore_jax._core.per_matrix import alone as only_leaf
from galore_jax._core.state_fields import NO_PARAMETER, Kind, kinds, labelled, parameter_index
from galore_jax._core.trees import as_arrays
from galore_jax.matrix_codec import CodedMatrix, MatrixCodec

CODECS = ("int8", "bf16")
_MIN_SIZE = 4096
_MIN_LAST_AXIS = 16
_NOT_NEGATIVE = {Kind.QUADRATIC, Kind.ROW, Kind.COLUMN, Kind.UNFACTORED, Kind.NORM}


class QuantizeState(NamedTuple):
    """State of :func:`quantize_state`."""

    FIELD_KINDS = kinds("", step=Kind.KEPT, inner_state=Kind.NESTED)

    # shape=(), dtype=jnp.int32; the number of updates so far, from which the noise is drawn.
    step: jax.Array
    # The state of the inner transformation, its large arrays as nodes of galore_jax.codecs.
    inner_state: Any

    @property
    def count(self) -> jax.Array:  # pyrefly: ignore[bad-override]
        """The number of updates so far.

        The field has another name so that ``optax.tree.get(state, "count")`` finds the count of the inner transformation alone.
        """
        return self.step


def quantize_state(
    inner: optax.GradientTransformation, codec: str | MatrixCodec = "int8", *, seed: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    """Stores the large state of ``inner`` in 8 bits (a quarter of its bytes), in bfloat16 (half of its bytes), or in fewer bits.

    Gradients and parameters are cast to at least float32 before they reach ``inner``.  Updates are cast back to the dtype of the
    gradients.  ``init`` decides which arrays are encoded, and ``update`` keeps to it.  So you can make a state for each layer
    with ``jax.vmap(tx.init)`` and update it layer by layer.

    Args:
      inner: An Optax transformation.
      codec: ``"int8"``, ``"bf16"``, or a :class:`galore_jax.MatrixCodec`, with which ``inner`` is run on one matrix after the
        other, so it must not combine several.
      seed: Seed for the noise of ``"bf16"`` and for the dither of a ``MatrixCodec``.  All matrices of a stack share their noise.

    Returns:
      A transformation whose state is a :class:`QuantizeState`.

    Raises:
      TypeError: ``inner`` is not an Optax transformation.
      ValueError: ``codec`` or ``seed`` is not one of the values above.

    >>> params = {"kernel": jnp.ones((64, 512)), "bias": jnp.ones((512,))}
    >>> tx = quantize_state(optax.scale_by_adam())
    >>> state = tx.init(params)
    >>> adam = state.inner_state
    >>> adam.mu["bias"].dtype, adam.mu["kernel"].codes.dtype, adam.nu["kernel"].scales.shape
    (dtype('float32'), dtype('uint8'), (64, 2))
    >>> updates, state = tx.update(params, state)
    >>> momentum = quantize_state(optax.trace(0.9), MatrixCodec(bits=4)).init(params).inner_state.trace
    >>> momentum["kernel"].rest.codes.shape
    (64, 256)
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner is {inner!r}; expected an Optax transformation. Write, for example, quantize_state(optax.scale_by_adam())."
        )
    if not isinstance(codec, MatrixCodec) and codec not in CODECS:
        raise ValueError(f"codec is {codec!r}; expected one of {', '.join(CODECS)}, or a galore_jax.MatrixCodec.")
    seeds.check_seed(seed)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> QuantizeState:
        state = inner.init(jax.tree.map(functools.partial(subspace.zero_coordinates, None), params))
        leaves, structure = codecs.flatten(state)
        zero = hidden_zero()
        stored = [_stored(codec, leaf, label.kind, zero) for leaf, label in zip(leaves, labelled(state), strict=True)]
        if isinstance(codec, MatrixCodec):
            stored = _with_matrices(codec, inner, params, state, stored)
        return QuantizeState(jnp.zeros([], jnp.int32), structure.unflatten(stored))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, QuantizeState]:
        updates = as_arrays(updates)
        stored, structure = codecs.flatten(state.inner_state)
        wide, wide_params = (jax.tree.map(promoted, tree) for tree in (updates, params))
        keys = _keys(seed, state.step, stored)
        arguments = structure, stored, keys, wide, wide_params, extra_args
        if any(isinstance(leaf, CodedMatrix) for leaf in stored):
            replies, new = _updated_by_matrix(inner, *arguments)
        else:
            replies, new = _updated(inner, *arguments)
        replies = jax.tree.map(lambda reply, gradient: reply.astype(gradient.dtype), replies, updates)
        return replies, QuantizeState(state.step + 1, structure.unflatten(new))

    return optax.GradientTransformationExtraArgs(init, update)


def _updated(
    inner: optax.GradientTransformationExtraArgs,
    structure: Any,
    stored: list[Any],
    keys: list[Any],
    gradients: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, list[Any]]:
    """The answer of ``inner`` and the leaves of its new state, encoded, with whole arrays at once."""

    def step(stored: list[Any]) -> tuple[optax.Updates, list[Any]]:
        wide = structure.unflatten(map(codecs.decoded, stored))
        replies, new = inner.update(gradients, wide, params, **extra_args)
        return replies, structure.flatten_up_to(new)

    # The scales need the whole new state and the codes need the scales, so XLA would keep the new state in float32 in
    # between.  The barrier hides that the step after it is the same, so XLA computes the new state again instead.  That
    # costs less than to write and read it.
    scales = list(map(codecs.scales_like, step(stored)[1], stored))
    pairs = [jax.lax.optimization_barrier(pair) for pair in zip(stored, scales, strict=True)]
    stored, scales = ([pair[i] for pair in pairs] for i in range(2))
    replies, new = step(stored)
    return replies, list(map(codecs.encoded_like, new, stored, keys, scales))


def _updated_by_matrix(
    inner: optax.GradientTransformationExtraArgs,
    structure: Any,
    stored: list[Any],
    keys: list[Any],
    gradients: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, list[Any]]:
    """:func:`_updated`, but matrix by matrix where the state of a parameter is stored as matrices."""
    leaves, treedef = jax.tree.flatten(gradients)
    values = [None] * len(leaves) if params is None else treedef.flatten_up_to(params)
    owners = parameter_index(inner, structure.unflatten(stored), treedef)
    alone = {owner for owner, leaf in zip(owners, stored, strict=True) if isinstance(leaf, CodedMatrix)}
    shared = [place for place, owner in enumerate(owners) if owner == NO_PARAMETER]

    def without(tree_leaves: list[Any]) -> Any:
        return treedef.unflatten(optax.MaskedNode() if i in alone else leaf for i, leaf in enumerate(tree_leaves))

    others = [optax.MaskedNode() if owner in alone else leaf for owner, leaf in zip(owners, stored, strict=True)]
    other_params = None if params is None else without(values)
    answered, new = _updated(inner, structure, others, keys, without(leaves), other_params, extra_args)
    replies = treedef.flatten_up_to(answered)

    for index in alone:
        mine = [place for place, owner in enumerate(owners) if owner == index]

        def one(carried: tuple, given: tuple, index: int = index, mine: list[int] = mine) -> tuple:
            gradient, *own = carried
            value, seeds_of_mine, counts = given
            wide = [optax.MaskedNode()] * len(stored)
            for place, leaf in zip(mine + shared, own + counts, strict=True):
                wide[place] = codecs.decoded(leaf)
            value = None if value is None else only_leaf(treedef, index, value)
            answer, after = inner.update(
                only_leaf(treedef, index, gradient), structure.unflatten(wide), value, **extra_args
            )
            after = structure.flatten_up_to(after)
            kept = [
                leaf.renewed(after[place], seed)
                if isinstance(leaf, CodedMatrix)
                else codecs.encoded_like(after[place], leaf)
                for place, leaf, seed in zip(mine, own, seeds_of_mine, strict=True)
            ]
            return treedef.flatten_up_to(answer)[index].astype(gradient.dtype), *kept

        batch_shape = leaves[index].shape[:-2]

        def spread(x: jax.Array, batch_shape: tuple[int, ...] = batch_shape) -> jax.Array:
            return jnp.broadcast_to(x, (*batch_shape, *x.shape))

        given = (
            values[index],
            [spread(jax.random.bits(keys[place], (), jnp.uint32)) for place in mine],
            jax.tree.map(spread, [stored[place] for place in shared]),
        )
        carried = (leaves[index], *(stored[place] for place in mine))
        replies[index], *found = matrix_by_matrix_anywhere(one, carried, given, len(batch_shape))
        for place, leaf in zip(mine, found, strict=True):
            new[place] = leaf
    return treedef.unflatten(replies), new


def _with_matrices(
    codec: MatrixCodec, inner: optax.GradientTransformation, params: Any, state: Any, stored: list[Any]
) -> list[Any]:
    """``stored`` with what is linear encoded by ``codec``, where all arrays of a parameter are one for each of its matrices."""
    leaves, treedef = jax.tree.flatten(params)
    found = codecs.flatten(state)[0]
    owners, labels = parameter_index(inner, state, treedef), labelled(state)
    fits = [
        all(
            jnp.shape(leaf)[: jnp.ndim(param) - 2] == jnp.shape(param)[:-2]
            for leaf, owner in zip(found, owners, strict=True)
            if owner == index
        )
        for index, param in enumerate(leaves)
    ]

    def chosen(leaf: Any, owner: int, kind: Kind | None, otherwise: Any) -> Any:
        own = owner != NO_PARAMETER and fits[owner] and jnp.shape(leaf) == jnp.shape(leaves[owner])
        linear = own and kind is Kind.LINEAR and leaf.dtype == jnp.float32
        return codec.encode(leaf) if linear and codec.applies_to(leaf.shape) else otherwise

    return [
        chosen(leaf, owner, label.kind, otherwise)
        for leaf, owner, label, otherwise in zip(found, owners, labels, stored, strict=True)
    ]


def _keys(seed: int | jax.Array, step: jax.Array, stored: list[Any]) -> list[jax.Array | None]:
    """A key for each leaf; None for each if no codec draws noise."""
    if not any(isinstance(leaf, codecs.Bfloat16 | CodedMatrix) for leaf in stored):
        return [None] * len(stored)
    fold = jax.vmap(functools.partial(jax.random.fold_in, seeds.key_of(seed, step)))
    return list(fold(jnp.arange(len(stored))))


def _stored(codec: str | MatrixCodec, leaf: Any, kind: Kind | None, zero: jax.Array) -> Any:
    """A leaf of a fresh state as it is stored; ``zero`` is added before it is encoded."""
    large = (
        isinstance(leaf, jax.Array)
        and leaf.dtype == jnp.float32
        and leaf.size >= _MIN_SIZE
        and leaf.shape[-1] >= _MIN_LAST_AXIS
    )
    if not large or kind in (None, Kind.CENTERED, Kind.COUNT, Kind.KEPT):
        return leaf
    leaf = leaf + zero
    if codec == "bf16":
        return codecs.Bfloat16.encode(leaf)
    return (codecs.UnsignedBlocks if kind in _NOT_NEGATIVE else codecs.SignedBlocks).encode(leaf)
