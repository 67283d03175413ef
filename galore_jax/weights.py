# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits, with stochastic rounding (Zhang et al. 2024, Q-GaLore, arXiv 2407.08296, section 3.3).

A row of a matrix is cut into blocks of 256 elements, the last one shorter where 256 does not divide it.  A block with scale s and
codes q in {-127 .. 127} stands for the weights s q.  After an update U,

    x = (s q + U) / s',      q' = floor(x + u),  u uniform in [0, 1),      E[s' q'] = s q + U

A nearest rounding would lose every update smaller than s/2.  The scale stays as it is, s' = s, unless the block outgrows it or
shrinks below half of it: otherwise each step would round all 256 weights anew, where now a weight without an update keeps its
code.  A new scale leaves room to grow, s' = 1.05 max|w| / 127.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from galore_jax import sharding
from galore_jax.matrix_view import is_matrix_name

BLOCK = 256
_LARGEST = 127
_ROOM = 1.05
_SHRUNK = 0.5  # of the largest weight that a scale can hold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A weight (*batch, m, n) in 8 bits; a node of the parameter tree whose leaves are ``codes`` and ``scales``."""

    codes: jax.Array  # (*batch, m, n), int8
    scales: jax.Array  # (*batch, m, ⌈n / 256⌉), bfloat16
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})  # of the weight when it is used


def quantize_weights(params: Any, mask: Any = None) -> Any:
    """``params`` with its matrices as :class:`Int8Weight`, rounded to nearest.

    Args:
      params: a tree of arrays.
      mask: tree of bools: which leaves.  None: those that galore projects by default, at least two axes and no embedding,
        LM head or norm in their path.

    >>> params = {"kernel": jnp.full((2, 300), 0.5, jnp.bfloat16), "norm": jnp.ones((300,))}
    >>> stored = quantize_weights(params)
    >>> stored["kernel"].codes.shape, stored["kernel"].scales.shape, stored["norm"].shape
    ((2, 300), (2, 2), (300,))
    >>> round(float(dequantize(stored)["kernel"][0, 0]), 2)
    0.5
    """
    if mask is None:
        mask = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf.ndim >= 2 and is_matrix_name(jax.tree_util.keystr(path, simple=True, separator="/"))
            ),
            params,
        )
    return jax.tree.map(lambda leaf, chosen: _nearest(leaf) if chosen else leaf, params, mask)


def dequantize(params: Any) -> Any:
    """``params`` with every :class:`Int8Weight` as an array of its dtype."""
    return jax.tree.map(lambda leaf: _dense(leaf) if is_int8(leaf) else leaf, params, is_leaf=is_int8)


def apply_updates(params: Any, updates: Any, key: jax.Array | None = None, *, layer: int | jax.Array = 0) -> Any:
    """``optax.apply_updates`` for a tree that may hold :class:`Int8Weight`; sums are float32 and rounded once.

    Args:
      params: arrays, rounded to nearest, and Int8Weights, rounded stochastically.
      updates: arrays in the shapes of the weights.
      key: PRNG key of this step; needed when there is an Int8Weight.  The noise of a weight depends on it, on the weight's
        path and on the number of its matrix.
      layer: the place of these parameters in a stack of which they are a slice, so that slices are rounded as the stack is.

    Raises:
      ValueError: an Int8Weight and no key.

    >>> params = quantize_weights({"kernel": jnp.full((2, 300), 0.5)})
    >>> updates = {"kernel": jnp.full((2, 300), 1e-3)}  # a quarter of a code
    >>> new = apply_updates(params, updates, jax.random.key(0))
    >>> change = dequantize(new)["kernel"] - dequantize(params)["kernel"]
    >>> sorted({round(float(x), 4) for x in change.ravel()}), bool(abs(jnp.mean(change) - 1e-3) < 3e-4)
    ([0.0, 0.0041], True)
    """

    def apply(path: tuple, weight: Any, update: jax.Array) -> Any:
        if not is_int8(weight):
            return (weight.astype(jnp.float32) + update.astype(jnp.float32)).astype(weight.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if key is None:
            raise ValueError(f"{name!r} is an int8 weight, which is rounded stochastically: give apply_updates a key.")
        return _stochastic(weight, update, jax.random.fold_in(key, zlib.crc32(name.encode())), layer)

    return jax.tree_util.tree_map_with_path(apply, params, updates, is_leaf=is_int8)


def is_int8(node: Any) -> bool:
    """Whether a node of a parameter tree is an :class:`Int8Weight`."""
    return isinstance(node, Int8Weight)


def _nearest(weight: jax.Array) -> Int8Weight:
    wide = weight.astype(jnp.float32)
    scales = _scale_for(_block_peaks(wide))
    codes = jnp.round(wide / sharding.spread(scales, wide, BLOCK)).astype(jnp.int8)
    return Int8Weight(codes, scales, jnp.dtype(weight.dtype))


def _dense(weight: Int8Weight) -> jax.Array:
    codes = jax.lax.platform_dependent(weight.codes, tpu=_by_rows, default=lambda codes: codes)
    scales = sharding.spread(weight.scales, codes, BLOCK)
    return (codes.astype(jnp.float32) * scales).astype(weight.dtype)


def _by_rows(codes: jax.Array) -> jax.Array:
    """As they are stored: XLA for TPUs would copy a whole stack of them into the order that the next product likes best."""
    return with_layout_constraint(codes, Layout(tuple(range(codes.ndim))))


def _stochastic(weight: Int8Weight, update: jax.Array, key: jax.Array, layer: int | jax.Array) -> Int8Weight:
    codes, update = weight.codes.astype(jnp.float32), update.astype(jnp.float32)
    peaks = _block_peaks(codes * sharding.spread(weight.scales, codes, BLOCK) + update)
    old = weight.scales.astype(jnp.float32)
    held = old * _LARGEST
    scales = jnp.where((peaks <= held) & (peaks >= _SHRUNK * held), weight.scales, _scale_for(peaks))
    # From the code, not from the product s q: where nothing changes, x is the code itself.
    change = sharding.spread(old / scales.astype(jnp.float32), codes, BLOCK)
    x = codes * change + update / sharding.spread(scales, codes, BLOCK)
    rounded = jnp.floor(x + _uniform(key, weight.codes.shape, layer))
    return Int8Weight(jnp.clip(rounded, -_LARGEST, _LARGEST).astype(jnp.int8), scales, weight.dtype)


def _uniform(key: jax.Array, shape: tuple[int, ...], layer: int | jax.Array) -> jax.Array:
    """Noise (*batch, m, n) in [0, 1), a draw of its own for each matrix of the batch."""
    count = math.prod(shape[:-2])
    numbers = jnp.asarray(layer, jnp.int32) * count + jnp.arange(count, dtype=jnp.int32)
    draw = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number), shape[-2:]))
    return draw(numbers).reshape(shape)


def _scale_for(peaks: jax.Array) -> jax.Array:
    return jnp.where(peaks > 0, peaks * (_ROOM / _LARGEST), 1).astype(jnp.bfloat16)


def _block_peaks(x: jax.Array) -> jax.Array:
    """(..., n) -> (..., ⌈n / 256⌉), the largest magnitude in each block."""
    return sharding.maxima(jnp.abs(x), BLOCK)
