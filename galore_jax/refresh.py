# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Policies that decide when a basis is recomputed.

T is ``update_proj_gap`` and t is the number of the update.  The whole tree has N matrices, numbered j = 0 .. N - 1 in the order
of the parameters and, within a stack, in the order of its matrices.  A policy refreshes matrix j at these updates:

    together     t mod T = 0                         every matrix on the same update
    staggered    t mod T = ⌊j T / N⌋                 at most ⌈N / T⌉ matrices per update
    lazy         like staggered, but T_j <- ⌊γ T_j⌋ once the mean of the last K overlaps ‖P_newᵀP_old‖² / r reaches a threshold
                 (Zhang et al. 2024, Q-GaLore, arXiv 2407.08296, which compares first singular vectors)
    every_step   T = 1
    manual       never: see :func:`refresh_bases`

Under every policy except manual, a matrix without a basis gets one at its first good gradient, so update 0 refreshes all
matrices.  Each new basis is computed from the same gradient that it then projects.
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

__all__ = ["RefreshPolicy", "every_step", "lazy", "manual", "refresh_bases", "staggered", "together"]

Gap = int | jax.Array | None


class Slots(NamedTuple):
    """The numbers of some matrices among all matrices of the tree."""

    numbers: np.ndarray | jax.Array  # [...] int32
    total: int  # matrices in the whole tree

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def offsets(self, gap: Gap) -> np.ndarray | jax.Array:
        """Returns ⌊j T / N⌋, int32 [...]."""
        steps = _as_int32(gap)
        whole, rest = steps // self.total, steps % self.total
        # The product j T itself can overflow.
        return self.numbers * whole + self.numbers * rest // self.total


@dataclasses.dataclass(frozen=True)
class RefreshPolicy:
    """Decides when bases are refreshed.  A subclass implements :meth:`due`, and the other methods if it has state."""

    update_proj_gap: Gap = None
    automatic = True  # whether ``update`` ever refreshes bases

    def init(self, slots: Slots) -> Any:
        """Returns the policy's state for these matrices: an array (..., anything), a tree of such arrays, or () for none."""
        return ()

    def due(self, count: jax.Array, slots: Slots, schedule: Any) -> jax.Array:
        """Returns a mask [...] of the matrices that update number ``count`` refreshes."""
        raise NotImplementedError

    def advance(self, count: jax.Array, slots: Slots, schedule: Any, turned: jax.Array, overlap: jax.Array) -> Any:
        """Returns the policy's state after a refresh.

        ``turned`` [...] marks the matrices that have new bases.  ``overlap`` [...] is -1 for a matrix's first basis.
        """
        return schedule


class Together(RefreshPolicy):
    """Refreshes all bases on the same update."""

    def due(self, count: jax.Array, slots: Slots, schedule: Any) -> jax.Array:
        return jnp.full(slots.shape, count % _as_int32(self.update_proj_gap) == 0)


@dataclasses.dataclass(frozen=True)
class Staggered(RefreshPolicy):
    """Spreads the refreshes of the matrices evenly over T updates."""

    def due(self, count: jax.Array, slots: Slots, schedule: Any) -> jax.Array:
        return count % _as_int32(self.update_proj_gap) == slots.offsets(self.update_proj_gap)


class LazySchedule(NamedTuple):
    """The state of ``lazy`` for each matrix."""

    gap: jax.Array  # T_j; (...), int32
    next: jax.Array  # The next update that is due, or -1 to follow ``staggered`` at first; (...), int32
    overlaps: jax.Array  # The last K overlaps, newest last, -K where there is none yet; (..., K), float32


@dataclasses.dataclass(frozen=True)
class Lazy(RefreshPolicy):
    """Staggers the refreshes, and gives each matrix its own gap, which grows while the matrix's subspace is stable."""

    threshold: float = 0.4
    factor: float = 2.0
    window: int = 5

    def init(self, slots: Slots) -> LazySchedule:
        gap = jnp.broadcast_to(_as_int32(self.update_proj_gap), slots.shape)
        # An overlap is at most 1, so one entry of -K makes the mean negative: a partial window stays below any threshold.
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
    """Never refreshes a basis in ``update``."""

    automatic = False

    def due(self, count: jax.Array, slots: Slots, schedule: Any) -> jax.Array:
        return jnp.zeros(slots.shape, bool)


