# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Ready-made optimizers: one choice on each of the library's axes.

Each is ``chain(galore(inner), add_decayed_weights, scale_by_learning_rate)``.  Embeddings, the LM head, norms and other
leaves that are not projected go through the same inner transformation whole, so they are on the plain optimizer at the same
learning rate; weight decay is decoupled and acts on the full weight, before the update (Loshchilov and Hutter 2019).

A preset that differs from another in its defaults and its inner transformation takes the same arguments
(:func:`with_arguments_of`), which ``help``, type checkers and ``optax.inject_hyperparams`` see.  Presets that use the gradient
outside the subspaces too are in :mod:`galore_jax.presets.full_rank`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from galore_jax import projectors, refresh as policies, residual as residuals
from galore_jax.matrix_view import Rank
from galore_jax.quantize import quantize_state
from galore_jax.transform import galore

_Preset = TypeVar("_Preset", bound=Callable[..., optax.GradientTransformationExtraArgs])


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
    refresh: str | policies.RefreshPolicy | None = None,
    transport: str | None = None,
    basis_codec: str = "float32",
    residual: str | residuals.Residual | None = None,
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
      rank, update_proj_gap, scale, proj_type, projector, refresh, transport, basis_codec, residual, diagnostics, mask,
        weight_dimension_numbers, seed: of :func:`galore`.

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
        basis_codec=basis_codec,
        residual=residual,
        diagnostics=diagnostics,
        mask=mask,
        weight_dimension_numbers=weight_dimension_numbers,
        seed=seed,
    )
    return decayed(low_rank, learning_rate, weight_decay, weight_decay_mask)


