# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How the inner optimizer's state is carried over when the basis of a matrix changes from P_old to P_new.

With Q = P_newᵀ P_old in R^(r x r), and ∘ the elementwise product:

    keep     no change: the state is read in the new basis as if it had been accumulated there (GaLore as published)
    rotate   linear      m' = Q m                                             exact inside both subspaces (Flora, LDAdam)
             quadratic   v' = (Q∘Q) v + (1 - Σ_j Q_ij²)₊ · mean over j of v_j   never negative
    reset    the moments and their bias-correction count start over as in a fresh optimizer; schedules continue

A second moment is the diagonal of a covariance whose off-diagonal entries are unknown, so no rule for it is exact.  Q∘Q is the
rule for independent coordinates.  If the old basis covers a new direction only in part, the rule fills the missing share with
the mean of v.  (Q v would let coordinates cancel.)  For a left basis, m is (r, n).  For a right basis, m is (m, r) and the same
rule applies to its columns, m' = m Qᵀ.  With both bases, the rule is applied to one side and then to the other.

:mod:`galore_jax._core.state_fields` knows which arrays of a state are linear and which are quadratic.  If a codec stores an
array, each matrix is decoded, rotated and encoded again in turn, with rounding to nearest.
"""

from __future__ import annotations

import dataclasses
import functools
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
    """How one leaf of the inner state is carried over to new bases."""

    parameter: int  # index of its parameter in jax.tree.leaves
    # Maps (one matrix's slice of the leaf, Q of the left basis or None, Q of the right basis or None) to the new slice.
    turn: Callable[[Any, jax.Array | None, jax.Array | None], Any]


def check_transport(transport: Any) -> None:
    """Raises ValueError if ``transport`` is unknown."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport is {transport!r}: write one of {', '.join(TRANSPORTS)}.")


def carriers(
    transport: str,
    inner: optax.GradientTransformation,
    state: Any,
    treedef: Any,
    views: list[MatrixView | None],
) -> list[Carrier | None]:
    """Returns how each leaf of an inner state is carried over to new bases.

    Args:
      transport: One of ``"keep"``, ``"rotate"`` and ``"reset"``.
      inner: The transformation that owns the state.  ``"reset"`` needs the result of
        :func:`galore_jax._core.per_matrix.per_matrix`, because a count that all matrices share cannot be reset for one of them.
      state: The inner state, as arrays or as their ``jax.ShapeDtypeStruct``.
      treedef: The structure of the low-rank tree that ``inner`` receives.
      views: The view of each leaf of that tree, or None for a leaf that is not projected.

    Returns:
      One entry for each leaf of the state, in the order of :func:`galore_jax.codecs.flatten`; None for a leaf that does not
      change.  A leaf with an entry is (*batch, ...).  Its ``turn`` takes and returns the slice of one matrix, without the batch
      axes and in the same storage format.

    Raises:
      ValueError: ``transport`` is unknown.  With ``"rotate"`` or ``"reset"``: an array of a projected parameter is in an unknown
        field or does not have the shape that its field has in Optax (a quantized moment, for example).  With ``"rotate"``: a
        second moment is centered.  With ``"reset"``: ``inner`` does not come from ``per_matrix``.

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

    @functools.cache
    def fresh(
        inner: optax.GradientTransformation, parameter: int, shape: tuple[int, ...]
    ) -> tuple[Any, Callable[[Any], list[Any]]]:
        """The program of the state of a new matrix of the parameter, and a function from a dtype to its leaves."""

        def start(dtype: Any) -> list[Any]:
            return codecs.flatten(inner.init(alone(treedef, parameter, jnp.zeros(shape, dtype))))[0]

        program = jax.make_jaxpr(start, static_argnums=0)(jnp.float32)
        # The text of a program does not show its constants.
        return parameter if program.consts else str(program), start

    return [
        None if view is None else _carrier(transport, inner, leaf, view, fresh)
        for leaf, view in _leaves(inner, state, treedef, views)
    ]


def mode_carriers(
    inner: optax.GradientTransformation, state: Any, treedef: Any, cores: list[tuple[str, tuple[int, ...]] | None]
) -> list[Callable[[int], Carrier] | None]:
    """Returns how each leaf of an inner state rotates with the basis of one axis of a tensor.

    Args:
      inner: The transformation that owns the state.
      state: The inner state, as arrays or as their ``jax.ShapeDtypeStruct``.
      treedef: The structure of the tree that ``inner`` receives.
      cores: The path and shape of each leaf of that tree, or None for a leaf that has no basis.

    Returns:
      A list like that of :func:`carriers`, but each entry is a function from the axis to the carrier.  The leaf has no batch
      axes, and ``turn`` takes the Q of that axis as the Q of the left basis.

    Raises:
      ValueError: An array of a parameter that has a basis is not a first or second moment with the shape of its core.
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
            f'changes with the bases of a core of shape {shape}: write transport="keep".'
        )
    return lambda axis: Carrier(parameter, _Rotation(label.kind, _Place(axis, None)))


class _Leaf(NamedTuple):
    """One leaf of an inner state."""

    shape: tuple[int, ...]
    # None for a leaf in an unknown field.
    kind: Kind | None
    # The class and the field that hold the leaf.
    name: str
    path: str
    # In a PerMatrixState, the index of the leaf in its matrix's own inner state.
    place: int
    # The index of the parameter that the leaf belongs to, or -1.
    parameter: int
    # Whether the leaf mirrors its parameter.  A count does not, even in a PerMatrixState, where it does belong to a parameter.
    is_copy: bool


