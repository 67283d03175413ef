# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Updates large parameters one at a time, so that their temporaries never occupy memory together.

XLA may update an embedding and an LM head at the same time, and then it holds the float32 copies of both.  For an optimizer that
treats each parameter independently, this module runs the whole update once per large parameter.  It keeps only that parameter's
result, and XLA removes the rest as dead code.  Gradients that can be computed apart do not occupy memory together either: ones
stand for them in the turns of other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax import codecs
from galore_jax._core.trees import squared_norm

LARGE = 2**24
"""In elements: 64 MiB in float32."""


def update_in_turn(
    tx: optax.GradientTransformation,
    gradient: Callable[[optax.Params, Any], optax.Updates],
    params: optax.Params,
    inputs: Any,
    state: Any,
    apply: Callable[[optax.Updates], Any],
    apart: Collection[int] = (),
    large: int = LARGE,
) -> tuple[Any, Any, jax.Array]:
    """Computes the updates in turns and returns ``apply(updates)``, the new state and the squared norm of the gradient.

    Args:
      tx: An optimizer that treats each parameter independently.
      gradient: A function that maps ``params`` and ``inputs`` to a tree of gradients.
      params: A tree of arrays.
      inputs: A tree of arrays.
      state: The state of ``tx``.
      apply: A function that maps updates to new parameters, each from its own update.  Its result has the structure of
        ``params``, except that a leaf may become a subtree.
      apart: Indices of leaves whose gradients share no work with those of other leaves.  The large ones of them come first, and
        the other gradients are computed after their turns.
      large: The number of elements at which a parameter gets its own turn.  All other parameters share one turn.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((2,))}
    >>> tx = optax.adam(0.1)
    >>> new, state, squares = update_in_turn(
    ...     tx, lambda p, _: p, params, (), tx.init(params), lambda u: optax.apply_updates(params, u), large=16
    ... )
    >>> round(float(new["b"][0, 0]), 3), int(state[0].count), float(squares)
    (0.9, 1, 34.0)
    """
    values, treedef = jax.tree.flatten(params)
    owners = _owners(params, state)
    parts, structure = codecs.flatten(state)
    unowned = [part for owner, part in zip(owners, parts, strict=True) if owner is None]
    if any(jnp.size(leaf) > 1 for leaf in jax.tree.leaves(unowned)):
        # More than a count, so the last turn may need all gradients for it.
        apart = ()
    turns = sorted((i for i, value in enumerate(values) if jnp.size(value) >= large), key=lambda i: i not in apart)[:-1]
    grads = treedef.flatten_up_to(gradient(params, inputs))
    squares = jnp.zeros([], jnp.float32)
    done_values: dict[int, Any] = {}
    done_parts: dict[int, Any] = {}
    # What stands for a gradient that is not there: NaN if it was not finite, which a guard in tx counts.
    marks: dict[int, jax.Array] = {}

    def updated(absent: Collection[int]) -> tuple[list[Any], list[Any]]:
        seen = [jnp.full_like(g, marks.get(i, 1)) if i in absent else g for i, g in enumerate(grads)]
        updates, new = tx.update(treedef.unflatten(seen), structure.unflatten(parts), treedef.unflatten(values))
        return treedef.flatten_up_to(apply(updates)), structure.flatten_up_to(new)

    for i in turns:
        new_values, new_parts = updated({*range(len(values))} - {i} if i in apart else marks)
        squares += squared_norm(grads[i])
        if i in apart:
            marks[i] = jnp.where(jnp.all(jnp.isfinite(grads[i])), 1, jnp.nan).astype(grads[i].dtype)
        done_values[i] = new_values[i]
        done_parts |= {j: part for j, part in enumerate(new_parts) if owners[j] == i}
        # Later turns read their inputs after this barrier, so XLA can reuse a buffer once its last turn has read it.
        left_values = {k: value for k, value in enumerate(values) if k not in done_values}
        left_parts = {j: part for j, part in enumerate(parts) if j not in done_parts}
        left_grads = None if i in apart else grads
        squares, marks, done_values, done_parts, inputs, left_grads, left_values, left_parts = (
            jax.lax.optimization_barrier(
                (squares, marks, done_values, done_parts, inputs, left_grads, left_values, left_parts)
            )
        )
        values = [left_values.get(k, value) for k, value in enumerate(values)]
        parts = [left_parts.get(j, part) for j, part in enumerate(parts)]
        # XLA removes from each of these computations the gradients that no later turn takes from it.
        grads = left_grads or treedef.flatten_up_to(gradient(treedef.unflatten(values), inputs))
    new_values, new_parts = updated(marks)
    squares += squared_norm([grad for i, grad in enumerate(grads) if i not in turns])
    return (
        treedef.unflatten(done_values.get(k, value) for k, value in enumerate(new_values)),
        structure.unflatten(done_parts.get(j, part) for j, part in enumerate(new_parts)),
        squares,
    )


def _owners(params: optax.Params, state: Any) -> list[int | None]:
    """Returns, for each array or coded array of ``state``, the index of the parameter whose path its path contains.

    Of several, it is the one that ends last: the names before it are those of the optimizer's own groups and places.
    """
    names = [path for path, _ in jax.tree.leaves_with_path(params)]

    def owner(path: tuple) -> int | None:
        found = [
            (k + len(name), len(name), i)
            for i, name in enumerate(names)
            for k in range(len(path) - len(name) + 1)
            if path[k : k + len(name)] == name
        ]
        return max(found)[-1] if found else None

    return [owner(path) for path, _ in jax.tree.leaves_with_path(state, is_leaf=codecs.is_coded)]
