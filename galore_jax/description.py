# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What an optimizer of this library does with each parameter."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax import matrix_view
from galore_jax._core.step import GaLoreMemoryWarning
from galore_jax._core.trees import is_box
from galore_jax.matrix_view import MatrixView
from galore_jax.memory import tree_bytes

__all__ = ["Description", "ParameterRecord", "describe"]


@dataclasses.dataclass(frozen=True)
class ParameterRecord:
    """One parameter, and what the optimizer keeps for it."""

    path: str  # '/'-separated
    shape: tuple[int, ...]
    matrix: tuple[int, int] | None  # (m, n) of each of its matrices; None if it is left whole
    batch: tuple[int, ...]  # the shape of its batch axes
    rank: int | None  # None if it has no basis
    side: str  # of the basis: "left" (m), "right" (n) or "both"; empty without a basis
    state_bytes: int
    reason: str  # why it is left whole; empty if it is projected


@dataclasses.dataclass(frozen=True)
class Description:
    """What :func:`describe` returns.  ``str`` of it is a table."""

    parameters: list[ParameterRecord]
    params_bytes: int
    state_bytes: int  # of the whole state, counters included
    adamw_bytes: int  # of the state of optax.adamw, whose moments have the dtypes of the parameters

    @property
    def projected(self) -> list[ParameterRecord]:
        return [record for record in self.parameters if record.matrix is not None]

    def summary(self) -> str:
        """The totals in one sentence."""
        share = self.state_bytes / self.adamw_bytes if self.adamw_bytes else 1.0
        return (
            f"{len(self.projected)} of {len(self.parameters)} parameters are projected; parameters {self.params_bytes:,} bytes, "
            f"optimizer state {self.state_bytes:,} bytes, {share:.1%} of AdamW's."
        )

    def __str__(self) -> str:
        columns = ("parameter", "shape", "matrices", "rank", "basis", "state bytes", "left whole because")
        rows = [columns] + [_row(record) for record in self.parameters]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        right = {3, 5}
        lines = [
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", self.summary()])


def describe(tx: optax.GradientTransformation, params: Any) -> Description:
    """Says of every parameter which matrices it is, at what rank, what state it costs, or why it is left whole.

    Nothing is allocated or compiled: ``params`` may be arrays or ``jax.ShapeDtypeStruct``, and Optax's transformations may be
    around those of this library.

    Args:
      tx: Any Optax optimizer.
      params: The parameters that it would be initialized with.

    >>> from galore_jax import galore_adamw
    >>> params = {"kernel": jax.ShapeDtypeStruct((64, 256), "float32"), "bias": jax.ShapeDtypeStruct((256,), "float32")}
    >>> print(describe(galore_adamw(0.01, rank=16), params))
    parameter  shape   matrices  rank  basis  state bytes  left whole because
    bias       256                                  2,048  one axis
    kernel     64x256  64 x 256    16  left        36,864
    <BLANKLINE>
    1 of 2 parameters are projected; parameters 66,560 bytes, optimizer state 38,932 bytes, 29.2% of AdamW's.
    """
    with matrix_view.recorded() as decisions, warnings.catch_warnings():
        warnings.simplefilter("ignore", GaLoreMemoryWarning)  # the reasons are in the description
        # A function of its own, because an init that was traced before would not be traced again, and record nothing.
        state = jax.eval_shape(lambda params: tx.init(params), params)
    sizes = _bytes_by_parameter(state, params)
    records = []
    for path, leaf, size in zip(matrix_view.paths_of(params), jax.tree.leaves(params), sizes, strict=True):
        shape = jnp.shape(leaf)
        decision = decisions.get((path, shape), "no transformation of galore_jax has it")
        records.append(_record(path, shape, decision, size))
    adamw = jax.eval_shape(optax.adamw(1e-3).init, params)
    return Description(records, tree_bytes(jax.eval_shape(lambda: params)), tree_bytes(state), tree_bytes(adamw))


def _record(path: str, shape: tuple[int, ...], decision: MatrixView | str, size: int) -> ParameterRecord:
    if isinstance(decision, str):
        return ParameterRecord(path, shape, None, (), None, "", size, decision)
    side = {(True, True): "both", (True, False): "left", (False, True): "right"}.get(
        (decision.left, decision.right), ""
    )
    rank = decision.rank if side else None
    return ParameterRecord(path, shape, decision.matrix_shape, decision.batch_shape, rank, side, size, "")


def _row(record: ParameterRecord) -> tuple[str, ...]:
    def sizes(shape: tuple[int, ...]) -> str:
        return "x".join(map(str, shape))

    matrices = ""
    if record.matrix is not None:
        matrices = (f"{sizes(record.batch)} of " if record.batch else "") + "{} x {}".format(*record.matrix)
    rank = "" if record.rank is None else str(record.rank)
    return record.path, sizes(record.shape), matrices, rank, record.side, f"{record.state_bytes:,}", record.reason


def _bytes_by_parameter(state: Any, params: Any) -> list[int]:
    """The bytes of the leaves of ``state`` whose path contains that of a parameter."""
    places = {path: i for i, (path, _) in enumerate(jax.tree.leaves_with_path(params, is_leaf=is_box))}
    lengths = sorted({len(path) for path in places}, reverse=True)
    sizes = [0] * len(places)
    for path, leaf in jax.tree.leaves_with_path(state):
        inside = (path[start : start + length] for length in lengths for start in range(len(path) - length + 1))
        owner = next((places[part] for part in inside if part in places), None)
        if owner is not None:
            sizes[owner] += tree_bytes(leaf)
    return sizes
