# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One update of :func:`galore_jax.galore`: refresh, project, inner transformation, lift."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import (
    codecs,
    diagnostics as diagnosis,
    projectors,
    refresh as policies,
    residual as residuals,
    sharding,
)
from galore_jax._core import coordinates, probe, ranks, trees
from galore_jax._core.basis import Rows
from galore_jax._core.basis_refresh import Member, Subspace, refresh_all
from galore_jax._core.call import Action, Call, call_of
from galore_jax._core.dtypes import promoted
from galore_jax._core.gradients import Batches, Guarded, is_sound, joined, update_guarded
from galore_jax._core.per_matrix import owners, per_matrix
from galore_jax._core.seeds import key_of
from galore_jax._core.state import GaLoreState
from galore_jax.layouts import UNKNOWN
from galore_jax.matrix_view import NO_BASIS, MatrixView, Rank, is_part, paths_of, views_of
from galore_jax.transport import Carrier, carriers


class GaLoreMemoryWarning(UserWarning):
    """GaLore is used in a way that saves no memory."""


def warn_if_whole(params: Any, decided: list[MatrixView | str], proj_type: str = "std") -> None:
    """Warns if no parameter of a whole tree is projected, or if one is left whole because its matrix is unknown.

    Args:
      params: The parameters.
      decided: What :func:`galore_jax.matrix_view.decisions` returns.
      proj_type: Its argument.  With ``NO_BASIS``, the matrices are not projected, and what is no matrix is left to Adam.
    """
    if is_part(params) or not decided:
        return
    leaves = zip(paths_of(params), map(jnp.shape, jax.tree.leaves(params)), decided, strict=True)
    whole = [(path, shape, reason) for path, shape, reason in leaves if isinstance(reason, str)]
    whole.sort(key=lambda leaf: -math.prod(leaf[1]))
    unknown = [(path, shape) for path, shape, reason in whole if reason == UNKNOWN]
    show = "print(galore_jax.describe(tx, params)) shows all of them"
    projects = proj_type != NO_BASIS
    if len(whole) == len(decided):
        named = ", ".join(f"{path!r} of shape {shape} ({reason})" for path, shape, reason in whole[:3])
        effect, remedy = (
            (
                f"galore projects none of the {len(decided)} parameters, so it saves no memory",
                "write a smaller rank, or ",
            )
            if projects
            else (f"none of the {len(decided)} parameters is updated as a matrix, so Adam updates all of them", "")
        )
        message = f"{effect}; the largest are {named}: {remedy}select parameters by mask or weight_dimension_numbers ({show})."
    elif unknown:
        named = ", ".join(f"{path!r} of shape {shape}" for path, shape in unknown[:3])
        message = (
            f"{'galore leaves' if projects else 'Adam updates'} {len(unknown)} of the {len(decided)} parameters whole because "
            f"{UNKNOWN}, the largest are {named}: name them in weight_dimension_numbers, with None for what is to stay whole "
            f"({show})."
        )
    else:
        return
    warnings.warn(message, GaLoreMemoryWarning, stacklevel=4)


class _Gradient(NamedTuple):
    """The gradient of one parameter."""

    view: MatrixView | None
    leaf: Any  # as it came, in its box if there is one
    matrices: Any  # (*batch, m, n), or at least float32 without a view; None if it is projected already
    dtype: Any  # of the update


