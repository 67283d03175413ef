# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Presets that use the whole gradient, also what is outside the subspaces, and so make updates of full rank.

A layer-wise step has the whole gradient of one layer at a time, so there they cost no more memory than the presets of
:mod:`galore_jax.presets.low_rank`.  Micro-batches cannot be summed in the subspaces.
"""

from __future__ import annotations

from typing import Any

import optax

from galore_jax.presets.low_rank import adamw_8bit, galore_adamw, with_arguments_of


@with_arguments_of(galore_adamw, residual="fira")
def fira_adamw(learning_rate: optax.ScalarOrSchedule, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """Fira (Chen et al. 2024, arXiv 2410.01623): :func:`galore_adamw`, and outside the subspace the gradient, scaled alike.

    The update has full rank, for the state of :func:`galore_adamw`, r(k + 2K) numbers, and one more a matrix.  Choose it before
    :func:`galore_adamw` where the whole gradient is there anyway, as in a layer-wise step for one layer at a time, and where the
    rank is small.  Micro-batches cannot be summed in the subspaces.

    Args:
      learning_rate: a number or a schedule.
      **arguments: those of :func:`galore_adamw`.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> tx = fira_adamw(0.01, rank=8)
    >>> optax.tree.get(tx.init(params), "residual")["kernel"].shape
    ()
    """
    return galore_adamw(learning_rate, **arguments)


_APOLLO = {"eps": 1e-6, "projector": "gaussian", "refresh": "together"}


@with_arguments_of(galore_adamw, **_APOLLO, rank=256, scale=1.0, residual="channel")
def apollo_adamw(learning_rate: optax.ScalarOrSchedule, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270): the gradient itself, each channel scaled as Adam scales a random sketch of it.

    State of a projected m x n matrix with K = max(m, n): 2 r K numbers, a seed and a norm; no basis and no factorisation.  The
    update needs the whole gradient, as :func:`fira_adamw`'s.  Choose it to have no factorisation in the step.  The paper has 256
    as rank, also where a quarter of the smaller side would be less.

    Args:
      learning_rate: a number or a schedule.  The paper trains 60M to 7B models at 0.01.
      **arguments: those of :func:`galore_adamw`.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> sorted(x.size for x in jax.tree.leaves(apollo_adamw(0.01, rank=8).init(params)) if x.size > 1)
    [2048, 2048]
    """
    return galore_adamw(learning_rate, **arguments)


@with_arguments_of(galore_adamw, **_APOLLO, rank=1, scale=128**0.5, residual="tensor")
def apollo_mini(learning_rate: optax.ScalarOrSchedule, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini (Zhu et al. 2024, arXiv 2412.05270): the gradient, scaled as a whole as Adam scales one random row of it.

    :func:`apollo_adamw` with other defaults; the state of a projected matrix is two vectors along its larger side, about that of
    momentum-free SGD.  Choose it when memory decides.

    Args:
      learning_rate: a number or a schedule.  The paper trains at 0.01, or 0.02.
      **arguments: those of :func:`galore_adamw`.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> sorted(x.size for x in jax.tree.leaves(apollo_mini(0.01).init(params)) if x.size > 1)
    [256, 256]
    """
    return galore_adamw(learning_rate, **arguments)


@with_arguments_of(apollo_mini)
def q_apollo_mini(learning_rate: optax.ScalarOrSchedule, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """Q-APOLLO-Mini (Zhu et al. 2024, arXiv 2412.05270): :func:`apollo_mini` beside int8 weights, with 8-bit moments elsewhere.

    State of a projected m x n matrix: two vectors along its larger side, a seed and a norm.  What is left is the moments of
    embeddings and LM head, which this preset keeps in 8 bits (see :func:`galore_jax.quantize_state`).  The smallest footprint of
    all presets, so choose it when nothing else fits.  The paper's other part, weights in int8 with stochastic rounding, is up to
    the training step: see :mod:`galore_jax.weights`, and ``galore-jax pretrain --optimizer q_apollo_mini --weights int8
    --layerwise``.

    Args:
      learning_rate: a number or a schedule.  The paper trains at 0.01, or 0.02.
      **arguments: those of :func:`galore_adamw`.

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((1000, 64)), "kernel": jnp.ones((64, 256))}
    >>> state = q_apollo_mini(0.01).init(params)
    >>> optax.tree.get(state, "nu")["embed"].codes.dtype, optax.tree.get(state, "nu")["kernel"].shape
    (dtype('uint8'), (1, 256))
    """
    return adamw_8bit(learning_rate, **arguments)
