# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizes kernels with more than two axes, such as convolution kernels, in Tucker coordinates.

Let G be a gradient of size d_1 x ... x d_N and k one of the chosen modes.  G_(k) in R^(d_k x Π_(j≠k) d_j) is the unfolding of G
along axis k, and X ×_k A is the tensor whose unfolding along k is A X_(k):

    every T updates   P_k   <- a basis of the leading left singular directions of G_(k), of size d_k x r_k, for each mode (HOSVD)
                      state <- the inner state, carried over from the old bases
    project           R     =  G ×_k P_kᵀ over the modes         the core, of size r_k along the modes
    inner             N     =  inner(R)
    lift              ΔW    =  α N ×_k P_k over the modes

By default, the modes are the last two axes, the input and output channels of a Flax kernel (*window, in, out).  This is Tucker-2:
the core is (*window, r_in, r_out).  The window keeps its size, because its axes are too short to benefit from a basis.

With Adam as the inner optimizer, the state of a kernel has Σ_k d_k r_k + 2 Π_k r_k Π_(j not a mode) d_j numbers.

HOSVD and Tucker: De Lathauwer, De Moor and Vandewalle 2000, SIAM J. Matrix Anal. Appl. 21(4).  GaLore on all modes: George et
al. 2025 (Tensor-GaLore, arXiv 2501.02379).  GaLore on the channels of convolutions: Xiao et al. 2024 (COAP, arXiv 2412.00071).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import codecs, projectors, refresh as policies, residual as residuals, sharding
from galore_jax._core import coordinates, probe, trees
from galore_jax._core.basis import Basis, Storage
from galore_jax._core.basis_refresh import Member, Subspace, refresh_all
from galore_jax._core.call import Action, call_of
from galore_jax._core.dtypes import promoted, state_dtype
from galore_jax._core.gradients import joined, update_guarded
from galore_jax._core.seeds import check_seed, key_of
from galore_jax._core.state_fields import Kind, parameter_index
from galore_jax.matrix_view import MatrixView, Rank, check_rank, is_part, resolve_rank, taking_part
from galore_jax.transport import Carrier, mode_carriers

# The input and output channels of a Flax kernel.
_CHANNELS = (-2, -1)


class TuckerState(NamedTuple):
    """State of :func:`tucker`.  It contains only plain arrays."""

    FIELD_KINDS = dict.fromkeys(("step", "skipped", "kept", "rejected", "basis"), Kind.KEPT) | {
        "inner_state": Kind.NESTED
    }

    # Number of updates in which at least one gradient was good; shape=(), dtype=jnp.int32.
    step: jax.Array
    # Number of updates with a gradient or an inner update that was not finite; shape=(), dtype=jnp.int32.
    skipped: jax.Array
    # Number of bases that were due but kept, because the gradient was zero or not finite; shape=(), dtype=jnp.int32.
    kept: jax.Array
    # Number of new bases that were rejected because they were not orthonormal; shape=(), dtype=jnp.int32.
    rejected: jax.Array
    # One tree of bases (d, r) for each mode, in at least float32; MaskedNode for a parameter without a basis along that mode.
    basis: Any
    inner_state: Any

    @property
    def count(self) -> jax.Array:  # pyrefly: ignore[bad-override]
        """The value of ``step``.  It is not a field, so ``optax.tree.get`` finds only the inner optimizer's ``count``."""
        return self.step


