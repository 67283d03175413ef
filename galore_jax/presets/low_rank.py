# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Ready-made optimizers that need only the gradient in the subspaces.

Each preset is ``chain(galore(inner), add_decayed_weights, scale_by_learning_rate)``.  Embeddings, the LM head, norms and other
leaves that are not projected go through the same inner transformation at full size, with the same learning rate.  Weight decay
is decoupled and acts on the full weight, before the update (Loshchilov and Hutter 2019).

:mod:`galore_jax.presets.full_rank` has the presets that also use the gradient outside the subspaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_jax import projectors
from galore_jax.presets._arguments import AdamW8bitArguments, AdamWArguments, GaLoreArguments, with_arguments_of
from galore_jax.quantize import quantize_state
from galore_jax.transform import galore


@with_arguments_of(galore, rank=128)
def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    mu_dtype: Any = None,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    **galore_arguments: Unpack[GaLoreArguments],
) -> optax.GradientTransformationExtraArgs:
    """AdamW with low-rank moments (Zhao et al. 2024, arXiv 2403.03507).

    The defaults are those of the paper.  A projected m x n matrix with k = min(m, n) and K = max(m, n) has r(k + 2K) numbers of
    state, against 2 m n for AdamW.

    Args:
      learning_rate: A number or a schedule.  The paper trains 60M to 1B models at 0.01 with ``scale`` 0.25.
      b1, b2, eps: The decay rates and epsilon of Adam.
      mu_dtype: The dtype of the first moment, as in ``optax.scale_by_adam``.  None keeps it in float32, whatever the dtype of
        the parameters; the second moment is always in float32.
      weight_decay: The strength of decoupled weight decay, which is multiplied by the learning rate.
      weight_decay_mask: A tree of bools or a callable of the parameters that says which of them decay.
      **galore_arguments: The arguments of :func:`galore`.  The default rank is 128.

    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> tx = galore_adamw(optax.cosine_decay_schedule(0.01, 1000), rank=8, weight_decay=0.1)
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    low_rank = galore(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype), **galore_arguments)
    return decayed(low_rank, learning_rate, weight_decay, weight_decay_mask)


@with_arguments_of(galore_adamw, projector="rows", transport="reset")
def grass_adamw(
    learning_rate: optax.ScalarOrSchedule, **arguments: Unpack[AdamWArguments]
) -> optax.GradientTransformationExtraArgs:
    """Grass: Adam on the r rows of the gradient with the largest norms (Muhamed et al. 2024, arXiv 2406.17660).

    The rows are chosen again at every refresh, and the moments restart then, because most of them belong to other rows.  A
    projected m x n matrix with K = max(m, n) has 2 r K numbers of state, r indices and factors, and a count.  Grass needs no
    matrix products and no factorization.  Rows capture less of a gradient than singular directions do.  Choose it where a dense
    basis takes too much time or memory, or where gradients are sparse in their rows.  Micro-batches can be summed in the
    subspaces.  The unbiased draw of the paper is ``projector=projectors.rows("sampled")``; the paper tunes its ``scale``.

    Args:
      learning_rate: A number or a schedule.
      **arguments: The arguments of :func:`galore_adamw`.

    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> state = grass_adamw(0.01, rank=8).init(params)
    >>> left = optax.tree.get(state, "left")["kernel"]
    >>> left.index.shape, [x.shape for x in jax.tree.leaves(state) if x.size > 8]
    ((8,), [(8, 256), (8, 256)])
    """
    return galore_adamw(learning_rate, **arguments)


@with_arguments_of(galore_adamw, transport="rotate")
def golore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    random_from: int | jax.Array,
    **arguments: Unpack[AdamWArguments],
) -> optax.GradientTransformationExtraArgs:
    """GoLore: :func:`galore_adamw` that ends in random subspaces (He et al. 2024, arXiv 2410.11289).

    Near a minimum, noise decides the leading directions of a gradient, and a method that follows only those need not converge.
    Uniformly random subspaces leave no direction out, and the paper proves that the method converges.  The state is that of
    :func:`galore_adamw`, r(k + 2K) numbers.  Both moments are carried into each new subspace.  Choose it for long runs with
    small batches.  Micro-batches can be summed in the subspaces.

    Args:
      learning_rate: A number or a schedule.
      random_from: The update from which new subspaces are random.  The paper sets it to 0.8 of all updates.
      **arguments: The arguments of :func:`galore_adamw`.  ``projector`` makes the subspaces before that update.

    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> tx = golore_adamw(optax.cosine_decay_schedule(0.01, 10_000), random_from=8_000, rank=8)
    >>> optax.tree.get(tx.init(params), "left")["kernel"].shape
    (64, 8)
    """
    arguments["projector"] = projectors.switch(arguments["projector"], "random", at=random_from)
    return galore_adamw(learning_rate, **arguments)


@with_arguments_of(galore, rank=128, basis_codec="bfloat16")
def galore_adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    **galore_arguments: Unpack[GaLoreArguments],
) -> optax.GradientTransformationExtraArgs:
    """:func:`galore_adamw` with 8-bit moments and bfloat16 bases (Zhao et al. 2024, arXiv 2403.03507, section 4.3).

    The large moments of embeddings, the LM head and other parameters that are not projected are in 8 bits too; see
    :func:`galore_jax.quantize_state`.  A projected m x n matrix with k = min(m, n) and K = max(m, n) and its basis on the
    smaller side has 2 r k bytes of basis and 2 r K bytes of moments, and 4 bytes for each block of 256 numbers of a moment.
    Blocks lie along the last axis of a moment, which is r x K for a basis on the left and K x r on the right.

    Args:
      learning_rate: A number or a schedule.
      b1, b2, eps: The decay rates and epsilon of Adam.
      weight_decay: The strength of decoupled weight decay, which is multiplied by the learning rate.
      weight_decay_mask: A tree of bools or a callable of the parameters that says which of them decay.
      **galore_arguments: The arguments of :func:`galore`.  The default rank is 128.

    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> state = galore_adamw_8bit(0.01, rank=32).init(params)
    >>> optax.tree.get(state, "nu")["kernel"].codes.dtype
    dtype('uint8')
    """
    low_rank = galore(quantize_state(optax.scale_by_adam(b1=b1, b2=b2, eps=eps)), **galore_arguments)
    return decayed(low_rank, learning_rate, weight_decay, weight_decay_mask)


@with_arguments_of(galore_adamw_8bit, refresh="lazy", basis_codec="int4")
def q_galore_adamw_8bit(
    learning_rate: optax.ScalarOrSchedule, **arguments: Unpack[AdamW8bitArguments]
) -> optax.GradientTransformationExtraArgs:
    """Q-GaLore: 8-bit moments, and 4-bit bases that are refreshed less often while stable (Zhang et al. 2024, arXiv 2407.08296).

    This is :func:`galore_adamw_8bit` with ``basis_codec="int4"`` and ``refresh="lazy"``, at the paper's threshold, factor and
    window (:func:`galore_jax.refresh.lazy` says what is compared).  The paper also keeps weights in int8 with stochastic
    rounding.  An optimizer returns updates and does not round parameters, so that part belongs to the training step: see
    :mod:`galore_jax.weights` and :mod:`galore_jax.layerwise`.

    A number of a basis takes half a byte and one of the moments two bytes, so ``proj_type="reverse_std"``, with the bases on the
    larger sides, takes the least memory.  At the same rank its loss was clearly higher (``benchmarks/quality.py``).

    Args:
      learning_rate: A number or a schedule.
      **arguments: The arguments of :func:`galore_adamw_8bit`.

    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> state = q_galore_adamw_8bit(0.01, rank=32).init(params)
    >>> optax.tree.get(state, "left")["kernel"].packed.shape
    (64, 16)
    """
    return galore_adamw_8bit(learning_rate, **arguments)


@with_arguments_of(galore, rank=128)
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: float | jax.Array = 0.8,
    eps: float | jax.Array = 1e-30,
    clipping_threshold: float | jax.Array | None = 1.0,
    momentum: float | jax.Array | None = None,
    min_dim_size_to_factor: int | None = None,
    multiply_by_parameter_scale: bool = False,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    **galore_arguments: Unpack[GaLoreArguments],
) -> optax.GradientTransformationExtraArgs:
    """Adafactor on low-rank gradients, with a factored second moment (Shazeer and Stern 2018, arXiv 1804.04235).

    A projected m x n matrix with K = max(m, n) and its basis on the smaller side k has r(k + 1) + K numbers of state, and r K
    more with momentum.  A rank below ``min_dim_size_to_factor`` leaves the second moment unfactored: r(k + K).

    Args:
      learning_rate: A number or a schedule.
      decay_rate: The exponent of the second moment's decay, 1 - t^-decay_rate.
      eps: A constant that is added to the squared gradient.
      clipping_threshold: A bound on the root mean square of the low-rank update of each matrix, or None for no bound.
      momentum: The decay rate of a moving average of the low-rank update, before the learning rate, or None.
      min_dim_size_to_factor: Low-rank matrices with a smaller side than this keep an unfactored second moment.  None means 128.
        ``optax.inject_hyperparams`` needs any other value in its ``static_args``.
      multiply_by_parameter_scale: If True, multiply each update by the root mean square of the full weight.
      weight_decay: The strength of decoupled weight decay, which is multiplied by the learning rate.
      weight_decay_mask: A tree of bools or a callable of the parameters that says which of them decay.
      **galore_arguments: The arguments of :func:`galore`.  The default rank is 128.

    >>> params = {"kernel": jnp.ones((256, 512))}
    >>> state = galore_adafactor(0.01, rank=128).init(params)
    >>> sorted(x.size for x in jax.tree.leaves(state) if x.size > 1)  # column and row factors, and the basis
    [128, 512, 32768]
    """
    smallest = 128 if min_dim_size_to_factor is None else min_dim_size_to_factor
    inner = [optax.scale_by_factored_rms(decay_rate=decay_rate, epsilon=eps, min_dim_size_to_factor=smallest)]
    if clipping_threshold is not None:
        inner.append(_clip_by_matrix_rms(clipping_threshold))
    if momentum is not None:
        inner.append(optax.ema(momentum, debias=False))
    low_rank = galore(optax.chain(*inner), **galore_arguments)
    if multiply_by_parameter_scale:
        low_rank = optax.chain(low_rank, optax.scale_by_param_block_rms())
    return decayed(low_rank, learning_rate, weight_decay, weight_decay_mask)


def _clip_by_matrix_rms(threshold: float | jax.Array) -> optax.GradientTransformation:
    """``optax.clip_by_block_rms`` for each matrix of a stack, so that the layers of a stack do not clip one another."""

    def clip(update: jax.Array) -> jax.Array:
        axes = (-2, -1) if update.ndim > 2 else None
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1, rms / threshold)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def decayed(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array,
    weight_decay_mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """Chains ``tx``, decoupled weight decay of the full weight, and the learning rate."""
    return optax.with_extra_args_support(
        optax.chain(
            tx,
            optax.add_decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
