# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Does a transformation treat every parameter by itself?

A layer-wise step shows a transformation one layer at a time, so a norm taken over the whole tree would silently become a norm
over a layer.  The question is answered by trying: on small parameters of the same names, the gradient of one is made a million
times larger, and the updates of the others must not change by a bit.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh

_SIDE = 8
_FACTOR = 1e6


def check_independent(tx: optax.GradientTransformation, params: Any) -> None:
    """Raises if the update of one parameter depends on the gradient of another.

    Args:
      tx: the transformation; its first two updates are looked at.
      params: arrays or ``jax.ShapeDtypeStruct``; only names, dtypes and the number of axes matter.

    Raises:
      ValueError: names two parameters.

    >>> params = {"a": jax.ShapeDtypeStruct((16, 16), "float32"), "b": jax.ShapeDtypeStruct((16,), "float32")}
    >>> check_independent(optax.adamw(1e-3), params)
    >>> check_independent(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), params)
    Traceback (most recent call last):
    ValueError: The update of 'b' depends on the gradient of 'a', so layer by layer tx would not do ...
    """
    leaves, treedef = jax.tree.flatten(params)
    if len(leaves) < 2:
        return
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
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

    # Also when all of this is traced, for a mesh perhaps.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.ensure_compile_time_eval():
        results = [second_update(grads)]
        for culprit in range(len(leaves)):
            # Another gradient and a larger one: Adam's update, for one, hardly knows how large all gradients are.
            replaced = (others[culprit] * _FACTOR).astype(others[culprit].dtype)
            results.append(second_update([*grads[:culprit], replaced, *grads[culprit + 1 :]]))
    before, *after = jax.device_get(results)
    for culprit, updates in enumerate(after):
        for i, (old, new) in enumerate(zip(before, updates, strict=True)):
            if i != culprit and not np.array_equal(old, new):
                raise ValueError(
                    f"The update of {paths[i]!r} depends on the gradient of {paths[culprit]!r}, so layer by layer tx would not "
                    "do what it does to the whole tree: take what couples parameters (a clip by global norm?) out of it, and "
                    "bound the norm by max_norm= of layerwise()."
                )
