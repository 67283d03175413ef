# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Views of parameters as batches of matrices: which parameters are projected, along which axes, at what rank and side.

A leaf of any shape is a batch of m x n matrices: m is the product of its reduction axes, n the product of its output axes,
and every other axis is a batch axis.  :mod:`galore_jax.layouts` says which axes those are by default.  With k = min(m, n):

    proj_type      basis                      low-rank gradient
    left           P in R^(m x r)             PᵀG    in R^(r x n)
    right          Q in R^(n x r)             G Q    in R^(m x r)
    full           P and Q                    PᵀG Q  in R^(r x r)
    std            left if m <= n else right  (the smaller side: Zhao et al. 2024, arXiv 2403.03507, Algorithm 2)
    reverse_std    right if m <= n else left  (the larger side: less state)
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import sharding
from galore_jax._core.trees import is_box, paths_of as paths_of
from galore_jax.layouts import LORA_FACTOR, Layout, kind_of, layouts

__all__ = ["GaLoreDimensionNumbers"]

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
# The view of a method that works on whole matrices.
NO_BASIS = "none"

Rank = int | float | Mapping[str, int | float | None] | Callable[[str, tuple[int, ...]], int | float | None]
_T = TypeVar("_T")


class GaLoreDimensionNumbers(NamedTuple):
    """The axes of a parameter that form the matrix; every other axis is a batch axis.

    An attention kernel of shape (layers, hidden, heads, head_dim) is a stack of hidden x (heads · head_dim) matrices:

    >>> GaLoreDimensionNumbers(reduction_axis=1, output_axis=(2, 3))
    GaLoreDimensionNumbers(reduction_axis=1, output_axis=(2, 3))
    """

    reduction_axis: int | tuple[int, ...] = -2
    output_axis: int | tuple[int, ...] = -1


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One parameter as a batch of m x n matrices, with the rank and the side or sides of its basis, if it has one."""

    path: str
    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    rank: int
    left: bool
    right: bool
    # The number of its first matrix among the ``total`` projected matrices of the whole tree, in the order of the leaves.
    first: int = 0
    total: int = 1
    # True if the leaf is one layer of a stack.  With k matrices in a layer, the first matrix of layer i is first + i k.
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
        """The shape of the projected gradient: (*batch, r or m, r or n)."""
        m, n = self.matrix_shape
        return (*self.batch_shape, self.rank if self.left else m, self.rank if self.right else n)

    @property
    def _permutation(self) -> tuple[int, ...]:
        return (*self.batch_axes, *self.reduction_axes, *self.output_axes)

    def to_matrices(self, leaf: jax.Array) -> jax.Array:
        """Parameter-shaped array -> (*batch, m, n).  Axes that are merged into one lose their explicit sharding."""
        sides = (self.reduction_axes, self.output_axes)
        merged = [axis for axes in sides if len(axes) > 1 for axis in axes]
        if not merged:
            # A reshape, even to the same shape, could lose a sharding.
            return jnp.transpose(leaf, self._permutation)
        matrices = jnp.transpose(sharding.gather(leaf, merged), self._permutation)
        return matrices.reshape(*self.batch_shape, *self.matrix_shape)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """(*batch, m, n) -> parameter-shaped array; the inverse of :meth:`to_matrices`."""
        if not len(self.reduction_axes) == len(self.output_axes) == 1:
            matrices = matrices.reshape([self.shape[axis] for axis in self._permutation])
        return jnp.transpose(matrices, np.argsort(self._permutation).tolist())


class Views(tuple[MatrixView, ...]):
    """Views that are resolved already, one for each leaf of a tree, in the place of ``weight_dimension_numbers``."""


class _Whole(NamedTuple):
    params: Any
    stacked: frozenset[str]


_WHOLE: contextvars.ContextVar[_Whole | None] = contextvars.ContextVar("galore_jax_whole_tree", default=None)


@contextlib.contextmanager
def whole_tree(params: Any, stacked: Collection[str]) -> Iterator[None]:
    """While active, :func:`select` takes a tree for a part of ``params``, and resolves masks and dimension numbers there.

    A layer-wise step initializes and updates the parts of a tree one by one.  Inside this context, the view of a leaf is the
    one that it has in the whole tree, which the leaf is found in by its path.  A part with other paths is its own whole tree.

    Args:
      params: The whole tree.
      stacked: Paths of leaves of ``params`` whose first axis is the layer.  Parts contain one layer of them, without that
        axis, and such a leaf isn't projected if the axis belongs to its matrix.

    >>> params = {"layers": jnp.zeros((3, 32, 64)), "out": jnp.zeros((32, 16))}
    >>> with whole_tree(params, stacked=["layers"]):
    ...     [view] = select({"layers": jnp.zeros((32, 64))}, rank=8)
    >>> view.batch_shape, view.total
    ((), 4)
    """
    token = _WHOLE.set(_Whole(params, frozenset(stacked)))
    try:
        yield
    finally:
        _WHOLE.reset(token)


_RECORD: contextvars.ContextVar[dict[tuple[str, tuple[int, ...]], MatrixView | str] | None] = contextvars.ContextVar(
    "galore_jax_record", default=None
)


@contextlib.contextmanager
def recorded() -> Iterator[dict[tuple[str, tuple[int, ...]], MatrixView | str]]:
    """Yields a dict that fills, while active, with what :func:`select` decides: (path, shape) -> a view, or why there is none.

    >>> with recorded() as record:
    ...     _ = select({"kernel": jnp.zeros((32, 64)), "bias": jnp.zeros(64)}, rank=8)
    >>> record["bias", (64,)], record["kernel", (32, 64)].rank
    ('one axis', 8)
    """
    record: dict[tuple[str, tuple[int, ...]], MatrixView | str] = {}
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def is_part(tree: Any) -> bool:
    """Whether a tree is a part of a larger one, by ``optax.MaskedNode()`` in it or by :func:`whole_tree`.

    >>> is_part({"a": optax.MaskedNode(), "b": jnp.ones(2)}), is_part({"b": jnp.ones(2)})
    (True, False)
    """
    return _WHOLE.get() is not None or _has_masked_nodes(tree)


def check_rank(rank: Rank, where: str = "rank") -> None:
    """Raises unless ``rank`` is a static positive int, a fraction in (0, 1], such ranks by patterns of paths, or a callable."""
    if callable(rank):
        return
    if isinstance(rank, Mapping):
        for pattern, value in rank.items():
            _compiled(pattern, where)
            if value is not None:
                check_rank(value, f"{where}[{pattern!r}]")
        return
    remedy = "write a positive int, a fraction of the smaller side in (0, 1], a dict of patterns, or a callable(path, shape)."
    if isinstance(rank, bool) or not isinstance(rank, (int, float, np.integer, np.floating)):
        raise TypeError(f"{where} is {rank!r} of type {type(rank).__name__}: {remedy}")
    if rank <= 0 or (isinstance(rank, (float, np.floating)) and not rank <= 1):
        raise ValueError(f"{where} is {rank}: {remedy}")


def _compiled(pattern: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where} has the pattern {pattern!r}, which is no regular expression: {error}.") from None


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
    """Returns the view of each leaf of ``params``, in the order of ``jax.tree.leaves``, and None for leaves left whole.

    A leaf is projected if it is a weight matrix of a block by :mod:`galore_jax.layouts`, which reads the whole tree, and its
    rank is below its smaller side.

    ``mask`` replaces the rule on names: True on a leaf selects it whatever its name, and True on a subtree applies the rule on
    names inside it.  A regular expression, or a list of them, applies the rule on names to the leaves in whose '/'-separated
    path one of them is found.  ``rank`` may be a dict from such patterns to ranks, and a leaf that no pattern is found in is
    left whole.

    ``weight_dimension_numbers`` on a leaf replaces all the rules: dimension numbers project it, at a rank of at most its
    smaller side, and None leaves it whole.  On a subtree, they give the axes of the leaves that the rules select in it.

    A function of the parameters may stand for either tree.  Both may cover more than ``params`` if :func:`is_part`.

    Raises:
      ValueError: The axes overlap or don't exist, a tree doesn't fit, or a mask selects nothing in a whole tree.

    >>> params = {"embed": jnp.zeros((100, 32)), "kernel": jnp.zeros((4, 32, 64)), "bias": jnp.zeros((4, 64))}
    >>> [view and view.low_rank_shape for view in select(params, rank=8)]
    [None, None, (4, 8, 64)]
    """
    return views_of(
        decisions(params, rank=rank, proj_type=proj_type, mask=mask, weight_dimension_numbers=weight_dimension_numbers)
    )


def views_of(decided: Iterable[MatrixView | str]) -> list[MatrixView | None]:
    """What :func:`select` returns, of what :func:`decisions` does."""
    return [None if isinstance(decision, str) else decision for decision in decided]


def decisions(
    params: Any,
    *,
    rank: Rank = 128,
    proj_type: str = "std",
    mask: Any = None,
    weight_dimension_numbers: Any = None,
) -> list[MatrixView | str]:
    """Like :func:`select`, with the reason, in a few words, for each leaf that is left whole.

    >>> decisions({"embed": jnp.zeros((100, 32)), "kernel": jnp.zeros((32, 64)), "bias": jnp.zeros((64,))}, rank=32)
    ['one axis', 'embedding', 'rank 32 is not below its smaller side 32']
    """
    if isinstance(weight_dimension_numbers, Views):
        return list(weight_dimension_numbers)
    decide = functools.partial(_decisions, rank=rank, proj_type=proj_type, mask=mask, numbers=weight_dimension_numbers)
    decided = [
        _as_shown(decision, jnp.shape(leaf))
        for decision, leaf in zip(_in_whole(params, decide), jax.tree.leaves(params), strict=True)
    ]
    record = _RECORD.get()
    if record is not None:
        keys = [(path, jnp.shape(leaf)) for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True)]
        # A parameter that one transformation leaves whole may be projected by another.
        record.update(
            (key, decision)
            for key, decision in zip(keys, decided, strict=True)
            if not (isinstance(decision, str) and key in record)
        )
    return decided


def taking_part(params: Any, mask: Any = None) -> list[tuple[str, bool]]:
    """Returns the path of each leaf and whether ``mask`` or the rule on names selects it, whatever its axes.

    >>> taking_part({"conv": {"kernel": jnp.zeros((3, 3, 4, 8))}, "norm": jnp.zeros((8,))})
    [('conv/kernel', True), ('norm', False)]
    """
    barred = _in_whole(params, lambda tree, stacked: [_barred(leaf) for leaf in _leaves(tree, mask, None, stacked)])
    return [(path, not reason) for path, reason in zip(paths_of(params), barred, strict=True)]


class _Choice(NamedTuple):
    value: Any
    on_leaf: bool  # False if the choice was made for a whole subtree


class _Leaf(NamedTuple):
    path: str
    shape: tuple[int, ...]
    dtype: Any
    layout: Layout
    mask: _Choice | None
    numbers: _Choice | None


def _decisions(
    tree: Any, stacked: frozenset[str], rank: Rank, proj_type: str, mask: Any, numbers: Any
) -> list[MatrixView | str]:
    """The view of each leaf of a whole tree, or the reason why it is left whole."""
    if isinstance(rank, Mapping):
        _searched(rank, tree, "rank")
    leaves = _leaves(tree, mask, numbers, stacked)
    decided = [_decision(leaf, rank, proj_type, leaf.path in stacked) for leaf in leaves]
    counts = [0 if isinstance(decision, str) else math.prod(decision.batch_shape) for decision in decided]
    if leaves and mask is not None and not any(counts) and not _has_masked_nodes(tree):
        names = ", ".join(leaf.path for leaf in leaves[:8])
        raise ValueError(
            f"mask selects none of the {len(leaves)} parameters ({names}): give True to a parameter with at least "
            f"two axes whose smaller side exceeds rank={rank}."
        )
    return [
        decision
        if isinstance(decision, str)
        else dataclasses.replace(decision, first=first, total=sum(counts), layers=decision.path in stacked)
        for decision, first in zip(decided, itertools.accumulate(counts, initial=0), strict=False)
    ]


def _in_whole(params: Any, decide: Callable[[Any, frozenset[str]], list[_T]]) -> list[_T]:
    """``decide(tree, stacked paths)`` for the leaves of ``params``, taken in the whole tree if they are a part of one."""
    whole = _WHOLE.get()
    if whole is None:
        return decide(params, frozenset())
    keys = [(path, jnp.ndim(leaf)) for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True)]
    known = [
        (path, jnp.ndim(leaf) - (path in whole.stacked))
        for path, leaf in zip(paths_of(whole.params), jax.tree.leaves(whole.params), strict=True)
    ]
    if not set(keys) <= set(known):
        return decide(params, frozenset())
    decided = dict(zip(known, decide(whole.params, whole.stacked), strict=True))
    return [decided[key] for key in keys]


def _as_shown(decision: MatrixView | str, shape: tuple[int, ...]) -> MatrixView | str:
    """The decision on a leaf of the whole tree, for the layer of it, or the smaller trial array, that has this shape."""
    if isinstance(decision, str):
        return decision
    if decision.layers:
        batch, reduction, output = (
            tuple(axis - 1 for axis in axes if axis > 0)
            for axes in (decision.batch_axes, decision.reduction_axes, decision.output_axes)
        )
        decision = dataclasses.replace(
            decision, shape=decision.shape[1:], batch_axes=batch, reduction_axes=reduction, output_axes=output
        )
    if decision.shape == shape:
        return decision
    decision = dataclasses.replace(decision, shape=shape)
    smaller = min(decision.matrix_shape)
    return _too_large(decision.rank, smaller) if decision.rank >= smaller else decision


def _leaves(tree: Any, mask: Any, numbers: Any, stacked: Collection[str]) -> list[_Leaf]:
    """Each leaf of a tree with the choices made for it."""
    if patterns := _patterns(mask):
        searched = _searched(patterns, tree, "mask")
        masks = [_Choice(bool(found), on_leaf=False) for found in searched]
    else:
        masks = _choices(mask, tree, "mask", lambda x: isinstance(x, (bool, np.bool_)), "write True or False.")
    specs = _choices(
        numbers,
        tree,
        "weight_dimension_numbers",
        lambda x: x is None or hasattr(x, "reduction_axis"),
        "write GaLoreDimensionNumbers(...) or None.",
    )
    return [
        _Leaf(path, jnp.shape(leaf), jnp.result_type(leaf), layout, chosen, spec)
        for path, leaf, layout, chosen, spec in zip(
            paths_of(tree), jax.tree.leaves(tree), layouts(tree, stacked), masks, specs, strict=True
        )
    ]


def _patterns(mask: Any) -> list[str | re.Pattern[str]]:
    """The regular expressions that a mask is; empty if it is a tree or a function."""
    patterns = list(mask) if isinstance(mask, (list, tuple, set, frozenset)) else [mask]
    return patterns if all(isinstance(pattern, (str, re.Pattern)) for pattern in patterns) else []


def _searched(patterns: Collection[str | re.Pattern[str]], tree: Any, where: str) -> list[list[str | re.Pattern[str]]]:
    """The patterns that are found in the path of each leaf.  In a whole tree, each has to be found somewhere."""
    paths = paths_of(tree)
    compiled = {pattern: _compiled(pattern, where) for pattern in patterns}
    found = [[pattern for pattern, search in compiled.items() if search.search(path)] for path in paths]
    unused = [pattern for pattern in patterns if not any(pattern in some for some in found)]
    if unused and paths and not _has_masked_nodes(tree):
        raise ValueError(
            f"{where} has the pattern {unused[0]!r}, which is in none of the {len(paths)} paths of parameters "
            f"({', '.join(paths[:8])})."
        )
    return found


def _choices(prefix: Any, params: Any, name: str, is_valid: Callable[[Any], bool], remedy: str) -> list[_Choice | None]:
    """Spreads a prefix tree, or the result of a function of the parameters, over the leaves of ``params``."""
    leaves = _names_of(params)
    # optax.tree.map_params initializes an empty tree.
    if prefix is None or not leaves:
        return [None] * len(leaves)
    prefix = prefix(params) if _is_function(prefix) else prefix
    chosen = dict(zip(_names_of(prefix, is_valid), jax.tree.leaves(prefix, is_leaf=is_valid), strict=True))
    choices, unused = [], set(chosen)
    for names, box in zip(leaves, _names_of(params, is_box), strict=True):
        covering = next((names[:k] for k in range(len(names), -1, -1) if names[:k] in chosen), None)
        if covering is None:
            raise _misfit(name, names)
        if not is_valid(chosen[covering]):
            raise TypeError(f"{name} holds {chosen[covering]!r}: {remedy}")
        unused.discard(covering)
        choices.append(_Choice(chosen[covering], on_leaf=len(covering) >= len(box)))
    if unused and not _has_masked_nodes(params):
        empty = _names_of(params, lambda node: not jax.tree.leaves(node))
        for names in sorted(unused):
            if not any(node[: len(names)] == names for node in empty):
                raise _misfit(name, names)
    return choices


def _is_function(prefix: Any) -> bool:
    """Optax's rule: a module with ``__call__`` is a tree, and only a tree whose leaves all are callables is a function."""
    leaves = jax.tree.leaves(prefix)
    return bool(leaves) and all(map(callable, leaves))


