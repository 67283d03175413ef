# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One optimizer step, and the loss of held-out text.

The loss of tokens t_0 .. t_S is the mean over i of -log p(t_i | t_0 .. t_(i-1)), i = 1 .. S, in float32.  With K
micro-batches of equal size the gradient is the mean of theirs, summed in float32: the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from galore_jax import GaLoreState
from galore_jax.accumulate import low_rank_mean, mean_over_devices, update_from_low_rank
from galore_jax.training.adapters import Restart, join, part

Metrics = dict[str, Any]

DATA_AXIS = "data"
"""Of a mesh: along it gradients can be averaged in the subspaces."""

COUNTS = {"skipped": "skipped", "kept_bases": "kept", "rejected_bases": "rejected"}
"""Metric -> field of GaLoreState."""


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    low_rank: bool = False,
    out_shardings: Any = None,
    data_parallel: Mesh | None = None,
    restart: Restart | None = None,
) -> Any:
    """A jitted ``step(params, opt_state, batch) -> (params, opt_state, metrics)``; the first two are donated.

    Parameters that are frozen (:func:`galore_jax.training.adapters.part`) have no gradient, and stay.

    Args:
      graphdef: of the model, from ``nnx.split``.
      tx: the optimizer of what is trained; it is given float32 gradients.
      accumulate: micro-batches that the batch is cut into; it divides the batch.
      low_rank: sum their gradients in the subspaces of the one galore in ``tx``: see :mod:`galore_jax.accumulate`.  Then
        ``grad_norm`` is that of the sum, what lies outside the subspaces left out.
      out_shardings: of (params, opt_state, metrics), as ``jax.jit`` takes them.
      data_parallel: a mesh along whose :data:`DATA_AXIS`, the only one longer than 1, gradients are averaged in the subspaces, as
        ``low_rank`` sums them.
      restart: what is done to parameters and state before each step, of :func:`galore_jax.training.adapters.make_restart`.

    Returns:
      The step.  ``batch`` is int32 [batch, sequence + 1]; the metrics are on the device.  Scalars: ``loss``, ``grad_norm``
      (before clipping), and what GaLore has counted so far, ``skipped`` (updates in which a gradient was not finite),
      ``kept_bases`` (refreshes left out because the gradient was zero or not finite) and ``rejected_bases`` (new bases
      that were not orthonormal).  ``subspace``: see :func:`subspace_metrics`.
    """

    def loss_fn(trained: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        return jnp.mean(token_losses(graphdef, join(trained, frozen), tokens))

    def gradient(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(*part(params), tokens)
        return loss, optax.tree.cast(grads, jnp.float32)

    def cut(batch: jax.Array) -> jax.Array:
        # [K, B/K, S+1], every K-th sequence together: a batch that is sharded along its sequences stays where it is.
        return jnp.swapaxes(batch.reshape(-1, accumulate, batch.shape[1]), 0, 1)

    def mean_gradient(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        if accumulate == 1:
            return gradient(params, batch)
        micro_batches = cut(batch)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, micro_batches[0]))

        def add(total: Any, tokens: jax.Array) -> tuple[Any, None]:
            return optax.tree.add(total, gradient(params, tokens)), None

        return jax.tree.map(lambda total: total / accumulate, jax.lax.scan(add, zeros, micro_batches)[0])

    def low_rank_gradient(params: Any, opt_state: Any, batch: jax.Array) -> tuple[jax.Array, Any, Any]:
        axis_name = None if data_parallel is None else DATA_AXIS
        losses, grads, opt_state = low_rank_mean(
            tx, lambda tokens: gradient(params, tokens), cut(batch), opt_state, params, axis_name
        )
        return mean_over_devices(jnp.mean(losses), axis_name), grads, opt_state

    def train_step(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, Any, Metrics]:
        if restart is not None:
            params, opt_state = restart(params, opt_state)
        trained, frozen = part(params)
        if low_rank or data_parallel is not None:
            loss, grads, opt_state = on_parts(low_rank_gradient, data_parallel)(params, opt_state, batch)
            updates, opt_state = update_from_low_rank(tx, grads, opt_state, trained)
        else:
            loss, grads = mean_gradient(params, batch)
            updates, opt_state = tx.update(grads, opt_state, trained)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)} | optimizer_metrics(opt_state)
        return join(add_updates(trained, updates), frozen), opt_state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=out_shardings)


