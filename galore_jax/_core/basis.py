# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How a basis P in R^(m x r) is stored, and what is done with it.

    Dense     P itself, m r numbers in float32
    Coded     P in bfloat16, or in 4 bits (galore_jax._core.basis_codecs)
    Rows      P = E D: r of the m rows with a factor each; project and lift are a gather and a scatter (Grass, 2406.17660)
    Seeded    the seed of a random P, 4 bytes; P is drawn anew wherever it is used

    project   R = PᵀX                                 X in (*batch, m, n), R in (*batch, r, n)
    lift      X = P R, the adjoint of project
    overlap   Q in R^(r x r), of one matrix, P_newᵀ P_old where columns are orthonormal: R in the old basis is Q R in the new

A basis that no gradient has reached yet is all zeros.  The first entry of any other dense basis is not zero, so that this
entry tells the two apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from galore_jax import sharding
from galore_jax._core.dtypes import state_dtype

_TINY = 1e-30  # a normal number in float32 and in bfloat16

Basis = Any  # a pytree of arrays, each with the batch axes in front


class Storage(Protocol):
    """One way to store a basis."""

    @property
    def orthonormal(self) -> bool:
        """Whether PᵀP = I, up to rounding."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: tuple | None, leaf: Any) -> Basis:
        """The basis before the first refresh.

        Args:
          shape: (*batch, m, r).
          dtype: of P.
          spec: the explicit sharding of (*batch, m, r) on the mesh of ``leaf``, or None.
          leaf: the parameter.
        """
        ...

    def exists(self, basis: Basis) -> jax.Array:
        """[*batch] whether there is a basis yet."""
        ...

    def project(self, basis: Basis, matrices: jax.Array, rank: int) -> jax.Array:
        """(*batch, m, n) -> (*batch, r, n), at least float32; the products are in the dtype of the matrices."""
        ...

    def lift(self, basis: Basis, low_rank: jax.Array, m: int) -> jax.Array:
        """(*batch, r, n) -> (*batch, m, n), in the dtype of ``low_rank``."""
        ...

    def overlap(self, new: Basis, old: Basis, m: int, rank: int) -> jax.Array:
        """(r, r)"""
        ...

    def decode(self, basis: Basis, rank: int, dtype: Any) -> Basis:
        """The basis as projectors see it."""
        ...

    def encode(self, basis: Basis) -> Basis:
        """The inverse of decode, up to rounding; (m, r), without batch axes."""
        ...


class _AsItIs:
    """A storage whose bases projectors make as they are stored."""

    def decode(self, basis: Basis, rank: int, dtype: Any) -> Basis:
        return basis

    def encode(self, basis: Basis) -> Basis:
        return basis


def with_first_entry(basis: jax.Array) -> jax.Array:
    """(m, r) with a tiny number in place of a first entry that is zero."""
    return basis.at[0, 0].set(jnp.where(basis[0, 0] == 0, _TINY, basis[0, 0]))


@dataclasses.dataclass(frozen=True)
class Dense(_AsItIs):
    """P itself."""

    orthonormal: bool = True

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: tuple | None, leaf: Any) -> jax.Array:
        return sharding.zeros(shape, dtype, spec, leaf)

    def exists(self, basis: jax.Array) -> jax.Array:
        if sharding.spec_of(basis) is not None:  # an explicitly sharded axis has no first entry
            return jnp.any(basis[..., 0] != 0, axis=-1)
        return basis[..., 0, 0] != 0

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
    """Matrix products over the axis ``axis`` of ``a`` and the rows of ``b``, accumulated in at least float32."""
    batch = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim + axis,), (b.ndim - 2,)), (batch, batch))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype, out_sharding=out)


class RowBasis(NamedTuple):
    """P = E D: column j has its one entry, ``factor[j]``, in row ``index[j]``."""

    index: jax.Array  # (*batch, r), int32
    factor: jax.Array  # (*batch, r), dtype of P


@dataclasses.dataclass(frozen=True)
class Rows(_AsItIs):
    """A :class:`RowBasis`; a row may be there more than once."""

    orthonormal: bool = False

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: tuple | None, leaf: Any) -> RowBasis:
        shape, spec = (*shape[:-2], shape[-1]), spec and (*spec[:-2], None)
        return RowBasis(sharding.zeros(shape, jnp.int32, spec, leaf), sharding.zeros(shape, dtype, spec, leaf))

    def exists(self, basis: RowBasis) -> jax.Array:
        return jnp.any(basis.factor != 0, axis=-1)

    def project(self, basis: RowBasis, matrices: jax.Array, rank: int) -> jax.Array:
        matrices = sharding.gather(matrices, [matrices.ndim - 2])
        chosen = jnp.take_along_axis(matrices, basis.index[..., None], axis=-2)
        return chosen.astype(basis.factor.dtype) * basis.factor[..., None]

    def lift(self, basis: RowBasis, low_rank: jax.Array, m: int) -> jax.Array:
        def scatter(basis: RowBasis, low_rank: jax.Array) -> jax.Array:
            rows = low_rank * basis.factor[:, None].astype(low_rank.dtype)
            return jnp.zeros((m, rows.shape[1]), rows.dtype).at[basis.index].add(rows)

        for _ in range(low_rank.ndim - 2):
            scatter = jax.vmap(scatter)
        return scatter(jax.tree.map(sharding.gather, basis), sharding.gather(low_rank))

    def overlap(self, new: RowBasis, old: RowBasis, m: int, rank: int) -> jax.Array:
        same = (new.index[:, None] == old.index[None, :]) & (old.factor != 0)[None, :]
        copies = jnp.maximum(jnp.sum(same, axis=1, keepdims=True), 1).astype(new.factor.dtype)
        ratio = new.factor[:, None] / jnp.where(old.factor != 0, old.factor, 1)[None, :]
        return jnp.where(same, ratio / copies, 0)


@dataclasses.dataclass(frozen=True)
class Seeded(_AsItIs):
    """The seed, uint32 [*batch], of ``draw(key, (m, r), dtype)``; 0 stands for no basis, which is all zeros."""

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
            return jnp.where(seed != 0, self.draw(jax.random.key(seed), shape, dtype), 0)

        for _ in range(seeds.ndim):
            one = jax.vmap(one)
        return one(seeds)
