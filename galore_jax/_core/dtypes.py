# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""State is at least float32, whatever the dtype of the parameters: a bfloat16 second moment stops moving."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def promoted(leaf: jax.Array) -> jax.Array:
    """``leaf`` in the dtype of its state."""
    return jnp.asarray(leaf).astype(state_dtype(leaf))


def state_dtype(leaf: Any) -> jnp.dtype:
    """The dtype of a leaf's basis and moments."""
    dtype = jnp.dtype(jnp.result_type(leaf))
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype
