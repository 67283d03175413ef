# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Muon's step from a low-rank momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax

from galore_jax import residual as residuals
from galore_jax.presets._arguments import GaLoreArguments, with_arguments_of
from galore_jax.presets._partition import on_matrices
from galore_jax.presets.low_rank import decayed
from galore_jax.transform import galore


@with_arguments_of(galore, rank=128, without="residual", scale=1.0, projector="random", transport="rotate")
def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.95,
    nesterov: bool = True,
    factor: float | jax.Array = 16.0,
    neuron_decay: float | jax.Array | None = None,
    ns_coeffs: str = "standard",
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    mu_dtype: Any = None,
    adam_scale: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    **galore_arguments: Unpack[GaLoreArguments],
) -> optax.GradientTransformationExtraArgs:
    """Muon's step from a low-rank momentum on matrices, and AdamW elsewhere.

    The momentum inside the subspace and the current gradient outside it are added, and the sum is orthogonalized as Muon
    orthogonalizes a momentum of full size (K. Jordan 2024; the rule ``"orthogonal"`` of :mod:`galore_jax.residual`).  The method
    is unpublished and rests on measurements alone.  A projected m x n matrix with k = min(m, n) and K = max(m, n) has r(k + K)
    numbers of state, about half of :func:`galore_adamw`'s, and at a quarter of the rank of a square matrix half of Muon's.  The
    step has full rank.  Each update needs Muon's products of full-size matrices.

    Bases are random, and the momentum is carried from each basis to the next.  That had a lower loss than bases computed from the
    gradient (``projector="power"``; ``benchmarks/quality.py``), and a refresh does not look at the gradient.  Choose it for
    quality at little memory where matrices make up most of the model.  It needs the whole gradient, so micro-batches cannot be
    summed in the subspaces.

    Args:
      learning_rate: A number or a schedule, for updates with the root mean square of AdamW's.
      momentum: The decay rate of the momentum in the subspace.
      nesterov: If True, use Nesterov momentum.
      factor: The weight of the gradient outside.  The momentum inside sums about 1 / (1 - momentum) gradients.
      neuron_decay, ns_coeffs: The arguments of :func:`galore_jax.muon`: NorMuon's division by neuron, and the coefficients of the
        orthogonalization.
      b1, b2, eps: The decay rates and epsilon of Adam, which updates embeddings, the LM head, norms and everything else that is
        not projected.
      mu_dtype: The dtype of the momentum and of Adam's first moment.  None keeps both in float32, whatever the dtype of the
        parameters; the second moment is always in float32.
      adam_scale: A factor of the learning rate for Adam.
      weight_decay: The strength of decoupled weight decay, which is multiplied by the learning rate.
      weight_decay_mask: A tree of bools or a callable of the parameters that says which of them decay.
      **galore_arguments: The arguments of :func:`galore`, except ``residual``.  The default rank is 128.  ``proj_type`` cannot be
        ``"full"``.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> sorted(x.size for x in jax.tree.leaves(galore_muon(0.01, rank=8).init(params)) if x.size > 1)
    [64, 64, 512, 2048]
    """

    def build(views: Any) -> optax.GradientTransformation:
        return galore(
            optax.trace(momentum, nesterov, accumulator_dtype=mu_dtype),
            residual=residuals.orthogonal(factor, neuron_decay, ns_coeffs),
            **galore_arguments | {"mask": None, "weight_dimension_numbers": views},
        )

    # Raises an error for a bad argument.
    build(None)
    adam = optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype), optax.scale(adam_scale))
    direction = on_matrices(
        build,
        adam,
        rank=galore_arguments["rank"],
        proj_type=galore_arguments["proj_type"],
        mask=galore_arguments["mask"],
        weight_dimension_numbers=galore_arguments["weight_dimension_numbers"],
    )
    return decayed(direction, learning_rate, weight_decay, weight_decay_mask)
