# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Gives every projected matrix its own inner state, and so a bias-correction count that can be reset separately.

An Optax state has one count for all parameters.  Here the inner transformation runs once for each projected matrix,

    s_k, N_k  =  inner(R_k; s_k)        k over the parameters and over the batch axes of each

with ``vmap`` over the batch axes, and once for all parameters that are not projected.  Each call receives the whole tree, with
``optax.MaskedNode()`` in place of all other leaves, as in ``optax.partition``, so masks and labels keep their structure.  If the
inner transformation reduces over its whole tree, as a global norm does, it now reduces over one matrix.  A schedule and an
injected hyperparameter have one value for each matrix.  Noise is the same for all matrices of one shape.
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

    For an empty tree, such as the placeholder of ``optax.tree.map_params``, ``matrices`` is that tree.  ``map_params`` therefore
    treats every leaf of ``matrices``, including the counts, as a leaf of a parameter.
    """

    matrices: Any  # Inner state of each parameter, arrays (*batch, ...); MaskedNode if it is not projected
    rest: Any  # Inner state of the parameters that are not projected


class PerMatrix(optax.GradientTransformationExtraArgs):
    """The result of :func:`per_matrix`.  ``inner`` is the transformation that runs on each matrix."""

    inner: optax.GradientTransformationExtraArgs

    def __new__(cls, init, update, inner):
        self = super().__new__(cls, init, update)
        self.inner = inner
        return self


def per_matrix(
    inner: optax.GradientTransformation, views_of: Callable[[Any], list[MatrixView | None]]
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on each projected matrix separately, and on all other parameters together.

    Args:
      inner: Any Optax transformation.
      views_of: A function from the low-rank tree that ``init`` or ``update`` receives to the view of each leaf, None for a leaf
        that is not projected.

    Returns:
      A transformation whose state is a :class:`PerMatrixState`.  It passes extra arguments to ``inner`` unchanged, the same for
      every matrix.

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
    """Returns the index of the parameter that each leaf of an inner state belongs to.

    Args:
      inner: The transformation that owns the state.
      state: The state of ``inner``.  In a :class:`PerMatrixState`, the count of a matrix belongs to its parameter.
      treedef: The structure of the tree that ``inner`` receives.

    Returns:
      One index for each leaf of the state, in the order of :func:`galore_jax.codecs.flatten`; -1 for a leaf that belongs to no
      parameter.

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
    """Returns a tree that holds one leaf, with ``optax.MaskedNode()`` in place of the others."""
    return treedef.unflatten(leaf if i == index else optax.MaskedNode() for i in range(treedef.num_leaves))


def _rest(treedef: Any, views: list[MatrixView | None], leaves: list[Any]) -> Any:
    """Returns the tree with ``optax.MaskedNode()`` in place of its projected leaves."""
    return treedef.unflatten(
        leaf if view is None else optax.MaskedNode() for view, leaf in zip(views, leaves, strict=True)
    )


def _over_batch(function: Callable, view: MatrixView) -> Callable:
    for _ in view.batch_shape:
        function = jax.vmap(function)
    return function


def _spread_like(array: jax.Array, leaf: jax.Array, batch: int) -> jax.Array:
    """Shards the batch axes of ``array`` like those of ``leaf``, because arrays that ``init`` creates are not sharded there."""
    spec = sharding.spec_of(leaf)
    if spec is None:
        return array
    own = sharding.spec_of(array) or (None,) * array.ndim
    return jax.sharding.reshard(array, sharding.named((*spec[:batch], *own[batch:]), leaf))
