# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Arrays in 8 bits, block by block, and in bfloat16 by stochastic rounding.

**Blocks.**  The last axis is cut into blocks of 256, the last of which may be shorter.  A block keeps its element s of largest
magnitude, sign included, and for each x the number of the value nearest to x / s in the dynamic map of 8-bit optimizers
(Dettmers et al. 2022, arXiv 2110.02861, section 1.3, as in bitsandbytes): zero, one, and the centres of 2^i equal cells in
each of seven decades,

    signed      ± 10^(i-6) (1 + 9 (k + ½) / 2^i) / 10       i = 0..6, k = 0..2^i - 1        code 127 ± (2^i + k); 0: 127, 1: 255
    unsigned      10^(i-7) (1 + 9 (k + ½) / 2^i) / 10       i = 1..7, k = 0..2^i - 1        code 2^i + k - 1;     0: 0,   1: 255

which are numbered in their order.  The border between decade i and the next is midway between their nearest cells, at
(1 + 0.9 / 2^i) times the end of decade i.  There is no -1, hence the sign of s: the extreme of a block is kept exactly, and
encoding what was decoded changes nothing.

**bfloat16.**  Sixteen random bits are added to the pattern of a float32, and the last sixteen cut off: x goes up with
probability (x - lower) / (upper - lower), so the mean is x.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import sharding

BLOCK = 256
_DECADES = 7
_SIGNED, _UNSIGNED = 64, 128  # cells of the highest decade
_LEAST_UNSIGNED_SCALE = 2.0**-104  # times the smallest value of the map, 3.25e-7, still a normal float32
_SMALLEST_NORMAL = 2.0**-126
_LARGEST_BFLOAT16 = 2.0**128 - 2.0**120


class SignedBlocks(NamedTuple):
    """An array in 8 bits.

    >>> stored = SignedBlocks.encode(jnp.array([0.5, -2.0, 0.0, 1e-9]))
    >>> stored.codes, stored.scales
    (Array([ 53, 255, 127, 127], dtype=uint8), Array([-2.], dtype=float32))
    >>> [round(x, 4) for x in stored.decode().tolist()]
    [0.4953, -2.0, -0.0, -0.0]
    """

    codes: jax.Array  # the shape of the array, uint8
    scales: (
        jax.Array
    )  # (*lead, ⌈n / 256⌉), float32; NaN for a block with an element that is not finite, all of which is NaN

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @classmethod
    def scales_of(cls, array: jax.Array) -> jax.Array:
        """The scales of an array (*lead, n), which ``encode`` takes when it is to be spared looking for them."""
        return _scales(array.astype(jnp.float32), signed=True)

    @classmethod
    def encode(cls, array: jax.Array, key: jax.Array | None = None, scales: jax.Array | None = None) -> SignedBlocks:
        """From (*lead, n), at least one axis; ``key`` is not used.  Less than 1.2e-38 in a block of no more becomes 0."""
        scales = cls.scales_of(array) if scales is None else scales
        return cls(_encode(array, scales, signed=True), scales)

    def decode(self) -> jax.Array:
        """float32"""
        return _decode(self.codes, self.scales, signed=True)


class UnsignedBlocks(NamedTuple):
    """An array without negative numbers in 8 bits, twice as finely; what is positive stays positive.

    >>> UnsignedBlocks.encode(jnp.array([1e-30, 0.0, 3.0, 4.0])).codes
    Array([  1,   0, 219, 255], dtype=uint8)
    """

    codes: jax.Array  # as in SignedBlocks
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @classmethod
    def scales_of(cls, array: jax.Array) -> jax.Array:
        return _scales(array.astype(jnp.float32), signed=False)

    @classmethod
    def encode(cls, array: jax.Array, key: jax.Array | None = None, scales: jax.Array | None = None) -> UnsignedBlocks:
        """As for :class:`SignedBlocks`; a positive number becomes no less than 1.6e-38, a negative one 0."""
        scales = cls.scales_of(array) if scales is None else scales
        return cls(_encode(array, scales, signed=False), scales)

    def decode(self) -> jax.Array:
        """float32"""
        return _decode(self.codes, self.scales, signed=False)


class Bfloat16(NamedTuple):
    """An array in bfloat16, rounded stochastically.

    The noise is that of the last two axes, the same for all matrices of a stack, so that a stack equals its layers alone.

    >>> stored = Bfloat16.encode(jnp.full((1000,), 1 + 2**-9), jax.random.key(0))  # a quarter of the way from 1 to 1 + 2^-7
    >>> float(jnp.mean(stored.decode() > 1)), float(jnp.max(stored.decode()))
    (0.242..., 1.0078125)
    """

    values: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @classmethod
    def scales_of(cls, array: jax.Array) -> None:
        """It has none."""

    @classmethod
    def encode(cls, array: jax.Array, key: jax.Array | None = None, scales: None = None) -> Bfloat16:
        """Rounded to nearest without a key.  A finite number stays finite, a NaN a NaN."""
        return cls(_to_bfloat16(array, key))

    def decode(self) -> jax.Array:
        """float32"""
        return self.values.astype(jnp.float32)


Coded = SignedBlocks | UnsignedBlocks | Bfloat16