def tucker(
    inner: optax.GradientTransformation,
    *,
    rank: Rank = 0.25,
    update_proj_gap: int | jax.Array = 200,
    scale: float | jax.Array | str = 0.25,
    modes: Sequence[int] | None = None,
    projector: str | projectors.Projector = "power",
    transport: str = "keep",
    mask: Any = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on the Tucker cores of the gradients of kernels with more than two axes, which makes its state small.

    ``inner`` receives all other leaves whole: leaves with at most two axes, embeddings, heads and norms.  It also receives a
    kernel whole if no mode of the kernel has a basis.  A mode has a basis if its rank is smaller than both its size d and the
    product of the other sizes, because its unfolding has no more directions than that.  To project matrices with GaLore as well,
    write

        galore(tucker(inner), rank=lambda path, shape: 0.25 if len(shape) == 2 else None)

    Gradients are cast to at least float32 before they reach ``inner``.  If the gradient of a kernel is all zeros or not finite,
    its update is zero, and its bases and moments do not change.  All bases are refreshed on the same update.  A missing basis is
    computed at the first good gradient.

    Args:
      inner: Any Optax transformation.  If it uses the parameters, it receives their cores.
      rank: The rank r of each mode: an int, a fraction of the mode's size in (0, 1], None to leave a parameter unprojected, or
        ``callable(path, shape)`` that returns any of these.
      update_proj_gap: The number T of updates between two refreshes of the bases.
      scale: The factor α, or ``"rms"`` to give the update the root mean square of the inner update.
      modes: The axes that get a basis, for example ``(0, 1, 2, 3)``.  None means the last two.  All other axes are part of each
        unfolding and are not batch axes, so a stack of kernels shares its bases.
      projector: The projector that computes a basis from an unfolding: a name or an object of :mod:`galore_jax.projectors`.
      transport: How the inner state is carried over at a refresh: ``"keep"`` or ``"rotate"``.  ``"rotate"`` applies the rule of
        :mod:`galore_jax.transport` to one mode after the other, and needs moments of the core's shape.  ``"reset"`` is not
        available.
      mask: A tree of bools, a prefix of one, or a callable of the parameters that returns one: which parameters are projected.
      seed: Seed for the random projectors.

    Returns:
      A transformation whose state is a :class:`TuckerState`.

    Raises:
      TypeError, ValueError: At construction, an argument is invalid.  At ``init``, the mask selects nothing, a kernel lacks one
        of the modes, or ``"rotate"`` does not support the inner state.  At ``update``, low-rank accumulation is in use.

    >>> params = {"conv": jnp.ones((3, 3, 16, 32)), "bias": jnp.ones((32,))}
    >>> tx = tucker(optax.adam(1e-3), rank=0.25)
    >>> state = tx.init(params)
    >>> state.inner_state[0].mu["conv"].shape, [tree["conv"].shape for tree in state.basis]
    ((3, 3, 4, 8), [(16, 4), (32, 8)])
    >>> updates, state = tx.update(params, state, params)
    >>> updates["conv"].shape
    (3, 3, 16, 32)
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"inner is {inner!r}: write an Optax transformation, for example tucker(optax.adam(1e-3)).")
    check_rank(rank)
    residuals.check_scale(scale)
    check_seed(seed)
    if transport not in ("keep", "rotate"):
        raise ValueError(f'transport is {transport!r}: tucker() supports "keep" and "rotate".')
    modes = _checked_modes(modes)

    def kernels_of(tree: Any) -> list[Kernel | None]:
        return _kernels(tree, rank, modes, mask)

    transformation = _Tucker(
        optax.with_extra_args_support(inner),
        kernels_of,
        len(modes),
        projectors.get(projector),
        policies.get("together", update_proj_gap),
        transport == "rotate",
        scale,
        seed,
    )
    return optax.GradientTransformationExtraArgs(transformation.init, transformation.update)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One parameter with its modes that have a basis, at least one.  Each basis acts on the left of the mode's unfolding."""

    modes: tuple[MatrixView, ...]
    places: tuple[int, ...]  # indices of these modes among the modes of tucker()

    @property
    def core_shape(self) -> tuple[int, ...]:
        ranks = {_axis(mode): mode.rank for mode in self.modes}
        return tuple(ranks.get(axis, size) for axis, size in enumerate(self.modes[0].shape))

    def core(self, storage: Storage, x: jax.Array, bases: tuple[Basis, ...]) -> jax.Array:
        """Returns x ×_k P_kᵀ over the modes."""
        for mode, basis in zip(self.modes, bases, strict=True):
            x = _mode_product(mode, x, functools.partial(storage.project, basis, rank=mode.rank))
        return x

    def lift(self, storage: Storage, core: jax.Array, bases: tuple[Basis, ...]) -> jax.Array:
        """Returns core ×_k P_k over the modes, the adjoint of :meth:`core`."""
        for mode, basis in zip(self.modes, bases, strict=True):
            core = _mode_product(mode, core, functools.partial(storage.lift, basis, m=mode.matrix_shape[0]))
        return core


