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

Which arrays of a state are linear and which quadratic, :mod:`galore_jax._core.state_fields` knows.  An array that is stored by a codec is
decoded, turned and stored again, rounded to nearest, one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import codecs
from galore_jax._core.dtypes import promoted, state_dtype
from galore_jax._core.per_matrix import PerMatrix, alone, owners
from galore_jax._core.state_fields import Kind, Label, labelled, parameter_index
from galore_jax.matrix_view import MatrixView

TRANSPORTS = ("keep", "rotate", "reset")


class Carrier(NamedTuple):
    """How one leaf of the inner state goes over to new bases."""

    parameter: int  # in the order of jax.tree.leaves
    # (one matrix's slice of the leaf, Q of the left basis or None, Q of the right basis or None) -> its new value
    turn: Callable[[Any, jax.Array | None, jax.Array | None], Any]


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
      inner: the transformation whose state this is; for reset that of :func:`galore_jax._core.per_matrix.per_matrix`, because a
        count that all matrices share cannot start again for one.
      state: arrays or their ``jax.ShapeDtypeStruct``.
      treedef: of the low-rank tree that ``inner`` was given.
      views: of its leaves, None where it is not projected.

    Returns:
      One entry for each leaf of the state as :func:`galore_jax.codecs.flatten` counts them; None for a leaf that stays as it
      is.  A leaf with an entry is (*batch, ...), and ``turn`` takes and returns the part behind the batch axes, stored alike.

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
        return [None] * len(codecs.flatten(state)[0])
    return [
        None if view is None else _carrier(transport, inner, leaf, view, treedef)
        for leaf, view in _leaves(inner, state, treedef, views)
    ]


def mode_carriers(
    inner: optax.GradientTransformation, state: Any, treedef: Any, cores: list[tuple[str, tuple[int, ...]] | None]
) -> list[Callable[[int], Carrier] | None]:
    """How each leaf of an inner state rotates with the basis of one axis of a tensor.

    Args:
      inner: the transformation whose state this is.
      state: arrays or their ``jax.ShapeDtypeStruct``.
      treedef: of the tree that ``inner`` was given.
      cores: of its leaves the path and the shape, None for a leaf that no basis turns.

    Returns:
      As :func:`carriers`, with a function of the axis in the place of each entry; the leaf has no batch axes, and ``turn`` takes
      the overlap along that axis for the Q of the left basis.

    Raises:
      ValueError: for an array of a parameter that is neither a first nor a second moment of its shape.
    """
    pairs = zip(labelled(state), parameter_index(inner, state, treedef), strict=True)
    return [_mode_carrier(label, parameter, cores[parameter] if parameter >= 0 else None) for label, parameter in pairs]


def _mode_carrier(
    label: Label, parameter: int, core: tuple[str, tuple[int, ...]] | None
) -> Callable[[int], Carrier] | None:
    if core is None or label.kind in (Kind.COUNT, Kind.KEPT, Kind.NORM):
        return None
    path, shape = core
    if label.kind not in (Kind.LINEAR, Kind.QUADRATIC) or label.shape != shape:
        raise ValueError(
            f'transport="rotate" does not know how {label.name} of {path!r} (inner state{label.path}, shape {label.shape}) '
            f'turns with the bases of a core of shape {shape}: write transport="keep".'
        )
    return lambda axis: Carrier(parameter, _Rotation(label.kind, _Place(axis, None)))


class _Leaf(NamedTuple):
    """One leaf of an inner state."""

    shape: tuple[int, ...]
    kind: Kind | None  # None: in no known field
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
    copies = [index for part in states for index in parameter_index(one, part, treedef)]
    labels = [(label, place) for part in states for place, label in enumerate(labelled(part))]
    return [
        (_Leaf(*label, place, parameter, copy >= 0), views[parameter] if parameter >= 0 else None)
        for (label, place), parameter, copy in zip(labels, owners(inner, state, treedef), copies, strict=True)
    ]