def on_parts(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """``function(params, opt_state, batch)`` on each part of the batch along :data:`DATA_AXIS`, which its collectives name.

    All that it returns is equal on all parts.  Without a mesh it is the function itself, on the whole batch.
    """
    if mesh is None:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(DATA_AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


def add_updates(params: Any, updates: Any) -> Any:
    """Their sum, added in float32 and rounded once to the parameters' dtype, which matters for bfloat16."""
    return jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """A jitted ``step(params, batch) -> (summed loss, predicted tokens)``; the perplexity is exp(their quotient)."""

    @jax.jit
    def eval_step(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(graphdef, params, batch)
        return jnp.sum(losses), jnp.array(losses.size, jnp.int32)

    return eval_step


def token_losses(graphdef: nnx.GraphDef, params: Any, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of each next token, float32 [batch, sequence], for int32 [batch, sequence + 1]."""
    model = nnx.merge(graphdef, params)
    return model.losses(model.run_layers(model.embed(tokens[:, :-1])), tokens[:, 1:])


def optimizer_metrics(opt_state: Any) -> Metrics:
    """What the optimizer has counted and measured, for the metrics of a step."""
    return {**galore_counts(opt_state), "subspace": subspace_metrics(opt_state)}


def galore_counts(opt_state: Any) -> dict[str, jax.Array]:
    """The :data:`COUNTS` of all GaLoreStates in an optimizer state together, int32 scalars; 0 without one.

    The states of a stack of layers (fields of one entry a layer) have skipped an update when one of them has.

    >>> {name: int(count) for name, count in galore_counts(optax.adam(0.1).init({})).items()}
    {'skipped': 0, 'kept_bases': 0, 'rejected_bases': 0}
    """
    states = _galore_states(opt_state)
    zero = jnp.zeros([], jnp.int32)
    over_layers = {"skipped": jnp.max, "kept_bases": jnp.sum, "rejected_bases": jnp.sum}
    return {
        name: sum((over_layers[name](getattr(state, field)) for state in states), start=zero)
        for name, field in COUNTS.items()
    }


def subspace_metrics(opt_state: Any) -> dict[str, dict[str, jax.Array]]:
    """The diagnostics of every projected parameter by its path, float32 [matrices] each; {} without diagnostics.

    ``captured_energy``, ``overlap`` and ``update_rms`` are those of :class:`galore_jax.diagnostics.Diagnostics`, but the
    overlap of a basis that has replaced no other yet is NaN.

    >>> params = {"up_proj": {"kernel": jnp.ones((2, 8, 16))}, "bias": jnp.ones((16,))}
    >>> from galore_jax import galore
    >>> tx = galore(optax.scale_by_adam(), rank=4, diagnostics=True)
    >>> subspace_metrics(tx.init(params))["up_proj"]["overlap"].tolist()
    [nan, nan]
    """
    leaves: dict[str, dict[str, jax.Array]] = {}
    for state in _galore_states(opt_state):
        for quantity, tree in state.diagnostics._asdict().items() if state.diagnostics else ():
            for path, values in jax.tree.leaves_with_path(tree):
                name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/kernel")
                if quantity == "overlap":
                    values = jnp.where(values >= 0, values, jnp.nan)
                leaves.setdefault(name, {})[quantity] = jnp.ravel(values)
    return leaves


def _galore_states(opt_state: Any) -> list[GaLoreState]:
    found = [state for _, state in optax.tree.get_all_with_path(opt_state, GaLoreState.__name__)]
    return [state for state in found if isinstance(state, GaLoreState)]  # Optax has one of that name too
