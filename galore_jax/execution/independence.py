# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks that a transformation treats parameters one by one.

A layer-wise step passes one layer at a time to a transformation, so a norm over the whole tree would silently become a norm
over a layer.  The check runs the transformation on small arrays with the same paths: replacing the gradient of one parameter
by another, a million times larger one must leave the updates of all others bit-identical.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh

from galore_jax._core.trees import paths_of

_SIDE = 8
_FACTOR = 1e6


def check_independent(tx: optax.GradientTransformation, params: Any) -> None:
    """Raises if the update of one parameter depends on the gradient of another.

    Args:
      tx: The transformation, whose first two updates are checked.
      params: A tree of arrays or ``jax.ShapeDtypeStruct``.  Arrays with at most 8 elements along each axis stand for them.

    Raises:
      ValueError: The message names two parameters that are coupled.

    >>> params = {"a": jax.ShapeDtypeStruct((16, 16), "float32"), "b": jax.ShapeDtypeStruct((16,), "float32")}
    >>> check_independent(optax.adamw(1e-3), params)
    >>> check_independent(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), params)
    Traceback (most recent call last):
    ValueError: The update of 'b' depends on the gradient of 'a', so tx does something else layer by layer ...
    """
    leaves, treedef = jax.tree.flatten(params)
    if len(leaves) < 2:
        return
    paths = paths_of(params)
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        return rng.normal(size=[min(side, _SIDE) for side in leaf.shape]).astype(leaf.dtype)

    small = treedef.unflatten(map(draw, leaves))
    first, grads, others = (list(map(draw, leaves)) for _ in range(3))
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def second_update(grads: list[np.ndarray]) -> list[jax.Array]:
        _, state = tx.update(treedef.unflatten(first), tx.init(small), small)
        return treedef.flatten_up_to(tx.update(treedef.unflatten(grads), state, small)[0])

    # The check runs at once, without a mesh, even if the caller is being traced under one.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.ensure_compile_time_eval():
        results = [second_update(grads)]
        for culprit in range(len(leaves)):
            # Scaling the gradient alone is not enough: Adam's update hardly depends on the scale.
            replaced = (others[culprit] * _FACTOR).astype(others[culprit].dtype)
            results.append(second_update([*grads[:culprit], replaced, *grads[culprit + 1 :]]))
    before, *after = jax.device_get(results)
    for culprit, updates in enumerate(after):
        for i, (old, new) in enumerate(zip(before, updates, strict=True)):
            if i != culprit and not np.array_equal(old, new):
                raise ValueError(
                    f"The update of {paths[i]!r} depends on the gradient of {paths[culprit]!r}, so tx does something else "
                    "layer by layer than on the whole tree: remove what couples parameters, such as a clip by global norm, "
                    "and bound the norm with layerwise(..., max_norm=...)."
                )
