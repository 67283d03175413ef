# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One transformation for the projected parameters and another for all others.

This is ``optax.partition`` with the library's own choice of parameters (:func:`galore_jax.matrix_view.select`), for methods that
have no step for an embedding, a norm or a bias.  As in ``optax.partition``, each of the two transformations gets the whole tree
with ``optax.MaskedNode()`` in place of the parameters of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from galore_jax._core import gradients as guards, ranks, state_fields, trees
from galore_jax._core.call import Action, call_of
from galore_jax._core.dtypes import promoted
from galore_jax._core.state import GaLoreState
from galore_jax._core.step import warn_if_whole
from galore_jax.matrix_view import MatrixView, Rank, Views, decisions, select, views_of


class OnMatricesState(NamedTuple):
    """State of :func:`on_matrices`."""

    matrices: Any
    rest: Any


def on_matrices(
    build: Callable[[Views], optax.GradientTransformation],
    rest: optax.GradientTransformation,
    *,
    rank: Rank | jax.Array,
    proj_type: str = "std",
    mask: Any = None,
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``build(views)`` on the projected parameters and ``rest`` on the others, in at least float32.

    If a gradient of the others is not finite, that parameter gets a zero update and keeps its state in ``rest``.  Entries of the
    reply of ``rest`` that are not finite become zeros one by one.  Low-rank accumulation raises a ValueError.

    Args:
      build: A function that makes a transformation of matrices from their views, which stand for ``weight_dimension_numbers``.
        Its state has bases in trees like the parameters.
      rest: Any Optax transformation.
      rank, proj_type, mask, weight_dimension_numbers: The arguments of :func:`galore_jax.matrix_view.select`, which chooses the
        projected parameters.  A rank that is an array is read off the bases in ``update``.

    >>> import jax.numpy as jnp
    >>> from galore_jax import galore
    >>> build = lambda views: galore(optax.trace(0.9), weight_dimension_numbers=views)
    >>> tx = on_matrices(build, optax.scale_by_adam(), rank=2)
    >>> state = tx.init({"kernel": jnp.ones((4, 8)), "bias": jnp.ones((8,))})
    >>> [x.shape for x in jax.tree.leaves(state.matrices.inner_state)], [x.shape for x in jax.tree.leaves(state.rest)]
    ([(2, 8)], [(), (8,), (8,)])
    """
    rest = optax.with_extra_args_support(rest)
    choices = {"proj_type": proj_type, "mask": mask, "weight_dimension_numbers": weight_dimension_numbers}

    def matrices_of(views: list[MatrixView | None]) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(build(Views(view for view in views if view is not None)))

    def init(params: optax.Params) -> OnMatricesState:
        known = ranks.at_init(rank)
        leaves, treedef = trees.flatten(trees.as_arrays(params))
        decided = decisions(params, rank=known, **choices)
        warn_if_whole(params, decided, proj_type)
        views = views_of(decided)
        ours, theirs = _split(views, leaves, treedef)
        return OnMatricesState(matrices_of(views).init(ours), rest.init(jax.tree.map(promoted, theirs)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, OnMatricesState]:
        # From a copy, because a galore among the matrices answers the same call.
        action = call_of(dict(extra_args)).action
        if action in (Action.PROJECT, Action.APPLY):
            raise ValueError(
                "This optimizer needs the whole gradient, which low-rank accumulation does not keep: accumulate whole gradients."
            )
        if params is not None:
            trees.check_gradients(updates, params)
        leaves, treedef = trees.flatten(trees.as_arrays(updates))
        known = ranks.in_update(rank, updates, *_bases_of(state.matrices)) if isinstance(rank, jax.Array) else rank
        views = select(updates, rank=known, **choices)
        ours, theirs = _split(views, leaves, treedef)
        our_params = their_params = None
        if params is not None:
            our_params, their_params = _split(views, treedef.flatten_up_to(trees.as_arrays(params)), treedef)
        ours, matrices = matrices_of(views).update(ours, state.matrices, our_params, **extra_args)
        if action is Action.REFRESH:
            return updates, state._replace(matrices=matrices)
        theirs, others = _update_guarded(rest, theirs, state.rest, their_params, **extra_args)
        both = zip(views, treedef.flatten_up_to(ours), treedef.flatten_up_to(theirs), strict=True)
        replies = treedef.unflatten(other if view is None else own for view, own, other in both)
        return replies, OnMatricesState(matrices, others)

    return optax.GradientTransformationExtraArgs(init, update)


def _bases_of(state: Any) -> tuple[Any, ...]:
    return (state.left, state.right) if isinstance(state, GaLoreState) else (state.basis,)


def _split(views: list[MatrixView | None], leaves: list[Any], treedef: Any) -> tuple[Any, Any]:
    """The tree of the leaves with a view, and the tree of the others."""
    pairs = list(zip(views, leaves, strict=True))
    ours = (leaf if view is not None else optax.MaskedNode() for view, leaf in pairs)
    theirs = (leaf if view is None else optax.MaskedNode() for view, leaf in pairs)
    return treedef.unflatten(ours), treedef.unflatten(theirs)


def _update_guarded(
    tx: optax.GradientTransformationExtraArgs, updates: Any, state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
    gradients, treedef = jax.tree.flatten(updates)
    if not gradients:
        return updates, state
    params = None if params is None else jax.tree.map(promoted, params)

    def update(usable: list[jax.Array]) -> tuple[list[jax.Array], Any]:
        replies, new = tx.update(treedef.unflatten(usable), state, params, **extra_args)
        return treedef.flatten_up_to(replies), new

    done = guards.update_guarded(
        update,
        list(map(promoted, gradients)),
        [0] * len(gradients),
        [False] * len(gradients),
        lambda new: state_fields.parameter_index(tx, new, treedef),
        state,
    )
    pairs = zip(done.replies, gradients, strict=True)
    return treedef.unflatten(reply.astype(gradient.dtype) for reply, gradient in pairs), done.inner_state
