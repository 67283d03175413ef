# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Arrays in 8 bits, block by block, and in bfloat16 by stochastic rounding; :mod:`galore_jax.matrix_codec` has fewer bits.

**Blocks.**  The last axis is cut into blocks of 256; the last block may be shorter.  A block stores its element s of largest
magnitude, with its sign.  For each x it stores the index of the value nearest to x / s in the dynamic map of 8-bit optimizers
(Dettmers et al. 2022, arXiv 2110.02861, section 1.3, as in bitsandbytes).  The map holds zero, one, and the centers of 2^i equal
cells in each of seven decades,

    signed      ± 10^(i-6) (1 + 9 (k + ½) / 2^i) / 10       i = 0..6, k = 0..2^i - 1        code 127 ± (2^i + k); 0: 127, 1: 255
    unsigned      10^(i-7) (1 + 9 (k + ½) / 2^i) / 10       i = 1..7, k = 0..2^i - 1        code 2^i + k - 1;     0: 0,   1: 255

in ascending order.  The map has no -1, so s keeps its sign: the extreme of a block is stored exactly, and encoding a decoded
array changes nothing.

Decoding looks the value up.  Encoding looks up the upper 16 bits of |x / s|, which leave at most one border between two values,
and compares the lower 16 bits with that border.  TPUs have no fast lookup, so they compute both decade by decade.

**bfloat16.**  Sixteen random bits are added to the bit pattern of a float32 and the lower sixteen bits are cut off.  So x rounds
up with probability (x - lower) / (upper - lower), and the mean is x.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax import sharding
from galore_jax.matrix_codec import CodedMatrix

BLOCK = 256
_DECADES = 7
# Cells of the highest decade.
_SIGNED, _UNSIGNED = 64, 128
# Times the smallest value of the map, 3.25e-7, this is still a normal float32.
_LEAST_UNSIGNED_SCALE = 2.0**-104
_SMALLEST_NORMAL = 2.0**-126
_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_BFLOAT16 = 2.0**128 - 2.0**120
# The upper 16 bits of 2^-24, which is below every border of the map, and of 2, which is above every |x / s|.
_LOWEST_WORD, _HIGHEST_WORD = 0x3380, 0x4000


class SignedBlocks(NamedTuple):
    """An array in 8 bits.

    >>> stored = SignedBlocks.encode(jnp.array([0.5, -2.0, 0.0, 1e-9]))
    >>> stored.codes, stored.scales
    (Array([ 53, 255, 127, 127], dtype=uint8), Array([-2.], dtype=float32))
    >>> [round(x, 4) for x in stored.decode().tolist()]
    [0.4953, -2.0, -0.0, -0.0]
    """

    # uint8, in the shape of the array
    codes: jax.Array
    # float32 (*lead, ⌈n / 256⌉).  If a block has an element that is not finite, its scale is NaN and all of it decodes to NaN.
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @classmethod
    def scales_of(cls, array: jax.Array) -> jax.Array:
        """The scales of an array (*lead, n).  ``encode`` computes them unless it is given them."""
        return _scales(array.astype(jnp.float32), signed=True)

    @classmethod
    def encode(cls, array: jax.Array, key: jax.Array | None = None, scales: jax.Array | None = None) -> SignedBlocks:
        """Encodes (*lead, n), at least one axis.  ``key`` is unused.  A block below 1.2e-38 becomes 0."""
        scales = cls.scales_of(array) if scales is None else scales
        return cls(_encode(array, scales, signed=True), scales)

    def decode(self) -> jax.Array:
        """The array in float32."""
        return _decode(self.codes, self.scales, signed=True)


class UnsignedBlocks(NamedTuple):
    """A nonnegative array in 8 bits, with twice the resolution.  Positive numbers stay positive.

    >>> UnsignedBlocks.encode(jnp.array([1e-30, 0.0, 3.0, 4.0])).codes
    Array([  1,   0, 219, 255], dtype=uint8)
    """

    # As in SignedBlocks.
    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @classmethod
    def scales_of(cls, array: jax.Array) -> jax.Array:
        return _scales(array.astype(jnp.float32), signed=False)

    @classmethod
    def encode(cls, array: jax.Array, key: jax.Array | None = None, scales: jax.Array | None = None) -> UnsignedBlocks:
        """Like :meth:`SignedBlocks.encode`.  A positive number becomes at least 1.6e-38, and a negative number 0."""
        scales = cls.scales_of(array) if scales is None else scales
        return cls(_encode(array, scales, signed=False), scales)

    def decode(self) -> jax.Array:
        """The array in float32."""
        return _decode(self.codes, self.scales, signed=False)