@dataclasses.dataclass(frozen=True)
class _Tucker:
    """The ``init`` and ``update`` of one :func:`tucker`."""

    inner: optax.GradientTransformationExtraArgs
    kernels_of: Callable[[Any], list[Kernel | None]]
    number: int  # number of modes
    projector: projectors.Projector
    refresh: policies.RefreshPolicy
    rotate: bool
    scale: float | jax.Array | str
    seed: int | jax.Array

    def init(self, params: optax.Params) -> TuckerState:
        leaves, treedef = trees.flatten(params)
        arrays = list(map(trees.array_of, leaves))
        kernels = self.kernels_of(params)
        storage = self.projector.storage
        bases = [
            () if kernel is None else tuple(coordinates.zero_bases(storage, mode, array)[0] for mode in kernel.modes)
            for kernel, array in zip(kernels, arrays, strict=True)
        ]
        cores = treedef.unflatten(map(trees.boxed_like, map(_zero_core, kernels, arrays), leaves))
        probe.check_init_ignores_values(self.inner, cores, [kernel is not None for kernel in kernels])
        inner_state = self.inner.init(cores)
        # Raises for a state that cannot be carried over.
        self._carriers(inner_state, treedef, kernels)
        counters = (jnp.zeros([], jnp.int32) for _ in range(4))
        return TuckerState(*counters, basis=self._trees(kernels, bases, treedef), inner_state=inner_state)

    def update(
        self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, TuckerState]:
        if call_of(extra_args).action in (Action.PROJECT, Action.APPLY):
            raise ValueError(
                "tucker() needs the whole gradient, which low-rank accumulation does not keep: accumulate whole gradients."
            )
        if params is not None:
            trees.check_gradients(updates, params)
        leaves, treedef = trees.flatten(updates)
        arrays = list(map(trees.array_of, leaves))
        kernels = self.kernels_of(updates)
        state = self._refreshed(kernels, arrays, treedef, state)
        bases = self._bases(kernels, state.basis, treedef)

        def cores(arrays: Any) -> list[jax.Array]:
            return list(map(self._core, kernels, map(promoted, arrays), jax.lax.stop_gradient(bases)))

        def tree(arrays: Any) -> Any:
            return treedef.unflatten(map(trees.boxed_like, arrays, leaves))

        values = None if params is None else map(trees.array_of, treedef.flatten_up_to(params))
        in_cores = None if values is None else tree(cores(values))

        def inner_update(low_rank: list[jax.Array]) -> tuple[list[jax.Array], Any]:
            replies, new = self.inner.update(tree(low_rank), state.inner_state, in_cores, **extra_args)
            return list(map(trees.array_of, treedef.flatten_up_to(replies))), new

        done = update_guarded(
            inner_update,
            cores(arrays),
            [0] * len(arrays),
            [kernel is not None for kernel in kernels],
            lambda new: parameter_index(self.inner, new, treedef),
            state.inner_state,
        )
        return tree(map(self._lift, kernels, done.replies, bases, arrays)), state._replace(
            step=state.step + done.moved, skipped=state.skipped + done.skipped, inner_state=done.inner_state
        )

    def _bases(self, kernels: list[Kernel | None], trees: tuple[Any, ...], treedef: Any) -> list[tuple[Basis, ...]]:
        """Returns the bases of each parameter, in the order of its modes."""
        columns = list(map(treedef.flatten_up_to, trees))
        return [
            () if kernel is None else tuple(columns[k][i] for k in kernel.places) for i, kernel in enumerate(kernels)
        ]

    def _trees(self, kernels: list[Kernel | None], bases: list[tuple[Basis, ...]], treedef: Any) -> tuple[Any, ...]:
        """Returns the trees of bases.  Inverse of :meth:`_bases`."""
        pairs = zip(kernels, bases, strict=True)
        rows = [{} if kernel is None else dict(zip(kernel.places, own, strict=True)) for kernel, own in pairs]
        return tuple(treedef.unflatten(row.get(k, optax.MaskedNode()) for row in rows) for k in range(self.number))

    def _carriers(
        self, state: Any, treedef: Any, kernels: list[Kernel | None]
    ) -> list[Callable[[int], Carrier] | None]:
        if not self.rotate:
            return [None] * len(codecs.flatten(state)[0])
        cores = [None if kernel is None else (kernel.modes[0].path, kernel.core_shape) for kernel in kernels]
        return mode_carriers(self.inner, state, treedef, cores)

    def _refreshed(
        self,
        kernels: list[Kernel | None],
        arrays: list[jax.Array],
        treedef: Any,
        state: TuckerState,
    ) -> TuckerState:
        """Refreshes the bases that are due or missing, and carries the inner state over to them."""
        projected = {i: kernel for i, kernel in enumerate(kernels) if kernel is not None}
        if not projected:
            return state
        storage = self.projector.storage
        due = self.refresh.due(state.step, policies.Slots(np.zeros((), np.int32), 1), ())
        moments, inner_def = codecs.flatten(state.inner_state)
        carriers = self._carriers(state.inner_state, treedef, kernels)
        owners = parameter_index(self.inner, state.inner_state, treedef)
        mine = {
            i: {j: carrier for j, carrier in enumerate(carriers) if carrier is not None and owners[j] == i}
            for i in projected
        }
        bases = self._bases(kernels, state.basis, treedef)
        wanted = {i: due | ~jnp.all(jnp.stack([storage.exists(basis) for basis in bases[i]])) for i in projected}
        current = bases, moments, state.kept, state.rejected

        def refreshed() -> tuple[list[tuple[Basis, ...]], list[Any], jax.Array, jax.Array]:
            """Recomputes the bases of one mode after the other, each from the whole gradient."""
            rows, moments, kept, rejected = [list(own) for own in bases], list(current[1]), state.kept, state.rejected
            for place in range(self.number):
                # Maps each parameter that has this mode to the index of the mode among its own.
                here = {i: kernel.places.index(place) for i, kernel in projected.items() if place in kernel.places}
                members = []
                for i, number in here.items():
                    mode = projected[i].modes[number]
                    members.append(
                        Member(
                            mode,
                            mode.to_matrices(jax.lax.stop_gradient(arrays[i])),
                            Subspace(rows[i][number], optax.MaskedNode(), tuple(moments[j] for j in mine[i])),
                            tuple(carrier(_axis(mode)) for carrier in mine[i].values()),
                        )
                    )
                key = jax.random.fold_in(key_of(self.seed, state.step), place)
                flags = jnp.stack([wanted[i] for i in here])
                subspaces, outcome = refresh_all(self.projector, key, state.step, members, flags)
                for (i, number), subspace in zip(here.items(), subspaces, strict=True):
                    rows[i][number] = subspace.left
                    for j, moment in zip(mine[i], subspace.moments, strict=True):
                        moments[j] = moment
                kept += jnp.sum(due & ~(outcome.done | outcome.rejected), dtype=jnp.int32)
                rejected += jnp.sum(outcome.rejected, dtype=jnp.int32)
            return [tuple(own) for own in rows], moments, kept, rejected

        bases, moments, kept, rejected = jax.lax.cond(
            jnp.any(joined(list(wanted.values()))), refreshed, lambda: current
        )
        return state._replace(
            kept=kept,
            rejected=rejected,
            basis=self._trees(kernels, bases, treedef),
            inner_state=inner_def.unflatten(moments),
        )

    def _core(self, kernel: Kernel | None, array: jax.Array, bases: tuple[Basis, ...]) -> jax.Array:
        return array if kernel is None else kernel.core(self.projector.storage, array, bases)

    def _lift(self, kernel: Kernel | None, reply: jax.Array, bases: tuple[Basis, ...], like: jax.Array) -> jax.Array:
        """Returns the update of a parameter."""
        if kernel is None:
            return reply.astype(like.dtype)
        if isinstance(self.scale, str):
            alpha = math.prod(map(residuals.rms_scale, kernel.modes))
        else:
            alpha = residuals.alpha(kernel.modes[0], self.scale, reply.dtype)
        lifted = kernel.lift(self.projector.storage, reply * alpha, bases)
        return sharding.like(lifted.astype(like.dtype), like)


