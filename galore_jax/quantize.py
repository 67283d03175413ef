# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizer state in 8 or 16 bits: any Optax transformation, with its large arrays stored by a codec between updates.

    update     state  ->  decode  ->  inner.update in float32  ->  encode  ->  state        leaf by leaf, within one program

``"int8"`` keeps a byte for each number and a float32 for each block of 256: second moments by the unsigned map, which never
turns a positive number into 0 and so never divides by one, everything else by the signed map.  ``"bf16"`` rounds
stochastically: to nearest, a second moment would stop moving, as 0.999 v is v in bfloat16.  See :mod:`galore_jax.codecs`.

An array is stored so if it is float32, has at least 4,096 elements and a last axis of at least 16, and is in a field that
:mod:`galore_jax._core.state_fields` knows.  (bitsandbytes has the first bound too: small tensors do not pay.)  What is not known stays as it
is: 8 bits do not do for a copy of the parameters, nor the signed map for a second moment under another name.  So does the mean
beside a centred second moment, whose difference must not turn negative.
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
from galore_jax._core.state_fields import Kind, labelled

CODECS = ("int8", "bf16")
_MIN_SIZE = 4096
_MIN_LAST_AXIS = 16
_NOT_NEGATIVE = {Kind.QUADRATIC, Kind.ROW, Kind.COLUMN, Kind.UNFACTORED, Kind.NORM}


class QuantizeState(NamedTuple):
    """State of :func:`quantize_state`."""

    count: jax.Array  # shape=(), dtype=jnp.int32; updates done, which the noise depends on
    inner_state: Any  # of the inner transformation, its large arrays as nodes of galore_jax.codecs


def quantize_state(
    inner: optax.GradientTransformation, codec: str = "int8", *, seed: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    """Stores the large state of ``inner`` in 8 bits (a quarter of its bytes) or in bfloat16 (half of them).

    Everything reaches ``inner`` in at least float32, whatever the dtype of the parameters; updates come back in the dtype of
    the gradients.  ``update`` stores what is stored already and decides nothing anew, so a state that was made for each layer by
    ``jax.vmap(tx.init)`` can be updated layer by layer.

    Args:
      inner: any Optax transformation.
      codec: ``"int8"`` or ``"bf16"``.
      seed: of the noise of ``"bf16"``, which is the same for all matrices of a stack.

    Returns:
      A transformation whose state is a :class:`QuantizeState`.

    Raises:
      TypeError, ValueError: for a bad argument.

    >>> params = {"kernel": jnp.ones((64, 512)), "bias": jnp.ones((512,))}
    >>> tx = quantize_state(optax.scale_by_adam())
    >>> state = tx.init(params)
    >>> adam = state.inner_state
    >>> adam.mu["bias"].dtype, adam.mu["kernel"].codes.dtype, adam.nu["kernel"].scales.shape
    (dtype('float32'), dtype('uint8'), (64, 2))
    >>> updates, state = tx.update(params, state)
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner is {inner!r}: write an Optax transformation, for example quantize_state(optax.scale_by_adam())."
        )
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}: write one of {', '.join(CODECS)}.")
    seeds.check_seed(seed)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> QuantizeState:
        state = inner.init(jax.tree.map(functools.partial(subspace.zero_coordinates, None), params))
        leaves, structure = codecs.flatten(state)
        stored = [_stored(codec, leaf, label.kind) for leaf, label in zip(leaves, labelled(state), strict=True)]
        return QuantizeState(jnp.zeros([], jnp.int32), structure.unflatten(stored))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, QuantizeState]:
        stored, structure = codecs.flatten(state.inner_state)
        gradients, params = (jax.tree.map(promoted, tree) for tree in (updates, params))

        def step(stored: list[Any]) -> tuple[optax.Updates, list[Any]]:
            wide = structure.unflatten(map(codecs.decoded, stored))
            replies, new = inner.update(gradients, wide, params, **extra_args)
            return replies, structure.flatten_up_to(new)

        # The scales of the new state need all of it, and its codes need the scales.  XLA would keep it in float32 in between;
        # from codes that it cannot know to be the same it makes it once more, which costs less than to write and read it.
        scales = list(map(codecs.scales_like, step(stored)[1], stored))
        pairs = [jax.lax.optimization_barrier(pair) for pair in zip(stored, scales, strict=True)]
        stored, scales = ([pair[i] for pair in pairs] for i in range(2))
        replies, new = step(stored)
        key = seeds.key_of(seed, state.count)
        new = [
            codecs.encoded_like(array, leaf, jax.random.fold_in(key, number), scale)
            for number, (array, leaf, scale) in enumerate(zip(new, stored, scales, strict=True))
        ]
        replies = jax.tree.map(lambda reply, gradient: reply.astype(gradient.dtype), replies, updates)
        return replies, QuantizeState(state.count + 1, structure.unflatten(new))

    return optax.GradientTransformationExtraArgs(init, update)


def _stored(codec: str, leaf: Any, kind: Kind | None) -> Any:
    """A leaf of a fresh state as it is kept."""
    large = (
        isinstance(leaf, jax.Array)
        and leaf.dtype == jnp.float32
        and leaf.size >= _MIN_SIZE
        and leaf.shape[-1] >= _MIN_LAST_AXIS
    )
    if not large or kind in (None, Kind.CENTRED, Kind.COUNT, Kind.KEPT):
        return leaf
    if codec == "bf16":
        return codecs.Bfloat16.encode(leaf)
    return (codecs.UnsignedBlocks if kind in _NOT_NEGATIVE else codecs.SignedBlocks).encode(leaf)