def _leaves(
    inner: optax.GradientTransformation, state: Any, treedef: Any, views: list[MatrixView | None]
) -> list[tuple[_Leaf, MatrixView | None]]:
    """Returns each leaf of the state with the view of its parameter."""
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
    transport: str, inner: optax.GradientTransformation, leaf: _Leaf, view: MatrixView, fresh: Callable[..., tuple]
) -> Carrier | None:
    place = _placed(transport, leaf, view, isinstance(inner, PerMatrix))
    if place is None or (transport == "rotate" and place == (None, None)):
        return None
    if transport == "rotate":
        return Carrier(leaf.parameter, _Rotation(leaf.kind, place))
    if not isinstance(inner, PerMatrix):
        raise ValueError(
            f'transport="reset" cannot reset {_described(leaf, view)}, because all matrices share the counts of this '
            "state: write per_matrix(inner, views_of), which gives each matrix its own."
        )
    program, start = fresh(inner.inner, leaf.parameter, view.low_rank_shape[-2:])
    return Carrier(leaf.parameter, _FreshStart(program, leaf.place, start))


class _Place(NamedTuple):
    """The positions of the matrix axes in a slice of a leaf; None for an axis that the slice lacks."""

    left: int | None
    right: int | None


def _placed(transport: str, leaf: _Leaf, view: MatrixView, each: bool) -> _Place | None:
    """Returns the axes of a leaf that ``transport`` changes, or None if the leaf stays the same.

    Raises ValueError for an unknown leaf.  ``each`` is True if the inner transformation runs on each matrix separately.
    """
    if leaf.kind is Kind.KEPT or not (leaf.is_copy or leaf.kind is Kind.COUNT):
        return None
    if leaf.kind is Kind.COUNT:
        return _Place(None, None) if transport == "reset" else None
    if leaf.kind is Kind.CENTERED and transport == "rotate":
        raise ValueError(
            f'transport="rotate" cannot rotate {_described(leaf, view)}, because the variance can become negative when the '
            'mean and the mean square rotate separately: write transport="reset" or transport="keep".'
        )
    batch = len(view.batch_shape)
    # The shape that the inner transformation sees.
    seen = view.low_rank_shape[batch:] if each else view.low_rank_shape
    lead = view.batch_shape if each else ()
    axes = _axes_of(leaf.kind, seen)
    factored = leaf.kind in (Kind.ROW, Kind.COLUMN, Kind.UNFACTORED)
    if factored and leaf.shape == (*lead, 1) and [seen[axis] for axis in axes] != [1]:
        # Optax leaves a placeholder of shape (1,) in a statistic that it does not use.
        return None
    if leaf.kind is None or leaf.shape != (*lead, *(seen[axis] for axis in axes)):
        raise ValueError(
            f'transport="{transport}" does not know how {_described(leaf, view)} changes with a basis: write '
            'transport="keep".'
        )
    first = len(seen) - 2
    if not set(range(first)) <= set(axes):
        # All matrices of the stack share this statistic.
        return None
    inside = [axis - first for axis in axes if axis >= first]
    return _Place(*(inside.index(side) if side in inside else None for side in (0, 1)))


def _described(leaf: _Leaf, view: MatrixView) -> str:
    return f"{leaf.name} of {view.path!r} (inner state{leaf.path}, shape {leaf.shape})"


def _axes_of(kind: Kind | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of the gradient that a field keeps.

    Optax factors over the two largest axes; if two axes have the same size, the later one counts as larger.  A row statistic
    lacks the largest axis, and a column statistic lacks the second largest.
    """
    if kind is Kind.NORM:
        return ()
    second, largest = (int(axis) for axis in np.argsort(shape)[-2:])
    lacking = largest if kind is Kind.ROW else second if kind is Kind.COLUMN else None
    return tuple(axis for axis in range(len(shape)) if axis != lacking)


class _Rotation(NamedTuple):
    """Rotates a slice of one leaf.  Leaves that rotate the same way compare equal, so they can share one compiled refresh."""

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
    """Rotates a first moment: (r, ...) -> (r, ...)."""
    return jnp.tensordot(q, moment, 1, precision=jax.lax.Precision.HIGHEST)


def _quadratic(q: jax.Array, moment: jax.Array) -> jax.Array:
    """Rotates a second moment: (r, ...) -> (r, ...)."""
    shares = jnp.square(q)
    # The shares of a fully covered direction can round to more than 1.
    missing = jnp.maximum(1 - jnp.sum(shares, axis=1), 0)
    missing = missing.reshape(-1, *(1,) * (moment.ndim - 1))
    return _linear(shares, moment) + missing * jnp.mean(moment, axis=0, keepdims=True)


@dataclasses.dataclass(frozen=True)
class _FreshStart:
    """Starts a slice of one leaf over.  Leaves that start alike compare equal, so they can share one compiled refresh."""

    program: Any
    place: int
    start: Callable[[Any], list[Any]] = dataclasses.field(compare=False)

    def __call__(self, old: Any, left: jax.Array | None, right: jax.Array | None) -> Any:
        array = codecs.decoded(old)
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        start = codecs.decoded(self.start(state_dtype(array) if floating else jnp.float32)[self.place])
        return codecs.encoded_like(jnp.asarray(start).astype(array.dtype), old)
