# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Gives every projected matrix an inner state of its own, and so a bias-correction count that can start again alone.

An Optax state has one count for all parameters.  Here the inner transformation runs once for each projected matrix,

    s_k, N_k  =  inner(R_k; s_k)        k over the parameters and over the batch axes of each

with ``vmap`` over the batch axes, and once for all parameters that are not projected.  Elsewhere in the tree it is given
stands ``optax.MaskedNode()``, as in ``optax.partition``, so that masks and labels keep their structure.  What the inner
transformation takes over its whole tree, a global norm say, it takes over one matrix; a schedule and an injected
hyperparameter have one value for each matrix, and noise is the same for every matrix of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from galore_jax import codecs, sharding
from galore_jax._core.state_fields import parameter_index
from galore_jax.matrix_view import MatrixView


class PerMatrixState(NamedTuple):
    """State of :func:`per_matrix`.

    Of an empty tree, such as the placeholder of ``optax.tree.map_params``, ``matrices`` is that tree; so ``map_params`` takes
    every leaf of ``matrices``, counts as well, for one of a parameter.
    """

    matrices: Any  # for each parameter its inner state, arrays of (*batch, ...); MaskedNode where it is not projected
    rest: Any  # the inner state of the parameters that are not projected


class PerMatrix(optax.GradientTransformationExtraArgs):
    """What :func:`per_matrix` returns; ``inner`` is the transformation that runs on each matrix."""

    inner: optax.GradientTransformationExtraArgs

    def __new__(cls, init, update, inner):
        self = super().__new__(cls, init, update)
        self.inner = inner
        return self


def per_matrix(
    inner: optax.GradientTransformation, views_of: Callable[[Any], list[MatrixView | None]]
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on each projected matrix alone, and on everything else together.

    Args:
      inner: any Optax transformation.
      views_of: the view of each leaf of the low-rank tree that ``init`` and ``update`` are given, None where it is not
        projected.  Extra arguments reach ``inner`` as they are, the same for every matrix.

    Returns:
      A transformation whose state is a :class:`PerMatrixState`.

    >>> import jax.numpy as jnp
    >>> from galore_jax.matrix_view import select
    >>> views = select({"stack": jnp.ones((3, 8, 16)), "bias": jnp.ones((16,))}, rank=2)
    >>> state = per_matrix(optax.adam(1e-3), lambda _: views).init({"stack": jnp.zeros((3, 2, 16)), "bias": jnp.ones((16,))})
    >>> bias, stack = state.matrices
    >>> bias, stack[0].count.shape, stack[0].mu["stack"].shape, state.rest[0].mu["bias"].shape
    (MaskedNode(), (3,), (3, 2, 16), (16,))
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> PerMatrixState:
        leaves, treedef = jax.tree.flatten(params)
        views = views_of(params)

        def start(index: int, view: MatrixView | None, leaf: Any) -> Any:
            if view is None:
                return optax.MaskedNode()
            state = _over_batch(lambda matrix: inner.init(alone(treedef, index, matrix)), view)(leaf)
            return jax.tree.map(lambda array: _spread_like(array, leaf, len(view.batch_shape)), state)

        matrices = tuple(map(start, range(len(leaves)), views, leaves))
        return PerMatrixState(matrices or params, inner.init(_rest(treedef, views, leaves)))

    def update(
        updates: optax.Updates, state: PerMatrixState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PerMatrixState]:
        gradients, treedef = jax.tree.flatten(updates)
        views = views_of(updates)
        values = [None] * len(gradients) if params is None else treedef.flatten_up_to(params)

        def step(index: int, view: MatrixView) -> tuple[jax.Array, Any]:
            def one(gradient: jax.Array, state: Any, value: jax.Array | None) -> tuple[jax.Array, Any]:
                value = None if value is None else alone(treedef, index, value)
                replies, state = inner.update(alone(treedef, index, gradient), state, value, **extra_args)
                return treedef.flatten_up_to(replies)[index], state

            return _over_batch(one, view)(gradients[index], state.matrices[index], values[index])

        rest_values = None if params is None else _rest(treedef, views, values)
        replies, rest = inner.update(_rest(treedef, views, gradients), state.rest, rest_values, **extra_args)
        pairs = [
            (reply, optax.MaskedNode()) if view is None else step(index, view)
            for index, (view, reply) in enumerate(zip(views, treedef.flatten_up_to(replies), strict=True))
        ]
        matrices = tuple(state for _, state in pairs) or state.matrices
        return treedef.unflatten(reply for reply, _ in pairs), PerMatrixState(matrices, rest)

    return PerMatrix(init, update, inner)


def owners(inner: optax.GradientTransformation, state: Any, treedef: Any) -> list[int]:
    """The index of the parameter that each leaf of an inner state belongs to, or -1.

    Args:
      inner: the transformation whose state this is.
      state: of ``inner``; of :func:`per_matrix` too, where a matrix's count belongs to its parameter.
      treedef: of the tree that ``inner`` was given.

    Returns:
      One index for each leaf of the state as :func:`galore_jax.codecs.flatten` counts them.

    >>> import jax.numpy as jnp
    >>> params = {"bias": jnp.ones((16,)), "kernel": jnp.ones((8, 16))}
    >>> tx = optax.adam(1e-3)
    >>> owners(tx, tx.init(params), jax.tree.structure(params))
    [-1, 0, 1, 0, 1]
    """
    if not isinstance(inner, PerMatrix):
        return parameter_index(inner, state, treedef)
    matrices = [index for index, own in enumerate(state.matrices) for _ in codecs.flatten(own)[0]]
    return matrices + parameter_index(inner.inner, state.rest, treedef)


def alone(treedef: Any, index: int, leaf: Any) -> Any:
    """A tree that holds one leaf, and ``optax.MaskedNode()`` in place of the others."""
    return treedef.unflatten(leaf if i == index else optax.MaskedNode() for i in range(treedef.num_leaves))


def _rest(treedef: Any, views: list[MatrixView | None], leaves: list[Any]) -> Any:
    """The tree without its projected leaves."""
    return treedef.unflatten(
        leaf if view is None else optax.MaskedNode() for view, leaf in zip(views, leaves, strict=True)
    )


def _over_batch(function: Callable, view: MatrixView) -> Callable:
    for _ in view.batch_shape:
        function = jax.vmap(function)
    return function


def _spread_like(array: jax.Array, leaf: jax.Array, batch: int) -> jax.Array:
    """``array`` with its first axes sharded as those of ``leaf``: what ``init`` makes anew has no sharding along them."""
    spec = sharding.spec_of(leaf)
    if spec is None:
        return array
    own = sharding.spec_of(array) or (None,) * array.ndim
    return jax.sharding.reshard(array, sharding.named((*spec[:batch], *own[batch:]), leaf))
