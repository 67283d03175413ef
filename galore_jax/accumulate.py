# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Gradients of micro-batches, and of the devices of a data-parallel step, summed in the subspaces.

Projection is linear, so between refreshes the mean over K micro-batches needs buffers of r x n only:

    R  =  1/K Σ_i PᵀG_i  =  Pᵀ (1/K Σ_i G_i)                 exactly, up to rounding

At a refresh P must be known before the second micro-batch is seen: it comes from the first one's gradient, not from the mean
of all.  Parameters that are not projected are summed whole.  Sums are float32.

The same holds for the mean over D devices that have a part of the batch each: they send each other the r x n numbers of PᵀG_d
where data parallelism sends the m x n of G_d.  Only a refresh sends a gradient, that of the matrix whose basis it makes, so that
the basis is that of the mean over the devices, as it would be on one.

What stands before ``galore`` in a chain acts on each micro-batch's gradient and then on R in the place of a gradient: a bound
on the global norm there would see the norm inside the subspaces only.  A matrix whose gradient is not finite in any
micro-batch is left alone in that update, as ``galore`` does with a bad gradient.
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

_WHO = "Low-rank accumulation"


def low_rank_mean(
    tx: optax.GradientTransformation,
    gradient: Callable[[Any], tuple[Any, optax.Updates]],
    micro_batches: Any,
    state: Any,
    params: optax.Params,
    axis_name: AxisName = None,
) -> tuple[Any, Any, Any]:
    """The mean gradient of micro-batches in the subspaces of ``tx``, for :func:`update_from_low_rank`.

    Args:
      tx: a transformation with one ``galore`` in it, of any wrapping that hands on extra arguments.
      gradient: micro-batch -> (anything to keep of it, gradient).
      micro_batches: arrays (K, ...), one micro-batch after the other.
      state: of ``tx``.
      params: the parameters.
      axis_name: of ``jax.shard_map``, along which devices have other parts of the batch and equal ``state`` and ``params``.  The
        mean is over them too; ``shard_map`` needs ``check_vma=False``, and can give what is returned as equal on all devices.

    Returns:
      What ``gradient`` returned first, leaves (K, ...), of this device; the mean, float32, (*batch, r, n) where a parameter is
      projected from the left; and the state, with the bases refreshed that were due.

    Raises:
      ValueError: there is no galore in ``tx``, or more than one.

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
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), micro_batches)
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
    """One gradient in the subspaces of ``tx``, its mean over ``axis_name``, and the state: see :func:`low_rank_mean`."""
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
    """``tx.update`` for a gradient in its subspaces, which it does not refresh: see :func:`low_rank_mean`.

    Returns:
      Updates like ``params``, and the new state.

    Raises:
      ValueError: there is no galore in ``tx``, or its output needs the gradient itself.
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
    """The gradient of one micro-batch on one device in the subspaces, at least float32, and the state with new bases."""
    call = Call(Action.PROJECT, layer=layer, may_refresh=refresh, axis_name=axis_name)
    updated = optax.with_extra_args_support(tx).update(grads, state, params, **{ARGUMENT: call})[1]
    call.check_reached(_WHO)
    with _in_reach():
        low_rank = jax.tree.map(lambda x: 1 * x.astype(jnp.promote_types(x.dtype, jnp.float32)), call.reply)
    return low_rank, galore_states_of(updated, state)


@contextlib.contextmanager
def _in_reach() -> Iterator[None]:
    """Says in one sentence that a reply is of a branch or a loop which is not there any more."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            f"{_WHO} reached the galore in tx inside a branch or a loop, from which its reply does not come back: give it a tx "
            "without wrappers such as optax.apply_if_finite that update under a condition."
        ) from error


def mean_over_devices(tree: Any, axis_name: AxisName) -> Any:
    """The mean of a tree of arrays along an axis of ``jax.shard_map``; the tree itself without one."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
