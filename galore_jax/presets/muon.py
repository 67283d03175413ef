# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Muon's step from a low-rank momentum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_jax import projectors, refresh as policies, residual as residuals
from galore_jax.matrix_view import Rank, select
from galore_jax.presets._partition import on_matrices
from galore_jax.presets.low_rank import decayed, with_arguments_of
from galore_jax.transform import galore


def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.95,
    nesterov: bool = True,
    factor: float | jax.Array = 16.0,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    adam_scale: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    rank: Rank = 128,
    update_proj_gap: int | jax.Array = 200,
    scale: float | jax.Array | str = 1.0,
    proj_type: str = "std",
    projector: str | projectors.Projector = "random",
    refresh: str | policies.RefreshPolicy | None = None,
    transport: str | None = "rotate",
    basis_codec: str = "float32",
    diagnostics: bool = False,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Muon's step from a low-rank momentum: the rule ``"orthogonal"`` of :mod:`galore_jax.residual` on matrices, AdamW elsewhere.

    Inside the subspace there is a momentum, outside it the gradient of the step alone, and their sum is orthogonalised as Muon
    does with a momentum of full size (K. Jordan 2024).  Not published; judged by measurement only.  State of a projected m x n
    matrix with k = min(m, n) and K = max(m, n): r(k + K) numbers, about half of :func:`galore_adamw`'s and, at a quarter of the
    rank of a square matrix, half of Muon's; the step has full rank.  It costs Muon's products of full-size matrices at every
    update.  Bases are random, and the momentum is carried from each to the next: that learnt better than bases of the gradient
    (``projector="power"``), and a refresh does not look at it (``benchmarks/quality.py``).  Choose it for quality at little
    memory where matrices make up the model.  It needs the whole gradient, so micro-batches cannot be summed in the subspaces.

    Args:
      learning_rate: a number or a schedule, for updates that have the root mean square of AdamW's.
      momentum, nesterov: of the momentum in the subspace.
      factor: weight of the gradient outside; the momentum inside sums about 1 / (1 - momentum) gradients.
      b1, b2, eps: of Adam, on embeddings, LM head, norms and everything else that is not projected.
      adam_scale: factor of the learning rate there.
      weight_decay: decoupled, multiplied by the learning rate.
      weight_decay_mask: tree of bools or callable: which parameters decay.
      rank, update_proj_gap, scale, proj_type, projector, refresh, transport, basis_codec, diagnostics, mask,
        weight_dimension_numbers, seed: of :func:`galore`; not ``proj_type="full"``.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> sorted(x.size for x in jax.tree.leaves(galore_muon(0.01, rank=8).init(params)) if x.size > 1)
    [64, 64, 512, 2048]
    """

    def build(numbers: Any) -> optax.GradientTransformation:
        return galore(
            optax.trace(momentum, nesterov),
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            projector=projector,
            refresh=refresh,
            transport=transport,
            basis_codec=basis_codec,
            residual=residuals.orthogonal(factor),
            diagnostics=diagnostics,
            weight_dimension_numbers=numbers,
            seed=seed,
        )

    build(None)  # raises for a bad argument
    views_of = functools.partial(
        select, rank=rank, proj_type=proj_type, mask=mask, weight_dimension_numbers=weight_dimension_numbers
    )
    adam = optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), optax.scale(adam_scale))
    return decayed(on_matrices(build, adam, views_of), learning_rate, weight_decay, weight_decay_mask)


@with_arguments_of(galore_muon, rank=0.25, update_proj_gap=100)
def recommended(learning_rate: optax.ScalarOrSchedule, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """What learnt best in a fifth of AdamW's state: :func:`galore_muon` at a quarter of the rank, refreshed every 100 updates.

    The evidence is ``benchmarks/quality.py``: a byte-level LLaMA of 3.3 million parameters on prose, 400 steps, each optimizer
    at the best of one grid of learning rates.  It ended 4 % below full-rank Muon and 15 % below AdamW, with 20 % of AdamW's
    state for the matrices; after 1,200 steps it was 1.7 % above Muon and 5 % below AdamW.  The figures and their spread are
    in docs/benchmarks.md.  That is a small model and few tokens: measure your own.  Where micro-batches are summed or sent in
    the subspaces it cannot be used; there take :func:`galore_adamw`.

    Args:
      learning_rate: a number or a schedule; the best of the grid was 0.01.
      **arguments: those of :func:`galore_muon`.

    >>> import jax.numpy as jnp
    >>> state = recommended(0.01).init({"kernel": jnp.ones((64, 256))})
    >>> sorted(x.shape for x in jax.tree.leaves(state) if x.size > 1)
    [(16, 256), (64, 16)]
    """
    return galore_muon(learning_rate, **arguments)