@dataclasses.dataclass(frozen=True)
class Step:
    """The ``init`` and ``update`` of one :func:`galore_jax.galore`."""

    inner: optax.GradientTransformationExtraArgs
    rank: Rank | jax.Array
    decisions: Callable[..., list[MatrixView | str]]  # (tree, rank=...) -> the view of each leaf, or why it has none
    projector: projectors.Projector
    refresh: policies.RefreshPolicy
    transport: str
    residual: residuals.Residual | None
    diagnostics: bool
    scale: float | jax.Array | str
    seed: int | jax.Array

    def init(self, params: optax.Params) -> GaLoreState:
        leaves, treedef = trees.flatten(params)
        arrays = list(map(trees.array_of, leaves))
        rank = ranks.at_init(self.rank)
        decided = self.decisions(params, rank=rank)
        warn_if_whole(params, decided)
        views = views_of(decided)
        bases = [coordinates.zero_bases(self._storage, *pair) for pair in zip(views, arrays, strict=True)]
        zeros = map(coordinates.zero_coordinates, views, arrays)
        low_rank = treedef.unflatten(map(trees.boxed_like, zeros, leaves))
        probe.check_init_ignores_values(self.inner, low_rank, [view is not None for view in views])
        residuals.check_direction(self.inner, self.residual, low_rank)
        inner = self._inner_of(views)
        inner_state = inner.init(low_rank)
        carriers(self.transport, inner, inner_state, treedef, views)  # raises for a state it cannot carry
        schedule = [() if view is None else self.refresh.init(_slots(view)) for view in views]
        counters = {name: jnp.zeros([], jnp.int32) for name in ("step", "skipped", "kept", "rejected")}
        return GaLoreState(
            **counters,
            left=treedef.unflatten(left for left, _ in bases),
            right=treedef.unflatten(right for _, right in bases),
            schedule=treedef.unflatten(schedule),
            diagnostics=diagnosis.initial(views, treedef) if self.diagnostics else (),
            residual=self._residual_of(views, treedef),
            inner_state=inner_state,
        )

    def update(
        self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, GaLoreState]:
        if not isinstance(state, GaLoreState):
            raise ValueError(
                f"state is a {type(state).__name__}, not the GaLoreState that init() made: call update(updates, state, params)."
            )
        call = call_of(extra_args)
        projected = call.action is Action.APPLY
        if params is not None and not projected:
            trees.check_gradients(updates, params)
        like = params if projected else updates
        views = views_of(self.decisions(like, rank=ranks.in_update(self.rank, like, state.left, state.right)))
        leaves, treedef = trees.flatten(updates)
        arrays = list(map(trees.array_of, leaves))

        if projected:
            if self.residual is not None:
                raise ValueError(
                    f"residual={self.residual.name!r} needs the whole gradient, which low-rank accumulation does not keep: "
                    "accumulate whole gradients, or leave residual out."
                )
            call.answer()
            dtypes = [promoted(trees.array_of(leaf)).dtype for leaf in treedef.flatten_up_to(params)]
            gradients = [
                _Gradient(view, leaf, None, dtype) for view, leaf, dtype in zip(views, leaves, dtypes, strict=True)
            ]
            return self._step(gradients, treedef, arrays, state, params, **extra_args)

        if not any(views):
            if call.action is Action.UPDATE:
                return self._update_whole(self._inner_of(views), updates, state, params, **extra_args)
            call.answer(updates if call.action is Action.PROJECT else True)
            return updates, state

        gradients = [
            _Gradient(view, leaf, promoted(array) if view is None else view.to_matrices(array), array.dtype)
            for view, leaf, array in zip(views, leaves, arrays, strict=True)
        ]
        state = self._refreshed(gradients, treedef, state, call)
        if call.action is Action.REFRESH:
            call.answer()
            return updates, state
        low_rank = [
            gradient.matrices if gradient.view is None else self._project(gradient.view, gradient.matrices, sides)
            for gradient, sides in zip(gradients, self._bases(views, treedef, state), strict=True)
        ]
        if isinstance(self._storage, Rows):
            # A product with a dense basis carries on whatever is not finite.  Rows show only a part of a gradient.
            low_rank = list(map(_marked, gradients, low_rank))
        if call.action is Action.PROJECT:
            call.answer(treedef.unflatten(map(trees.boxed_like, low_rank, leaves)))
            return updates, state
        return self._step(gradients, treedef, low_rank, state, params, **extra_args)

    @property
    def _storage(self) -> Any:
        return self.projector.storage

    def _residual_of(self, views: list[MatrixView | None], treedef: Any) -> Any:
        rule = self.residual
        return () if rule is None else treedef.unflatten(() if v is None else rule.init(v) for v in views)

    def _inner_of(self, views: list[MatrixView | None]) -> optax.GradientTransformationExtraArgs:
        """A bias-correction count that all matrices share cannot be reset for one, so each matrix gets its own inner state."""
        return per_matrix(self.inner, lambda _: views) if self.transport == "reset" else self.inner

    def _refreshed(self, gradients: list[_Gradient], treedef: Any, state: GaLoreState, call: Call) -> GaLoreState:
        """The state with new bases where they are due (or missing, or all of them) and the inner state carried into them."""
        everything = call.action is Action.REFRESH
        if not (everything or self.refresh.automatic):
            return state
        views = [gradient.view for gradient in gradients]
        inner_leaves, inner_def = codecs.flatten(state.inner_state)
        carried = carriers(self.transport, self._inner_of(views), state.inner_state, treedef, views)
        lefts, rights, schedules = map(treedef.flatten_up_to, (state.left, state.right, state.schedule))
        projected, chosen = map(
            list, zip(*((i, view) for i, view in enumerate(views) if view is not None), strict=True)
        )
        # The leaves of the inner state that each parameter carries over, by their places.
        mine: dict[int, dict[int, Carrier]] = {i: {} for i in projected}
        for place, carrier in enumerate(carried):
            if carrier is not None:
                mine[carrier.parameter][place] = carrier

        members = [
            Member(
                view,
                gradients[i].matrices,
                Subspace(lefts[i], rights[i], tuple(inner_leaves[place] for place in mine[i])),
                tuple(mine[i].values()),
            )
            for i, view in zip(projected, chosen, strict=True)
        ]
        # From here to the loop over groups, vectors have an entry for each matrix of all parameters.
        batches = Batches(tuple(view.batch_shape for view in chosen))
        numbers = [_slots(view, call.layer).numbers.reshape(-1) for view in chosen]
        concatenate = np.concatenate if all(isinstance(part, np.ndarray) for part in numbers) else jnp.concatenate
        slots = policies.Slots(concatenate(numbers), chosen[0].total)
        schedule = jax.tree.map(lambda *parts: batches.join(parts), *(schedules[i] for i in projected))
        due = (self.refresh.due(state.step, slots, schedule) | everything) & call.may_refresh
        exists = batches.join(
            [
                self._storage.exists(lefts[i] if view.left else rights[i])
                for i, view in zip(projected, chosen, strict=True)
            ]
        )
        wanted = due | (~exists & call.may_refresh)
        key = key_of(self.seed, state.step)
        subspaces, outcome = refresh_all(self.projector, key, state.step, members, wanted, call.axis_name)

        for i, subspace in zip(projected, subspaces, strict=True):
            lefts[i], rights[i] = subspace.left, subspace.right
            for place, moment in zip(mine[i], subspace.moments, strict=True):
                inner_leaves[place] = moment
        leaves, structure = jax.tree.flatten(
            self.refresh.advance(state.step, slots, schedule, outcome.done, outcome.overlap)
        )
        split = zip(*map(batches.split, leaves), strict=True) if leaves else [()] * len(projected)
        for i, parts in zip(projected, split, strict=True):
            schedules[i] = structure.unflatten(parts)
        if self.diagnostics:
            overlaps = treedef.flatten_up_to(state.diagnostics.overlap)
            for i, overlap in zip(projected, batches.split(outcome.overlap), strict=True):
                overlaps[i] = jnp.where(overlap >= 0, overlap, overlaps[i])
            state = state._replace(diagnostics=state.diagnostics._replace(overlap=treedef.unflatten(overlaps)))
        kept = due & ~(outcome.done | outcome.rejected)
        return state._replace(
            kept=state.kept + jnp.sum(kept, dtype=jnp.int32),
            rejected=state.rejected + jnp.sum(outcome.rejected, dtype=jnp.int32),
            left=treedef.unflatten(lefts),
            right=treedef.unflatten(rights),
            schedule=treedef.unflatten(schedules),
            inner_state=inner_def.unflatten(inner_leaves),
        )

    def _bases(self, views: list[MatrixView | None], treedef: Any, state: GaLoreState) -> list[Any]:
        """The (left, right) bases of each parameter, None on a side without one; constant to differentiation.  None if whole."""
        lefts, rights = map(treedef.flatten_up_to, jax.lax.stop_gradient((state.left, state.right)))
        triples = zip(views, lefts, rights, strict=True)
        return [None if view is None else coordinates.sides(view, left, right) for view, left, right in triples]

    def _project(self, view: MatrixView, matrices: jax.Array, sides: tuple[Any, Any]) -> jax.Array:
        return coordinates.project(self._storage, matrices, *sides, view.rank)

    def _lift(self, view: MatrixView, low_rank: jax.Array, sides: tuple[Any, Any]) -> jax.Array:
        return coordinates.lift(self._storage, low_rank, *sides, view.matrix_shape)

    def _step(
        self,
        gradients: list[_Gradient],
        treedef: Any,
        low_rank: list[jax.Array],
        state: GaLoreState,
        params: optax.Params | None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        """The inner transformation on the low-rank gradients, and its answer lifted."""
        views = [gradient.view for gradient in gradients]
        bases = self._bases(views, treedef, state)

        def tree(arrays: Any) -> Any:
            boxes = (gradient.leaf for gradient in gradients)
            return treedef.unflatten(map(trees.boxed_like, arrays, boxes))

        in_subspaces = None
        if params is not None:
            values = map(trees.array_of, treedef.flatten_up_to(params))
            in_subspaces = tree(
                promoted(value) if view is None else self._project(view, view.to_matrices(value), sides)
                for view, value, sides in zip(views, values, bases, strict=True)
            )
        inner = self._inner_of(views)

        def update(low_rank: list[jax.Array]) -> tuple[list[jax.Array], Any]:
            replies, new = inner.update(tree(low_rank), state.inner_state, in_subspaces, **extra_args)
            return list(map(trees.array_of, treedef.flatten_up_to(replies))), new

        done = update_guarded(
            update,
            low_rank,
            [0 if view is None else view.batch for view in views],
            [view is not None for view in views],
            lambda new: owners(inner, new, treedef),
            state.inner_state,
        )
        remembered = None if self.residual is None else treedef.flatten_up_to(state.residual)
        updates = []
        for i, (gradient, reply, sides) in enumerate(zip(gradients, done.replies, bases, strict=True)):
            view = gradient.view
            if view is None:
                updates.append(reply.astype(gradient.dtype))
                continue
            alpha = residuals.alpha(view, self.scale, reply.dtype)
            if self.residual is None or remembered is None:
                # The lift is in the dtype of the update, with at least float32 sums.
                matrices = self._lift(view, (reply * alpha).astype(gradient.dtype), sides)
            else:
                matrices, remembered[i] = residuals.combine(
                    self.residual,
                    gradient.matrices,
                    done.answered[i],
                    done.low_rank[i],
                    reply,
                    sides,
                    remembered[i],
                    lift=functools.partial(self._lift, view),
                    alpha=alpha,
                    axis=-2 if view.left else -1,
                )
            updates.append(matrices.astype(gradient.dtype))

        new_state = state._replace(
            step=state.step + done.moved,
            skipped=state.skipped + done.skipped,
            inner_state=done.inner_state,
            residual=state.residual if remembered is None else treedef.unflatten(remembered),
        )
        if self.diagnostics:
            found = self._diagnosed(gradients, treedef, done, updates, state.diagnostics)
            new_state = new_state._replace(diagnostics=found)
        return tree(map(_as_parameter, gradients, updates)), new_state

    def _diagnosed(
        self,
        gradients: list[_Gradient],
        treedef: Any,
        done: Guarded,
        updates: list[jax.Array],
        known: diagnosis.Diagnostics,
    ) -> diagnosis.Diagnostics:
        captured = treedef.flatten_up_to(known.captured_energy)
        rms: list[Any] = [optax.MaskedNode()] * len(gradients)
        for i, gradient in enumerate(gradients):
            if gradient.view is not None:
                rms[i] = diagnosis.root_mean_square(updates[i])
                if gradient.matrices is not None:
                    share = diagnosis.captured_energy(done.low_rank[i], gradient.matrices)
                    captured[i] = jnp.where(done.good[i], share, captured[i])
        return known._replace(captured_energy=treedef.unflatten(captured), update_rms=treedef.unflatten(rms))

    def _update_whole(
        self,
        inner: optax.GradientTransformationExtraArgs,
        updates: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        """When nothing is projected, runs the inner transformation directly.

        Gradients that are not finite are masked afterwards, which keeps its arithmetic bit-identical.  Entries of an answer that
        are not finite become zeros one by one: to count over the answers, XLA would write them in float32.
        """
        updates = trees.as_arrays(updates)
        gradients, params = (jax.tree.map(promoted, tree) for tree in (updates, params))
        replies, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
        sound = jnp.all(joined(list(map(is_sound, jax.tree.leaves(updates)))))
        replies = jax.tree.map(
            lambda reply, x: jnp.where(sound & jnp.isfinite(reply), reply, 0).astype(x.dtype), replies, updates
        )
        inner_state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), inner_state, state.inner_state)
        good = sound.astype(jnp.int32)
        return replies, state._replace(
            step=state.step + good, skipped=state.skipped + 1 - good, inner_state=inner_state
        )


def _slots(view: MatrixView, layer: int | jax.Array | None = None) -> policies.Slots:
    """The places of a parameter's matrices among all of them, those of the other layers included."""
    size = math.prod(view.batch_shape)
    numbers = view.first + np.arange(size, dtype=np.int32).reshape(view.batch_shape)
    return policies.Slots(numbers if layer is None or not view.layers else numbers + layer * size, view.total)


def _marked(gradient: _Gradient, low_rank: jax.Array) -> jax.Array:
    """A low-rank gradient, NaN if the whole one is not finite."""
    if gradient.view is None:
        return low_rank
    sound = is_sound(gradient.matrices, gradient.view.batch)
    return jnp.where(sound[..., None, None], low_rank, jnp.nan)


def _as_parameter(gradient: _Gradient, update: jax.Array) -> jax.Array:
    """An update in the shape of its parameter."""
    if gradient.view is None:
        return update
    like = trees.array_of(gradient.leaf)
    update = gradient.view.from_matrices(update)
    return update if gradient.matrices is None else sharding.like(update, like)
