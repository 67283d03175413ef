# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What becomes of the inner optimizer's state when the basis of a matrix turns from P_old to P_new.

With Q = P_newᵀ P_old in R^(r x r), and ∘ the elementwise product:

    keep     nothing: the state is read in the new basis as if it had been made there (GaLore as published)
    rotate   linear      m' = Q m                                             exact inside both subspaces (Flora, LDAdam)
             quadratic   v' = (Q∘Q) v + (1 - Σ_j Q_ij²)₊ · mean over j of v_j   never negative
    reset    the moments and the count of their bias correction are those of a fresh optimizer; schedules go on

A second moment is the diagonal of a covariance, of which the rest is not known, so no rule for it is exact.  Q∘Q is that of
independent coordinates; a direction that the old basis held only in part is given the mean of v for the missing part of its
mass.  (Q v would let coordinates cancel.)  m is (r, n) for a basis on the left.  On the right m is (m, r) and the same holds
for its columns, m' = m Qᵀ; with both bases one side turns after the other.

Which arrays of a state are linear and which quadratic is known by the name of the state's class and of its fields.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax.guards import parameter_index
from galore_jax.matrix_view import MatrixView
from galore_jax.per_matrix import PerMatrix, alone, owners
from galore_jax.subspace import promoted, state_dtype

TRANSPORTS = ("keep", "rotate", "reset")


class Carrier(NamedTuple):
    """How one leaf of the inner state goes over to new bases."""

    parameter: int  # in the order of jax.tree.leaves
    # (one matrix's slice of the leaf, Q of the left basis or None, Q of the right basis or None) -> its new value
    turn: Callable[[jax.Array, jax.Array | None, jax.Array | None], jax.Array]


