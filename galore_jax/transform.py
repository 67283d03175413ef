# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore: any Optax transformation, run on low-rank gradients (Zhao et al. 2024, arXiv 2403.03507, Algorithm 2).

For a weight W in R^(m x n) with gradient G_t and, say, a basis P in R^(m x r) on the left:

    every T updates   P     <- the leading left singular directions of G_t
    project           R_t   =  Pᵀ G_t                      the inner transformation and its state see r x n
    inner             N_t   =  inner(R_t), with params PᵀW if it asks for them
    lift              ΔW_t  =  α P N_t

The update number 0 refreshes and projects with that same gradient; the inner state is untouched by a refresh.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import guards, output, projectors, subspace
from galore_jax.matrix_view import MatrixView, Rank, check_proj_type, check_rank, select
from galore_jax.refresh import check_gap, is_due, refresh_basis


class GaLoreState(NamedTuple):
    """State of :func:`galore`: plain arrays only.

    ``left`` and ``right`` have the structure of the parameters, with ``optax.MaskedNode()`` (no array) where a parameter has
    no basis on that side; as for ``optax.masked``, ``optax.tree.map_params`` with further trees wants
    ``is_leaf=lambda x: isinstance(x, optax.MaskedNode)``.
    """

    count: jax.Array  # shape=(), dtype=jnp.int32; updates done, those with no good gradient left out
    skipped: jax.Array  # shape=(), dtype=jnp.int32; updates in which some gradient was not finite
    left: Any  # (*batch, m, r), at least float32
    right: Any  # (*batch, n, r), at least float32
    inner_state: Any


class GaLoreMemoryWarning(UserWarning):
    """A bare ``galore(rank=...)`` stands in a plain ``optax.chain``, where what follows it keeps full-size state."""


class BareGaLore(optax.GradientTransformationExtraArgs):
    """``galore(rank=...)`` without an inner transformation; ``bind(inner)`` gives it one (see :func:`galore_jax.chain`)."""

    bind: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]

    def __new__(cls, init, update, bind):
        self = super().__new__(cls, init, update)
        self.bind = bind
        return self


