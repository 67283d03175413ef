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

Metrics = dict[str, jax.Array]


def make_train_step(graphdef: nnx.GraphDef, tx: optax.GradientTransformation, accumulate: int = 1) -> Any:
    """A jitted ``step(params, opt_state, batch) -> (params, opt_state, metrics)``; the first two are donated.

    Args:
      graphdef: of the model, from ``nnx.split``.
      tx: the optimizer; it is given float32 gradients.
      accumulate: micro-batches that the batch is cut into; it divides the batch.

    Returns:
      The step.  ``batch`` is int32 [batch, sequence + 1]; the metrics are scalars on the device: ``loss``,
      ``grad_norm`` (before clipping), and ``skipped`` (updates GaLore left out so far because of a gradient that was
      not finite).
    """

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.mean(token_losses(graphdef, params, tokens))

    def gradient(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        return loss, optax.tree.cast(grads, jnp.float32)

    def mean_gradient(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        if accumulate == 1:
            return gradient(params, batch)
        micro_batches = batch.reshape(accumulate, -1, batch.shape[1])  # [K, B/K, S+1]
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, micro_batches[0]))

        def add(total: Any, tokens: jax.Array) -> tuple[Any, None]:
            return optax.tree.add(total, gradient(params, tokens)), None

        return jax.tree.map(lambda total: total / accumulate, jax.lax.scan(add, zeros, micro_batches)[0])

    def train_step(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, Any, Metrics]:
        loss, grads = mean_gradient(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        # Added in float32 and rounded once, which matters for bfloat16 parameters.
        params = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "skipped": _skipped(opt_state)}
        return params, opt_state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1))


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """A jitted ``step(params, batch) -> (summed loss, predicted tokens)``; the perplexity is exp(their quotient)."""

    @jax.jit
    def eval_step(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(graphdef, params, batch)
        return jnp.sum(losses), jnp.array(losses.size, jnp.int32)

    return eval_step


def token_losses(graphdef: nnx.GraphDef, params: Any, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of each next token, float32 [batch, sequence], for int32 [batch, sequence + 1]."""
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])  # [B, S, V]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def _skipped(opt_state: Any) -> jax.Array:
    counts = [value for _, value in optax.tree.get_all_with_path(opt_state, "skipped")]
    return sum(counts, start=jnp.zeros([], jnp.int32))