def check_transport(transport: Any) -> None:
    """Raises for an unknown ``transport``."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport is {transport!r}: write one of {', '.join(TRANSPORTS)}.")


def carriers(
    transport: str,
    inner: optax.GradientTransformation,
    state: Any,
    treedef: Any,
    views: list[MatrixView | None],
) -> list[Carrier | None]:
    """How each leaf of an inner state goes over to new bases.

    Args:
      transport: ``"keep"``, ``"rotate"`` or ``"reset"``.
      inner: the transformation whose state this is; for reset that of :func:`galore_jax.per_matrix.per_matrix`, because a
        count that all matrices share cannot start again for one.
      state: arrays or their ``jax.ShapeDtypeStruct``.
      treedef: of the low-rank tree that ``inner`` was given.
      views: of its leaves, None where it is not projected.

    Returns:
      One entry for each of ``jax.tree.leaves(state)``; None for a leaf that stays as it is.  A leaf with an entry is
      (*batch, ...), and ``turn`` takes and returns the part behind the batch axes, in the leaf's dtype.

    Raises:
      ValueError: unless ``transport`` is keep, for an array that belongs to a projected parameter and is not known, or that
        has not the shape its field has in Optax (a quantized moment); for reset without ``per_matrix``.

    >>> from galore_jax.matrix_view import select
    >>> params, low_rank = {"kernel": jnp.ones((8, 16))}, {"kernel": jnp.zeros((2, 16))}
    >>> tx = optax.adam(1e-3)
    >>> count, mu, nu = carriers("rotate", tx, tx.init(low_rank), jax.tree.structure(params), select(params, rank=2))
    >>> swap = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> count, mu.turn(jnp.array([[1.0], [2.0]]), swap, None).tolist(), nu.turn(jnp.array([[1.0], [4.0]]), swap, None).tolist()
    (None, [[2.0], [-1.0]], [[4.0], [1.0]])
    """
    check_transport(transport)
    if transport == "keep" or not any(views):
        return [None] * len(jax.tree.leaves(state))
    return [
        None if view is None else _carrier(transport, inner, leaf, view, treedef)
        for leaf, view in _leaves(inner, state, treedef, views)
    ]


class _Kind(enum.Enum):
    """What a field of a state is."""

    LINEAR = enum.auto()  # in the gradient
    QUADRATIC = enum.auto()
    CENTRED = enum.auto()  # a mean and a mean square whose difference is a variance: only together could they turn
    ROW = enum.auto()  # a factored second moment, see _axes_of
    COLUMN = enum.auto()
    UNFACTORED = enum.auto()  # a second moment, or (1,) where that one is factored
    NORM = enum.auto()  # a scalar a parameter, which no rotation changes
    COUNT = enum.auto()  # of bias correction, or what else says that a state is new
    KEPT = enum.auto()  # left as it is, whatever it holds
    NESTED = enum.auto()  # another state


def _kinds(names: str, **others: _Kind) -> dict[str, _Kind]:
    """Kinds by the usual names, and others."""
    usual = {"count": _Kind.COUNT, "mu": _Kind.LINEAR, "nu": _Kind.QUADRATIC}
    return {name: usual[name] for name in names.split()} | others


# Optax's classes by name.  What is not here is unknown on purpose: SM3's maxima over an axis, Rprop's step sizes and the
# parameters of some steps ago (Prodigy, schedule-free, ...) do not go over to another basis.  Adamax keeps max |g| in the nu of
# ScaleByAdamState: it turns as if it were a second moment.
_STATES: dict[str, dict[str, _Kind]] = {
    "ScaleByAdamState": _kinds("count mu nu"),
    "ScaleByAmsgradState": _kinds("count mu nu", nu_max=_Kind.QUADRATIC),
    "ScaleByBeliefState": _kinds("count mu nu"),
    "ScaleByLionState": _kinds("count mu"),
    "ScaleByNovogradState": _kinds("count mu", nu=_Kind.NORM),
    "ScaleByRmsState": _kinds("nu"),
    "ScaleByRmsWithCountState": _kinds("count nu"),
    "ScaleByRStdDevState": _kinds("", mu=_Kind.CENTRED, nu=_Kind.CENTRED),
    "ScaleByRStdDevWithCountState": _kinds("count", mu=_Kind.CENTRED, nu=_Kind.CENTRED),
    "ScaleByRssState": _kinds("", sum_of_squares=_Kind.QUADRATIC),
    "ScaleByAdaDeltaState": _kinds("", e_g=_Kind.QUADRATIC, e_x=_Kind.QUADRATIC),
    # v is a mean of differences of gradients, g the last gradient.
    "ScaleByAdanState": _kinds("", m=_Kind.LINEAR, v=_Kind.LINEAR, n=_Kind.QUADRATIC, g=_Kind.LINEAR, t=_Kind.COUNT),
    # count_m2 is the argument of the schedules of b3 and alpha.
    "ScaleByAdemamixState": _kinds("count nu", count_m2=_Kind.KEPT, m1=_Kind.LINEAR, m2=_Kind.LINEAR),
    "ScaleBySimplifiedAdEMAMixState": _kinds("", t=_Kind.COUNT, m=_Kind.LINEAR, n=_Kind.QUADRATIC),
    "ScaleByOptimisticGradientState": _kinds("", is_initial_step=_Kind.COUNT, previous_gradient=_Kind.LINEAR),
    "FactoredState": _kinds("count", v_row=_Kind.ROW, v_col=_Kind.COLUMN, v=_Kind.UNFACTORED),
    "MuonState": _kinds("count mu", ns_coeffs=_Kind.KEPT),
    "TraceState": _kinds("", trace=_Kind.LINEAR),
    "EmaState": _kinds("count", ema=_Kind.LINEAR),
    "ApplyEvery": _kinds("count", grad_acc=_Kind.LINEAR),
    "MultiStepsState": _kinds(
        "",
        mini_step=_Kind.COUNT,
        gradient_step=_Kind.KEPT,
        inner_opt_state=_Kind.NESTED,
        acc_grads=_Kind.LINEAR,
        skip_state=_Kind.KEPT,
    ),
    "ZeroNansState": _kinds("", found_nan=_Kind.KEPT),
}


class _Leaf(NamedTuple):
    """One leaf of an inner state."""

    shape: tuple[int, ...]
    kind: _Kind | None  # None: in no known field
    name: str  # the class and the field that hold it
    path: str
    place: int  # among the leaves of the inner state of its matrix, in a PerMatrixState
    parameter: int  # that it belongs to, or -1
    is_copy: bool  # of the parameter; a count is none, and in a PerMatrixState belongs to one all the same


def _leaves(
    inner: optax.GradientTransformation, state: Any, treedef: Any, views: list[MatrixView | None]
) -> list[tuple[_Leaf, MatrixView | None]]:
    """Each leaf of the state with the view of its parameter."""
    each = isinstance(inner, PerMatrix)
    states = [state]
    if each:
        states = [own for own, view in zip(state.matrices, views, strict=True) if view is not None] + [state.rest]
    one = inner.inner if each else inner
    copies = [index for part in states for index in jax.tree.leaves(parameter_index(one, part, treedef))]
    labelled = [(*label, place) for part in states for place, label in enumerate(_labelled(part))]
    return [
        (_Leaf(*label, parameter, copy >= 0), views[parameter] if parameter >= 0 else None)
        for label, parameter, copy in zip(labelled, owners(inner, state, treedef), copies, strict=True)
    ]


def _labelled(
    node: Any, kind: _Kind | None = None, name: str = "an array", path: tuple = ()
) -> list[tuple[tuple[int, ...], _Kind | None, str, str]]:
    """The leaves of a state in order: (shape, kind, name, path) of each."""
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(children) == 1 and children[0][1] is node:
        return [(jnp.shape(node), kind, name, jax.tree_util.keystr(path))]
    fields = getattr(node, "_fields", None)
    known = _STATES.get(type(node).__name__, {}) if fields else {}
    known = known if fields and set(fields) <= set(known) else {}
    found = []
    for keys, child in children:
        field = getattr(keys[0], "name", None)
        if kind is None and field is not None:  # a field of a known state holds parameters, whatever their classes
            inside = None if known.get(field) is _Kind.NESTED else known.get(field)
            found += _labelled(child, inside, f"{type(node).__name__}.{field}", path + keys)
        else:
            found += _labelled(child, kind, name, path + keys)
    return found


def _carrier(
    transport: str, inner: optax.GradientTransformation, leaf: _Leaf, view: MatrixView, treedef: Any
) -> Carrier | None:
    each = isinstance(inner, PerMatrix)
    place = _placed(transport, leaf, view, each)
    if place is None or (transport == "rotate" and place == (None, None)):
        return None
    if transport == "rotate":
        return Carrier(leaf.parameter, _rotation(_linear if leaf.kind is _Kind.LINEAR else _quadratic, place))
    if not each:
        raise ValueError(
            f'transport="reset" cannot start {_described(leaf, view)} again, because all matrices share the counts of this '
            "state: write per_matrix(inner, views_of), which gives each matrix its own."
        )
    return Carrier(leaf.parameter, _fresh_start(inner.inner, leaf, view, treedef))


class _Place(NamedTuple):
    """Where the axes of the matrix stand in a slice of a leaf; None for one that is not there."""

    left: int | None
    right: int | None


def _placed(transport: str, leaf: _Leaf, view: MatrixView, each: bool) -> _Place | None:
    """The axes of a leaf that ``transport`` changes, None when it leaves the leaf alone.  Raises for an unknown one.

    ``each`` says that the inner transformation runs on each matrix alone.
    """
    if leaf.kind is _Kind.KEPT or not (leaf.is_copy or leaf.kind is _Kind.COUNT):
        return None
    if leaf.kind is _Kind.COUNT:
        return _Place(None, None) if transport == "reset" else None
    if leaf.kind is _Kind.CENTRED and transport == "rotate":
        raise ValueError(
            f'transport="rotate" cannot turn {_described(leaf, view)}, because the variance that a mean and a mean square '
            'make up turns negative when they turn apart: write transport="reset" or transport="keep".'
        )
    batch = len(view.batch_shape)
    seen = view.low_rank_shape[batch:] if each else view.low_rank_shape  # by the inner transformation
    lead = view.batch_shape if each else ()
    axes = _axes_of(leaf.kind, seen)
    factored = leaf.kind in (_Kind.ROW, _Kind.COLUMN, _Kind.UNFACTORED)
    if factored and leaf.shape == (*lead, 1) and [seen[axis] for axis in axes] != [1]:
        return None  # not in use
    if leaf.kind is None or leaf.shape != (*lead, *(seen[axis] for axis in axes)):
        raise ValueError(
            f'transport="{transport}" does not know how {_described(leaf, view)} turns with a basis: write '
            'transport="keep".'
        )
    first = len(seen) - 2
    if not set(range(first)) <= set(axes):
        return None  # shared by the matrices of a stack
    inside = [axis - first for axis in axes if axis >= first]
    return _Place(*(inside.index(side) if side in inside else None for side in (0, 1)))


def _described(leaf: _Leaf, view: MatrixView) -> str:
    return f"{leaf.name} of {view.path!r} (inner state{leaf.path}, shape {leaf.shape})"


def _axes_of(kind: _Kind | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of the gradient that a field keeps.

    Optax factors over the two largest axes, the later one of equals being the larger: a row statistic lacks the largest, a
    column statistic the second.
    """
    if kind is _Kind.NORM:
        return ()
    second, largest = (int(axis) for axis in np.argsort(shape)[-2:])
    lacking = largest if kind is _Kind.ROW else second if kind is _Kind.COLUMN else None
    return tuple(axis for axis in range(len(shape)) if axis != lacking)


