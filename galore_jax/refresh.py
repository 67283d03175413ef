# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""When a basis is recomputed.  With T = ``update_proj_gap``, t the number of the update and N matrices in the whole tree,
numbered j = 0 .. N - 1 in the order of the parameters and, within a stack, of its matrices:

    together     t mod T = 0                         every matrix on the same update
    staggered    t mod T = ⌊j T / N⌋                 at most ⌈N / T⌉ matrices an update
    lazy         as staggered, but T_j <- ⌊γ T_j⌋ once the mean of the last K overlaps ‖P_newᵀP_old‖² / r reaches a threshold
                 (Zhang et al. 2024, Q-GaLore, arXiv 2407.08296, which compares first singular vectors)
    every_step   T = 1
    manual       never: see :func:`refresh_bases`

Whatever the policy (but manual), a matrix without a basis gets one at its first good gradient, so that update 0 refreshes them
all.  A basis is made from the gradient that it then projects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax._core.call import ARGUMENT, Action, Call
from galore_jax._core.state import galore_states_of

Gap = int | jax.Array | None


class Slots(NamedTuple):
    """The places of some matrices among all of them."""

    numbers: np.ndarray | jax.Array  # [...] int32
    total: int  # matrices in the whole tree

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def offsets(self, gap: Gap) -> np.ndarray | jax.Array:
        """⌊j T / N⌋, int32 [...]"""
        steps = _as_int32(gap)
        whole, rest = steps // self.total, steps % self.total
        return self.numbers * whole + self.numbers * rest // self.total  # j T itself may overflow


@dataclasses.dataclass(frozen=True)
class RefreshPolicy:
    """When bases are refreshed.  A subclass implements :meth:`due`, and the other methods if it has a state."""

    update_proj_gap: Gap = None
    automatic = True  # whether ``update`` refreshes bases at all

    def init(self, slots: Slots) -> Any:
        """What the policy remembers of the matrices: an array (..., anything), a tree of them, or () for nothing."""
        return ()

    def due(self, count: jax.Array, slots: Slots, schedule: Any) -> jax.Array:
        """[...] which matrices the update number ``count`` refreshes."""
        raise NotImplementedError

    def advance(self, count: jax.Array, slots: Slots, schedule: Any, turned: jax.Array, overlap: jax.Array) -> Any:
        """What it remembers once the matrices ``turned`` [...] have new bases; ``overlap`` [...] is -1 for a first one."""
        return schedule


class Together(RefreshPolicy):
    """All bases on the same update."""

    def due(self, count: jax.Array, slots: Slots, schedule: Any) -> jax.Array:
        return jnp.full(slots.shape, count % _as_int32(self.update_proj_gap) == 0)


@dataclasses.dataclass(frozen=True)
class Staggered(RefreshPolicy):
    """The matrices spread evenly over T updates."""

    def due(self, count: jax.Array, slots: Slots, schedule: Any) -> jax.Array:
        return count % _as_int32(self.update_proj_gap) == slots.offsets(self.update_proj_gap)


class LazySchedule(NamedTuple):
    """What ``lazy`` remembers of each matrix."""

    gap: jax.Array  # (...), int32; T_j
    next: jax.Array  # (...), int32; the update at which it is due, -1 before the first: as if staggered
    overlaps: jax.Array  # (..., K), float32; the last ones, newest last; -K where there were none yet


@dataclasses.dataclass(frozen=True)
class Lazy(RefreshPolicy):
    """Staggered, with a gap of its own for each matrix that grows while its subspace stays put."""

    threshold: float = 0.4
    factor: float = 2.0
    window: int = 5

    def init(self, slots: Slots) -> LazySchedule:
        gap = jnp.broadcast_to(_as_int32(self.update_proj_gap), slots.shape)
        # Less than -1 a place: a window that is not full stays below any threshold.
        overlaps = jnp.full((*slots.shape, self.window), -self.window, jnp.float32)
        return LazySchedule(gap, jnp.full(slots.shape, -1, jnp.int32), overlaps)

    def due(self, count: jax.Array, slots: Slots, schedule: LazySchedule) -> jax.Array:
        return count >= jnp.where(schedule.next < 0, slots.offsets(self.update_proj_gap), schedule.next)

    def advance(
        self, count: jax.Array, slots: Slots, schedule: LazySchedule, turned: jax.Array, overlap: jax.Array
    ) -> LazySchedule:
        had_basis = overlap >= 0
        pushed = jnp.concatenate([schedule.overlaps[..., 1:], overlap[..., None]], axis=-1)
        overlaps = jnp.where((turned & had_basis)[..., None], pushed, schedule.overlaps)
        steady = jnp.mean(overlaps, axis=-1) >= self.threshold
        longer = jnp.minimum(jnp.floor(schedule.gap.astype(jnp.float32) * self.factor), 2**30).astype(jnp.int32)
        gap = jnp.where(turned & had_basis & steady, longer, schedule.gap)
        moved = turned & self.due(count, slots, schedule)
        return LazySchedule(gap, jnp.where(moved, count + gap, schedule.next), overlaps)


