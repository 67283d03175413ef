# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation in the subspaces, over micro-batches and over data-parallel devices.

Projection is linear, so between refreshes the mean over K micro-batches needs only r x n buffers:

    R  =  1/K Σ_i PᵀG_i  =  Pᵀ (1/K Σ_i G_i)                 exactly, up to rounding

A refresh needs P before the second micro-batch, so it computes P from the gradient of the first micro-batch, not from the mean.
Gradients of parameters that are not projected are accumulated at full size.  Sums are in at least float32.

The same identity holds for the mean over D devices that each process part of the batch.  The devices exchange the r x n numbers
of PᵀG_d, while plain data parallelism exchanges the m x n numbers of G_d.  Only a refresh exchanges a full gradient, and only for
the matrices that it refreshes.  The basis therefore comes from the mean gradient over the devices, as it would on one device.

A transformation before ``galore`` in a chain acts on the gradient of each micro-batch, and then again on R.  There, clipping by
global norm would see only the norm inside the subspaces.

A matrix whose gradient is not finite in any micro-batch, or whose projected mean is zero, is left alone in that update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax._core.call import ARGUMENT, Action, AxisName, Call
from galore_jax._core.state import galore_states_of
from galore_jax._core.trees import one_of

__all__ = ["low_rank_mean", "low_rank_of", "mean_over_devices", "update_from_low_rank"]

_WHO = "Low-rank accumulation"


def low_rank_mean(
    tx: optax.GradientTransformation,
    gradient: Callable[[Any], tuple[Any, optax.Updates]],
    micro_batches: Any,
    state: Any,
    params: optax.Params,
    axis_name: AxisName = None,
) -> tuple[Any, Any, Any]:
    """Computes the projected mean gradient over micro-batches, for :func:`update_from_low_rank`.

    Args:
      tx: A transformation that contains exactly one ``galore``.  Any wrapper around it must pass extra arguments on.
      gradient: A function that maps a micro-batch to (auxiliary output, gradient).
      micro_batches: A tree of arrays (K, ...), where K is the number of micro-batches.
      state: The state of ``tx``.
      params: The parameters.
      axis_name: The ``jax.shard_map`` axis along which devices hold different parts of the batch, with the same ``state`` and
        ``params``.  The mean then includes these devices.  ``shard_map`` needs ``check_vma=False``, and its ``out_specs`` can
        declare the mean and the state as replicated.  None means a single device.

    Returns:
      A tuple of three values: the auxiliary outputs on this device, with leaves (K, ...); the mean in at least float32, of shape
      (*batch, r, n) for a parameter with a basis on the left; and the state, in which the bases that were due are refreshed.

    Raises:
      ValueError: ``tx`` contains no galore, or more than one.

    >>> from galore_jax import galore
    >>> params, batches = {"kernel": jnp.ones((64, 256))}, jnp.arange(1.0, 4.0)
    >>> tx = galore(optax.sgd(1.0), rank=8)
    >>> gradient = lambda batch: (batch, {"kernel": batch * jnp.ones((64, 256))})
    >>> seen, mean, state = low_rank_mean(tx, gradient, batches, tx.init(params), params)
    >>> mean["kernel"].shape
    (8, 256)
    >>> updates, state = update_from_low_rank(tx, mean, state, params)
    >>> bool(jnp.allclose(updates["kernel"], -0.25 * 2.0, atol=1e-5))  # scale times the mean gradient
    True
    """

    def add(carry: tuple, numbered: tuple) -> tuple[tuple, Any]:
        total, state = carry
        number, batch = numbered
        kept, grads = gradient(batch)
        low_rank, state = _collected(tx, grads, state, params, number == 0, axis_name)
        return (jax.tree.map(jnp.add, total, low_rank), state), kept

    number = jax.tree.leaves(micro_batches)[0].shape[0]
    one = one_of(micro_batches)
    with _in_reach():
        shapes = jax.eval_shape(lambda batch: _collected(tx, gradient(batch)[1], state, params, True)[0], one)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (total, state), kept = jax.lax.scan(add, (zeros, state), (jnp.arange(number), micro_batches))
    return kept, mean_over_devices(jax.tree.map(lambda x: x / number, total), axis_name), state


def low_rank_of(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: Any,
    params: optax.Params,
    axis_name: AxisName = None,
    layer: int | jax.Array | None = None,
) -> tuple[Any, Any]:
    """Projects one gradient and returns its mean over ``axis_name`` with the new state; see :func:`low_rank_mean`."""
    low_rank, state = _collected(tx, grads, state, params, True, axis_name, layer)
    return mean_over_devices(low_rank, axis_name), state


def update_from_low_rank(
    tx: optax.GradientTransformation,
    low_rank: optax.Updates,
    state: Any,
    params: optax.Params,
    layer: int | jax.Array | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, Any]:
    """Runs ``tx.update`` on a projected gradient, without refreshing any basis; see :func:`low_rank_mean`.

    Returns:
      Updates with the structure of ``params``, and the new state.

    Raises:
      ValueError: ``tx`` contains no galore, or its update needs the whole gradient.
    """
    call = Call(Action.APPLY, layer=layer)
    updates, new_state = optax.with_extra_args_support(tx).update(
        low_rank, state, params, **extra_args, **{ARGUMENT: call}
    )
    call.check_reached(_WHO)
    return updates, new_state


def _collected(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: Any,
    params: optax.Params,
    refresh: bool | jax.Array,
    axis_name: AxisName = None,
    layer: int | jax.Array | None = None,
) -> tuple[Any, Any]:
    """Projects the gradient of one micro-batch on one device, in at least float32, and returns it with the new state."""
    call = Call(Action.PROJECT, layer=layer, may_refresh=refresh, axis_name=axis_name)
    updated = optax.with_extra_args_support(tx).update(grads, state, params, **{ARGUMENT: call})[1]
    call.check_reached(_WHO)
    with _in_reach():
        low_rank = jax.tree.map(lambda x: 1 * x.astype(jnp.promote_types(x.dtype, jnp.float32)), call.reply)
    return low_rank, galore_states_of(updated, state)


@contextlib.contextmanager
def _in_reach() -> Iterator[None]:
    """Raises a clear error if a reply escaped from a branch or a loop that has already been traced."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            f"{_WHO} reached the galore in tx inside a branch or a loop, which cannot return the projected gradients: pass a tx "
            "without wrappers that update under a condition, such as optax.apply_if_finite."
        ) from error


def mean_over_devices(tree: Any, axis_name: AxisName) -> Any:
    """Averages a tree of arrays along an axis of ``jax.shard_map``.  If ``axis_name`` is None, returns the tree unchanged."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