def galore(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: Rank = 128,
    update_proj_gap: int | jax.Array = 200,
    scale: float | jax.Array | str = 0.25,
    proj_type: str = "std",
    projector: str | projectors.Projector = "randomized",
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on gradients projected to rank r, so that its state is low-rank too.

    Leaves that are not projected (see :func:`galore_jax.matrix_view.select`) go to ``inner`` whole; where nothing is
    projected at all, this is ``inner`` itself, bit for bit.  Everything reaches ``inner`` in at least float32, whatever the
    dtype of the parameters.  A gradient matrix that is all zeros or not finite reaches no basis and no moment: its update is
    zero.  Decoupled weight decay belongs outside, after this transformation.  A stack of matrices is one leaf to ``inner``:
    what is elementwise (Adam, Lion, momentum) treats each matrix as if it stood alone, but a norm over a leaf (LAMB's trust
    ratio, Adafactor's clipping) is taken over the stack.

    Args:
      inner: any Optax transformation.  Without it the transformation only projects the gradient onto its subspace and back
        (α P Pᵀ G), which saves no memory; :func:`galore_jax.chain` makes what follows the inner transformation.
      rank: r.  An int, a fraction of each matrix's smaller side in (0, 1], or ``callable(path, shape)`` that returns either,
        or None to leave a parameter alone.
      update_proj_gap: T, updates between two refreshes of the bases.
      scale: α, or ``"rms"``: the update keeps the root mean square of the inner update, √(m/r) for a basis on the left, so
        that a learning rate carries over between ranks and sides.
      proj_type: ``"std"`` (basis on the smaller side), ``"reverse_std"``, ``"left"``, ``"right"`` or ``"full"``.
      projector: ``"randomized"``, ``"svd"``, ``"eigh"`` or an object of :mod:`galore_jax.projectors`.
      mask: tree of bools (or a prefix of one, or a callable of the parameters): which parameters are projected.
      weight_dimension_numbers: tree of :class:`GaLoreDimensionNumbers` or None (or a prefix, or a callable): which axes are
        the matrix; every other axis is a batch axis.
      seed: of the random projectors.

    Returns:
      A transformation whose state is a :class:`GaLoreState`.

    Raises:
      TypeError, ValueError: at construction for a bad argument, at ``init`` for a bad mask or bad dimension numbers.

    >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.ones((256,))}
    >>> tx = galore(optax.adam(1e-3), rank=8)
    >>> state = tx.init(params)
    >>> state.inner_state[0].mu["kernel"].shape, state.left["kernel"].shape
    ((8, 256), (64, 8))
    >>> updates, state = tx.update(params, state, params)
    >>> updates["kernel"].shape
    (64, 256)
    """
    check_rank(rank)
    check_proj_type(proj_type)
    check_gap(update_proj_gap)
    output.check_scale(scale)
    _check_seed(seed)

    def bind(inner: optax.GradientTransformation) -> _GaLore:
        if not isinstance(inner, optax.GradientTransformation):
            raise TypeError(
                f"inner is {inner!r}: write an Optax transformation, for example galore(optax.adam(1e-3), rank=8)."
            )
        return _GaLore(
            optax.with_extra_args_support(inner),
            lambda tree: select(
                tree, rank=rank, proj_type=proj_type, mask=mask, weight_dimension_numbers=weight_dimension_numbers
            ),
            projectors.get(projector),
            update_proj_gap,
            scale,
            seed,
        )

    if inner is None:
        bare = bind(optax.identity())
        return BareGaLore(
            _warn_once(bare.init), bare.update, lambda inner: optax.GradientTransformationExtraArgs(*bind(inner).pair)
        )
    return optax.GradientTransformationExtraArgs(*bind(inner).pair)


class _Projected(NamedTuple):
    """What the gradient of one leaf becomes: low-rank, with its bases, and whether it can be used."""

    low_rank: jax.Array  # view.low_rank_shape, or the whole leaf
    left: Any
    right: Any
    good: jax.Array  # [*batch]
    finite: jax.Array  # scalar


@dataclasses.dataclass(frozen=True)
class _GaLore:
    """The ``init`` and ``update`` of one :func:`galore`."""

    inner: optax.GradientTransformationExtraArgs
    views_of: Callable[[Any], list[MatrixView | None]]
    projector: projectors.Projector
    update_proj_gap: int | jax.Array
    scale: float | jax.Array | str
    seed: int | jax.Array

    @property
    def pair(self) -> tuple[Callable, Callable]:
        return self.init, self.update

    def init(self, params: optax.Params) -> GaLoreState:
        leaves, treedef = jax.tree.flatten(params)
        views = self.views_of(params)
        bases = [subspace.zero_bases(view, leaf) for view, leaf in zip(views, leaves, strict=True)]
        return GaLoreState(
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            left=treedef.unflatten([left for left, _ in bases]),
            right=treedef.unflatten([right for _, right in bases]),
            inner_state=self.inner.init(treedef.unflatten(map(subspace.zero_coordinates, views, leaves))),
        )

    def update(
        self, updates: optax.Updates, state: GaLoreState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, GaLoreState]:
        views = self.views_of(updates)
        if not any(views):
            return self._update_whole(updates, state, params, **extra_args)
        gradients, treedef = jax.tree.flatten(updates)
        projected = self._project_all(views, gradients, treedef, state)
        coordinates = None
        if params is not None:
            leaves = treedef.flatten_up_to(params)
            coordinates = treedef.unflatten(
                subspace.coordinates(view, leaf, p.left, p.right)
                for view, leaf, p in zip(views, leaves, projected, strict=True)
            )
        low_rank, inner_state = self.inner.update(
            treedef.unflatten(p.low_rank for p in projected), state.inner_state, coordinates, **extra_args
        )
        good = [p.good for p in projected]
        lifted = map(self._lift, views, treedef.flatten_up_to(low_rank), gradients, projected)
        new_state = GaLoreState(
            count=state.count + _any(good).astype(jnp.int32),
            skipped=state.skipped + _any([~p.finite for p in projected]).astype(jnp.int32),
            left=treedef.unflatten(p.left for p in projected),
            right=treedef.unflatten(p.right for p in projected),
            inner_state=guards.hold_bad(self.inner, inner_state, state.inner_state, good, treedef),
        )
        return treedef.unflatten(lifted), new_state

    def _update_whole(
        self, updates: optax.Updates, state: GaLoreState, params: optax.Params | None, **extra_args: Any
    ) -> tuple[optax.Updates, GaLoreState]:
        """Nothing is projected: the inner transformation itself.  A branch, unlike a select, leaves its arithmetic as it is."""
        gradients = jax.tree.map(subspace.promoted, updates)
        params = jax.tree.map(subspace.promoted, params)
        finite = ~_any([~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)])

        def step(gradients: optax.Updates) -> tuple[optax.Updates, Any]:
            return self.inner.update(gradients, state.inner_state, params, **extra_args)

        def skip(gradients: optax.Updates) -> tuple[optax.Updates, Any]:
            replies, _ = step(jax.tree.map(jnp.zeros_like, gradients))
            return jax.tree.map(jnp.zeros_like, replies), state.inner_state

        replies, inner_state = jax.lax.cond(finite, step, skip, gradients)
        good = finite.astype(jnp.int32)
        replies = jax.tree.map(lambda reply, gradient: reply.astype(gradient.dtype), replies, updates)
        return replies, state._replace(
            count=state.count + good, skipped=state.skipped + 1 - good, inner_state=inner_state
        )

    def _project_all(
        self, views: list[MatrixView | None], gradients: list[jax.Array], treedef: Any, state: GaLoreState
    ) -> list[_Projected]:
        due = is_due(state.count, self.update_proj_gap)
        key = jax.random.fold_in(jax.random.key(jnp.asarray(self.seed).astype(jnp.uint32)), state.count)
        bases = treedef.flatten_up_to(state.left), treedef.flatten_up_to(state.right)
        return [self._project(key, due, *leaf) for leaf in zip(views, gradients, *bases, strict=True)]

    def _project(
        self, key: jax.Array, due: jax.Array, view: MatrixView | None, gradient: jax.Array, left: Any, right: Any
    ) -> _Projected:
        """One leaf: its bases refreshed where that is due, and its gradient in their coordinates."""
        if view is None:
            finite = jnp.all(jnp.isfinite(gradient))
            return _Projected(subspace.promoted(jnp.where(finite, gradient, 0)), left, right, finite, finite)
        matrices = subspace.promoted(view.to_matrices(gradient))  # [*batch, m, n]
        peak = jnp.max(jnp.abs(matrices), axis=(-2, -1))  # [*batch]
        finite = jnp.all(
            jnp.isfinite(matrices), axis=(-2, -1)
        )  # not read off the peak: XLA's maximum on CPU drops a NaN
        good = finite & (peak > 0)
        if view.left:
            left = refresh_basis(self.projector, key, matrices, left, "left", due=due, peak=peak, good=good)
        if view.right:
            right = refresh_basis(self.projector, key, matrices, right, "right", due=due, peak=peak, good=good)
        low_rank = subspace.project(matrices, left if view.left else None, right if view.right else None)
        return _Projected(jnp.where(good[..., None, None], low_rank, 0), left, right, good, jnp.all(finite))

    def _lift(
        self, view: MatrixView | None, low_rank: jax.Array, gradient: jax.Array, projected: _Projected
    ) -> jax.Array:
        """The inner update as an update of the parameter; zero where the gradient is bad."""
        if view is None:
            return jnp.where(projected.good, low_rank, 0).astype(gradient.dtype)
        low_rank = jnp.where(projected.good[..., None, None], low_rank, 0)
        return output.lifted(view, low_rank, projected.left, projected.right, self.scale, gradient)


def _check_seed(seed: Any) -> None:
    if isinstance(seed, jax.Array):
        return  # an injected hyperparameter
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}: write an int in [0, 2**32).")


def _any(flags: list[jax.Array]) -> jax.Array:
    return jnp.any(jnp.stack([jnp.any(flag) for flag in flags])) if flags else jnp.array(False)


def _warn_once(init_fn: Callable) -> Callable:
    """Says, at the first ``init`` on real parameters, that a bare galore saves no memory."""
    warned = False

    def init(params: optax.Params) -> GaLoreState:
        nonlocal warned
        if not warned and jax.tree.leaves(params):
            warned = True
            warnings.warn(
                "galore(rank=...) without an inner transformation saves no memory: what follows it in a plain optax.chain keeps "
                "full-size state; write galore_jax.chain(galore(rank=...), inner) or galore(inner, rank=...).",
                GaLoreMemoryWarning,
                stacklevel=2,
            )
        return init_fn(params)

    return init