def _kernels(tree: Any, rank: Rank, modes: tuple[int, ...], mask: Any) -> list[Kernel | None]:
    """Returns each leaf with its modes, or None for a leaf that the inner transformation receives whole."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        # optax.tree.map_params calls init on an empty tree.
        return []
    chosen = taking_part(tree, mask)
    kernels = [
        _kernel(path, tuple(jnp.shape(leaf)), rank, modes) if part else None
        for leaf, (path, part) in zip(leaves, chosen, strict=True)
    ]
    if mask is not None and not any(kernels) and not is_part(tree):
        names = ", ".join(path for path, _ in chosen[:8])
        raise ValueError(
            f"mask selects none of the {len(leaves)} parameters ({names}): set True for a parameter with more than two axes "
            f"that rank={rank} makes smaller."
        )
    return kernels


def _kernel(path: str, shape: tuple[int, ...], rank: Rank, modes: tuple[int, ...]) -> Kernel | None:
    if len(shape) < 3:
        return None
    axes = [axis % len(shape) for axis in modes]
    if not all(-len(shape) <= axis < len(shape) for axis in modes) or len(set(axes)) < len(axes):
        raise ValueError(
            f"modes is {modes}, and {path!r} has the shape {shape}: write distinct axes that it has, or exclude the "
            "parameter with mask."
        )
    views, places = [], []
    for place, axis in enumerate(axes):
        rest = tuple(other for other in range(len(shape)) if other != axis)
        view = MatrixView(path, shape, (), (axis,), rest, rank=1, left=True, right=False)
        resolved = resolve_rank(rank, path, shape, shape[axis])
        if resolved is not None and resolved < min(view.matrix_shape):
            views.append(dataclasses.replace(view, rank=resolved))
            places.append(place)
    return Kernel(tuple(views), tuple(places)) if views else None


def _checked_modes(modes: Sequence[int] | None) -> tuple[int, ...]:
    if modes is None:
        return _CHANNELS
    valid = isinstance(modes, Sequence) and all(
        isinstance(m, (int, np.integer)) and not isinstance(m, bool) for m in modes
    )
    if not valid or not modes:
        raise ValueError(f"modes is {modes!r}: write a tuple of axes, such as (-2, -1), or None for the last two.")
    return tuple(map(int, modes))


def _mode_product(mode: MatrixView, x: jax.Array, multiply: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Applies ``multiply`` to the unfolding of x along the axis of ``mode``.

    The sizes of x along the other axes can differ from those of the parameter.
    """
    axis = _axis(mode)
    matrix = multiply(dataclasses.replace(mode, shape=x.shape).to_matrices(x))
    shape = (*x.shape[:axis], matrix.shape[0], *x.shape[axis + 1 :])
    return dataclasses.replace(mode, shape=shape).from_matrices(matrix)


def _axis(mode: MatrixView) -> int:
    return mode.reduction_axes[0]


def _zero_core(kernel: Kernel | None, leaf: Any) -> Any:
    """Returns the zeros that the inner transformation's ``init`` receives for a leaf."""
    if kernel is None:
        return coordinates.zero_coordinates(None, leaf)
    spec = sharding.spec_of(leaf) and (None,) * len(kernel.core_shape)
    return sharding.zeros(kernel.core_shape, state_dtype(leaf), spec, leaf)
