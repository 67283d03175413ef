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


def device_bytes(tree: Any) -> int:
    """Bytes of all arrays (or ``jax.ShapeDtypeStruct``) in a pytree on one of the devices that they are sharded over.

    >>> device_bytes({"a": jax.ShapeDtypeStruct((3, 4), "bfloat16")})
    24
    """

    def one(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the state that ``tx.init(params)`` would make; ``params`` may be abstract.

    >>> state_bytes(optax.adam(1e-3), {"w": jax.ShapeDtypeStruct((10, 10), "float32")})  # two moments and a count
    804
    """
    return tree_bytes(jax.eval_shape(tx.init, params))


def state_bytes_by_kind(state: Any) -> dict[str, int]:
    """Bytes of an optimizer state, which may be abstract, by what they are for; together they are ``tree_bytes(state)``.

    ``bases``: of the subspaces.  ``scales``: the factors beside values that are stored in few bits.  ``moments``: every
    other array, such as LDAdam's error.  ``other``: counters, diagnostics, and what refresh policies and residuals remember.

    >>> from galore_jax import galore_adamw
    >>> params = {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}
    >>> state_bytes_by_kind(jax.eval_shape(galore_adamw(0.01, rank=8).init, params))
    {'bases': 2048, 'moments': 16384, 'scales': 0, 'other': 20}
    """
    sizes = dict.fromkeys(("bases", "moments", "scales", "other"), 0)
    for path, leaf in jax.tree.leaves_with_path(state):
        # Attributes are fields of states; dictionary keys, such as the "scale" of a norm, are names of parameters.
        fields = {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
        if fields & {"schedule", "diagnostics", "residual"}:
            kind = "other"
        elif fields & {"scale", "scales"}:
            kind = "scales"
        elif fields & {"left", "right", "basis"}:
            kind = "bases"
        else:  # a counter has as many axes as layers are stacked in front of it
            kind = "other" if leaf.ndim == 0 or leaf.dtype == "int32" else "moments"
        sizes[kind] += tree_bytes(leaf)
    return sizes
