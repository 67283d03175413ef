# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What the arrays of an optimizer state are.

A state class of this library says it in an attribute ``FIELD_KINDS``, a dict from field names to kinds.  Optax's classes are
listed here by name.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import codecs

# Marks a leaf that belongs to no parameter.
NO_PARAMETER = -1


class Kind(enum.Enum):
    """What a field of a state is."""

    # In the gradient.
    LINEAR = enum.auto()
    QUADRATIC = enum.auto()
    # A mean and a mean square whose difference is a variance.  They could only rotate together.
    CENTERED = enum.auto()
    # A factored second moment, see galore_jax.transport.
    ROW = enum.auto()
    COLUMN = enum.auto()
    # A second moment; (1,) if that one is factored.
    UNFACTORED = enum.auto()
    # One scalar per parameter, which does not change with the basis.
    NORM = enum.auto()
    # Of bias correction, or another mark of a new state.
    COUNT = enum.auto()
    # Left unchanged, whatever it holds.
    KEPT = enum.auto()
    # Another state.
    NESTED = enum.auto()


def kinds(names: str, **others: Kind) -> dict[str, Kind]:
    """The kinds of fields with common names, and of others."""
    usual = {"count": Kind.COUNT, "mu": Kind.LINEAR, "nu": Kind.QUADRATIC}
    return {name: usual[name] for name in names.split()} | others


# Optax's classes by name.  Classes that are missing are unknown on purpose: SM3's maxima over an axis, Rprop's step sizes and
# earlier parameters (Prodigy, schedule-free, ...) cannot be carried into another basis.  Adamax keeps max |g| in the nu of
# ScaleByAdamState, which rotates as if it were a second moment.
_STATES: dict[str, dict[str, Kind]] = {
    "ScaleByAdamState": kinds("count mu nu"),
    "ScaleByAmsgradState": kinds("count mu nu", nu_max=Kind.QUADRATIC),
    "ScaleByBeliefState": kinds("count mu nu"),
    "ScaleByLionState": kinds("count mu"),
    "ScaleByNovogradState": kinds("count mu", nu=Kind.NORM),
    "ScaleByRmsState": kinds("nu"),
    "ScaleByRmsWithCountState": kinds("count nu"),
    "ScaleByRStdDevState": kinds("", mu=Kind.CENTERED, nu=Kind.CENTERED),
    "ScaleByRStdDevWithCountState": kinds("count", mu=Kind.CENTERED, nu=Kind.CENTERED),
    "ScaleByRssState": kinds("", sum_of_squares=Kind.QUADRATIC),
    "ScaleByAdaDeltaState": kinds("", e_g=Kind.QUADRATIC, e_x=Kind.QUADRATIC),
    # v is a mean of differences of gradients, g the last gradient.
    "ScaleByAdanState": kinds("", m=Kind.LINEAR, v=Kind.LINEAR, n=Kind.QUADRATIC, g=Kind.LINEAR, t=Kind.COUNT),
    # count_m2 is the argument of the schedules of b3 and alpha.
    "ScaleByAdemamixState": kinds("count nu", count_m2=Kind.KEPT, m1=Kind.LINEAR, m2=Kind.LINEAR),
    "ScaleBySimplifiedAdEMAMixState": kinds("", t=Kind.COUNT, m=Kind.LINEAR, n=Kind.QUADRATIC),
    "ScaleByOptimisticGradientState": kinds("", is_initial_step=Kind.COUNT, previous_gradient=Kind.LINEAR),
    "FactoredState": kinds("count", v_row=Kind.ROW, v_col=Kind.COLUMN, v=Kind.UNFACTORED),
    "MuonState": kinds("count mu", ns_coeffs=Kind.KEPT),
    "TraceState": kinds("", trace=Kind.LINEAR),
    "EmaState": kinds("count", ema=Kind.LINEAR),
    "ApplyEvery": kinds("count", grad_acc=Kind.LINEAR),
    "MultiStepsState": kinds(
        "",
        mini_step=Kind.COUNT,
        gradient_step=Kind.KEPT,
        inner_opt_state=Kind.NESTED,
        acc_grads=Kind.LINEAR,
        skip_state=Kind.KEPT,
    ),
    "ZeroNansState": kinds("", found_nan=Kind.KEPT),
}


class Label(NamedTuple):
    """One leaf of a state."""

    shape: tuple[int, ...]
    # None if it is in no known field.
    kind: Kind | None
    # Class and field that hold it.
    name: str
    path: str


def labelled(state: Any) -> list[Label]:
    """A label for each leaf of a state, in order.  An encoded array is one leaf.

    >>> import optax
    >>> [label.name for label in labelled(optax.adam(0.1).init({"w": jnp.zeros((2, 3))}))]
    ['ScaleByAdamState.count', 'ScaleByAdamState.mu', 'ScaleByAdamState.nu']
    """
    return _labelled(state, None, "an array", ())


def _labelled(node: Any, kind: Kind | None, name: str, path: tuple) -> list[Label]:
    if codecs.is_coded(node):
        return [Label(node.shape, kind, name, jax.tree_util.keystr(path))]
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(children) == 1 and children[0][1] is node:
        return [Label(jnp.shape(node), kind, name, jax.tree_util.keystr(path))]
    known = _kinds_of(node)
    found = []
    for keys, child in children:
        field = getattr(keys[0], "name", None)
        # A field of a known state holds parameters, whatever their classes.
        if kind is None and field is not None:
            inside = None if known.get(field) is Kind.NESTED else known.get(field)
            found += _labelled(child, inside, f"{type(node).__name__}.{field}", path + keys)
        else:
            found += _labelled(child, kind, name, path + keys)
    return found


def _kinds_of(node: Any) -> dict[str, Kind]:
    """The kinds of the fields of a state.  An Optax class with a field that is not listed is unknown altogether."""
    own, fields = getattr(node, "FIELD_KINDS", None), getattr(node, "_fields", None)
    if own is not None or fields is None:
        return own or {}
    known = _STATES.get(type(node).__name__, {})
    return known if set(fields) <= set(known) else {}


def parameter_index(inner: optax.GradientTransformation, state: Any, treedef: Any) -> list[int]:
    """For each leaf of ``state``, the index of the parameter that it belongs to, or -1.  An encoded array is one leaf."""
    indices = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    tree = optax.tree.map_params(
        inner.init,
        lambda copy, indices: jax.tree.map(lambda i, leaves: jax.tree.map(lambda _: i, leaves), indices, copy),
        state,
        indices,
        transform_non_params=lambda leaf: jax.tree.map(lambda _: NO_PARAMETER, leaf),
        # A whole copy of the tree at once, because a parameter may have several leaves in it (SM3) or none (masked).
        is_leaf=lambda _: True,
    )
    return [jax.tree.leaves(leaf)[0] for leaf in codecs.flatten(tree)[0]]
