# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Exact bytes of parameters and optimizer state, without allocating any."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or ``jax.ShapeDtypeStruct``) in a pytree.

    >>> tree_bytes({"a": jax.ShapeDtypeStruct((3, 4), "bfloat16"), "b": jax.ShapeDtypeStruct((), "int32")})
    28
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the state that ``tx.init(params)`` would make; ``params`` may be abstract.

    >>> state_bytes(optax.adam(1e-3), {"w": jax.ShapeDtypeStruct((10, 10), "float32")})  # two moments and a count
    804
    """
    return tree_bytes(jax.eval_shape(tx.init, params))
