# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Tries a transformation on a small tree, to learn what it does with trees of that structure.

The tree has the structure, the containers and the dtypes of the real one, so that masks and partitions apply to it, but no side
is longer than a few entries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import codecs
from galore_jax._core.state_fields import labelled

_SIDE = 8

# What a transformation raises on a tree it was not written for.  TypeError: it needs extra arguments, or its hyperparameters are
# traced.  ValueError, AssertionError: it insists on the real shapes.  RuntimeError, NameError: it needs a mesh or a named axis.
# The real call raises the same if the fault is in the transformation.
_CANNOT_TRY = (AssertionError, NameError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def concretely() -> Iterator[None]:
    """Computes values at once, whatever is traced around it.

    There is no mesh inside: the mesh outside may be abstract, and nothing can be computed on an abstract mesh.
    """
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.ensure_compile_time_eval():
        yield


def small(tree: Any, rng: np.random.Generator) -> Any:
    """Normal random numbers in the structure and the dtypes of ``tree``, as NumPy arrays with sides of at most 8.

    >>> small({"w": jax.ShapeDtypeStruct((4, 1000), "bfloat16")}, np.random.default_rng(0))["w"].shape
    (4, 8)
    """
    return jax.tree.map(lambda leaf: rng.normal(size=[min(n, _SIDE) for n in leaf.shape]).astype(leaf.dtype), tree)


def first_replies(inner: optax.GradientTransformation, gradients: Any) -> list[list[np.ndarray]] | None:
    """The replies of ``inner`` to the same gradients in its first two updates, leaf by leaf.

    The parameters equal the gradients.  The result is None if ``inner`` can't be tried on them.

    >>> [[first], [second]] = first_replies(optax.sgd(0.5), {"w": np.ones(2)})
    >>> first.tolist()
    [-0.5, -0.5]
    """
    treedef = jax.tree.structure(gradients)
    found = []
    try:
        with concretely():
            state = inner.init(gradients)
            for _ in range(2):
                replies, state = inner.update(gradients, state, gradients)
                found.append(list(map(np.asarray, treedef.flatten_up_to(replies))))
    except _CANNOT_TRY:
        return None
    return found


def check_init_ignores_values(
    inner: optax.GradientTransformation, low_rank_tree: Any, projected: Sequence[bool]
) -> None:
    """Raises a ValueError if the state that ``inner.init`` returns depends on the values of projected parameters.

    Such a transformation compares later parameters with those of ``init``.  Before the first update there is no basis, so
    ``init`` gets zeros where ``update`` gets PᵀW, and the comparison would be wrong without a sign of it.

    Args:
      inner: the inner transformation.
      low_rank_tree: what it is given: arrays, tracers or ``jax.ShapeDtypeStruct``.
      projected: for each leaf, whether it is projected.

    >>> tree = {"w": jnp.zeros((2, 8))}
    >>> check_init_ignores_values(optax.adam(1e-3), tree, [True])
    >>> check_init_ignores_values(optax.contrib.dowg(), tree, [True])
    Traceback (most recent call last):
    ValueError: inner keeps values of the parameters it is given in init (DoWGState.init_params), ...
    """
    if not any(projected) or _ignores_values(inner, low_rank_tree, projected):
        return
    leaves, treedef = jax.tree.flatten(small(low_rank_tree, np.random.default_rng(0)))
    zeros = [np.zeros_like(leaf) if flag else leaf for leaf, flag in zip(leaves, projected, strict=True)]
    try:
        with concretely():
            state, other = (inner.init(treedef.unflatten(values)) for values in (zeros, leaves))
            pairs = list(zip(_values(state), _values(other), strict=True))
    except _CANNOT_TRY:
        return
    for label, (one, two) in zip(labelled(state), pairs, strict=True):
        if not all(map(_equal, one, two)):
            raise ValueError(
                f"inner keeps values of the parameters it is given in init ({label.name}), which inside galore are zeros then "
                "and coordinates in a subspace later: put galore inside instead, for example optax.contrib.schedule_free("
                "galore(optax.scale_by_adam(), ...), ...), or choose a transformation whose init looks at shapes alone."
            )


def _ignores_values(inner: optax.GradientTransformation, tree: Any, projected: Sequence[bool]) -> bool:
    """Whether tracing alone shows that ``init`` ignores the values: under ``vmap`` nothing in the state has a batch axis.

    It computes nothing, and a false answer means "not known": 0 * w, for one, has a batch axis.
    """
    leaves, treedef = jax.tree.flatten(tree)
    batched = [
        jax.ShapeDtypeStruct((1, *leaf.shape) if flag else leaf.shape, leaf.dtype)
        for leaf, flag in zip(leaves, projected, strict=True)
    ]
    axes = tuple(0 if flag else None for flag in projected)
    try:
        jax.eval_shape(jax.vmap(lambda *args: inner.init(treedef.unflatten(args)), axes, None), *batched)
    except _CANNOT_TRY:
        return False
    return True


def _values(state: Any) -> list[list[np.ndarray]]:
    """The arrays of each leaf, of which a coded array has several; PRNG keys hold no parameter."""
    leaves = [jax.tree.leaves(leaf) for leaf in codecs.flatten(state)[0]]
    return [
        [np.asarray(x) for x in arrays if not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)]
        for arrays in leaves
    ]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, also where both are NaN."""
    return a.tobytes() == b.tobytes() or np.array_equal(a, b)