class Bfloat16(NamedTuple):
    """An array in bfloat16, rounded stochastically.

    All matrices of a stack share the noise of their last two axes, so a stack equals its layers encoded one by one.

    >>> # A quarter of the way from 1 to 1 + 2^-7.
    >>> stored = Bfloat16.encode(jnp.full((1000,), 1 + 2**-9), jax.random.key(0))
    >>> float(jnp.mean(stored.decode() > 1)), float(jnp.max(stored.decode()))
    (0.242..., 1.0078125)
    """

    values: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @classmethod
    def scales_of(cls, array: jax.Array) -> None:
        """None: bfloat16 has no scales."""

    @classmethod
    def encode(cls, array: jax.Array, key: jax.Array | None = None, scales: None = None) -> Bfloat16:
        """Rounds to nearest if ``key`` is None.  Finite numbers stay finite, and NaN stays NaN."""
        return cls(_to_bfloat16(array, key))

    def decode(self) -> jax.Array:
        """The array in float32."""
        return self.values.astype(jnp.float32)


_Elementwise = SignedBlocks | UnsignedBlocks | Bfloat16
Coded = _Elementwise | CodedMatrix


def is_coded(node: Any) -> bool:
    """Whether a node of a pytree is an encoded array."""
    return isinstance(node, Coded)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree and its structure.  An encoded array is one leaf."""
    return jax.tree.flatten(tree, is_leaf=is_coded)


def decoded(leaf: Any) -> Any:
    """The float32 values of an encoded array; any other leaf unchanged."""
    return leaf.decode() if isinstance(leaf, Coded) else leaf


def scales_like(array: Any, leaf: Any) -> Any:
    """The scales of ``array`` in the codec of ``leaf``; None if ``leaf`` is not encoded or has no scales."""
    return type(leaf).scales_of(array) if isinstance(leaf, _Elementwise) else None


def encoded_like(array: Any, leaf: Any, key: jax.Array | None = None, scales: Any = None) -> Any:
    """``array`` in the codec of ``leaf``, with the scales of :func:`scales_like` if they are known."""
    if isinstance(leaf, CodedMatrix):
        return leaf.renewed(array, None if key is None else jax.random.bits(key, (), jnp.uint32))
    return type(leaf).encode(array, key, scales) if isinstance(leaf, _Elementwise) else array


@functools.partial(jax.jit, static_argnames="signed", inline=True)
def _encode(array: jax.Array, scales: jax.Array, signed: bool) -> jax.Array:
    array = array.astype(jnp.float32)
    # The inverse of the largest scales is denormal, four times it is not.  Where a scale is 0 or NaN, the codes do not matter.
    inverse = jnp.clip(4 / scales, -_LARGEST, _LARGEST)
    ratio = array * sharding.spread(inverse, array, BLOCK) * 0.25
    by_table, by_arithmetic = (functools.partial(f, top=_top(signed)) for f in (_nearest_by_table, _nearest))
    place = jax.lax.platform_dependent(jnp.abs(ratio), tpu=by_arithmetic, default=by_table)
    if signed:
        codes = 127 + jnp.where(ratio < 0, -jnp.minimum(place, 127), place)
    else:
        # Compared as integers, because some devices take a denormal for zero.
        positive = jax.lax.bitcast_convert_type(array, jnp.int32) > 0
        codes = jnp.where(positive, jnp.maximum(place - 1, 1), 0)
    return codes.astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="signed", inline=True)
def _decode(codes: jax.Array, scales: jax.Array, signed: bool) -> jax.Array:
    by_table, by_arithmetic = (functools.partial(f, signed=signed) for f in (_values_by_table, _values))
    values = jax.lax.platform_dependent(codes, tpu=by_arithmetic, default=by_table)
    return values * sharding.spread(scales, codes, BLOCK)


def _scales(array: jax.Array, signed: bool) -> jax.Array:
    """(*lead, n) -> (*lead, blocks): the element of largest magnitude in each block, the positive one of two.

    Integers are compared, whose order is that of the magnitudes, because some devices drop a NaN or flush a denormal.
    """
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    if signed:
        # The sign becomes the lowest bit.
        largest = sharding.maxima(bits << 1 | ~bits >> 31, BLOCK)
        scale = jax.lax.bitcast_convert_type(largest >> 1 | ~largest << 31, jnp.float32)
        scale = jnp.where(jnp.abs(scale) >= _SMALLEST_NORMAL, scale, 0)
        return jnp.where(largest >> 1 < 0x7F800000, scale, jnp.nan)
    largest = sharding.maxima(bits & 0x7FFFFFFF, BLOCK)
    scale = jnp.maximum(jax.lax.bitcast_convert_type(largest, jnp.float32), _LEAST_UNSIGNED_SCALE)
    scale = jnp.where(largest > 0, scale, 0)
    return jnp.where(largest < 0x7F800000, scale, jnp.nan)


def _top(signed: bool) -> int:
    return _SIGNED if signed else _UNSIGNED


@functools.cache
def _map(top: int) -> np.ndarray:
    """The nonnegative values of the map in float64, in ascending order."""
    decades = []
    for decade in range(_DECADES):
        cells = (top >> (_DECADES - 1)) << decade
        decades.append(10.0 ** (decade + 1 - _DECADES) * (0.1 + 0.9 * (np.arange(cells) + 0.5) / cells))
    return np.concatenate([[0.0], *decades, [1.0]])


@functools.cache
def _borders(top: int) -> np.ndarray:
    """For the upper 16 bits of each |x / s|, an int32 to which the lower 16 bits are added: the upper half is then the place.

    Its upper half is the place of the smallest number with these upper bits.  Its lower half is 2^16 less the lower bits of the
    border that is among these numbers, so that the sum carries over from the border on.
    """
    values, first = _map(top), (top >> (_DECADES - 1)) - 1
    borders = ((values[1:] + values[:-1]) / 2).astype(np.float32).view(np.int32)
    words = np.arange(_LOWEST_WORD, _HIGHEST_WORD + 1)
    table = (first + np.searchsorted(borders, words << 16)) << 16
    table[(borders >> 16) - _LOWEST_WORD] += 0x10000 - (borders & 0xFFFF)
    # At least 2, infinity or NaN.
    table[-1] = first << 16
    return table.astype(np.int32)


def _nearest_by_table(magnitude: jax.Array, top: int) -> jax.Array:
    """Like :func:`_nearest`."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    words = jnp.clip(bits >> 16, _LOWEST_WORD, _HIGHEST_WORD) - _LOWEST_WORD
    return (_looked_up(_borders(top), words) + (bits & 0xFFFF)) >> 16


