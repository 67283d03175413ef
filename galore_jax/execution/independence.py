# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Does a transformation treat each parameter independently?

A layer-wise step gives a transformation one layer at a time, so a norm over the whole tree would silently become a norm over
one layer.  The check tries the transformation on small parameters of the same names: it makes the gradient of one parameter a
million times larger, and the updates of the others must stay bit-identical.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from galore_jax._core import probe, trees

_FACTOR = 1e6


def check_independent(tx: optax.GradientTransformation, params: Any) -> None:
    """Raises a ValueError if the update of one parameter depends on the gradient of another.

    Args:
      tx: The transformation.  The check compares its second updates.
      params: Arrays or ``jax.ShapeDtypeStruct``.  Only the names, the dtypes and the number of axes matter.

    Raises:
      ValueError: The update of a parameter depends on the gradient of another; the message names both.

    >>> params = {"a": jax.ShapeDtypeStruct((16, 16), "float32"), "b": jax.ShapeDtypeStruct((16,), "float32")}
    >>> check_independent(optax.adamw(1e-3), params)
    >>> check_independent(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), params)
    Traceback (most recent call last):
    ValueError: The update of 'b' depends on the gradient of 'a', so layer by layer tx would not do ...
    """
    leaves, treedef = jax.tree.flatten(params)
    if len(leaves) < 2:
        return
    rng = np.random.default_rng(0)
    values, first, grads, others = (jax.tree.leaves(probe.small(params, rng)) for _ in range(4))
    weights = treedef.unflatten(values)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def second_update(grads: list[np.ndarray]) -> list[jax.Array]:
        _, state = tx.update(treedef.unflatten(first), tx.init(weights), weights)
        return treedef.flatten_up_to(tx.update(treedef.unflatten(grads), state, weights)[0])

    with probe.concretely():
        results = [second_update(grads)]
        for culprit in range(len(leaves)):
            # A different gradient, not only a larger one: Adam's update hardly depends on the common size of all gradients.
            replaced = (others[culprit] * _FACTOR).astype(others[culprit].dtype)
            results.append(second_update([*grads[:culprit], replaced, *grads[culprit + 1 :]]))
    before, *after = jax.device_get(results)
    paths = trees.paths_of(params)
    for culprit, updates in enumerate(after):
        for i, (old, new) in enumerate(zip(before, updates, strict=True)):
            if i != culprit and not np.array_equal(old, new):
                raise ValueError(
                    f"The update of {paths[i]!r} depends on the gradient of {paths[culprit]!r}, so layer by layer tx would not "
                    "do what it does to the whole tree: remove what couples parameters from tx (optax.clip_by_global_norm?), "
                    "and bound the norm with max_norm= of layerwise()."
                )