def _misfit(name: str, names: tuple[str, ...]) -> ValueError:
    where = repr("/".join(names)) if names else "its root"
    return ValueError(
        f"{name} must have the structure of the parameters or be a prefix of their tree, and it does not at {where}."
    )


def _names_of(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, ...]]:
    """The path of each leaf as a tuple of names."""
    paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in paths]


def _has_masked_nodes(tree: Any) -> bool:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)


def _barred(leaf: _Leaf, whatever_its_name: bool = False) -> str:
    """Why the mask, the name or the dtype keeps a leaf whole; empty if they don't."""
    if leaf.mask is not None and not leaf.mask.value:
        return "mask"
    if math.prod(leaf.shape) == 0:
        return "no elements"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"dtype {leaf.dtype}"
    chosen = whatever_its_name or (leaf.mask is not None and leaf.mask.on_leaf)
    return "" if chosen else leaf.layout.kind


def _decision(leaf: _Leaf, rank: Rank, proj_type: str, stacked: bool) -> MatrixView | str:
    path, shape = leaf.path, leaf.shape
    explicit = leaf.numbers is not None and leaf.numbers.on_leaf
    if leaf.numbers is not None and leaf.numbers.value is None:
        return "dimension numbers are None"
    if not explicit and len(shape) < 2:
        return leaf.layout.unclear
    if reason := _barred(leaf, whatever_its_name=explicit):
        return reason

    if leaf.numbers is None:
        if leaf.layout.unclear:
            return leaf.layout.unclear
        reduction, output = leaf.layout.reduction, leaf.layout.output
    else:
        numbers = leaf.numbers.value
        reduction = _axes(numbers.reduction_axis, path, shape)
        output = _axes(numbers.output_axis, path, shape)
        if len(set(reduction + output)) != len(reduction + output) or not reduction or not output:
            raise ValueError(
                f"weight_dimension_numbers of {path!r} with shape {shape} has reduction_axis={numbers.reduction_axis} "
                f"and output_axis={numbers.output_axis}: name at least one axis in each, and no axis twice."
            )
    if stacked and 0 in reduction + output:
        return "the layers are an axis of its matrix"
    batch = tuple(axis for axis in range(len(shape)) if axis not in reduction + output)
    view = MatrixView(path, shape, batch, reduction, output, rank=1, left=True, right=False)
    smaller = min(view.matrix_shape)
    resolved = resolve_rank(rank, path, shape, smaller)
    if resolved is None:
        return "no pattern of rank" if isinstance(rank, Mapping) else "rank is None"
    if not explicit and resolved >= smaller:
        return _too_large(resolved, smaller)
    left, right = _sides(proj_type, *view.matrix_shape)
    return dataclasses.replace(view, rank=min(resolved, smaller), left=left, right=right)


