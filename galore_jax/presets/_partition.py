# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One transformation for the parameters that are projected, another for everything else.

``optax.partition`` with the library's own rules (:func:`galore_jax.matrix_view.select`) for which is which, for methods whose
step on a matrix is none for an embedding, a norm or a bias.  As there, each transformation is given the whole tree with
``optax.MaskedNode()`` in place of what is not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax._core import gradients as guards, state_fields
from galore_jax._core.call import Action, call_of
from galore_jax._core.dtypes import promoted
from galore_jax.matrix_view import MatrixView, Views


class OnMatricesState(NamedTuple):
    """State of :func:`on_matrices`."""

    matrices: Any
    rest: Any


def on_matrices(
    build: Callable[[Views], optax.GradientTransformation],
    rest: optax.GradientTransformation,
    views_of: Callable[[Any], list[MatrixView | None]],
) -> optax.GradientTransformationExtraArgs:
    """``build(views)`` on the parameters that ``views_of`` has a view of, ``rest`` on the others in at least float32.

    A gradient of the others that is not finite reaches no state of ``rest``, and its update is zero.  Low-rank accumulation is
    refused.

    Args:
      build: makes a transformation of matrices from their views, which stand for ``weight_dimension_numbers``.
      rest: any Optax transformation.
      views_of: the view of each leaf of a tree, None for a leaf that is not projected.

    >>> from galore_jax.matrix_view import select
    >>> tx = on_matrices(lambda views: optax.trace(0.9), optax.scale_by_adam(), lambda params: select(params, rank=2))
    >>> state = tx.init({"kernel": jnp.ones((4, 8)), "bias": jnp.ones((8,))})
    >>> [leaf.shape for leaf in jax.tree.leaves(state.matrices)], [leaf.shape for leaf in jax.tree.leaves(state.rest)]
    ([(4, 8)], [(), (8,), (8,)])
    """
    rest = optax.with_extra_args_support(rest)

    def matrices_of(views: list[MatrixView | None]) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(build(Views(view for view in views if view is not None)))

    def init(params: optax.Params) -> OnMatricesState:
        leaves, treedef = jax.tree.flatten(params)
        views = views_of(params)
        ours, theirs = _split(views, leaves, treedef)
        return OnMatricesState(matrices_of(views).init(ours), rest.init(jax.tree.map(promoted, theirs)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, OnMatricesState]:
        if call_of(dict(extra_args)).action in (Action.PROJECT, Action.APPLY):
            raise ValueError(
                "This optimizer needs the whole gradient, which low-rank accumulation does not keep: accumulate whole gradients."
            )
        leaves, treedef = jax.tree.flatten(updates)
        views = views_of(updates)
        ours, theirs = _split(views, leaves, treedef)
        our_params = their_params = None
        if params is not None:
            our_params, their_params = _split(views, treedef.flatten_up_to(params), treedef)
        ours, new_matrices = matrices_of(views).update(ours, state.matrices, our_params, **extra_args)
        theirs, new_rest = _update_guarded(rest, theirs, state.rest, their_params, **extra_args)
        both = zip(views, treedef.flatten_up_to(ours), treedef.flatten_up_to(theirs), strict=True)
        replies = treedef.unflatten(other if view is None else own for view, own, other in both)
        return replies, OnMatricesState(new_matrices, new_rest)

    return optax.GradientTransformationExtraArgs(init, update)


def _split(views: list[MatrixView | None], leaves: list[Any], treedef: Any) -> tuple[Any, Any]:
    """The tree of the leaves with a view, and that of the others."""
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
    good = [jnp.all(jnp.isfinite(gradient)) for gradient in gradients]
    usable = [jnp.where(flag, promoted(gradient), 0) for flag, gradient in zip(good, gradients, strict=True)]
    params = None if params is None else jax.tree.map(promoted, params)
    replies, new = tx.update(treedef.unflatten(usable), state, params, **extra_args)
    new = guards.hold_bad(state_fields.parameter_index(tx, new, treedef), new=new, old=state, good=good)
    triples = zip(good, treedef.flatten_up_to(replies), gradients, strict=True)
    return treedef.unflatten(jnp.where(flag, reply, 0).astype(gradient.dtype) for flag, reply, gradient in triples), new
