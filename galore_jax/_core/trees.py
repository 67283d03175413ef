# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Parameter trees of any library: numbers among the leaves, arrays in boxes, and gradients of another structure.

A box is a node that wraps a single array together with metadata about its axes, such as ``nnx.Param``, ``nn.Partitioned`` or
a Haliax ``NamedArray``.  The metadata holds for an array of that shape only, so trees of state hold a bare array wherever the
shape differs from the parameter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

_CONTAINERS = (Mapping, list, tuple, optax.MaskedNode, type(None))


def is_box(node: Any) -> bool:
    """Whether a node of a tree wraps a single array.

    >>> is_box({"kernel": jnp.ones(2)}), is_box(jnp.ones(2))
    (False, False)
    """
    if isinstance(node, _CONTAINERS):
        return False
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return len(children) == 1 and children[0] is not node and jax.tree_util.all_leaves(children)


def one_of(stacked: Any) -> Any:
    """The shapes and dtypes of one of the trees in a stack along the first axis of every leaf.

    >>> one_of({"kernel": jnp.ones((3, 4, 8))})
    {'kernel': ShapeDtypeStruct(shape=(4, 8), dtype=float32)}
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)


def squared_norm(tree: Any) -> jax.Array:
    """The sum of the squares of all entries, a float32 scalar.

    >>> float(squared_norm({"a": jnp.ones((2, 3)), "b": jnp.full((1,), 2.0)}))
    10.0
    """
    squares = (jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
    return sum(squares, start=jnp.zeros([], jnp.float32))


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree, boxes included, and the structure around them."""
    return jax.tree.flatten(tree, is_leaf=is_box)


def array_of(leaf: Any) -> Any:
    """The array in a box, or the leaf itself; a Python number becomes an array."""
    [array] = jax.tree.leaves(leaf)
    return array if hasattr(array, "dtype") else jnp.asarray(array)


def boxed_like(array: Any, leaf: Any) -> Any:
    """``array`` in a box like ``leaf`` if ``leaf`` is one and its array has the same shape; otherwise the array itself."""
    if not is_box(leaf) or jnp.shape(array) != jnp.shape(jax.tree.leaves(leaf)[0]):
        return array
    return jax.tree.map(lambda _: array, leaf)


def as_arrays(tree: Any) -> Any:
    """The tree with its Python numbers as arrays.

    >>> as_arrays({"temperature": 0.5})["temperature"].shape
    ()
    """
    return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf), tree)


def paths_of(tree: Any, is_leaf: Any = None) -> list[str]:
    """The '/'-separated path of each leaf.

    >>> paths_of({"mlp": {"kernel": 0, "bias": 1}})
    ['mlp/bias', 'mlp/kernel']
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def check_gradients(updates: Any, params: Any) -> None:
    """Raises a ValueError unless the gradients have the structure and the shapes of the parameters.

    Shapes are static, so the check costs nothing in a compiled program.

    >>> check_gradients({"a": jnp.ones((2, 3))}, {"a": jnp.ones((3, 2))})
    Traceback (most recent call last):
    ValueError: The gradient of 'a' has shape (2, 3), but the parameter has shape (3, 2): ...
    """
    got, wanted = (
        dict(zip(paths_of(tree), map(jnp.shape, jax.tree.leaves(tree)), strict=True)) for tree in (updates, params)
    )
    for path, shape in wanted.items():
        if path not in got:
            raise ValueError(
                f"The gradients have no leaf {path!r}, where the parameters have one of shape {shape}: pass update() a tree "
                "of gradients with the structure of the parameters."
            )
        if got[path] != shape:
            raise ValueError(
                f"The gradient of {path!r} has shape {got[path]}, but the parameter has shape {shape}: pass update() the "
                "gradient with respect to this parameter."
            )
    for path, shape in got.items():
        if path not in wanted:
            raise ValueError(
                f"The gradients have a leaf {path!r} of shape {shape}, which the parameters do not have: pass update() a tree "
                "of gradients with the structure of the parameters."
            )
    structures = flatten(updates)[1], flatten(params)[1]
    if structures[0] != structures[1]:
        raise ValueError(
            f"The gradients are in {structures[0]}, and the parameters in {structures[1]}: pass update() trees of the same "
            "containers."
        )
