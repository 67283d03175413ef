# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How a parameter is seen as a batch of matrices, which ones take part, their rank and side.

A leaf of any shape is a batch of m x n matrices: m is the product of its reduction axes, n that of its output axes, and every
other axis, wherever it stands, is a batch axis.  By default the matrix is the last two axes.  With k = min(m, n):

    proj_type      basis                      low-rank gradient
    left           P in R^(m x r)             PᵀG    in R^(r x n)
    right          Q in R^(n x r)             G Q    in R^(m x r)
    full           P and Q                    PᵀG Q  in R^(r x r)
    std            left if m <= n else right  (the smaller side: Zhao et al. 2024, arXiv 2403.03507, Algorithm 2)
    reverse_std    right if m <= n else left  (the larger side: less state)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax import sharding

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

Rank = int | float | Callable[[str, tuple[int, ...]], int | float | None]


class GaLoreDimensionNumbers(NamedTuple):
    """Which axes of a parameter are the matrix; every axis named by neither field is a batch axis.

    An attention kernel of shape (layers, hidden, heads, head_dim) is a stack of hidden x (heads · head_dim) matrices:

    >>> GaLoreDimensionNumbers(reduction_axis=1, output_axis=(2, 3))
    GaLoreDimensionNumbers(reduction_axis=1, output_axis=(2, 3))
    """

    reduction_axis: int | tuple[int, ...] = -2
    output_axis: int | tuple[int, ...] = -1


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One parameter as a batch of m x n matrices, with the rank and the side(s) of its basis."""

    path: str
    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    rank: int
    left: bool
    right: bool
    first: int = 0
    total: int = 1
    layers: bool = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def batch(self) -> int:
        """The number of batch axes."""
        return len(self.batch_axes)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n)"""
        return (
            math.prod(self.shape[axis] for axis in self.reduction_axes),
            math.prod(self.shape[axis] for axis in self.output_axes),
        )

    @property
    def low_rank_shape(self) -> tuple[int, ...]:
        """Shape of the projected gradient: (*batch, r or m, r or n)."""
        m, n = self.matrix_shape
        return (*self.batch_shape, self.rank if self.left else m, self.rank if self.right else n)

    @property
    def _permutation(self) -> tuple[int, ...]:
        return (*self.batch_axes, *self.reduction_axes, *self.output_axes)

    def to_matrices(self, leaf: jax.Array) -> jax.Array:
        """Parameter-shaped array -> (*batch, m, n); axes that are merged into one lose their explicit sharding."""
        sides = (self.reduction_axes, self.output_axes)
        merged = [axis for axes in sides if len(axes) > 1 for axis in axes]
        if not merged:
            return jnp.transpose(leaf, self._permutation)  # a reshape, even to the same shape, could lose a sharding
        matrices = jnp.transpose(sharding.gather(leaf, merged), self._permutation)
        return matrices.reshape(*self.batch_shape, *self.matrix_shape)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """(*batch, m, n) -> parameter-shaped array; the inverse of :meth:`to_matrices`."""
        if not len(self.reduction_axes) == len(self.output_axes) == 1:
            matrices = matrices.reshape([self.shape[axis] for axis in self._permutation])
        return jnp.transpose(matrices, np.argsort(self._permutation).tolist())


def check_rank(rank: Rank, where: str = "rank") -> None:
    """Raises unless ``rank`` is a positive int, a fraction in (0, 1] or a callable, known before tracing."""
    if isinstance(rank, jax.Array):
        raise TypeError(
            f"{where} must be static because it fixes the shapes of the state, got {rank}: with optax.inject_hyperparams write "
            'static_args=("rank", "update_proj_gap").'
        )
    if callable(rank):
        return
    remedy = "write a positive int, a fraction of the smaller side in (0, 1], or a callable(path, shape)."
    if isinstance(rank, bool) or not isinstance(rank, (int, float, np.integer, np.floating)):
        raise TypeError(f"{where} is {rank!r} of type {type(rank).__name__}: {remedy}")
    if rank <= 0 or (isinstance(rank, (float, np.floating)) and not rank <= 1):
        raise ValueError(f"{where} is {rank}: {remedy}")


def check_proj_type(proj_type: str) -> None:
    """Raises for an unknown ``proj_type``."""
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type is {proj_type!r}: write one of {', '.join(PROJ_TYPES)}.")


