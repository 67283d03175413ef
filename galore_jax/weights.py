# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits, with stochastic rounding (Zhang et al. 2024, Q-GaLore, arXiv 2407.08296, section 3.3).

Each row of a matrix is cut into blocks of 256 elements; the last block may be shorter.  A block with scale s and codes q in
{-127 .. 127} stores the weights s q.  After an update U,

    x = (s q + U) / s',      q' = floor(x + u),  u uniform in [0, 1),      E[s' q'] = s q + U

Rounding to nearest would lose every update smaller than s/2.  The scale stays, s' = s, unless the block outgrows it or shrinks
below half of it.  A new scale at every step would round all 256 weights again, while now a weight without an update keeps its
code.  A new scale leaves room to grow, s' = 1.05 max|w| / 127.

If a weight becomes NaN or infinite, s' is NaN and the whole block reads as NaN, from then on.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from galore_jax import sharding
from galore_jax.matrix_view import is_matrix_name

__all__ = ["Int8Weight", "apply_updates", "dequantize", "quantize_weights"]

BLOCK = 256
_LARGEST = 127
_ROOM = 1.05
# Of the largest weight that a scale can hold.
_SHRUNK = 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A weight (*batch, m, n) in 8 bits.  It is a node of the parameter tree, with the leaves ``codes`` and ``scales``."""

    # (*batch, m, n), int8
    codes: jax.Array
    # (*batch, m, ⌈n / 256⌉), bfloat16; NaN for a block with a weight that is not finite.
    scales: jax.Array
    # The dtype of the weight when it is used.
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})


def quantize_weights(params: Any, mask: Any = None) -> Any:
    """``params`` with its matrices as :class:`Int8Weight`, rounded to nearest.

    Args:
      params: Tree of arrays.
      mask: Tree of bools that selects the leaves to quantize.  None selects the leaves that galore projects by default: floating
        point, at least two axes, and no embedding, LM head or norm in their path.

    Raises:
      ValueError: ``mask`` selects a leaf that is a vector or not of a real floating point dtype.

    >>> params = {"kernel": jnp.full((2, 300), 0.5, jnp.bfloat16), "norm": jnp.ones((300,))}
    >>> stored = quantize_weights(params)
    >>> stored["kernel"].codes.shape, stored["kernel"].scales.shape, stored["norm"].shape
    ((2, 300), (2, 2), (300,))
    >>> round(float(dequantize(stored)["kernel"][0, 0]), 2)
    0.5
    """
    if mask is None:
        mask = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.ndim(leaf) >= 2 and _is_real(leaf) and is_matrix_name(_name(path)), params
        )

    def quantize(path: tuple, leaf: Any, chosen: bool) -> Any:
        if not chosen:
            return leaf
        if jnp.ndim(leaf) < 2 or not _is_real(leaf):
            raise ValueError(
                f"mask selects {_name(path)!r} with shape {jnp.shape(leaf)} and dtype {jnp.result_type(leaf)}; expected a matrix "
                "of a real floating point dtype. Write False for it in mask."
            )
        return _nearest(leaf)

    return jax.tree_util.tree_map_with_path(quantize, params, mask)


def dequantize(params: Any) -> Any:
    """``params`` with every :class:`Int8Weight` as an array of its dtype."""
    return jax.tree.map(lambda leaf: _dense(leaf) if is_int8(leaf) else leaf, params, is_leaf=is_int8)


def apply_updates(params: Any, updates: Any, key: jax.Array | None = None, *, layer: int | jax.Array = 0) -> Any:
    """``optax.apply_updates`` for a tree that may hold :class:`Int8Weight`.

    Int8Weights are rounded stochastically.  All other parameters get the result of ``optax.apply_updates``.

    Args:
      params: Tree of arrays and Int8Weights.
      updates: Tree of arrays in the shapes of the weights.
      key: PRNG key of this step, needed if there is an Int8Weight.  The noise of a weight depends on the key, on the path of the
        weight and on the index of its matrix.
      layer: If these parameters are a slice of a stack, its index in the stack.  Slices are then rounded as the stack would be.

    Raises:
      ValueError: There is an Int8Weight and no key.

    >>> params = quantize_weights({"kernel": jnp.full((2, 300), 0.5)})
    >>> # A quarter of a code.
    >>> updates = {"kernel": jnp.full((2, 300), 1e-3)}
    >>> new = apply_updates(params, updates, jax.random.key(0))
    >>> change = dequantize(new)["kernel"] - dequantize(params)["kernel"]
    >>> sorted({round(float(x), 4) for x in change.ravel()}), bool(abs(jnp.mean(change) - 1e-3) < 3e-4)
    ([0.0, 0.0041], True)
    """

    def apply(path: tuple, weight: Any, update: jax.Array) -> Any:
        if not is_int8(weight):
            with jax.numpy_dtype_promotion("standard"):
                return optax.apply_updates(weight, update)
        name = _name(path)
        if key is None:
            raise ValueError(
                f"{name!r} is an int8 weight, which is rounded stochastically, and key is None. Pass key=."
            )
        return _stochastic(weight, update, jax.random.fold_in(key, zlib.crc32(name.encode())), layer)

    return jax.tree_util.tree_map_with_path(apply, params, updates, is_leaf=lambda node: node is None or is_int8(node))


def is_int8(node: Any) -> bool:
    """Whether a node of a parameter tree is an :class:`Int8Weight`."""
    return isinstance(node, Int8Weight)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_real(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _nearest(weight: jax.Array) -> Int8Weight:
    wide = weight.astype(jnp.float32)
    scales = _scale_for(_block_peaks(wide))
    codes = _to_int8(jnp.round(wide / sharding.spread(scales, wide, BLOCK)))
    return Int8Weight(codes, scales, jnp.dtype(weight.dtype))


def _dense(weight: Int8Weight) -> jax.Array:
    # XLA for TPUs would copy a whole stack into the order that the next product likes best.
    codes = jax.lax.platform_dependent(weight.codes, tpu=_by_rows, default=lambda codes: codes)
    scales = sharding.spread(weight.scales, codes, BLOCK)
    return (codes.astype(jnp.float32) * scales).astype(weight.dtype)


def _by_rows(array: jax.Array) -> jax.Array:
    """In the order of memory, by rows."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def _stochastic(weight: Int8Weight, update: jax.Array, key: jax.Array, layer: int | jax.Array) -> Int8Weight:
    # An update that comes by columns, as Muon's do, would be widened to float32 before it is turned.
    codes, update = weight.codes.astype(jnp.float32), _by_rows(update).astype(jnp.float32)
    peaks = _block_peaks(codes * sharding.spread(weight.scales, codes, BLOCK) + update)
    old = weight.scales.astype(jnp.float32)
    held = old * _LARGEST
    scales = jnp.where((peaks <= held) & (peaks >= _SHRUNK * held), weight.scales, _scale_for(peaks))
    # Computed from the code, not from the product s q, so that x is the code itself where nothing changes.  An infinite ratio
    # would turn a code of 0 into NaN.
    ratio = jnp.minimum(old / scales.astype(jnp.float32), jnp.finfo(jnp.float32).max)
    change = sharding.spread(ratio, codes, BLOCK)
    x = codes * change + update / sharding.spread(scales, codes, BLOCK)
    rounded = jnp.floor(x + _uniform(key, weight.codes.shape, layer))
    return Int8Weight(_to_int8(rounded), scales, weight.dtype)