def is_coded(node: Any) -> bool:
    """Whether a node of a pytree is an array stored by a codec."""
    return isinstance(node, Coded)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree and its structure, a coded array counting as one leaf."""
    return jax.tree.flatten(tree, is_leaf=is_coded)


def decoded(leaf: Any) -> Any:
    """A coded array in float32, anything else as it is."""
    return leaf.decode() if isinstance(leaf, Coded) else leaf


def scales_like(array: Any, leaf: Any) -> Any:
    """The scales that ``array`` has when it is stored as ``leaf`` is; None if that has none."""
    return type(leaf).scales_of(array) if isinstance(leaf, Coded) else None


def encoded_like(array: Any, leaf: Any, key: jax.Array | None = None, scales: Any = None) -> Any:
    """``array`` stored as ``leaf`` is, with the scales of :func:`scales_like`, if they are known."""
    return type(leaf).encode(array, key, scales) if isinstance(leaf, Coded) else array


@functools.partial(jax.jit, static_argnames="signed", inline=True)
def _encode(array: jax.Array, scales: jax.Array, signed: bool) -> jax.Array:
    array = array.astype(jnp.float32)
    # In two factors, because the inverse of the largest numbers is denormal.
    shrink = jnp.where(jnp.abs(scales) >= 2.0**64, 2.0**-64, 1)
    inverse = 1 / jnp.where(scales != 0, scales * shrink, 1)
    shrink = shrink.astype(jnp.bfloat16)  # a power of two
    ratio = array * sharding.spread(shrink, array, BLOCK) * sharding.spread(inverse, array, BLOCK)
    magnitude = jnp.abs(ratio)
    magnitude = jnp.where(magnitude < 2, magnitude, 0)  # NaN, which no conversion to an integer accepts
    if signed:
        place = _nearest(magnitude, _SIGNED)
        codes = 127 + jnp.where(ratio < 0, -jnp.minimum(place, 127), place)
    else:
        positive = (
            jax.lax.bitcast_convert_type(array, jnp.int32) > 0
        )  # a denormal too, where the device takes it for zero
        codes = jnp.where(positive, jnp.maximum(_nearest(magnitude, _UNSIGNED) - 1, 1), 0)
    return codes.astype(jnp.int32).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="signed", inline=True)
def _decode(codes: jax.Array, scales: jax.Array, signed: bool) -> jax.Array:
    number = codes.astype(jnp.int32).astype(jnp.float32)
    if signed:
        place = number - 127
        values = jnp.where(place < 0, -_value(-place, _SIGNED), _value(place, _SIGNED))
    else:
        values = _value(number + 1, _UNSIGNED)
    return values * sharding.spread(scales, codes, BLOCK)


def _scales(array: jax.Array, signed: bool) -> jax.Array:
    """(*lead, n) -> (*lead, blocks), the element of largest magnitude in each, the positive one of two.

    Compared as integers, whose order is that of the magnitudes: no device drops a NaN or flushes a denormal.
    """
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    positive = 1 - (bits >> 31) if signed else jnp.ones_like(bits)
    largest = sharding.maxima((bits << 1) | positive, BLOCK)
    magnitude = largest >> 1
    scale = jax.lax.bitcast_convert_type(magnitude | ((1 - (largest & 1)) << 31), jnp.float32)
    if signed:
        scale = jnp.where(jnp.abs(scale) >= _SMALLEST_NORMAL, scale, 0)
    else:
        scale = jnp.where(magnitude > 0, jnp.maximum(scale, _LEAST_UNSIGNED_SCALE), 0)
    return jnp.where(magnitude < 0x7F800000, scale, jnp.nan)


def _nearest(magnitude: jax.Array, top: int) -> jax.Array:
    """The place of the value nearest to a number in [0, 1]: 2^i + k in decade i, the one before the first for 0, 2 top for 1."""
    first = top >> (_DECADES - 1)
    smallest = 10.0 ** (1 - _DECADES) * (0.1 + 0.45 / first)
    count, slope = jnp.full_like(magnitude, first), jnp.full_like(magnitude, first / (0.9 * 10.0 ** (1 - _DECADES)))
    for decade in range(1, _DECADES):
        cells, unit = first << decade, 10.0 ** (decade + 1 - _DECADES)
        beyond = magnitude >= 0.1 * unit * (1 + 1.8 / cells)  # half as many cells below
        count, slope = jnp.where(beyond, cells, count), jnp.where(beyond, cells / (0.9 * unit), slope)
    place = jnp.floor(magnitude * slope + count * (8 / 9))  # 2^i + (10^.. x - 0.1) 2^i / 0.9
    place = jnp.clip(place, count, 2 * count - 1)
    place = jnp.where(magnitude >= 1 - 0.225 / top, 2 * top, place)
    return jnp.where(magnitude >= smallest / 2, place, first - 1)


def _value(place: jax.Array, top: int) -> jax.Array:
    """The inverse of :func:`_nearest`; what is below the first place is 0."""
    first = top >> (_DECADES - 1)
    unit, share = jnp.full_like(place, 10.0 ** (1 - _DECADES)), jnp.full_like(place, 1 / first)
    for decade in range(1, _DECADES):
        cells = first << decade
        beyond = place >= cells
        unit = jnp.where(beyond, 10.0 ** (decade + 1 - _DECADES), unit)
        share = jnp.where(beyond, 1 / cells, share)
    fraction = (place + 0.5) * share - 1  # exact
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