def select(
    params: Any,
    *,
    rank: Rank = 128,
    proj_type: str = "std",
    mask: Any = None,
    weight_dimension_numbers: Any = None,
) -> list[MatrixView | None]:
    """The view of each leaf of ``params`` in ``jax.tree.leaves`` order; None for a leaf that is not projected.

    A leaf takes part when it has at least two axes, its path names no embedding, LM head or norm, and its rank is smaller
    than its smaller side.  ``mask`` replaces the rule on names: True on a leaf selects it whatever its name, True on a
    whole subtree applies the rule on names inside it.  ``weight_dimension_numbers`` on a leaf replaces all the rules: with a
    spec it is projected (its rank clipped to its smaller side), with None it is not; a spec on a whole subtree says which
    axes are the matrix of those leaves in it that the rules select.

    Raises:
      ValueError: for axes that overlap or do not exist, and for a mask that selects nothing.

    >>> params = {"embed": jnp.zeros((100, 32)), "kernel": jnp.zeros((4, 32, 64)), "bias": jnp.zeros((64,))}
    >>> [view and view.low_rank_shape for view in select(params, rank=8)]
    [None, None, (4, 8, 64)]
    """
    leaves = jax.tree.leaves(params)
    if not leaves:
        return []  # optax.tree.map_params calls init on an empty tree
    masks = _masks(mask, params)
    specs = _per_leaf(
        weight_dimension_numbers,
        params,
        "weight_dimension_numbers",
        lambda x: x is None or hasattr(x, "reduction_axis"),
        "write GaLoreDimensionNumbers(...) or None.",
    )
    views = [
        _view(path, leaf, rank, proj_type, leaf_mask, leaf_spec)
        for path, leaf, leaf_mask, leaf_spec in zip(paths_of(params), leaves, masks, specs, strict=True)
    ]
    sizes = [0 if view is None else math.prod(view.batch_shape) for view in views]
    views = [view and dataclasses.replace(view, first=sum(sizes[:i]), total=sum(sizes)) for i, view in enumerate(views)]
    if mask is not None and not any(views):
        names = ", ".join(paths_of(params)[:8])
        raise ValueError(
            f"mask selects none of the {len(leaves)} parameters ({names}): give True to a parameter with at least "
            f"two axes whose smaller side exceeds rank={rank}."
        )
    return views


def taking_part(params: Any, mask: Any = None) -> list[tuple[str, bool]]:
    """The path of each leaf, and whether ``mask`` or the rule on names lets it be projected, whatever its axes.

    >>> taking_part({"conv": {"kernel": jnp.zeros((3, 3, 4, 8))}, "norm": jnp.zeros((8,))})
    [('conv/kernel', True), ('norm', False)]
    """
    triples = zip(paths_of(params), jax.tree.leaves(params), _masks(mask, params), strict=True)
    return [(path, _takes_part(path, leaf, choice)) for path, leaf, choice in triples]


class _Choice(NamedTuple):
    value: Any
    on_leaf: bool  # False when the choice was made for a whole subtree


def _masks(mask: Any, params: Any) -> list[_Choice | None]:
    return _per_leaf(mask, params, "mask", lambda x: isinstance(x, (bool, np.bool_)), "write True or False.")


def _takes_part(path: str, leaf: Any, mask: _Choice | None, whatever_its_name: bool = False) -> bool:
    if (mask is not None and not mask.value) or math.prod(jnp.shape(leaf)) == 0:
        return False
    named = whatever_its_name or (mask is not None and mask.on_leaf) or is_matrix_name(path)
    return named and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _per_leaf(
    prefix: Any, params: Any, name: str, is_valid: Callable[[Any], bool], remedy: str
) -> list[_Choice | None]:
    """Spreads a prefix tree (or a callable of params that returns one) over the leaves of params."""
    if prefix is None:
        return [None] * len(jax.tree.leaves(params))
    prefix = prefix(params) if callable(prefix) else prefix
    try:
        spread = jax.tree.map(
            lambda value, subtree: jax.tree.map(lambda _: _Choice(value, jax.tree_util.all_leaves([subtree])), subtree),
            prefix,
            params,
            is_leaf=is_valid,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} must have the structure of the parameters or be a prefix of their tree, and it does not at "
            f"{_first_mismatch(prefix, params, is_valid)}."
        ) from error
    choices = jax.tree.leaves(spread, is_leaf=lambda x: isinstance(x, _Choice))
    for choice in choices:
        if not is_valid(choice.value):
            raise TypeError(f"{name} holds {choice.value!r}: {remedy}")
    return choices