def _to_int8(x: jax.Array) -> jax.Array:
    """A code of 0 for NaN, for which the scale is NaN too.  What an integer conversion makes of a NaN depends on the device."""
    return jnp.where(jnp.isnan(x), 0, jnp.clip(x, -_LARGEST, _LARGEST)).astype(jnp.int8)


def _uniform(key: jax.Array, shape: tuple[int, ...], layer: int | jax.Array) -> jax.Array:
    """Noise (*batch, m, n) in [0, 1), drawn separately for each matrix of the batch."""
    count = math.prod(shape[:-2])
    numbers = jnp.asarray(layer, jnp.int32) * count + jnp.arange(count, dtype=jnp.int32)
    draw = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number), shape[-2:]))
    return draw(numbers).reshape(shape)


def _scale_for(peaks: jax.Array) -> jax.Array:
    scales = jnp.where(peaks > 0, peaks * (_ROOM / _LARGEST), 1)
    return jnp.where(jnp.isfinite(peaks), scales, jnp.nan).astype(jnp.bfloat16)


def _block_peaks(x: jax.Array) -> jax.Array:
    """(..., n) -> (..., ⌈n / 256⌉): the largest magnitude in each block, NaN if there is one.

    Integers are compared, whose order is that of the magnitudes, because XLA's maximum on CPUs drops a NaN.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFFFF
    return jax.lax.bitcast_convert_type(sharding.maxima(bits, BLOCK), jnp.float32)