@dataclasses.dataclass(frozen=True)
class Manual(RefreshPolicy):
    """Never in ``update``."""

    automatic = False

    def due(self, count: jax.Array, slots: Slots, schedule: Any) -> jax.Array:
        return jnp.zeros(slots.shape, bool)


def together(update_proj_gap: Gap = None) -> RefreshPolicy:
    """Every basis at updates 0, T, 2T, ..., as published; T is galore's ``update_proj_gap`` unless given here."""
    return Together(_checked(update_proj_gap))


def staggered(update_proj_gap: Gap = None) -> RefreshPolicy:
    """Each basis every T updates, spread so that no update after the first refreshes more than its share."""
    return Staggered(_checked(update_proj_gap))


def lazy(update_proj_gap: Gap = None, threshold: float = 0.4, factor: float = 2.0, window: int = 5) -> RefreshPolicy:
    """Staggered, with a gap that grows for matrices whose subspace stays put.

    Args:
      update_proj_gap: the first gap.
      threshold: the mean overlap, in [0, 1], from which a gap grows; two unrelated bases have r/m.
      factor: γ, at least 1.
      window: K, the number of overlaps that are averaged.
    """
    if not (threshold >= 0 and factor >= 1 and isinstance(window, int) and window >= 1):
        raise ValueError(
            f"lazy() needs threshold >= 0, factor >= 1 and an int window >= 1, got {threshold}, {factor} and {window}."
        )
    return Lazy(_checked(update_proj_gap), threshold, factor, window)


def every_step() -> RefreshPolicy:
    """Every basis at every update."""
    return Together(1)


def manual() -> RefreshPolicy:
    """Never: ``update`` holds no factorisation, and the projected parameters stand still until :func:`refresh_bases`."""
    return Manual()


REFRESHES: dict[str, Callable[[], RefreshPolicy]] = {
    "together": together,
    "staggered": staggered,
    "lazy": lazy,
    "every_step": every_step,
    "manual": manual,
}


def get(refresh: str | RefreshPolicy, update_proj_gap: int | jax.Array) -> RefreshPolicy:
    """A policy by name, or the object itself, with galore's ``update_proj_gap`` where it has none of its own.

    >>> get("staggered", 50).update_proj_gap, get(together(10), 50).update_proj_gap
    (50, 10)
    """
    check_gap(update_proj_gap)
    if isinstance(refresh, str) and refresh in REFRESHES:
        refresh = REFRESHES[refresh]()
    if not isinstance(refresh, RefreshPolicy):
        raise ValueError(
            f"refresh is {refresh!r}: write one of {', '.join(REFRESHES)}, or a policy of galore_jax.refresh."
        )
    if refresh.update_proj_gap is None:
        refresh = dataclasses.replace(refresh, update_proj_gap=update_proj_gap)
    return refresh


def check_gap(update_proj_gap: Any) -> None:
    """Raises unless ``update_proj_gap`` is a positive int or an injected hyperparameter."""
    if isinstance(update_proj_gap, jax.Array):
        return
    if isinstance(update_proj_gap, bool) or not isinstance(update_proj_gap, (int, np.integer)) or update_proj_gap < 1:
        raise ValueError(
            f"update_proj_gap is {update_proj_gap!r}: write a positive int, the updates between two refreshes."
        )


def refresh_bases(
    tx: optax.GradientTransformation, grads: optax.Updates, state: Any, params: optax.Params | None = None
) -> Any:
    """New bases from these gradients, and nothing else: a program of its own, to be jitted apart from the training step.

    With ``galore(..., refresh="manual")`` the training step holds no factorisation at all; call this before the first
    update, and every few hundred updates from then on.  With another policy it is an extra refresh.

    Args:
      tx: a transformation with one ``galore`` or several in it, of any wrapping that hands on extra arguments.
      grads: as for ``tx.update``; what comes before galore in a chain acts on them first.
      state: of ``tx``.
      params: for members of the chain that want them.

    Returns:
      ``state`` with new bases for all matrices whose gradient is good, and the inner state carried over to them.

    Raises:
      ValueError: no galore in ``tx`` was reached.

    >>> from galore_jax import galore
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> tx = galore(optax.adam(1e-3), rank=8, refresh="manual")
    >>> refresh = jax.jit(lambda grads, state: refresh_bases(tx, grads, state))
    >>> state = refresh(params, tx.init(params))
    >>> bool(jnp.any(state.left["kernel"] != 0)), int(state.count)
    (True, 0)
    """
    call = Call(Action.REFRESH)
    _, refreshed = optax.with_extra_args_support(tx).update(grads, state, params, **{ARGUMENT: call})
    call.check_reached("refresh_bases()")
    return galore_states_of(refreshed, state)


def _checked(update_proj_gap: Gap) -> Gap:
    if update_proj_gap is not None:
        check_gap(update_proj_gap)
    return update_proj_gap


def _as_int32(gap: Any) -> jax.Array | np.int32:
    return gap.astype(jnp.int32) if isinstance(gap, jax.Array) else np.int32(gap)
