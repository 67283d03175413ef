# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Presets that use the whole gradient, also what is outside the subspaces, and so make updates of full rank.

A layer-wise step has the whole gradient of one layer at a time, so there they cost no more memory than the presets of
:mod:`galore_jax.presets`.  Micro-batches cannot be summed in the subspaces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_jax import projectors, refresh as policies, residual as residuals
from galore_jax.ldadam import scale_by_ldadam
from galore_jax.matrix_view import MatrixView, Rank, check_proj_type, check_rank, select
from galore_jax.on_matrices import on_matrices
from galore_jax.presets import adamw_8bit, decayed, galore_adamw, with_arguments_of
from galore_jax.transform import galore


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


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.908,
    b2: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-8,
    rho: float | jax.Array = 0.908,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    rank: Rank = 16,
    proj_type: str = "std",
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam (Robert et al. 2024, arXiv 2410.16103): a subspace that moves at every update, and feedback of what it left out.

    State of a projected m x n matrix with k = min(m, n) and K = max(m, n): r(k + 2K) numbers **and m n for the error**, so it
    saves at most half of AdamW's state, and about 12 m n r operations an update, three times those of :func:`galore_adamw`.
    Choose it where a small rank must lose nothing in the long run (it has a proof of convergence) and the memory for one more
    copy of the gradients is there; else :func:`fira_adamw` uses the whole gradient for one number a matrix.  It needs the whole
    gradient, so micro-batches cannot be summed in the subspaces.

    Args:
      learning_rate: a number or a schedule.  The paper's code has 0.001.
      b1, b2, eps: of Adam, on all parameters.
      rho: weight of the momentum beside the gradient when a subspace moves.
      weight_decay: decoupled, multiplied by the learning rate.
      weight_decay_mask: tree of bools or callable: which parameters decay.
      rank, proj_type, mask, weight_dimension_numbers, seed: of :func:`galore`; not ``proj_type="full"``.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> sorted(x.size for x in jax.tree.leaves(ldadam(0.001, rank=8).init(params)) if x.size > 1)
    [512, 2048, 2048, 16384]
    """
    check_rank(rank)
    check_proj_type(proj_type)

    def build(numbers: Any) -> optax.GradientTransformation:
        def views_of(tree: Any) -> list[MatrixView | None]:
            return select(tree, rank=rank, proj_type=proj_type, weight_dimension_numbers=numbers)

        return scale_by_ldadam(views_of, b1=b1, b2=b2, eps=eps, rho=rho, seed=seed)

    views_of = functools.partial(
        select, rank=rank, proj_type=proj_type, mask=mask, weight_dimension_numbers=weight_dimension_numbers
    )
    direction = on_matrices(build, optax.scale_by_adam(b1=b1, b2=b2, eps=eps), views_of)
    return decayed(direction, learning_rate, weight_decay, weight_decay_mask)


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
    refresh: str | policies.Together | None = None,
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