def _carrier(
    transport: str, inner: optax.GradientTransformation, leaf: _Leaf, view: MatrixView, treedef: Any
) -> Carrier | None:
    each = isinstance(inner, PerMatrix)
    place = _placed(transport, leaf, view, each)
    if place is None or (transport == "rotate" and place == (None, None)):
        return None
    if transport == "rotate":
        return Carrier(leaf.parameter, _Rotation(leaf.kind, place))
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
    if leaf.kind is Kind.KEPT or not (leaf.is_copy or leaf.kind is Kind.COUNT):
        return None
    if leaf.kind is Kind.COUNT:
        return _Place(None, None) if transport == "reset" else None
    if leaf.kind is Kind.CENTERED and transport == "rotate":
        raise ValueError(
            f'transport="rotate" cannot turn {_described(leaf, view)}, because the variance that a mean and a mean square '
            'make up turns negative when they turn apart: write transport="reset" or transport="keep".'
        )
    batch = len(view.batch_shape)
    seen = view.low_rank_shape[batch:] if each else view.low_rank_shape  # by the inner transformation
    lead = view.batch_shape if each else ()
    axes = _axes_of(leaf.kind, seen)
    factored = leaf.kind in (Kind.ROW, Kind.COLUMN, Kind.UNFACTORED)
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


def _axes_of(kind: Kind | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of the gradient that a field keeps.

    Optax factors over the two largest axes, the later one of equals being the larger: a row statistic lacks the largest, a
    column statistic the second.
    """
    if kind is Kind.NORM:
        return ()
    second, largest = (int(axis) for axis in np.argsort(shape)[-2:])
    lacking = largest if kind is Kind.ROW else second if kind is Kind.COLUMN else None
    return tuple(axis for axis in range(len(shape)) if axis != lacking)


class _Rotation(NamedTuple):
    """Rotates a slice of one leaf; equal for leaves that turn alike, so that these can share one compiled refresh."""

    kind: Kind | None
    place: _Place

    def __call__(self, leaf: Any, left: jax.Array | None, right: jax.Array | None) -> Any:
        rule = _linear if self.kind is Kind.LINEAR else _quadratic
        array = codecs.decoded(leaf)
        turned = promoted(array)
        for axis, q in zip(self.place, (left, right), strict=True):
            if axis is not None and q is not None:
                turned = jnp.swapaxes(rule(q.astype(turned.dtype), jnp.swapaxes(turned, 0, axis)), 0, axis)
        return codecs.encoded_like(turned.astype(array.dtype), leaf)


def _linear(q: jax.Array, moment: jax.Array) -> jax.Array:
    """(r, ...) -> the same"""
    return jnp.tensordot(q, moment, 1, precision=jax.lax.Precision.HIGHEST)


def _quadratic(q: jax.Array, moment: jax.Array) -> jax.Array:
    """(r, ...) -> the same"""
    shares = jnp.square(q)
    missing = jnp.maximum(1 - jnp.sum(shares, axis=1), 0)  # rounding of a full row leaves less than nothing
    missing = missing.reshape(-1, *(1,) * (moment.ndim - 1))
    return _linear(shares, moment) + missing * jnp.mean(moment, axis=0, keepdims=True)


def _fresh_start(inner: optax.GradientTransformation, leaf: _Leaf, view: MatrixView, treedef: Any) -> Callable:
    def turn(old: Any, left: jax.Array | None, right: jax.Array | None) -> Any:
        array = codecs.decoded(old)
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        dtype = state_dtype(array) if floating else jnp.float32
        fresh = inner.init(alone(treedef, leaf.parameter, jnp.zeros(view.low_rank_shape[-2:], dtype)))
        start = codecs.decoded(codecs.flatten(fresh)[0][leaf.place])
        return codecs.encoded_like(jnp.asarray(start).astype(array.dtype), old)

    return turn
