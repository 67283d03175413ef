# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""PRNG keys from a seed.  The seed is an int or an injected hyperparameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_seed(seed: Any) -> None:
    """Raises an error unless ``seed`` is an int in [0, 2**32) or an injected hyperparameter."""
    if isinstance(seed, jax.Array):
        return
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}: write an int in [0, 2**32).")


def key_of(seed: int | jax.Array, count: jax.Array) -> jax.Array:
    """Returns the key for update number ``count``."""
    return jax.random.fold_in(jax.random.key(jnp.asarray(seed).astype(jnp.uint32)), count)
