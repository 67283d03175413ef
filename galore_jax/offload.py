# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizer state in the memory of the host, where an accelerator has too little of its own.

Each update copies the state to the device and the new state back.  In a layer-wise step (:mod:`galore_jax.layerwise`) that is the
state of one layer at a time, and so it is when the state is made.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

HOST = "pinned_host"
"""What JAX calls the memory of the host that a device can read and write by itself."""


def offload_state(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of ``inner`` in the pinned memory of the host.

    It changes no number, only where the state is.  Arrays with fewer than two axes stay on the device.  A step on the whole tree
    has the whole state on the device for a moment.  A layer-wise step has that of one layer, and of the parameters outside the
    stack.

    A step sends every byte of the state to the device and back, so it takes up to 2 · bytes / bandwidth longer.  PCIe 4.0 x16 has
    about 25 GB/s in practice, and 5.0 has 50.

    Args:
      inner: Any Optax transformation, such as a preset.

    Returns:
      A transformation with the state of ``inner``, in arrays whose ``sharding.memory_kind`` is ``pinned_host``.

    >>> import jax.numpy as jnp
    >>> from galore_jax import galore_adamw
    >>> tx, params = offload_state(galore_adamw(0.01, rank=2)), {"w": jnp.ones((8, 16))}
    >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    >>> optax.tree.get(state, "mu")["w"].sharding.memory_kind, updates["w"].sharding.memory_kind
    ('pinned_host', 'device')
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> Any:
        # Without the barrier, XLA would make equal moments once and copy them from host to host.
        return _moved(jax.lax.optimization_barrier(inner.init(params)), jax.memory.Space.Host)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        state = _moved(state, jax.memory.Space.Device)
        updates, state = inner.update(updates, state, params, **extra_args)
        return updates, _moved(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)


def offloaded(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether :func:`offload_state` keeps an array of the inner state on the host."""
    return leaf.ndim > 1


def _moved(state: Any, space: jax.memory.Space) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if offloaded(leaf) else leaf, state)
