# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The momentum of a matrix in 8, 4, 3 or 2 bits.

**Grid.**  The scale of an entry follows its row and its column, so that a large row or column does not coarsen the others:

    D_ij = min(max_k |x_ik|, max_k |x_kj|) / (2^(b-1) - 1)
    q_ij = round(x_ij / D_ij + u_ij)                          decoded as  D_ij (q_ij - u_ij)

The maxima are in bfloat16, rounded up.  The dither u is uniform in [-1/2, 1/2), a hash of a seed and the place of the entry, so
it takes no bytes.  Subtracted again at decoding, it makes the error independent of x, with mean 0 and the variance of rounding to
nearest.  With nearest (u = 0), a momentum has a dead zone: as long as D stays, round(β q) = q for |q| < 1 / (2 (1 - β)), so an
entry without gradient never decays.  Stochastic rounding adds u and does not subtract it, with twice the variance.

With 3 or 2 bits, a step that reaches from the largest entry to the smallest would be wider than most entries are large.  So the
scales are root mean squares, the grid has 2^b steps around 0, and what lies outside is clipped:

    D_ij = d_b r_i c_j,     r_i = rms_k(x_ik),     c_j = rms_k(x_kj / r_k),     d_3 = 0.73,  d_2 = 1.25
    q_ij = round(x_ij / D_ij - 1/2 + u_ij)                    decoded as  D_ij (q_ij + 1/2 - u_ij)

For normally distributed entries the squared error is 0.15 of the squared entries with 2 bits, and 0.046 with 3.  The steps are
a quarter wider than those of the least error without dither (J. Max 1960), because clipping shortens the memory of a momentum.

**Split.**  The leading directions M ≈ P Rᵀ are stored apart, and the grid holds the rest, whose entries are much smaller
(4-bit-Muon-GRASP, ICLR 2026; MuonQ, arXiv 2605.11396).  One power step from the last R follows them:

    P = orth(M R),   R = MᵀP,   rest = M - P Rᵀ               with k = min(m, n) / 16 columns

P and R are grids too, rounded to nearest, and the rest takes up their rounding errors.  With 0 bits there is no rest: the
momentum is P Rᵀ alone.  A step that orthogonalizes a momentum lifts all singular values to the same size, and most of them are
small.  Noise that is small beside the largest entries would be large beside those.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax import sharding
from galore_jax._core.folding import hidden_zero
from galore_jax._core.matrix_loop import matrix_by_matrix
from galore_jax._core.orthonormal import noise, orthonormal

