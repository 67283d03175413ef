# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Presets that use the whole gradient, including the part outside the subspaces, so their updates have full rank.

A layer-wise step has the whole gradient of one layer at a time, so there these presets take no more memory than those of
:mod:`galore_jax.presets.low_rank`.  Micro-batches cannot be summed in the subspaces.
"""

from __future__ import annotations

from typing import Any, Unpack

import optax

from galore_jax.presets._arguments import AdamW8bitArguments, AdamWArguments, with_arguments_of
from galore_jax.presets.low_rank import galore_adamw, galore_adamw_8bit


@with_arguments_of(galore_adamw, residual="fira")
def fira_adamw(
    learning_rate: optax.ScalarOrSchedule, **arguments: Unpack[AdamWArguments]
) -> optax.GradientTransformationExtraArgs:
    """Fira: :func:`galore_adamw` plus the scaled gradient outside the subspace (Chen et al. 2024, arXiv 2410.01623).

    The gradient outside the subspace is scaled as Adam scales the gradient inside.  The state is that of :func:`galore_adamw`,
    r(k + 2K) numbers, and one more number for each matrix.  Choose it over :func:`galore_adamw` where the whole gradient is
    available anyway, as in a layer-wise step, and where the rank is small.

    Args:
      learning_rate: A number or a schedule.
      **arguments: The arguments of :func:`galore_adamw`.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> tx = fira_adamw(0.01, rank=8)
    >>> optax.tree.get(tx.init(params), "residual")["kernel"].shape
    ()
    """
    return galore_adamw(learning_rate, **arguments)


_APOLLO: dict[str, Any] = {"eps": 1e-6, "projector": "gaussian", "refresh": "together"}
_APOLLO_MINI = _APOLLO | {"rank": 1, "scale": 128**0.5, "residual": "tensor"}


@with_arguments_of(galore_adamw, **_APOLLO, rank=256, scale=1.0, residual="channel")
def apollo_adamw(
    learning_rate: optax.ScalarOrSchedule, **arguments: Unpack[AdamWArguments]
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: the gradient, with each channel scaled as Adam scales a random sketch of it (Zhu et al. 2024, arXiv 2412.05270).

    A projected m x n matrix with K = max(m, n) has 2 r K numbers of state, a seed and a norm.  It has no basis, so choose APOLLO
    to keep factorizations out of the training step.

    Args:
      learning_rate: A number or a schedule.  The paper trains 60M to 7B models at 0.01.
      **arguments: The arguments of :func:`galore_adamw`.  The default rank is 256, as in the paper, even where a quarter of the
        smaller side would be less.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> sorted(x.size for x in jax.tree.leaves(apollo_adamw(0.01, rank=8).init(params)) if x.size > 1)
    [2048, 2048]
    """
    return galore_adamw(learning_rate, **arguments)


@with_arguments_of(galore_adamw, **_APOLLO_MINI)
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule, **arguments: Unpack[AdamWArguments]
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: the gradient, scaled by one number as Adam scales a random row of it (Zhu et al. 2024, arXiv 2412.05270).

    This is :func:`apollo_adamw` with other defaults.  The state of a projected matrix is two vectors along its larger side, so
    the total is close to that of SGD without momentum.  Choose it where memory decides.

    Args:
      learning_rate: A number or a schedule.  The paper trains at 0.01 or 0.02.
      **arguments: The arguments of :func:`galore_adamw`.  The default rank is 1.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> sorted(x.size for x in jax.tree.leaves(apollo_mini(0.01).init(params)) if x.size > 1)
    [256, 256]
    """
    return galore_adamw(learning_rate, **arguments)


@with_arguments_of(galore_adamw_8bit, **_APOLLO_MINI, basis_codec="float32")
def q_apollo_mini(
    learning_rate: optax.ScalarOrSchedule, **arguments: Unpack[AdamW8bitArguments]
) -> optax.GradientTransformationExtraArgs:
    """Q-APOLLO-Mini: :func:`apollo_mini` for int8 weights, with 8-bit moments elsewhere (Zhu et al. 2024, arXiv 2412.05270).

    The state of a projected m x n matrix is two vectors along its larger side, a seed and a norm.  Most of the rest is the
    moments of the embeddings and the LM head, which are in 8 bits; see :func:`galore_jax.quantize_state`.  It has the smallest
    state of all presets, so choose it where nothing else fits.  The training step keeps the weights in int8 with stochastic
    rounding: see :mod:`galore_jax.weights`, and ``galore-jax pretrain --optimizer q_apollo_mini --weights int8 --layerwise``.

    Args:
      learning_rate: A number or a schedule.  The paper trains at 0.01 or 0.02.
      **arguments: The arguments of :func:`galore_adamw_8bit`.  The default rank is 1.

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((1000, 64)), "kernel": jnp.ones((64, 256))}
    >>> state = q_apollo_mini(0.01).init(params)
    >>> optax.tree.get(state, "nu")["embed"].codes.dtype, optax.tree.get(state, "nu")["kernel"].shape
    (dtype('uint8'), (1, 256))
    """
    return galore_adamw_8bit(learning_rate, **arguments)
