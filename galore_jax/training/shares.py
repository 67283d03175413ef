# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A stream of text that several processes read, each its share of the documents.

The rows of a batch are cut into equal shares, as many as there can be with all rows of a process's devices in one of them.  A
share has its own documents, and begins again when it comes to their end, so that no process waits for the text of another.

How many shares there are is decided when a run starts.  Its checkpoints hold the position of each of them, so that any number of
processes goes on with exactly the same batches: each opens the shares in which rows of its devices lie.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from galore_jax.training import processes
from galore_jax.training.data import StreamedText, TextData, TrainIterator


def train_batches(text: TextData, batch: jax.ShapeDtypeStruct, state: dict[str, Any] | None) -> TrainIterator:
    """The batches of a run, each with the rows that this process needs; all processes have to ask.

    Args:
      text: the corpus, the same in all processes.
      batch: int32 [batch, sequence + 1], with its sharding over the devices of all processes.
      state: the position in a checkpoint of the run.  None: the run starts.

    Raises:
      ValueError: there is too little text for one of the shares; in all processes.
    """
    if state is not None:
        count = len(state["shares"]) if "shares" in state else 1
    else:
        count = share_count(batch.shape[0], _spans(batch).values()) if isinstance(text, StreamedText) else 1
    batches = Shares(text, batch, count) if isinstance(text, StreamedText) and count > 1 else text.train_iterator()
    if state is not None:
        batches.set_state(state)
    return batches


def share_count(rows: int, spans: Collection[tuple[int, int]]) -> int:
    """Into how many equal shares a batch can be cut with every span, the first and the last row of a process, in one of them.

    >>> share_count(8, [(0, 3), (4, 7)]), share_count(8, [(0, 3), (0, 3), (4, 7), (4, 7)])
    (2, 2)
    >>> share_count(12, [(0, 3), (0, 7), (4, 7), (8, 11)])
    1
    """
    return max(
        count
        for count in range(1, len(spans) + 1)
        if rows % count == 0 and all(first * count // rows == last * count // rows for first, last in spans)
    )


class Shares:
    """Batches, int32 [batch, sequence + 1], of a stream that is read in so many shares.

    Rows of shares in which this process has none are zeros.
    """

    def __init__(self, text: StreamedText, batch: jax.ShapeDtypeStruct, count: int):
        self._shape, self._count = batch.shape, count
        first, last = (row * count // batch.shape[0] for row in _spans(batch)[jax.process_index()])
        problem = ""
        try:
            self._open = {number: text.share(number, count) for number in range(first, last + 1)}
        except (ValueError, OSError) as error:
            problem = str(error)
        # One process that ends alone would leave the others waiting for it.
        problems = [found for found in processes.gathered(problem) if found]
        if problems:
            raise ValueError(problems[0])

    def __next__(self) -> np.ndarray:
        batch = np.zeros(self._shape, np.int32)
        parts = np.split(batch, self._count)
        for number, batches in self._open.items():
            parts[number][:] = next(batches)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position of every share; all processes have to ask."""
        found: dict[int, Any] = {}
        for theirs in processes.gathered([(number, batches.get_state()) for number, batches in self._open.items()]):
            found.update(theirs)
        return {"shares": [found[number] for number in range(self._count)]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position from ``get_state``."""
        for number, batches in self._open.items():
            batches.set_state(state["shares"][number])

    def close(self) -> None:
        """Ends the worker processes."""
        for batches in self._open.values():
            batches.close()


def _spans(batch: jax.ShapeDtypeStruct) -> dict[int, tuple[int, int]]:
    """The first and the last row of a batch that each process has on its devices."""
    rows = batch.shape[0]
    if batch.sharding is None:
        return {jax.process_index(): (0, rows - 1)}
    held: dict[int, list[int]] = {}
    for device, index in batch.sharding.devices_indices_map(batch.shape).items():
        start, stop, _ = index[0].indices(rows)
        held.setdefault(device.process_index, []).extend((start, stop - 1))
    return {process: (min(found), max(found)) for process, found in held.items()}