BITS = (8, 4, 3, 2)
ROUNDINGS = ("dither", "stochastic", "nearest")
_MIN_SIZE = 4096
_MIN_SIDE = 16
# The step of a smaller scale would be below the normal numbers.
_LEAST = 2.0**-119
# Bit patterns of bfloat16: infinity, a NaN, and the least scale.
_INFINITY, _NAN, _LEAST_BITS = 0x7F80, 0x7FC0, 0x0400
# The bits of the grids that clip, with the width of a step in root mean squares.
_CLIPPED = {3: 0.73, 2: 1.25}
_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """Matrices (*batch, m, n) with a scale for each row and column.

    >>> grid = Grid.encode(jnp.array([[8.0, 0.5, -1.0], [2.0, 0.25, -0.3]]), bits=4)
    >>> grid.codes.shape, grid.rows.tolist(), grid.columns.tolist()
    ((2, 2), [8.0, 2.0], [8.0, 0.5, 1.0])
    >>> [round(x, 2) for x in grid.decode()[1].tolist()]  # in steps of 2/7, 0.5/7 and 1/7
    [2.0, 0.29, -0.29]
    """

    # uint8 (*batch, m, bytes): q + 2^(b-1) in b bits, four or two codes a byte or eight in three bytes.
    codes: jax.Array
    # bfloat16 (*batch, m); NaN if an entry is not finite, and then the row decodes to NaN.
    rows: jax.Array
    columns: jax.Array  # bfloat16 (*batch, n)
    seed: jax.Array | None  # uint32 (*batch,); None rounds to nearest
    bits: int = dataclasses.field(metadata={"static": True})
    # Whether decoding subtracts the dither again.
    subtractive: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape, self.columns.shape[-1])

    @classmethod
    def encode(cls, array: jax.Array, seed: jax.Array | None = None, *, bits: int, subtractive: bool = True) -> Grid:
        """Encodes (*batch, m, n); ``seed`` is that of the dither, uint32 (*batch,)."""
        codes, rows, columns = _encoded(array, seed, bits)
        return cls(codes, rows, columns, seed, bits, subtractive)

    def decode(self) -> jax.Array:
        """The matrices in float32."""
        return _decoded(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedMatrix:
    """Matrices (*batch, m, n) as a grid, and their leading directions apart if ``left`` is not None."""

    rest: Grid | None  # None if the leading directions are all that is stored
    left: Grid | None  # Pᵀ, (*batch, k, m)
    right: Grid | None  # Rᵀ, (*batch, k, n)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.left and self.right:
            return (*self.left.shape[:-2], self.left.shape[-1], self.right.shape[-1])
        return self.rest.shape if self.rest else ()

    def decode(self) -> jax.Array:
        """The matrices in float32."""
        parts = [self.rest.decode()] if self.rest else []
        if self.left and self.right:
            parts.append(_product(self.left, self.right))
        return sum(parts[1:], start=parts[0])

    def renewed(self, array: jax.Array, seed: jax.Array | None = None) -> CodedMatrix:
        """Encodes other matrices of the same shape in the same way, one after the other.

        Args:
          array: Finite matrices (*batch, m, n).
          seed: The seed of the dither, uint32, which all matrices of a stack share.  None keeps the last one.
        """
        seeds = self.rest.seed if self.rest else None
        if seeds is not None and seed is not None:
            seeds = sharding.like(jnp.broadcast_to(seed, seeds.shape), seeds)
        return matrix_by_matrix(_renewed, self, (array.astype(jnp.float32), seeds), array.ndim - 2)


@dataclasses.dataclass(frozen=True)
class MatrixCodec:
    """How the matrices of a linear state are stored.

    With the default split, a square matrix takes 0.63 bytes per entry at 4 bits, 0.50 at 3 and 0.38 at 2.  ``leading_bits=4``
    saves 0.06.

    Args:
      bits: 8, 4, 3 or 2 bits for each entry, of which 3 and 2 clip the largest, or 0 to store the leading directions alone.
      leading: Number of leading directions that are stored apart, as a share of the smaller side; 0 for none.
      leading_bits: 8, 4, 3 or 2 bits for each entry of these.
      rounding: ``"dither"`` (subtractive), ``"stochastic"`` or ``"nearest"``.

    Raises:
      ValueError: An argument is out of range.

    >>> x = jax.random.normal(jax.random.key(0), (128, 64))
    >>> coded = MatrixCodec(bits=4).encode(x)
    >>> coded = coded.renewed(x, jnp.uint32(1))
    >>> coded.rest.codes.shape, coded.left.shape, bool(jnp.std(coded.decode() - x) < 0.2)
    ((128, 32), (4, 128), True)
    """

    bits: int = 4
    leading: float = 1 / 16
    leading_bits: int = 8
    rounding: str = "dither"

    def __post_init__(self) -> None:
        for name, known in (("bits", (*BITS, 0)), ("leading_bits", BITS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, known))}.")
        if not 0 <= self.leading <= 0.5:
            raise ValueError(f"leading is {self.leading!r}; expected a share of the smaller side in [0, 0.5].")
        if self.bits == self.leading == 0:
            raise ValueError(
                "bits and leading are both 0, which stores nothing; expected at least one of them above 0."
            )

    def applies_to(self, shape: tuple[int, ...]) -> bool:
        """Whether arrays of this shape are encoded: matrices, or stacks, of 4,096 entries or more with sides of 16 or more."""
        return len(shape) >= 2 and min(shape[-2:]) >= _MIN_SIDE and math.prod(shape) >= _MIN_SIZE

    def encode(self, array: jax.Array) -> CodedMatrix:
        """Encodes (*batch, m, n), mostly zeros.  The first :meth:`CodedMatrix.renewed` finds the leading directions."""
        spec = sharding.spec_of(array)
        *batch, m, n = array.shape
        *lead, first, second = spec or (None,) * array.ndim
        dithered = self.rounding != "nearest"
        seed = sharding.zeros(tuple(batch), jnp.uint32, spec and tuple(lead), array) if dithered else None
        zero = hidden_zero()
        rest = None
        if self.bits:
            wide, subtractive = array.astype(jnp.float32) + zero, self.rounding != "stochastic"
            rest = Grid.encode(wide, seed, bits=self.bits, subtractive=subtractive)
        if self.leading == 0:
            return CodedMatrix(rest, None, None)
        count = max(1, int(self.leading * min(m, n)))

        def zeros(side: int, entry: Any) -> Grid:
            shape = (*batch, count, side)
            empty = sharding.zeros(shape, jnp.float32, spec and (*lead, None, entry), array)
            return Grid.encode(empty + zero, bits=self.leading_bits)

        return CodedMatrix(rest, zeros(m, first), zeros(n, second))