def _values_by_table(codes: jax.Array, signed: bool) -> jax.Array:
    """Like :func:`_values`."""
    values = _map(_top(signed)).astype(np.float32)
    return _looked_up(np.concatenate([-values[-2:0:-1], values]) if signed else values, codes)


def _looked_up(table: np.ndarray, indices: jax.Array) -> jax.Array:
    found = jnp.asarray(table).at[indices.astype(jnp.uint32)]
    return found.get(mode="promise_in_bounds", out_sharding=sharding.named(sharding.spec_of(indices), indices))


def _nearest(magnitude: jax.Array, top: int) -> jax.Array:
    """The place of the value nearest to a number in [0, 1] as an int32.

    The cell k of decade i has the place 2^i + k.  0 has the place before the first, and 1 the place 2 ``top``.  A number that is
    2 or more, or NaN, has the place of 0.
    """
    # No conversion to an integer accepts a NaN.
    magnitude = jnp.where(magnitude < 2, magnitude, 0)
    first = top >> (_DECADES - 1)
    smallest = 10.0 ** (1 - _DECADES) * (0.1 + 0.45 / first)
    count, slope = jnp.full_like(magnitude, first), jnp.full_like(magnitude, first / (0.9 * 10.0 ** (1 - _DECADES)))
    for decade in range(1, _DECADES):
        cells, unit = first << decade, 10.0 ** (decade + 1 - _DECADES)
        # Midway between the nearest cells of the two decades; the lower decade has half as many cells.
        beyond = magnitude >= 0.1 * unit * (1 + 1.8 / cells)
        count, slope = jnp.where(beyond, cells, count), jnp.where(beyond, cells / (0.9 * unit), slope)
    # 2^i + (10^.. x - 0.1) 2^i / 0.9
    place = jnp.floor(magnitude * slope + count * (8 / 9))
    place = jnp.clip(place, count, 2 * count - 1)
    place = jnp.where(magnitude >= 1 - 0.225 / top, 2 * top, place)
    return jnp.where(magnitude >= smallest / 2, place, first - 1).astype(jnp.int32)


def _values(codes: jax.Array, signed: bool) -> jax.Array:
    """The value of each code in float32."""
    number = codes.astype(jnp.int32).astype(jnp.float32)
    if not signed:
        return _value(number + 1, _UNSIGNED)
    place = number - 127
    return jnp.where(place < 0, -_value(-place, _SIGNED), _value(place, _SIGNED))


def _value(place: jax.Array, top: int) -> jax.Array:
    """The inverse of :func:`_nearest`; a place below the first is 0."""
    first = top >> (_DECADES - 1)
    unit, share = jnp.full_like(place, 10.0 ** (1 - _DECADES)), jnp.full_like(place, 1 / first)
    for decade in range(1, _DECADES):
        cells = first << decade
        beyond = place >= cells
        unit = jnp.where(beyond, 10.0 ** (decade + 1 - _DECADES), unit)
        share = jnp.where(beyond, 1 / cells, share)
    # Exact.
    fraction = (place + 0.5) * share - 1
    value = jnp.where(place >= 2 * top, 1, unit * (0.1 + 0.9 * fraction))
    return jnp.where(place >= first, value, 0)


@jax.jit
def _to_bfloat16(array: jax.Array, key: jax.Array | None) -> jax.Array:
    array = array.astype(jnp.float32)
    finite = jnp.isfinite(array)
    bounded = jnp.where(finite, jnp.clip(array, -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16), array)
    if key is None:
        return bounded.astype(jnp.bfloat16)
    noise = jax.random.bits(key, array.shape[-2:], jnp.uint16).astype(jnp.uint32)
    noise = sharding.like(jnp.broadcast_to(noise, array.shape), array)
    bits = (jax.lax.bitcast_convert_type(bounded, jnp.uint32) + noise) >> 16
    rounded = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(finite, rounded, array.astype(jnp.bfloat16))
