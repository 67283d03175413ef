# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What XLA is not to compute while it compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def hidden_zero() -> jax.Array:
    """A float32 zero that XLA does not know to be one.

    Add it to the constants of a fresh state before they are encoded.  XLA would encode them while it compiles, which takes
    minutes for a large state.

    >>> hidden_zero()
    Array(0., dtype=float32)
    """
    return jax.lax.optimization_barrier(jnp.zeros([], jnp.float32))