def _rotation(rule: Callable[[jax.Array, jax.Array], jax.Array], place: _Place) -> Callable:
    def turn(array: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
        turned = promoted(array)
        for axis, q in zip(place, (left, right), strict=True):
            if axis is not None and q is not None:
                turned = jnp.swapaxes(rule(q.astype(turned.dtype), jnp.swapaxes(turned, 0, axis)), 0, axis)
        return turned.astype(array.dtype)

    return turn


def _linear(q: jax.Array, moment: jax.Array) -> jax.Array:
    """(r, n) or (r,) -> the same"""
    return jnp.matmul(q, moment, precision=jax.lax.Precision.HIGHEST)


def _quadratic(q: jax.Array, moment: jax.Array) -> jax.Array:
    """(r, n) or (r,) -> the same"""
    shares = jnp.square(q)
    missing = jnp.maximum(1 - jnp.sum(shares, axis=1), 0)  # rounding of a full row leaves less than nothing
    missing = missing.reshape(-1, *(1,) * (moment.ndim - 1))
    return _linear(shares, moment) + missing * jnp.mean(moment, axis=0, keepdims=True)


def _fresh_start(inner: optax.GradientTransformation, leaf: _Leaf, view: MatrixView, treedef: Any) -> Callable:
    def turn(array: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        dtype = state_dtype(array) if floating else jnp.float32
        fresh = inner.init(alone(treedef, leaf.parameter, jnp.zeros(view.low_rank_shape[-2:], dtype)))
        return jnp.asarray(jax.tree.leaves(fresh)[leaf.place]).astype(array.dtype)

    return turn