def with_arguments_of(preset: _Preset, **defaults: Any) -> Callable[[Callable], _Preset]:
    """Decorates a preset that takes the arguments of another, some with other defaults, and is called with all of them.

    A name that the other has not is an argument of its own; ``inspect.Parameter.empty`` is no default.
    """
    parameters = inspect.signature(preset).parameters
    arguments = [
        argument.replace(default=defaults.get(name, argument.default)) for name, argument in parameters.items()
    ]
    own = {name: default for name, default in defaults.items() if name not in parameters}
    arguments += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=own[name]) for name in own]
    signature = inspect.Signature(arguments)

    def decorate(function: Callable) -> Any:
        @functools.wraps(function)
        def decorated(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(*bound.args, **bound.kwargs)

        decorated.__signature__ = signature  # type: ignore[attr-defined]
        return decorated

    return decorate


@with_arguments_of(galore_adamw, projector="rows", transport="reset")
def grass_adamw(learning_rate: optax.ScalarOrSchedule, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """Grass (Muhamed et al. 2024, arXiv 2406.17660): Adam on the r rows of the gradient of largest norm, chosen every T updates.

    State of a projected m x n matrix with K = max(m, n): 2 r K numbers, r indices and factors, and a count; no matrix products
    and no factorisation.  Rows hold less of a gradient than singular directions do, so choose it where the time or the memory of
    a dense basis is too much, and where gradients are sparse in their rows.  Moments start again when the rows change, because
    most of them belong to other rows then.  The paper's unbiased draw is ``projector=projectors.rows("sampled")``; its scale
    is tuned, and has no default there.  Micro-batches can be summed in the subspaces.

    Args:
      learning_rate: a number or a schedule.
      **arguments: those of :func:`galore_adamw`.

    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> state = grass_adamw(0.01, rank=8).init(params)
    >>> left = optax.tree.get(state, "left")["kernel"]
    >>> left.index.shape, [x.shape for x in jax.tree.leaves(state) if x.size > 8]
    ((8,), [(8, 256), (8, 256)])
    """
    return galore_adamw(learning_rate, **arguments)


@with_arguments_of(galore_adamw, transport="rotate", random_from=inspect.Parameter.empty)
def golore_adamw(
    learning_rate: optax.ScalarOrSchedule, *, random_from: int, projector: str | projectors.Projector, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """GoLore (He et al. 2024, arXiv 2410.11289): :func:`galore_adamw` that ends on random subspaces, with proof of convergence.

    Near a minimum the leading directions of a gradient are mostly those of its noise, and a method that follows them alone need
    not converge; uniformly random ones leave no direction out.  The state is that of :func:`galore_adamw`, r(k + 2K) numbers.
    Choose it for long runs with small batches.  Both moments are carried into each new subspace.  Micro-batches can be summed in
    the subspaces.

    Args:
      learning_rate: a number or a schedule.
      random_from: number of the update from which on new subspaces are random; the paper's is 0.8 of all updates.
      projector: for the subspaces before.
      **arguments: the others of :func:`galore_adamw`.

    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> tx = golore_adamw(optax.cosine_decay_schedule(0.01, 10_000), random_from=8_000, rank=8)
    >>> optax.tree.get(tx.init(params), "left")["kernel"].shape
    (64, 8)
    """
    switching = projectors.switch(projector, "random", at=random_from)
    return galore_adamw(learning_rate, projector=switching, **arguments)


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array,
    weight_decay: float | jax.Array,
    weight_decay_mask: Any,
    **galore_arguments: Any,
) -> optax.GradientTransformationExtraArgs:
    """A preset around Adam with its large moments in 8 bits, from all arguments of :func:`galore_adamw`."""
    low_rank = galore(quantize_state(optax.scale_by_adam(b1=b1, b2=b2, eps=eps)), **galore_arguments)
    return decayed(low_rank, learning_rate, weight_decay, weight_decay_mask)


@with_arguments_of(galore_adamw, basis_codec="bfloat16")
def galore_adamw_8bit(learning_rate: optax.ScalarOrSchedule, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """:func:`galore_adamw` with moments in 8 bits and bases in bfloat16 (Zhao et al. 2024, arXiv 2403.03507, section 4.3).

    The moments of embeddings, LM head and other parameters that are not projected are in 8 bits too, if they are large: see
    :func:`galore_jax.quantize_state`.  State of a projected m x n matrix with k = min(m, n) and K = max(m, n), basis on the
    smaller side: 2 r k bytes of basis and 2 r K of moments, and 4 bytes for each block of 256 of these.  Blocks lie along the
    last axis of a moment: it is r x K for a basis on the left, and K x r on the right.

    Args:
      learning_rate: a number or a schedule.
      **arguments: those of :func:`galore_adamw`.

    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> state = galore_adamw_8bit(0.01, rank=32).init(params)
    >>> optax.tree.get(state, "nu")["kernel"].codes.dtype
    dtype('uint8')
    """
    return adamw_8bit(learning_rate, **arguments)


@with_arguments_of(galore_adamw, refresh="lazy", basis_codec="int4")
def q_galore_adamw_8bit(
    learning_rate: optax.ScalarOrSchedule, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """Q-GaLore (Zhang et al. 2024, arXiv 2407.08296): 8-bit moments, bases in 4 bits, refreshed less often while they stay put.

    :func:`galore_adamw_8bit` with other defaults: ``basis_codec="int4"``, and ``refresh="lazy"`` with the paper's threshold,
    factor and window (see :func:`galore_jax.refresh.lazy` for what is compared).  The paper's other part, weights in int8 with
    stochastic rounding, is up to the training step, because an optimizer returns updates and does not round parameters: see
    :mod:`galore_jax.weights` and :mod:`galore_jax.layerwise`.

    A number of a basis takes half a byte and one of the moments two, so ``proj_type="reverse_std"``, with the bases on the
    larger sides, takes least; at the same rank it learnt clearly worse (``benchmarks/quality.py``).

    Args:
      learning_rate: a number or a schedule.
      **arguments: those of :func:`galore_adamw`.

    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> state = q_galore_adamw_8bit(0.01, rank=32).init(params)
    >>> optax.tree.get(state, "left")["kernel"].packed.shape
    (64, 16)
    """
    return adamw_8bit(learning_rate, **arguments)


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
    refresh: str | policies.RefreshPolicy | None = None,
    transport: str | None = None,
    basis_codec: str = "float32",
    residual: str | residuals.Residual | None = None,
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
      rank, update_proj_gap, scale, proj_type, projector, refresh, transport, basis_codec, residual, diagnostics, mask,
        weight_dimension_numbers, seed: of :func:`galore`.

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
        basis_codec=basis_codec,
        residual=residual,
        diagnostics=diagnostics,
        mask=mask,
        weight_dimension_numbers=weight_dimension_numbers,
        seed=seed,
    )
    if multiply_by_parameter_scale:
        low_rank = optax.chain(low_rank, optax.scale_by_param_block_rms())
    return decayed(low_rank, learning_rate, weight_decay, weight_decay_mask)


def _clip_by_matrix_rms(threshold: float) -> optax.GradientTransformation:
    """``optax.clip_by_block_rms``, but matrix by matrix in a stack, whose layers would else clip one another."""

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
    """``tx``, decoupled weight decay of the full weight, and the learning rate."""
    return optax.with_extra_args_support(
        optax.chain(
            tx,
            optax.add_decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
