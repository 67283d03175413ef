# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Dense bases in bfloat16 or in 4 bits; Q-GaLore keeps its bases in 4 bits (Zhang et al. 2024, arXiv 2407.08296, section 3.3).

    bfloat16   P rounded to nearest
    int4       P_ij = s_ib q_ij c_j      q_ij = round(p_ij / s_ib) in -8 .. 7,  b the block of up to 256 columns that holds j,
                                         s_ib = -(the largest-magnitude entry of row i in block b) / 8,
                                         c_j restores the norm of column j of P

Each row has its own scales, because the rows of a basis differ in magnitude.  The rank axis is never sharded, so each device can
encode its shard of P independently.  Two columns share a byte: column j uses the low half and column j + ⌈r / 2⌉ the high half.

Project and lift use the decoded basis.  The gradient that produces a new basis is projected with the decoded basis too.  The
decoded basis is only nearly orthonormal.  For a random basis with r/m = 1/4, the singular values in 4 bits lie in 0.92 .. 1.08;
with r/m = 1/16, they lie in 0.96 .. 1.04.  The distance between the subspaces, (1 - ‖P_decodedᵀP‖² / r)^½, is 0.1.  (The column
norms c_j remove the bias of the singular values but not their spread, which comes from the rounding error's singular values.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import sharding
from galore_jax._core.basis import Basis, Dense, Storage, with_first_entry

_BLOCK = 256


class Int4Basis(NamedTuple):
    """P in 4 bits, with two numbers per byte."""

    packed: jax.Array  # (*batch, m, ⌈r / 2⌉), uint8; each half-byte is q + 8
    scales: jax.Array  # (*batch, m, ⌈r / 256⌉), float32
    columns: jax.Array  # (*batch, r), float32; 0 if there is no basis


class BasisCodec(NamedTuple):
    """Functions that encode and decode a dense basis."""

    # (shape (*batch, m, r), its explicit sharding, parameter) -> the initial coded basis
    zeros: Callable[[tuple[int, ...], tuple | None, Any], Basis]
    # coded basis -> bool [*batch]
    exists: Callable[[Basis], jax.Array]
    # (m, r) -> coded basis
    encode: Callable[[jax.Array], Basis]
    # (coded basis, r) -> (*batch, m, r), float32
    decode: Callable[[Basis, int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Coded:
    """Stores a coded basis, and decodes it for the operations of :class:`galore_jax._core.basis.Dense`.

    >>> p = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (64, 5)))[0]
    >>> storage = stored(Dense(), "int4", "power")
    >>> decoded = storage.decode(storage.encode(p), 5, jnp.float32)
    >>> bool(jnp.allclose(jnp.sum(decoded**2, axis=0), 1)), bool(jnp.allclose(decoded.T @ p, jnp.eye(5), atol=0.1))
    (True, True)
    """

    codec: BasisCodec
    orthonormal: bool

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: tuple | None, leaf: Any) -> Basis:
        return self.codec.zeros(shape, spec, leaf)

    def exists(self, basis: Basis) -> jax.Array:
        return self.codec.exists(basis)

    def project(self, basis: Basis, matrices: jax.Array, rank: int) -> jax.Array:
        return Dense().project(self.decode(basis, rank, matrices.dtype), matrices, rank)

    def lift(self, basis: Basis, low_rank: jax.Array, m: int) -> jax.Array:
        return Dense().lift(self.decode(basis, low_rank.shape[-2], low_rank.dtype), low_rank, m)

    def overlap(self, new: Basis, old: Basis, m: int, rank: int) -> jax.Array:
        return Dense().overlap(self.codec.decode(new, rank), self.codec.decode(old, rank), m, rank)

    def decode(self, basis: Basis, rank: int, dtype: Any) -> jax.Array:
        return self.codec.decode(basis, rank).astype(dtype)

    def encode(self, basis: jax.Array) -> Basis:
        return self.codec.encode(basis)


def stored(storage: Storage, basis_codec: str, projector: str) -> Storage:
    """Returns the storage of a projector with ``basis_codec`` applied.

    >>> stored(Dense(), "int4", "power").zeros((64, 5), jnp.float32, None, None).packed.shape
    (64, 3)
    """
    if basis_codec not in BASIS_CODECS:
        raise ValueError(f"basis_codec is {basis_codec!r}: write one of {', '.join(BASIS_CODECS)}.")
    codec = BASIS_CODECS[basis_codec]
    if codec is None:
        return storage
    if not isinstance(storage, Dense):
        raise ValueError(
            f'basis_codec is {basis_codec!r}, but the projector {projector!r} stores no dense basis: write "float32", or '
            "another projector."
        )
    return Coded(codec, storage.orthonormal)


def _zeros_in_bfloat16(shape: tuple[int, ...], spec: tuple | None, leaf: Any) -> jax.Array:
    return sharding.zeros(shape, jnp.bfloat16, spec, leaf)


def _zeros_in_int4(shape: tuple[int, ...], spec: tuple | None, leaf: Any) -> Int4Basis:
    *batch, m, r = shape
    return Int4Basis(
        sharding.zeros((*batch, m, -(-r // 2)), jnp.uint8, spec, leaf),
        sharding.zeros((*batch, m, -(-r // _BLOCK)), jnp.float32, spec, leaf),
        sharding.zeros((*batch, r), jnp.float32, spec and (*spec[:-2], None), leaf),
    )


def _to_int4(basis: jax.Array) -> Int4Basis:
    rank = basis.shape[1]
    basis = basis.astype(jnp.float32)
    blocks = sharding.blocked(basis, _BLOCK)  # (m, blocks, 256)
    low, high = jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
    scales = jnp.where(high > -low, -high, -low) / 8
    numbers = jnp.round(blocks / jnp.where(scales != 0, scales, 1)[..., None])
    numbers = sharding.merged(jnp.clip(numbers, -8, 7).astype(jnp.int32) + 8)[:, :rank]
    numbers = jnp.pad(numbers, ((0, 0), (0, rank % 2)))
    half = numbers.shape[1] // 2
    packed = (numbers[:, :half] + 16 * numbers[:, half:]).astype(jnp.uint8)
    coded = Int4Basis(packed, scales, jnp.ones((rank,), jnp.float32))
    lengths = _lengths(_from_int4(coded, rank))
    return coded._replace(columns=_lengths(basis) / jnp.where(lengths > 0, lengths, 1))


# Jitted, so that the bases of one shape share its program.
@functools.partial(jax.jit, static_argnames="rank")
def _from_int4(basis: Int4Basis, rank: int) -> jax.Array:
    packed = basis.packed.astype(jnp.int32)
    numbers = jnp.concatenate([packed & 15, packed >> 4], axis=-1)
    numbers = jax.lax.slice_in_dim(numbers, 0, rank, axis=-1) - 8  # (*batch, m, r)
    scaled = numbers.astype(jnp.float32) * sharding.spread(basis.scales, numbers, _BLOCK)
    return scaled * basis.columns[..., None, :]


def _lengths(basis: jax.Array) -> jax.Array:
    """Returns the column norms (r,) of a matrix (m, r)."""
    return jnp.sqrt(jnp.sum(jnp.square(basis), axis=0))


BASIS_CODECS = {
    "float32": None,
    "bfloat16": BasisCodec(
        _zeros_in_bfloat16,
        Dense().exists,
        lambda basis: with_first_entry(basis).astype(jnp.bfloat16),
        lambda basis, rank: basis.astype(jnp.float32),
    ),
    "int4": BasisCodec(_zeros_in_int4, lambda basis: basis.columns[..., 0] != 0, _to_int4, _from_int4),
}