def _first_mismatch(prefix: Any, params: Any, is_leaf: Callable[[Any], bool]) -> str:
    """The first path at which a prefix tree and the parameters part."""
    chosen = paths_of(prefix, is_leaf)
    wanted = paths_of(params)

    def covers(choice: str, path: str) -> bool:
        return path == choice or path.startswith(f"{choice}/")

    unchosen = [path for path in wanted if not any(covers(choice, path) for choice in chosen)]
    without = [choice for choice in chosen if not any(covers(choice, path) for path in wanted)]
    outside = sorted(unchosen) + sorted(without)
    return repr(outside[0]) if outside else "its root"


def paths_of(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The '/'-separated path of each leaf.

    >>> paths_of({"mlp": {"kernel": 0, "bias": 1}})
    ['mlp/bias', 'mlp/kernel']
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _view(
    path: str, leaf: Any, rank: Rank, proj_type: str, mask: _Choice | None, spec: _Choice | None
) -> MatrixView | None:
    shape = tuple(jnp.shape(leaf))
    explicit = spec is not None and spec.on_leaf
    if (spec is not None and spec.value is None) or (not explicit and len(shape) < 2):
        return None
    if not _takes_part(path, leaf, mask, whatever_its_name=explicit):
        return None

    numbers = GaLoreDimensionNumbers() if spec is None else spec.value
    reduction = _axes(numbers.reduction_axis, path, shape)
    output = _axes(numbers.output_axis, path, shape)
    if len(set(reduction + output)) != len(reduction + output) or not reduction or not output:
        raise ValueError(
            f"weight_dimension_numbers of {path!r} with shape {shape} has reduction_axis={numbers.reduction_axis} and "
            f"output_axis={numbers.output_axis}: name at least one axis in each, and no axis twice."
        )
    batch = tuple(axis for axis in range(len(shape)) if axis not in reduction + output)
    view = MatrixView(path, shape, batch, reduction, output, rank=1, left=True, right=False)
    smaller = min(view.matrix_shape)
    resolved = resolve_rank(rank, path, shape, smaller)
    if resolved is None or (not explicit and resolved >= smaller):
        return None
    left, right = _sides(proj_type, *view.matrix_shape)
    return dataclasses.replace(view, rank=min(resolved, smaller), left=left, right=right)


def _axes(axes: int | tuple[int, ...], path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"weight_dimension_numbers of {path!r} names axis {axis}, but its shape is {shape}.")
    return tuple(axis % len(shape) for axis in axes)


def resolve_rank(rank: Rank, path: str, shape: tuple[int, ...], smaller: int) -> int | None:
    """The number of columns of a basis on a side of size ``smaller``, which an int may exceed; None to leave it alone."""
    chosen = rank(path, shape) if callable(rank) else rank
    if chosen is None:
        return None
    check_rank(chosen, f"rank of {path!r} with shape {shape}")
    return max(1, round(chosen * smaller)) if isinstance(chosen, (float, np.floating)) else int(chosen)


def _sides(proj_type: str, m: int, n: int) -> tuple[bool, bool]:
    """Whether the basis is on the left (m) and on the right (n)."""
    return {
        "std": (m <= n, m > n),
        "reverse_std": (m > n, m <= n),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


# The layers that the paper and its successors train with plain Adam, by the names Flax, Equinox and Hugging Face give them.
_NOT_A_MATRIX = re.compile(
    r"(^|_)(un)?embed|(^|_)[a-z]*norm\d*(_|$)|^(lm_?)?head(_\d+)?$|^(output|classifier|classification|prediction)_head$"
    r"|^(wte|wpe|logits|scale)$|^ln(_|$)|^ln\d+$"
)


def is_matrix_name(path: str) -> bool:
    """Whether no part of a '/'-separated path names an embedding, an LM head or a norm.

    >>> [is_matrix_name(p) for p in ("layers/attn/q_proj/kernel", "multi_head_attention/out", "lm_head/kernel", "Embed_0")]
    [True, True, False, False]
    """
    parts = (
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", part).lower()
        for part in re.split(r"[/.]", path)
    )
    return not any(_NOT_A_MATRIX.search(part) for part in parts)
