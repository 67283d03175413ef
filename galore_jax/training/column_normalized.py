# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""SCALE: SGD on gradients whose columns have one size, with a momentum for the LM head alone.

For a matrix W (inputs m x outputs n) with the gradient G, and C that divides each column by its root mean square,

    C(G)_ij = G_ij / sqrt(sum_k G_kj^2 / m)

    W <- W - lr C(G)                                       matrices, without any state
    M <- b M + (1 - b) G ,    W <- W - lr C(M)             the LM head, b = 0.9
    AdamW                                                  norms and all else that is one-dimensional

A column belongs to one output (of the embedding: one hidden unit, over all tokens).  The paper divides by the norm, its authors'
code by the root mean square: sqrt(m) more in the learning rate, and updates of the size of Adam's.

Source: Glentis et al. 2025, arXiv:2506.16659.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

_SMALLEST = 1e-8
"""Root mean square that smaller ones are taken for: a column of zeros stays zero."""

_HEADS = ("lm_head", "classification_head")


def scale(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.9, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer SCALE (arXiv:2506.16659) for the parameters of a model of :mod:`galore_jax.models`.

    Args:
      learning_rate: of all parameters, a number or a schedule.
      momentum: b, of the head.
      weight_decay: decoupled, multiplied by the learning rate.

    Returns:
      The transformation.  A leaf called ``kernel`` or ``embedding`` is a matrix, or a stack of them; one with ``lm_head`` or
      ``classification_head`` in its path is the head.  A model with tied embeddings has no head, and so no momentum.

    >>> params = {"lm_head": {"kernel": jnp.ones((8, 20))}, "up_proj": {"kernel": jnp.ones((2, 8, 16))}}
    >>> [leaf.shape for leaf in jax.tree.leaves(scale(1e-3).init(params)) if leaf.ndim]
    [(8, 20)]
    """
    normalized = optax.stateless(lambda updates, params: jax.tree.map(_normalize_columns, updates))
    kinds: dict[Hashable, optax.GradientTransformation] = {
        "matrix": normalized,
        "head": optax.chain(optax.ema(momentum, debias=False), normalized),
        "vector": optax.scale_by_adam(),
    }
    return optax.chain(
        optax.partition(kinds, _kinds),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _normalize_columns(gradient: jax.Array) -> jax.Array:
    rms = jnp.sqrt(jnp.mean(jnp.square(gradient), axis=-2, keepdims=True))
    return gradient / jnp.maximum(rms, _SMALLEST)


def _kinds(params: optax.Params) -> Any:
    """What each parameter is: matrix, head or vector."""

    def kind(path: tuple, leaf: jax.Array) -> str:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if leaf.ndim < 2 or names[-1] not in ("kernel", "embedding"):
            return "vector"
        return "head" if any(name in _HEADS for name in names) else "matrix"

    return jax.tree_util.tree_map_with_path(kind, params)
