# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore: any Optax transformation, run on low-rank gradients (Zhao et al. 2024, arXiv 2403.03507, Algorithm 2).

For a weight W in R^(m x n) with gradient G_t and, say, a basis P in R^(m x r) on the left:

    every T updates   P     <- a basis of the leading left singular directions of G_t      galore_jax.projectors, .refresh
                      state <- the inner state, carried from the old basis to P            galore_jax.transport
    project           R_t   =  Pᵀ G_t                      the inner transformation and its state see r x n
    inner             N_t   =  inner(R_t), with params PᵀW if it asks for them
    lift              ΔW_t  =  α P N_t                     and the gradient outside: galore_jax.residual

The update number 0 refreshes and projects with that same gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax import (
    accumulate,
    codecs,
    diagnostics as diagnosis,
    projectors,
    refresh as policies,
    residual as output,
    residual as residuals,
    sharding,
)
from galore_jax._core import basis_codecs, coordinates as subspace, gradients as guards, seeds
from galore_jax._core.basis_refresh import Subspace, coordinates_in_constant_bases, turn
from galore_jax._core.dtypes import promoted
from galore_jax._core.gradients import MatrixGradient, measured
from galore_jax._core.per_matrix import owners, per_matrix
from galore_jax._core.probe import check_init_ignores_values
from galore_jax._core.state import GaLoreState
from galore_jax.bare import BareGaLore, warned_once
from galore_jax.matrix_view import MatrixView, Rank, check_proj_type, check_rank, select
from galore_jax.transport import carriers, check_transport