def _renewed(old: CodedMatrix, given: tuple[jax.Array, jax.Array | None]) -> CodedMatrix:
    """:meth:`CodedMatrix.renewed` of one matrix."""
    matrix, seed = given
    if old.left is None or old.right is None:
        return CodedMatrix(_encoded_like(old.rest, matrix, seed), None, None)
    last = old.right.decode()
    # Divided, so that the product of two large momenta does not overflow.  One that was zero has no directions yet.
    peak = jnp.max(jnp.abs(last))
    last = jnp.where(peak > 0, last / jnp.where(peak > 0, peak, 1), noise(last.shape, last.dtype))
    basis = orthonormal(jnp.matmul(matrix, last.T, precision=_HIGHEST))
    left = Grid.encode(basis.T, bits=old.left.bits)
    right = Grid.encode(jnp.matmul(left.decode(), matrix, precision=_HIGHEST), bits=old.right.bits)
    return CodedMatrix(_encoded_like(old.rest, matrix - _product(left, right), seed), left, right)


def _encoded_like(old: Grid | None, matrix: jax.Array, seed: jax.Array | None) -> Grid | None:
    return old and Grid.encode(matrix, seed, bits=old.bits, subtractive=old.subtractive)


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def _encoded(array: jax.Array, seed: jax.Array | None, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The codes and the scales of :class:`Grid`."""
    array = array.astype(jnp.float32)
    rows, columns = (_root_mean_squares if bits in _CLIPPED else _maxima)(array)
    scales = _scales(rows, columns, bits)
    steps, offset, top = _steps(bits)
    numbers = _ratio(array, scales) * steps - offset
    if seed is not None:
        numbers += _dither(seed, array)
    # No conversion to an integer accepts a NaN.
    numbers = jnp.where(jnp.isnan(numbers), 0, jnp.clip(jnp.round(numbers), -top - 1, top))
    return _packed(numbers.astype(jnp.int32) + top + 1, bits), rows, columns


@functools.partial(jax.jit, inline=True)
def _decoded(grid: Grid) -> jax.Array:
    scales = _scales(grid.rows, grid.columns, grid.bits)
    steps, offset, top = _steps(grid.bits)
    numbers = (_unpacked(grid.codes, grid.shape[-1], grid.bits) - (top + 1)).astype(jnp.float32) + offset
    numbers = sharding.like(numbers, scales)
    if grid.seed is not None and grid.subtractive:
        numbers -= _dither(grid.seed, scales)
    return numbers * (scales / steps)


def _product(left: Grid, right: Grid) -> jax.Array:
    """P Rᵀ, (*batch, m, n)"""
    return jnp.matmul(jnp.swapaxes(left.decode(), -1, -2), right.decode(), precision=_HIGHEST)


def _steps(bits: int) -> tuple[float, float, int]:
    """How many steps there are in a scale, the number that q = 0 stands for, and the largest q.

    The smallest q is one less than the negative of the largest.  Only the dither reaches it in a grid that does not clip.
    """
    top = 2 ** (bits - 1) - 1
    return (1 / _CLIPPED[bits], 0.5, top) if bits in _CLIPPED else (top, 0.0, top)


def _scales(rows: jax.Array, columns: jax.Array, bits: int) -> jax.Array:
    """(*batch, m, n) in float32"""
    both = rows.astype(jnp.float32)[..., :, None], columns.astype(jnp.float32)[..., None, :]
    return jnp.multiply(*both) if bits in _CLIPPED else jnp.minimum(*both)


def _maxima(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest magnitudes of rows and columns, bfloat16 rounded up; NaN where an entry is not finite."""
    magnitudes = jax.lax.bitcast_convert_type(array, jnp.uint32) & 0x7FFFFFFF
    rows, columns = (_rounded_up(jnp.max(magnitudes, axis=axis)) for axis in (-1, -2))
    return rows, columns


def _root_mean_squares(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those of the rows, and those of the columns after a division by the rows', in bfloat16.

    A row with an entry that is not finite, or above 2^126, has NaN.
    """
    rows = _root_mean_square(array, -1)
    rows = jnp.where(rows < _LEAST, 0, rows).astype(jnp.bfloat16)
    wide = rows.astype(jnp.float32)[..., :, None]
    return rows, _root_mean_square(_ratio(array, wide), -2).astype(jnp.bfloat16)


def _root_mean_square(array: jax.Array, axis: int) -> jax.Array:
    """Over one axis, NaN where an entry is not finite or above 2^126.

    It is a sum of integers, which is the same in every order: a momentum is the same on one device and on several.
    """
    count = array.shape[axis]
    largest = jnp.max(jnp.abs(array), axis=axis, keepdims=True)
    # The reciprocal of a larger number is below the normal ones.
    largest = jnp.where(largest <= 2.0**126, largest, jnp.nan)
    unit = 2.0 ** (31 - (count - 1).bit_length())
    squares = jnp.square(_ratio(array, largest)) * unit
    total = jnp.sum(jnp.round(squares).astype(jnp.uint32), axis=axis)
    return jnp.squeeze(largest, axis) * jnp.sqrt(total.astype(jnp.float32) / (unit * count))


def _ratio(array: jax.Array, scales: jax.Array) -> jax.Array:
    """``array / scales``, 0 where a scale is 0 or NaN."""
    return jnp.where(scales > 0, array / jnp.where(scales > 0, scales, 1), 0)


def _dither(seed: jax.Array, array: jax.Array) -> jax.Array:
    return sharding.like(noise(array.shape, jnp.float32, seed) / 2, array)


def _rounded_up(magnitudes: jax.Array) -> jax.Array:
    """The bit patterns of nonnegative float32 numbers -> bfloat16, so that no entry exceeds its scale."""
    finite = magnitudes < _INFINITY << 16
    upper = jnp.minimum((jnp.minimum(magnitudes, _INFINITY << 16) + 0xFFFF) >> 16, _INFINITY - 1)
    upper = jnp.where(upper < _LEAST_BITS, 0, upper)
    return jax.lax.bitcast_convert_type(jnp.where(finite, upper, _NAN).astype(jnp.uint16), jnp.bfloat16)


def _group(bits: int) -> tuple[int, int]:
    """How many codes are in how many bytes."""
    return {8: (1, 1), 4: (2, 1), 3: (8, 3), 2: (4, 1)}[bits]


def _packed(codes: jax.Array, bits: int) -> jax.Array:
    """(*lead, n) int32 -> (*lead, bytes) uint8"""
    codes_per_group, bytes_per_group = _group(bits)
    if codes_per_group == 1:
        return codes.astype(jnp.uint8)
    groups = sharding.blocked(codes, codes_per_group)
    words = functools.reduce(jnp.bitwise_or, (groups[..., i] << bits * i for i in range(codes_per_group)))
    parts = [(words >> 8 * i & 0xFF).astype(jnp.uint8) for i in range(bytes_per_group)]
    return sharding.merged(jnp.stack(parts, axis=-1))


def _unpacked(packed: jax.Array, n: int, bits: int) -> jax.Array:
    """The inverse of :func:`_packed`, (*lead, n) int32."""
    codes_per_group, bytes_per_group = _group(bits)
    if codes_per_group == 1:
        return packed.astype(jnp.int32)
    groups = sharding.blocked(packed, bytes_per_group).astype(jnp.int32)
    words = functools.reduce(jnp.bitwise_or, (groups[..., i] << 8 * i for i in range(bytes_per_group)))
    codes = jnp.stack([words >> bits * i & 2**bits - 1 for i in range(codes_per_group)], axis=-1)
    return jax.lax.slice_in_dim(sharding.merged(codes), 0, n, axis=-1)
