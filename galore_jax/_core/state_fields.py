# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What the arrays of an Optax state are: known by the name of the state's class and of its fields."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import codecs

NO_PARAMETER = -1  # marks a leaf that belongs to no parameter


class Kind(enum.Enum):
    """What a field of a state is."""

    LINEAR = enum.auto()  # in the gradient
    QUADRATIC = enum.auto()
    CENTRED = enum.auto()  # a mean and a mean square whose difference is a variance: only together could they turn
    ROW = enum.auto()  # a factored second moment, see galore_jax.transport
    COLUMN = enum.auto()
    UNFACTORED = enum.auto()  # a second moment, or (1,) where that one is factored
    NORM = enum.auto()  # a scalar a parameter, which no rotation changes
    COUNT = enum.auto()  # of bias correction, or what else says that a state is new
    KEPT = enum.auto()  # left as it is, whatever it holds
    NESTED = enum.auto()  # another state


def _kinds(names: str, **others: Kind) -> dict[str, Kind]:
    """Kinds by the usual names, and others."""
    usual = {"count": Kind.COUNT, "mu": Kind.LINEAR, "nu": Kind.QUADRATIC}
    return {name: usual[name] for name in names.split()} | others


# Optax's classes by name, and three of ours.  What is not here is unknown on purpose: SM3's maxima over an axis, Rprop's step
# sizes and the parameters of some steps ago (Prodigy, schedule-free, ...) do not go over to another basis.  Adamax keeps max |g|
# in the nu of ScaleByAdamState: it turns as if it were a second moment.
_STATES: dict[str, dict[str, Kind]] = {
    "ScaleByAdamState": _kinds("count mu nu"),
    "ScaleByAmsgradState": _kinds("count mu nu", nu_max=Kind.QUADRATIC),
    "ScaleByBeliefState": _kinds("count mu nu"),
    "ScaleByLionState": _kinds("count mu"),
    "ScaleByNovogradState": _kinds("count mu", nu=Kind.NORM),
    "ScaleByRmsState": _kinds("nu"),
    "ScaleByRmsWithCountState": _kinds("count nu"),
    "ScaleByRStdDevState": _kinds("", mu=Kind.CENTRED, nu=Kind.CENTRED),
    "ScaleByRStdDevWithCountState": _kinds("count", mu=Kind.CENTRED, nu=Kind.CENTRED),
    "ScaleByRssState": _kinds("", sum_of_squares=Kind.QUADRATIC),
    "ScaleByAdaDeltaState": _kinds("", e_g=Kind.QUADRATIC, e_x=Kind.QUADRATIC),
    # v is a mean of differences of gradients, g the last gradient.
    "ScaleByAdanState": _kinds("", m=Kind.LINEAR, v=Kind.LINEAR, n=Kind.QUADRATIC, g=Kind.LINEAR, t=Kind.COUNT),
    # count_m2 is the argument of the schedules of b3 and alpha.
    "ScaleByAdemamixState": _kinds("count nu", count_m2=Kind.KEPT, m1=Kind.LINEAR, m2=Kind.LINEAR),
    "ScaleBySimplifiedAdEMAMixState": _kinds("", t=Kind.COUNT, m=Kind.LINEAR, n=Kind.QUADRATIC),
    "ScaleByOptimisticGradientState": _kinds("", is_initial_step=Kind.COUNT, previous_gradient=Kind.LINEAR),
    "FactoredState": _kinds("count", v_row=Kind.ROW, v_col=Kind.COLUMN, v=Kind.UNFACTORED),
    "MuonState": _kinds("count mu", ns_coeffs=Kind.KEPT),
    "TraceState": _kinds("", trace=Kind.LINEAR),
    "EmaState": _kinds("count", ema=Kind.LINEAR),
    "ApplyEvery": _kinds("count", grad_acc=Kind.LINEAR),
    "MultiStepsState": _kinds(
        "",
        mini_step=Kind.COUNT,
        gradient_step=Kind.KEPT,
        inner_opt_state=Kind.NESTED,
        acc_grads=Kind.LINEAR,
        skip_state=Kind.KEPT,
    ),
    "LDAdamState": _kinds("mu nu", step=Kind.COUNT, basis=Kind.KEPT, error=Kind.LINEAR),
    "ZeroNansState": _kinds("", found_nan=Kind.KEPT),
    "TuckerState": dict.fromkeys(("count", "skipped", "kept", "rejected", "basis"), Kind.KEPT)
    | {"inner_state": Kind.NESTED},
    "QuantizeState": _kinds("", count=Kind.KEPT, inner_state=Kind.NESTED),
}


class Label(NamedTuple):
    """One leaf of a state."""

    shape: tuple[int, ...]
    kind: Kind | None  # None: in no known field
    name: str  # the class and the field that hold it
    path: str


def labelled(state: Any) -> list[Label]:
    """A label for each leaf of a state, in order; an array stored by a codec is one leaf.

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
    fields = getattr(node, "_fields", None)
    known = _STATES.get(type(node).__name__, {}) if fields else {}
    known = known if fields and set(fields) <= set(known) else {}
    found = []
    for keys, child in children:
        field = getattr(keys[0], "name", None)
        if kind is None and field is not None:  # a field of a known state holds parameters, whatever their classes
            inside = None if known.get(field) is Kind.NESTED else known.get(field)
            found += _labelled(child, inside, f"{type(node).__name__}.{field}", path + keys)
        else:
            found += _labelled(child, kind, name, path + keys)
    return found


def parameter_index(inner: optax.GradientTransformation, state: Any, treedef: Any) -> list[int]:
    """For each leaf of ``state`` the index of the parameter it belongs to, or -1; a coded array is one leaf."""
    indices = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    tree = optax.tree.map_params(
        inner.init,
        lambda copy, indices: jax.tree.map(lambda i, leaves: jax.tree.map(lambda _: i, leaves), indices, copy),
        state,
        indices,
        transform_non_params=lambda leaf: jax.tree.map(lambda _: NO_PARAMETER, leaf),
        # A whole copy of the tree at once: in it a parameter may have several leaves (SM3) or none (masked).
        is_leaf=lambda _: True,
    )
    return [jax.tree.leaves(leaf)[0] for leaf in codecs.flatten(tree)[0]]
