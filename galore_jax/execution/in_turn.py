# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Updates large parameters one at a time, so that their temporaries never occupy memory together.

XLA may update an embedding and an LM head at the same time, and then it holds the float32 copies of both.  For an optimizer that
treats each parameter independently, this module runs the whole update once per large parameter.  It keeps only that parameter's
result, and XLA removes the rest as dead code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_jax import codecs

# In elements: 64 MiB in float32.
_LARGE = 2**24


def update_in_turn(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: Any,
    params: optax.Params,
    apply: Callable[[optax.Updates], Any],
    large: int = _LARGE,
) -> tuple[Any, Any]:
    """Computes the updates in turns and returns ``apply(updates)`` with the new state.

    Args:
      tx: An optimizer that treats each parameter independently.
      grads: A tree of arrays.
      state: The state of ``tx``.
      params: A tree with the structure of ``grads``.
      apply: A function that maps updates to new parameters, each from its own update.  Its result has the structure of
        ``grads``, except that a leaf may become a subtree.
      large: The number of elements at which a parameter gets its own turn.  All other parameters share one turn.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((2,))}
    >>> tx = optax.adam(0.1)
    >>> new, state = update_in_turn(tx, params, tx.init(params), params, lambda u: optax.apply_updates(params, u), large=16)
    >>> round(float(new["b"][0, 0]), 3), int(state[0].count)
    (0.9, 1)
    """
    leaves, treedef = jax.tree.flatten(grads)
    turns = [i for i, leaf in enumerate(leaves) if leaf.size >= large][:-1]
    owners = _owners(grads, state)
    values = treedef.flatten_up_to(params)
    parts, structure = codecs.flatten(state)
    done_values: dict[int, Any] = {}
    done_parts: dict[int, Any] = {}

    def updated() -> tuple[list[Any], list[Any]]:
        updates, new = tx.update(treedef.unflatten(leaves), structure.unflatten(parts), treedef.unflatten(values))
        return treedef.flatten_up_to(apply(updates)), structure.flatten_up_to(new)

    for i in turns:
        new_values, new_parts = updated()
        done_values[i] = new_values[i]
        done_parts |= {j: part for j, part in enumerate(new_parts) if i in owners[j]}
        # Later turns read their inputs after this barrier, so XLA can reuse a buffer once its last turn has read it.
        left_values = {k: value for k, value in enumerate(values) if k not in done_values}
        left_parts = {j: part for j, part in enumerate(parts) if j not in done_parts}
        done_values, done_parts, leaves, left_values, left_parts = jax.lax.optimization_barrier(
            (done_values, done_parts, leaves, left_values, left_parts)
        )
        values = [left_values.get(k, value) for k, value in enumerate(values)]
        parts = [left_parts.get(j, part) for j, part in enumerate(parts)]
    new_values, new_parts = updated()
    return (
        treedef.unflatten(done_values.get(k, value) for k, value in enumerate(new_values)),
        structure.unflatten(done_parts.get(j, part) for j, part in enumerate(new_parts)),
    )


def _owners(grads: optax.Updates, state: Any) -> list[set[int]]:
    """Returns, for each array or coded array of ``state``, the indices of the parameters whose path its path contains.

    The result decides only which turn computes a leaf, not its value, because every turn starts from the old state.
    """
    names = [path for path, _ in jax.tree.leaves_with_path(grads)]

    def holds(path: tuple, name: tuple) -> bool:
        return any(path[k : k + len(name)] == name for k in range(len(path) - len(name) + 1))

    leaves = jax.tree.leaves_with_path(state, is_leaf=codecs.is_coded)
    return [{i for i, name in enumerate(names) if holds(path, name)} for path, _ in leaves]