def _too_large(rank: int, smaller: int) -> str:
    return f"rank {rank} is not below its smaller side {smaller}"


def _axes(axes: int | tuple[int, ...], path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"weight_dimension_numbers of {path!r} names axis {axis}, but its shape is {shape}.")
    return tuple(axis % len(shape) for axis in axes)


def resolve_rank(rank: Rank, path: str, shape: tuple[int, ...], smaller: int) -> int | None:
    """Returns the number of columns of a basis, which may exceed ``smaller``, or None to leave the parameter whole."""
    if isinstance(rank, Mapping):
        found = {pattern: value for pattern, value in rank.items() if re.search(pattern, path)}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"rank has patterns that disagree on {path!r}: {found}; write patterns of which one matches."
            )
        chosen = next(iter(found.values()), None)
    else:
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
        NO_BASIS: (False, False),
    }[proj_type]


def is_matrix_name(path: str) -> bool:
    """Whether a '/'-separated path names a matrix, of whatever size: no embedding, LM head, norm, bias, router, ...

    The factors of LoRA are matrices, though they are too small to be projected.

    >>> [is_matrix_name(p) for p in ("layers/attn/q_proj/kernel", "multi_head_attention/out", "lm_head/kernel", "Embed_0")]
    [True, True, False, False]
    """
    return kind_of(path) in ("", LORA_FACTOR)
