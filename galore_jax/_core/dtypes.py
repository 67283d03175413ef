# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""State dtypes: at least float32 for any parameter dtype, because small updates to a bfloat16 second moment round to zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def promoted(leaf: jax.Array) -> jax.Array:
    """Casts ``leaf`` to the dtype of its state."""
    return jnp.asarray(leaf).astype(state_dtype(leaf))


def state_dtype(leaf: Any) -> jnp.dtype:
    """Returns the dtype of the basis and moments of ``leaf``: at least float32."""
    dtype = jnp.dtype(jnp.result_type(leaf))
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype
