# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A momentum of full size for each matrix, as an array or in a codec, and the seed of its dither."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax import sharding
from galore_jax._core import coordinates
from galore_jax.matrix_codec import MatrixCodec
from galore_jax.matrix_view import MatrixView


def zero_momentum(view: MatrixView, array: jax.Array, dtype: Any, codec: MatrixCodec | None) -> Any:
    """Zeros for a parameter's matrices (*batch, m, n), coded if ``codec`` applies to them."""
    shape = (*view.batch_shape, *view.matrix_shape)
    zeros = sharding.zeros(shape, dtype, coordinates.matrix_spec(view, array), array)
    return codec.encode(zeros) if codec and codec.applies_to(shape) else zeros


def dither_seed(key: jax.Array, view: MatrixView) -> jax.Array:
    """A uint32 scalar by the path of a parameter, so that a layer has the same dither as in the whole tree."""
    return jax.random.bits(jax.random.fold_in(key, zlib.crc32(view.path.encode())), (), jnp.uint32)
