# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Ready-made optimizers: one choice on each of the library's axes.

Each is ``chain(galore(inner), add_decayed_weights, scale_by_learning_rate)``.  Embeddings, the LM head, norms and other
leaves that are not projected go through the same inner transformation whole, so they are on the plain optimizer at the same
learning rate; weight decay is decoupled and acts on the full weight, before the update (Loshchilov and Hutter 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax import projectors, refresh as policies
from galore_jax.matrix_view import Rank
from galore_jax.transform import galore


def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    rank: Rank = 128,
    update_proj_gap: int | jax.Array = 200,
    scale: float | jax.Array | str = 0.25,
    proj_type: str = "std",
    projector: str | projectors.Projector = "power",
    refresh: str | policies.Together | None = None,
    transport: str | None = None,
    diagnostics: bool = False,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with low-rank moments (Zhao et al. 2024, arXiv 2403.03507), the paper's defaults.

    State of a projected m x n matrix with k = min(m, n) and K = max(m, n): r(k + 2K) numbers in float32, against 2 m n.

    Args:
      learning_rate: a number or a schedule.  The paper trains 60M to 1B models at 0.01 with ``scale`` 0.25.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, multiplied by the learning rate.
      weight_decay_mask: tree of bools or callable: which parameters decay.
      rank, update_proj_gap, scale, proj_type, projector, refresh, transport, diagnostics, mask, weight_dimension_numbers,
        seed: of :func:`galore`.

    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> tx = galore_adamw(optax.cosine_decay_schedule(0.01, 1000), rank=8, weight_decay=0.1)
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    low_rank = galore(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        proj_type=proj_type,
        projector=projector,
        refresh=refresh,
        transport=transport,
        diagnostics=diagnostics,
        mask=mask,
        weight_dimension_numbers=weight_dimension_numbers,
        seed=seed,
    )
    return _decayed(low_rank, learning_rate, weight_decay, weight_decay_mask)


def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: float | jax.Array = 0.8,
    eps: float | jax.Array = 1e-30,
    clipping_threshold: float | None = 1.0,
    momentum: float | jax.Array | None = None,
    min_dim_size_to_factor: int = 128,
    multiply_by_parameter_scale: bool = False,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    rank: Rank = 128,
    update_proj_gap: int | jax.Array = 200,
    scale: float | jax.Array | str = 0.25,
    proj_type: str = "std",
    projector: str | projectors.Projector = "power",
    refresh: str | policies.Together | None = None,
    transport: str | None = None,
    diagnostics: bool = False,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) on low-rank gradients: a factored low-rank second moment.

    State of a projected m x n matrix, basis on the smaller side k, K = max(m, n): r(k + 1) + K numbers, plus r K with momentum.
    A rank below ``min_dim_size_to_factor`` leaves the second moment unfactored: r(k + K).

    Args:
      learning_rate: a number or a schedule.
      decay_rate: exponent of the second moment's decay, 1 - t^-decay_rate.
      eps: added to the squared gradient.
      clipping_threshold: bound on the root mean square of each low-rank update, matrix by matrix; None for no bound.
      momentum: of an exponential moving average of the low-rank update, before the learning rate, or None.
      min_dim_size_to_factor: matrices (here low-rank ones) with a smaller side keep an unfactored second moment.  Static:
        name it in ``static_args`` of ``optax.inject_hyperparams``, beside ``rank``.
      multiply_by_parameter_scale: multiply each update by the root mean square of the full weight.
      weight_decay: decoupled, multiplied by the learning rate.
      weight_decay_mask: tree of bools or callable: which parameters decay.
      rank, update_proj_gap, scale, proj_type, projector, refresh, transport, diagnostics, mask, weight_dimension_numbers,
        seed: of :func:`galore`.

    >>> params = {"kernel": jnp.ones((256, 512))}
    >>> state = galore_adafactor(0.01, rank=128).init(params)
    >>> sorted(x.size for x in jax.tree.leaves(state) if x.size > 1)  # column and row factors, and the basis
    [128, 512, 32768]
    """
    inner = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, epsilon=eps, min_dim_size_to_factor=min_dim_size_to_factor)
    ]
    if clipping_threshold is not None:
        inner.append(_clip_by_matrix_rms(clipping_threshold))
    if momentum is not None:
        inner.append(optax.ema(momentum, debias=False))
    low_rank = galore(
        optax.chain(*inner),
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        proj_type=proj_type,
        projector=projector,
        refresh=refresh,
        transport=transport,
        diagnostics=diagnostics,
        mask=mask,
        weight_dimension_numbers=weight_dimension_numbers,
        seed=seed,
    )
    if multiply_by_parameter_scale:
        low_rank = optax.chain(low_rank, optax.scale_by_param_block_rms())
    return _decayed(low_rank, learning_rate, weight_decay, weight_decay_mask)


def _clip_by_matrix_rms(threshold: float) -> optax.GradientTransformation:
    """``optax.clip_by_block_rms``, but matrix by matrix in a stack, whose layers would else clip one another."""

    def clip(update: jax.Array) -> jax.Array:
        axes = (-2, -1) if update.ndim > 2 else None
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1, rms / threshold)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def _decayed(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array,
    weight_decay_mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """``tx``, decoupled weight decay of the full weight, and the learning rate."""
    return optax.with_extra_args_support(
        optax.chain(
            tx,
            optax.add_decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
