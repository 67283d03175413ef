# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Storage formats for a basis P in R^(m x r), and the operations on it.

    Dense     P itself: m r numbers in float32
    Coded     P in bfloat16, or in 4 bits (galore_jax._core.basis_codecs)
    Rows      P = E D: r of the m rows, each with a factor; project is a gather and lift is a scatter (Grass, 2406.17660)
    Seeded    the 4-byte seed of a random P; each use draws P again

    project   R = PᵀX                                 X in (*batch, m, n), R in (*batch, r, n)
    lift      X = P R, the adjoint of project
    overlap   Q in R^(r x r) of one matrix: maps R in the old basis to Q R in the new one.  Q = P_newᵀ P_old for orthonormal P

A basis is all zeros until its first refresh.  Every other dense basis has a nonzero first entry, so this one entry shows whether
a basis exists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from galore_jax import sharding
from galore_jax._core.dtypes import state_dtype

# A normal (not subnormal) number in both float32 and bfloat16.
_TINY = 1e-30

# A pytree of arrays, each with leading batch axes.
Basis = Any


class Storage(Protocol):
    """The interface of a storage format for bases."""

    @property
    def orthonormal(self) -> bool:
        """True if PᵀP = I, up to rounding."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: tuple | None, leaf: Any) -> Basis:
        """Returns the basis that state starts with, before the first refresh.

        Args:
          shape: Shape (*batch, m, r) of P.
          dtype: Dtype of P.
          spec: Explicit sharding of (*batch, m, r) on the mesh of ``leaf``, or None.
          leaf: The parameter.
        """
        ...

    def exists(self, basis: Basis) -> jax.Array:
        """Returns a bool array [*batch]: True where a basis has been made."""
        ...

    def project(self, basis: Basis, matrices: jax.Array, rank: int) -> jax.Array:
        """Projects (*batch, m, n) to (*batch, r, n), in at least float32.  Products use the dtype of ``matrices``."""
        ...

    def lift(self, basis: Basis, low_rank: jax.Array, m: int) -> jax.Array:
        """Lifts (*batch, r, n) to (*batch, m, n), in the dtype of ``low_rank``."""
        ...

    def overlap(self, new: Basis, old: Basis, m: int, rank: int) -> jax.Array:
        """Returns Q (r, r), which maps coordinates in ``old`` to coordinates in ``new``."""
        ...

    def decode(self, basis: Basis, rank: int, dtype: Any) -> Basis:
        """Returns the basis in the form that projectors read."""
        ...

    def encode(self, basis: Basis) -> Basis:
        """Inverts ``decode``, up to rounding.  The input (m, r) has no batch axes."""
        ...


class _AsItIs:
    """A storage format that projectors read and write directly, without decoding."""

    def decode(self, basis: Basis, rank: int, dtype: Any) -> Basis:
        return basis

    def encode(self, basis: Basis) -> Basis:
        return basis


def with_first_entry(basis: jax.Array) -> jax.Array:
    """Returns ``basis`` (m, r), with a tiny number in place of a zero first entry."""
    return basis.at[0, 0].set(jnp.where(basis[0, 0] == 0, _TINY, basis[0, 0]))


@dataclasses.dataclass(frozen=True)
class Dense(_AsItIs):
    """Stores P itself."""

    orthonormal: bool = True

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: tuple | None, leaf: Any) -> jax.Array:
        return sharding.zeros(shape, dtype, spec, leaf)

    def exists(self, basis: jax.Array) -> jax.Array:
        # Indexing one entry of an explicitly sharded axis is not possible, so test the whole first column.
        if sharding.spec_of(basis) is not None:
            return jnp.any(basis[..., 0] != 0, axis=-1)
        entry = jax.lax.slice(basis, [0] * basis.ndim, (*basis.shape[:-2], 1, 1))
        return jax.lax.squeeze(entry, (-2, -1)) != 0

    def encode(self, basis: jax.Array) -> jax.Array:
        return with_first_entry(basis)

    def project(self, basis: jax.Array, matrices: jax.Array, rank: int) -> jax.Array:
        spec = sharding.spec_of(matrices)
        out = sharding.named(spec and (*spec[:-2], None, spec[-1]), matrices)
        return _product(basis.astype(matrices.dtype), matrices, -2, state_dtype(matrices), out)

    def lift(self, basis: jax.Array, low_rank: jax.Array, m: int) -> jax.Array:
        return _product(basis.astype(low_rank.dtype), low_rank, -1, low_rank.dtype)

    def overlap(self, new: jax.Array, old: jax.Array, m: int, rank: int) -> jax.Array:
        return jnp.matmul(new.T, old, precision=jax.lax.Precision.HIGHEST)


def _product(a: jax.Array, b: jax.Array, axis: int, dtype: Any, out: Any = None) -> jax.Array:
    """Contracts axis ``axis`` of ``a`` with the rows of ``b``, accumulating in at least float32."""
    batch = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim + axis,), (b.ndim - 2,)), (batch, batch))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype, out_sharding=out)


class RowBasis(NamedTuple):
    """P = E D: the only nonzero entry of column j is ``factor[j]``, in row ``index[j]``."""

    index: jax.Array  # (*batch, r), int32
    factor: jax.Array  # (*batch, r), dtype of P


# Jitted, so that the parameters of one shape share their programs.
@jax.jit
def _rows_of(matrices: jax.Array, basis: RowBasis) -> jax.Array:
    """The rows of matrices (*batch, m, n) that a basis names, times its factors: (*batch, r, n)."""
    chosen = jnp.take_along_axis(matrices, basis.index[..., None], axis=-2)
    return chosen.astype(basis.factor.dtype) * basis.factor[..., None]


@functools.partial(jax.jit, static_argnames="m")
def _in_rows(basis: RowBasis, low_rank: jax.Array, m: int) -> jax.Array:
    """The adjoint: (*batch, r, n) -> (*batch, m, n)."""

    def one(basis: RowBasis, low_rank: jax.Array) -> jax.Array:
        rows = low_rank * basis.factor[:, None].astype(low_rank.dtype)
        return jnp.zeros((m, rows.shape[1]), rows.dtype).at[basis.index].add(rows)

    for _ in range(low_rank.ndim - 2):
        one = jax.vmap(one)
    return one(basis, low_rank)


@dataclasses.dataclass(frozen=True)
class Rows(_AsItIs):
    """Stores a :class:`RowBasis`, which may contain a row more than once."""

    orthonormal: bool = False

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: tuple | None, leaf: Any) -> RowBasis:
        shape, spec = (*shape[:-2], shape[-1]), spec and (*spec[:-2], None)
        return RowBasis(sharding.zeros(shape, jnp.int32, spec, leaf), sharding.zeros(shape, dtype, spec, leaf))

    def exists(self, basis: RowBasis) -> jax.Array:
        return jnp.any(basis.factor != 0, axis=-1)

    def project(self, basis: RowBasis, matrices: jax.Array, rank: int) -> jax.Array:
        return _rows_of(sharding.gather(matrices, [matrices.ndim - 2]), basis)

    def lift(self, basis: RowBasis, low_rank: jax.Array, m: int) -> jax.Array:
        return _in_rows(jax.tree.map(sharding.gather, basis), sharding.gather(low_rank), m)

    def overlap(self, new: RowBasis, old: RowBasis, m: int, rank: int) -> jax.Array:
        same = (new.index[:, None] == old.index[None, :]) & (old.factor != 0)[None, :]
        copies = jnp.maximum(jnp.sum(same, axis=1, keepdims=True), 1).astype(new.factor.dtype)
        ratio = new.factor[:, None] / jnp.where(old.factor != 0, old.factor, 1)[None, :]
        return jnp.where(same, ratio / copies, 0)


@dataclasses.dataclass(frozen=True)
class Seeded(_AsItIs):
    """Stores the uint32 seeds [*batch] of ``draw(seed, (m, r), dtype)``.  Seed 0 means no basis: P is all zeros."""

    draw: Callable[[jax.Array, tuple[int, int], Any], jax.Array]
    orthonormal: bool

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: tuple | None, leaf: Any) -> jax.Array:
        return sharding.zeros(shape[:-2], jnp.uint32, spec and spec[:-2], leaf)

    def exists(self, basis: jax.Array) -> jax.Array:
        return basis != 0

    def project(self, basis: jax.Array, matrices: jax.Array, rank: int) -> jax.Array:
        drawn = self._drawn(basis, (matrices.shape[-2], rank), state_dtype(matrices))
        return Dense().project(drawn, matrices, rank)

    def lift(self, basis: jax.Array, low_rank: jax.Array, m: int) -> jax.Array:
        return Dense().lift(self._drawn(basis, (m, low_rank.shape[-2]), state_dtype(low_rank)), low_rank, m)

    def overlap(self, new: jax.Array, old: jax.Array, m: int, rank: int) -> jax.Array:
        new, old = (self._drawn(seed, (m, rank), jnp.float32) for seed in (new, old))
        return Dense().overlap(new, old, m, rank)

    def _drawn(self, seeds: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
        def one(seed: jax.Array) -> jax.Array:
            return jnp.where(seed != 0, self.draw(seed, shape, dtype), 0)

        for _ in range(seeds.ndim):
            one = jax.vmap(one)
        return one(seeds)