def galore(
    inner: optax.GradientTransformation | None = None,
    *,
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
      projector: how a basis is made: ``"power"``, ``"randomized"``, ``"svd"``, ``"eigh"``, ``"random"``, ``"gaussian"``,
        ``"rows"``, ``"sampled"`` or an object of :mod:`galore_jax.projectors`.
      refresh: when: ``"staggered"``, ``"together"``, ``"lazy"``, ``"every_step"``, ``"manual"`` or an object of
        :mod:`galore_jax.refresh`.  None is staggered, but together for the projector ``"svd"``, which stands for GaLore as
        published.
      transport: what becomes of the inner state when a basis turns: ``"keep"``, ``"rotate"`` or ``"reset"``; see
        :mod:`galore_jax.transport`.  None is keep.
      basis_codec: how dense bases are stored: ``"float32"``, ``"bfloat16"`` or ``"int4"``; .
      residual: what the update does with the gradient outside the subspace: None leaves it out, as GaLore does; ``"fira"``,
        ``"sgd"``, ``"sign"``, ``"channel"``, ``"tensor"``, ``"orthogonal"`` or an object of :mod:`galore_jax.residual`.
      diagnostics: whether the state has :class:`galore_jax.diagnostics.Diagnostics`.
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
    output.check_scale(scale)
    seeds.check_seed(seed)
    projector = projectors.get(projector)
    projector = projector._replace(storage=basis_codecs.stored(projector.storage, basis_codec, projector.name))
    if refresh is None:
        refresh = "together" if projector.name == "svd" else "staggered"
    refresh = policies.get(refresh, update_proj_gap)
    transport = "keep" if transport is None else transport
    check_transport(transport)
    residual = residuals.get(residual)
    if residual is not None and proj_type == "full":
        raise ValueError(
            f'residual={residual.name!r} goes by the channels of a basis on one side, but proj_type is "full": write "std", '
            '"reverse_std", "left" or "right".'
        )

    def bind(inner: optax.GradientTransformation) -> _GaLore:
        if not isinstance(inner, optax.GradientTransformation):
            raise TypeError(
                f"inner is {inner!r}: write an Optax transformation, for example galore(optax.adam(1e-3), rank=8)."
            )
        return _GaLore(
            optax.with_extra_args_support(inner),
            functools.partial(
                select, rank=rank, proj_type=proj_type, mask=mask, weight_dimension_numbers=weight_dimension_numbers
            ),
            projector,
            refresh,
            transport,
            residual,
            diagnostics,
            scale,
            seed,
        )

    if inner is None:
        bare = bind(optax.identity())
        return BareGaLore(
            warned_once(bare.init), bare.update, lambda inner: optax.GradientTransformationExtraArgs(*bind(inner).pair)
        )
    return optax.GradientTransformationExtraArgs(*bind(inner).pair)


@dataclasses.dataclass(frozen=True)
class _GaLore:
    """The ``init`` and ``update`` of one :func:`galore`."""

    inner: optax.GradientTransformationExtraArgs
    views_of: Callable[[Any], list[MatrixView | None]]
    projector: projectors.Projector
    refresh: policies.RefreshPolicy
    transport: str
    residual: residuals.Residual | None
    diagnostics: bool
    scale: float | jax.Array | str
    seed: int | jax.Array

    @property
    def pair(self) -> tuple[Callable, Callable]:
        return self.init, self.update

    def init(self, params: optax.Params) -> GaLoreState:
        leaves, treedef = jax.tree.flatten(params)
        views = self.views_of(params)
        bases = [subspace.zero_bases(self._storage, view, leaf) for view, leaf in zip(views, leaves, strict=True)]
        inner = self._inner_of(views)
        low_rank = treedef.unflatten(map(subspace.zero_coordinates, views, leaves))
        check_init_ignores_values(self.inner, low_rank, [view is not None for view in views])
        output.check_direction(self.inner, self.residual, low_rank)
        inner_state = inner.init(low_rank)
        carriers(self.transport, inner, inner_state, treedef, views)  # raises for a state it cannot carry
        schedule = [() if slots is None else self.refresh.init(slots) for slots in _slots(views)]
        return GaLoreState(
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            kept=jnp.zeros([], jnp.int32),
            rejected=jnp.zeros([], jnp.int32),
            left=treedef.unflatten([left for left, _ in bases]),
            right=treedef.unflatten([right for _, right in bases]),
            schedule=treedef.unflatten(schedule),
            diagnostics=diagnosis.initial(views, treedef) if self.diagnostics else (),
            residual=self._residual_of(views, treedef),
            inner_state=inner_state,
        )

    def update(
        self, updates: optax.Updates, state: GaLoreState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, GaLoreState]:
        request = extra_args.pop(policies.Request.ARGUMENT, None)
        layer = extra_args.pop(policies.Layer.ARGUMENT, None)
        collect = extra_args.pop(accumulate.Collect.ARGUMENT, None)
        projected = extra_args.pop(accumulate.Projected.ARGUMENT, None)
        views = self.views_of(updates if projected is None else params)
        gradients, treedef = jax.tree.flatten(updates)
        if request is not None:
            request.answered = True
        if projected is not None:
            projected.answered = True
            if self.residual is not None:
                raise ValueError(
                    f"residual={self.residual.name!r} needs the whole gradient, which low-rank accumulation does not keep: "
                    "accumulate whole gradients, or leave residual out."
                )
            likes = map(promoted, treedef.flatten_up_to(params))
            leaves = [measured(view, r, like) for view, r, like in zip(views, gradients, likes, strict=True)]
            low_rank = [leaf.where_good(leaf.matrices) for leaf in leaves]
            return self._step(leaves, treedef, low_rank, state, params, whole=False, **extra_args)
        if not any(views):
            if collect is not None:
                collect.answer(updates)
                return updates, state
            inner = self._inner_of(views)
            return (
                self._update_whole(inner, updates, state, params, **extra_args) if request is None else (updates, state)
            )
        leaves = [measured(view, gradient) for view, gradient in zip(views, gradients, strict=True)]
        if collect is None:
            state, low_rank = self._turn_all(leaves, treedef, state, layer, everything=request is not None)
        else:
            leaves = [leaf.agreed(collect.axis_name) for leaf in leaves]
            state, low_rank = self._turn_all(
                leaves, treedef, state, layer, allowed=collect.refresh, axis_name=collect.axis_name
            )
            bad = zip(leaves, low_rank, strict=True)
            collect.answer(treedef.unflatten(jnp.where(leaf.over(leaf.finite), x, jnp.nan) for leaf, x in bad))
        if request is not None or collect is not None:
            return updates, state
        return self._step(leaves, treedef, low_rank, state, params, **extra_args)

    def _residual_of(self, views: list[MatrixView | None], treedef: Any) -> Any:
        rule = self.residual
        return () if rule is None else treedef.unflatten(() if v is None else rule.init(v.batch_shape) for v in views)

    @property
    def _storage(self) -> Any:
        return self.projector.storage

    def _inner_of(self, views: list[MatrixView | None]) -> optax.GradientTransformationExtraArgs:
        """A bias-correction count shared by all matrices cannot be reset for one: then each has an inner state of its own."""
        return per_matrix(self.inner, lambda _: views) if self.transport == "reset" else self.inner

    def _turn_all(
        self,
        leaves: list[MatrixGradient],
        treedef: Any,
        state: GaLoreState,
        layer: policies.Layer | None,
        everything: bool = False,
        allowed: bool | jax.Array = True,
        axis_name: accumulate.AxisName = None,
    ) -> tuple[GaLoreState, list[jax.Array]]:
        """The state with the bases refreshed that are due (or all) and allowed to, and the gradients in these bases."""
        views = [leaf.view for leaf in leaves]
        key = seeds.key_of(self.seed, state.count)
        inner_leaves, inner_def = codecs.flatten(state.inner_state)
        carried = carriers(self.transport, self._inner_of(views), state.inner_state, treedef, views)
        lefts, rights, schedules = map(treedef.flatten_up_to, (state.left, state.right, state.schedule))
        overlaps = treedef.flatten_up_to(state.diagnostics.overlap) if self.diagnostics else []
        kept, rejected, low_rank = state.kept, state.rejected, []
        for i, (leaf, slots) in enumerate(zip(leaves, _slots(views, layer), strict=True)):
            if leaf.view is None or slots is None:
                low_rank.append(leaf.where_good(leaf.matrices))
                continue
            mine = {j: carrier for j, carrier in enumerate(carried) if carrier is not None and carrier.parameter == i}
            sides = subspace.sides(leaf.view, lefts[i], rights[i])
            projected = subspace.project(self._storage, leaf.matrices, *sides, leaf.view.rank)
            current = Subspace(lefts[i], rights[i], projected, tuple(inner_leaves[j] for j in mine))
            if everything or self.refresh.automatic:
                due = (self.refresh.due(state.count, slots, schedules[i]) | everything) & allowed
                missing = ~self._storage.exists(sides[0] if leaf.view.left else sides[1])
                wanted = leaf.good & (due | (missing & allowed))
                current, turned, overlap = turn(
                    self.projector,
                    leaf.view,
                    key,
                    state.count,
                    leaf.matrices,
                    current,
                    tuple(mine.values()),
                    wanted,
                    axis_name,
                )
                schedules[i] = self.refresh.advance(state.count, slots, schedules[i], turned, overlap)
                kept += jnp.sum(due & ~leaf.good, dtype=jnp.int32)
                rejected += jnp.sum(wanted & ~turned, dtype=jnp.int32)
                if self.diagnostics:
                    overlaps[i] = jnp.where(overlap >= 0, overlap, overlaps[i])
            lefts[i], rights[i] = current.left, current.right
            for j, moment in zip(mine, current.moments, strict=True):
                inner_leaves[j] = moment
            projected = coordinates_in_constant_bases(
                self._storage, leaf.view, current.low_rank, leaf.matrices, current.left, current.right
            )
            low_rank.append(leaf.where_good(projected))
        state = state._replace(
            kept=kept,
            rejected=rejected,
            left=treedef.unflatten(lefts),
            right=treedef.unflatten(rights),
            schedule=treedef.unflatten(schedules),
            inner_state=inner_def.unflatten(inner_leaves),
        )
        if self.diagnostics:
            state = state._replace(diagnostics=state.diagnostics._replace(overlap=treedef.unflatten(overlaps)))
        return state, low_rank

    def _step(
        self,
        leaves: list[MatrixGradient],
        treedef: Any,
        low_rank: list[jax.Array],
        state: GaLoreState,
        params: optax.Params | None,
        whole: bool = True,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        """The inner transformation on the low-rank gradients, and its answer lifted.

        Not ``whole``: the matrices of ``leaves`` are low-rank gradients too, and what they were projected from is not there.
        """
        views = [leaf.view for leaf in leaves]
        bases = list(zip(treedef.flatten_up_to(state.left), treedef.flatten_up_to(state.right), strict=True))
        coordinates = None
        if params is not None:
            coordinates = treedef.unflatten(
                subspace.coordinates(self._storage, view, param, *sides)
                for view, param, sides in zip(views, treedef.flatten_up_to(params), bases, strict=True)
            )
        inner = self._inner_of(views)
        replies, inner_state = inner.update(treedef.unflatten(low_rank), state.inner_state, coordinates, **extra_args)
        good = [leaf.good for leaf in leaves]
        residual = state.residual and treedef.flatten_up_to(state.residual)
        updates, update_rms = [], []
        for i, (leaf, reply, sides) in enumerate(zip(leaves, treedef.flatten_up_to(replies), bases, strict=True)):
            update, rms, rest = self._lift(leaf, low_rank[i], reply, *sides, residual and residual[i])
            updates.append(update)
            update_rms.append(rms)
            if residual:
                residual[i] = rest
        new_state = state._replace(
            count=state.count + guards.any_of(good).astype(jnp.int32),
            skipped=state.skipped + guards.any_of([~leaf.finite for leaf in leaves]).astype(jnp.int32),
            inner_state=guards.hold_bad(
                owners(inner, inner_state, treedef), new=inner_state, old=state.inner_state, good=good
            ),
            residual=residual and treedef.unflatten(residual),
        )
        if self.diagnostics:
            captured = treedef.flatten_up_to(state.diagnostics.captured_energy)
            for i, leaf in enumerate(leaves):
                if leaf.view is not None and whole:
                    share = diagnosis.captured_energy(low_rank[i], leaf.matrices, leaf.peak)
                    captured[i] = jnp.where(leaf.good, share, captured[i])
            new_state = new_state._replace(
                diagnostics=state.diagnostics._replace(
                    captured_energy=treedef.unflatten(captured), update_rms=treedef.unflatten(update_rms)
                )
            )
        return treedef.unflatten(updates), new_state

    def _update_whole(
        self,
        inner: optax.GradientTransformationExtraArgs,
        updates: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        """Nothing is projected: the inner transformation itself.

        It is shown bad gradients too, and what it makes of them is thrown away: its arithmetic is as it would be alone, and no
        branch holds a copy of the state.
        """
        finite = ~guards.any_of([~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)])
        gradients, params = (jax.tree.map(promoted, tree) for tree in (updates, params))
        replies, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
        replies = jax.tree.map(lambda reply: jnp.where(finite, reply, 0), replies)
        inner_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state)
        good = finite.astype(jnp.int32)
        replies = jax.tree.map(lambda reply, gradient: reply.astype(gradient.dtype), replies, updates)
        return replies, state._replace(
            count=state.count + good, skipped=state.skipped + 1 - good, inner_state=inner_state
        )

    def _lift(
        self, leaf: MatrixGradient, low_rank: jax.Array, reply: jax.Array, left: Any, right: Any, residual: Any
    ) -> tuple[jax.Array, Any, Any]:
        """The update of a parameter, zero where its gradient is bad; its RMS, matrix by matrix; what the residual remembers."""
        reply = leaf.where_good(reply)
        if leaf.view is None:
            return reply.astype(leaf.gradient.dtype), optax.MaskedNode(), residual
        alpha, sides = output.alpha(leaf.view, self.scale, low_rank.dtype), subspace.sides(leaf.view, left, right)
        shape = leaf.view.matrix_shape

        if self.residual is None:
            matrices = subspace.lift(self._storage, reply * alpha, *sides, shape)
        else:
            matrices, residual = residuals.combine(
                self.residual,
                leaf.matrices,
                leaf.good,
                low_rank,
                reply,
                sides,
                residual,
                lift=lambda x, both: subspace.lift(self._storage, x, both[0], both[1], shape),
                alpha=alpha,
                axis=-2 if leaf.view.left else -1,
            )
        matrices = matrices.astype(leaf.gradient.dtype)
        rms = diagnosis.root_mean_square(matrices) if self.diagnostics else optax.MaskedNode()
        return sharding.like(leaf.view.from_matrices(matrices), leaf.gradient), rms, residual


def _slots(views: list[MatrixView | None], layer: policies.Layer | None = None) -> list[policies.Slots | None]:
    """The place of each parameter's matrices among all of them, those of the other layers included."""
    sizes = [0 if view is None else math.prod(view.batch_shape) for view in views]
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        None if view is None else policies.Slots(start, view.batch_shape, sum(sizes)).of(layer)
        for view, start in zip(views, first, strict=True)
    ]
