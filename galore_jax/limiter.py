# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A bound on the growth of the norm of an update, matrix by matrix (Chen et al. 2024, Fira, arXiv 2410.01623, section 4.3):

    ‖X_t‖ > γ ‖X_(t-1)‖   =>   X_t <- X_t γ ‖X_(t-1)‖ / ‖X_t‖          γ = 1.01; the norm that is stored is the bounded one

Clipping needs to know how large an update may be.  This bound only needs to know how fast an update may grow: a spike in the
gradient does not reach the weights, and slow growth does.  X_t is the gradient outside the subspace in Fira and the whole scaled
gradient in APOLLO; see :mod:`galore_jax.residual`.  A zero update says nothing about the next one, so its norm is not stored.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import sharding
from galore_jax._core.dtypes import promoted
from galore_jax._core.state_fields import Kind, kinds
from galore_jax._core.trees import array_of, as_arrays, boxed_like, check_gradients, flatten, is_box, paths_of

GAMMA = 1.01


class LimitNormGrowthState(NamedTuple):
    """State of :func:`limit_norm_growth`."""

    FIELD_KINDS = kinds("", norm=Kind.KEPT)

    # For each parameter, float32 [*batch]: the norm of its last nonzero update; 0 before the first.
    norm: Any


def limit_norm_growth(gamma: float | jax.Array = GAMMA) -> optax.GradientTransformationExtraArgs:
    """Bounds how much the norm of each matrix's update grows from one update to the next.

    The last two axes of a parameter are the matrix.  Earlier axes count matrices, each with its own norm.  A vector has one norm,
    and complex numbers count by their moduli.  A matrix with an entry that is not finite is returned unchanged, and its norm is
    not stored.  Put this transformation before the learning rate, or it bounds the schedule as well:
    ``optax.chain(optax.scale_by_adam(), limit_norm_growth(), optax.scale_by_learning_rate(schedule))``.

    Args:
      gamma: γ, the largest ratio of a norm to the one before.

    Returns:
      A transformation whose state is a :class:`LimitNormGrowthState`.

    Raises:
      ValueError: ``gamma`` is not positive, or at ``update``, the updates do not have the structure and the shapes of the
        parameters.

    >>> tx = limit_norm_growth(1.5)
    >>> state = tx.init({"w": jnp.ones((2, 2))})
    >>> for size in (1.0, 9.0, 2.0):
    ...     updates, state = tx.update({"w": jnp.full((2, 2), size)}, state)
    ...     print(float(updates["w"][0, 0]), float(state.norm["w"]))
    1.0 2.0
    1.5 3.0
    2.0 4.0
    """
    check_growth(gamma, "gamma")

    def init(params: optax.Params) -> LimitNormGrowthState:
        leaves, treedef = flatten(as_arrays(params))
        return LimitNormGrowthState(treedef.unflatten(boxed_like(_no_norm(array_of(leaf)), leaf) for leaf in leaves))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LimitNormGrowthState]:
        def limit(update: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
            axes = (-2, -1) if update.ndim > 1 else None
            finite = jnp.all(jnp.isfinite(update), axis=axes, keepdims=True)
            limited, norm = bounded(jnp.where(finite, promoted(update), 0), before, gamma)
            return jnp.where(finite, limited.astype(update.dtype), update), norm

        if params is None:
            _check_paths(updates, state.norm)
        else:
            check_gradients(updates, params)
        leaves, treedef = flatten(as_arrays(updates))
        norms = treedef.flatten_up_to(state.norm)
        pairs = [limit(array_of(leaf), array_of(norm)) for leaf, norm in zip(leaves, norms, strict=True)]
        limited, new = (
            treedef.unflatten(boxed_like(pair[i], old) for pair, old in zip(pairs, like, strict=True))
            for i, like in enumerate((leaves, norms))
        )
        return limited, LimitNormGrowthState(new)

    return optax.GradientTransformationExtraArgs(init, update)


def check_growth(growth: Any, name: str) -> None:
    """Raises unless ``growth`` is a positive number or an injected hyperparameter."""
    if not isinstance(growth, jax.Array) and not growth > 0:
        raise ValueError(f"{name} is {growth}; expected a positive factor. Write, for example, {GAMMA}.")


def bounded(x: jax.Array, before: jax.Array, growth: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bounds the norms of finite matrices, and returns the norms to store.

    Args:
      x: (*batch, m, n), (n,) or ().
      before: [*batch], the norms of the last update.
      growth: The largest ratio of a norm to the one before.
    """
    # Replicated, as ``before`` is.
    norm = sharding.gather(norm_of(x, (-2, -1) if x.ndim > 1 else None))
    factor, kept = growth_factor(norm, before, growth)
    return x * factor.astype(x.dtype), kept


@jax.jit
def growth_factor(norm: jax.Array, before: jax.Array, growth: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the factor in the shape of ``norm`` that bounds a matrix of this norm, and the norm to store.

    >>> growth_factor(jnp.array([[4.0]]), jnp.array(2.0), 1.5)
    (Array([[0.75]], dtype=float32), Array(3., dtype=float32))
    """
    last = before.astype(norm.dtype).reshape(norm.shape)
    limit = jnp.where(last > 0, growth * last, norm)
    positive = norm > 0
    factor = jnp.where(norm > limit, limit / jnp.where(positive, norm, 1), 1)
    kept = jnp.where(positive, jnp.minimum(norm, limit), last)
    return factor, kept.reshape(before.shape).astype(before.dtype)


@functools.partial(jax.jit, static_argnames="axes")
def norm_of(x: jax.Array, axes: int | tuple[int, int] | None) -> jax.Array:
    """The norm along ``axes``, or along all if None; they keep size 1.

    Entries are divided by the largest one, so no square overflows or underflows.  It is jitted, so that the parameters of one
    shape share its program.
    """
    moduli = jnp.abs(x)
    peak = jnp.max(moduli, axis=axes, keepdims=True, initial=0)
    scaled = moduli / jnp.where(peak > 0, peak, 1)
    return peak * jnp.sqrt(jnp.sum(jnp.square(scaled), axis=axes, keepdims=True))


def _no_norm(leaf: Any) -> jax.Array:
    # On the devices of ``leaf`` inside shard_map, as the norms of its updates will be.
    return jnp.zeros_like(leaf, shape=leaf.shape[:-2], dtype=jnp.float32)


def _check_paths(updates: Any, norms: Any) -> None:
    """Raises a ValueError unless the updates have the paths of the norms and as many matrices at each."""
    got, wanted = (
        dict(zip(paths_of(tree, is_leaf=is_box), flatten(tree)[0], strict=True)) for tree in (updates, norms)
    )
    for path in got.keys() ^ wanted.keys():
        raise ValueError(
            f"{path!r} is a leaf of the {'updates' if path in got else 'parameters'} alone. Pass update() a tree of updates with "
            "the structure of the parameters."
        )
    for path, leaf in got.items():
        shape, batch = jnp.shape(array_of(leaf)), jnp.shape(array_of(wanted[path]))
        if shape[:-2] != batch:
            raise ValueError(
                f"The update of {path!r} has shape {shape}, but limit_norm_growth has norms of shape {batch} for it. Pass "
                "update() an update in the shape of the parameter."
            )
