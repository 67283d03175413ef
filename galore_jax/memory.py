# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The exact size of parameters and optimizer state in bytes, without allocating them."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

__all__ = ["device_bytes", "state_bytes", "state_bytes_by_kind", "tree_bytes"]


def tree_bytes(tree: Any) -> int:
    """The bytes of all arrays (or ``jax.ShapeDtypeStruct``) in a pytree.

    >>> tree_bytes({"a": jax.ShapeDtypeStruct((3, 4), "bfloat16"), "b": jax.ShapeDtypeStruct((), "int32")})
    28
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """The bytes on one device of all arrays (or ``jax.ShapeDtypeStruct``) in a pytree.

    >>> device_bytes({"a": jax.ShapeDtypeStruct((3, 4), "bfloat16")})
    24
    """

    def one(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """The bytes of the state that ``tx.init(params)`` would make.  ``params`` may be abstract.

    >>> # Two moments and a count.
    >>> state_bytes(optax.adam(1e-3), {"w": jax.ShapeDtypeStruct((10, 10), "float32")})
    804
    """
    return tree_bytes(jax.eval_shape(tx.init, params))


def state_bytes_by_kind(state: Any) -> dict[str, int]:
    """The bytes of an optimizer state by purpose.  They add up to ``tree_bytes(state)``, and the state may be abstract.

    ``bases`` are the bases of the subspaces, and ``scales`` the scales of arrays that are stored in few bits.  ``moments`` are
    all other arrays, such as LDAdam's error.  ``other`` are counters, diagnostics, and the memory of refresh policies and
    residuals.

    >>> from galore_jax import galore_adamw
    >>> params = {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}
    >>> state_bytes_by_kind(jax.eval_shape(galore_adamw(0.01, rank=8).init, params))
    {'bases': 2048, 'moments': 16384, 'scales': 0, 'other': 20}
    """
    sizes = dict.fromkeys(("bases", "moments", "scales", "other"), 0)
    for path, leaf in jax.tree.leaves_with_path(state):
        # Attributes are fields of states.  Dictionary keys are names of parameters, such as the "scale" of a norm layer.
        fields = {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
        if fields & {"schedule", "diagnostics", "residual"}:
            kind = "other"
        elif fields & {"scale", "scales"}:
            kind = "scales"
        elif fields & {"left", "right", "basis"}:
            kind = "bases"
        else:
            # The counters of a stack of layers have an axis of layers.
            kind = "other" if leaf.ndim == 0 or leaf.dtype == "int32" else "moments"
        sizes[kind] += tree_bytes(leaf)
    return sizes