def together(update_proj_gap: Gap = None) -> RefreshPolicy:
    """Refreshes every basis at updates 0, T, 2T, ..., as published.

    Args:
      update_proj_gap: T.  None uses galore's ``update_proj_gap``.
    """
    return Together(_checked(update_proj_gap))


def staggered(update_proj_gap: Gap = None) -> RefreshPolicy:
    """Refreshes each basis every T updates, and spreads the refreshes evenly over the updates after the first.

    Args:
      update_proj_gap: T.  None uses galore's ``update_proj_gap``.
    """
    return Staggered(_checked(update_proj_gap))


def lazy(update_proj_gap: Gap = None, threshold: float = 0.4, factor: float = 2.0, window: int = 5) -> RefreshPolicy:
    """Staggers the refreshes, and increases the gap of each matrix whose subspace is stable.

    Args:
      update_proj_gap: The initial gap.  None uses galore's ``update_proj_gap``.
      threshold: The mean overlap, in [0, 1], at which a gap grows.  Two unrelated bases overlap by r/m.
      factor: The growth factor γ, at least 1.
      window: The number K of overlaps in the mean.

    Raises:
      ValueError: An argument is out of range.
    """
    if not (threshold >= 0 and factor >= 1 and isinstance(window, int) and window >= 1):
        raise ValueError(
            f"lazy() needs threshold >= 0, factor >= 1 and an int window >= 1, got {threshold}, {factor} and {window}."
        )
    return Lazy(_checked(update_proj_gap), threshold, factor, window)


def every_step() -> RefreshPolicy:
    """Refreshes every basis at every update."""
    return Together(1)


def manual() -> RefreshPolicy:
    """Never refreshes a basis in ``update``, which then contains no factorization.

    Projected parameters do not change until the first call of :func:`refresh_bases`.
    """
    return Manual()


REFRESHES: dict[str, Callable[[], RefreshPolicy]] = {
    "together": together,
    "staggered": staggered,
    "lazy": lazy,
    "every_step": every_step,
    "manual": manual,
}


def get(refresh: str | RefreshPolicy, update_proj_gap: int | jax.Array) -> RefreshPolicy:
    """Returns a policy by name, or the given policy.  A policy without a gap gets galore's ``update_proj_gap``.

    Args:
      refresh: The name of a policy in ``REFRESHES``, or a policy.
      update_proj_gap: The gap T of galore.

    Raises:
      ValueError: ``refresh`` is not a policy, or ``update_proj_gap`` is not a positive int.

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
    """Raises ValueError unless ``update_proj_gap`` is a positive int or an injected hyperparameter."""
    if isinstance(update_proj_gap, jax.Array):
        return
    if isinstance(update_proj_gap, bool) or not isinstance(update_proj_gap, (int, np.integer)) or update_proj_gap < 1:
        raise ValueError(
            f"update_proj_gap is {update_proj_gap!r}: write a positive int, the number of updates between refreshes."
        )


def refresh_bases(
    tx: optax.GradientTransformation, grads: optax.Updates, state: Any, params: optax.Params | None = None
) -> Any:
    """Recomputes the bases from these gradients and changes nothing else.  Jit it separately from the training step.

    With ``galore(..., refresh="manual")`` the training step contains no factorization.  Call this function before the first
    update and every few hundred updates after that.  With any other policy, it performs an extra refresh.

    Args:
      tx: A transformation that contains one or more ``galore``, inside any wrappers that pass on extra arguments.
      grads: The gradients, as for ``tx.update``.  Transformations before galore in a chain are applied to them first.
      state: The state of ``tx``.
      params: The parameters, if another transformation in the chain needs them.

    Returns:
      ``state`` with new bases for all matrices whose gradient is good, and with the inner state carried over to them.

    Raises:
      ValueError: The call reached no galore in ``tx``.

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
