# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The preset with the lowest measured loss whose state fits a budget.

``frontier.json`` beside this module has the measurements, as ``benchmarks/quality.py OUT --report --publish FILE`` writes them: a
preset, its arguments, the number of steps, the loss, and the learning rate with which it was lowest.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any, NamedTuple

import optax

from galore_jax import memory
from galore_jax.matrix_codec import MatrixCodec
from galore_jax.presets import PRESETS

__all__ = ["Recommendation", "recommend"]


class Recommendation(NamedTuple):
    """A preset and its arguments, and what speaks for it."""

    preset: str  # name in galore_jax
    arguments: dict[str, Any]
    state_bytes: int  # of its state for the given parameters
    loss: float  # validation loss in the benchmark, nats a byte
    steps: int  # length of the benchmark's run
    learning_rate: float  # best one of the benchmark

    def build(self, learning_rate: optax.ScalarOrSchedule | None = None) -> optax.GradientTransformationExtraArgs:
        """The optimizer; ``learning_rate`` is the benchmark's by default."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        return PRESETS[self.preset](rate, **self.arguments)


def recommend(params: Any, *, state_bytes: float, **arguments: Any) -> Recommendation:
    """The preset that had the lowest loss of those whose optimizer state for ``params`` takes at most ``state_bytes``.

    The losses are those of ``benchmarks/quality.py``, which trained a small model (docs/benchmarks.md).  A longer run decides
    before a shorter one, because low-rank momenta fall behind with time.  The state of all parameters is counted, embeddings and
    the LM head too, exactly and without allocating it.

    Args:
      params: The parameters, arrays or ``jax.ShapeDtypeStruct``.
      state_bytes: The largest size of the optimizer state in bytes.
      **arguments: Arguments for every preset, such as ``mask`` or ``weight_decay``.

    Raises:
      ValueError: No state is small enough.

    >>> import jax
    >>> params = {"kernel": jax.ShapeDtypeStruct((1024, 1024), "float32")}
    >>> found = recommend(params, state_bytes=2.2e6)
    >>> found.state_bytes <= 2.2e6, found.preset in PRESETS
    (True, True)
    >>> tx = found.build(optax.cosine_decay_schedule(found.learning_rate, 1000))
    """
    sizes = {}
    for point in sorted(_points(), key=lambda point: (-point.steps, point.loss)):
        found = point._replace(arguments=point.arguments | arguments)
        size = sizes[point.preset, repr(point.arguments)] = memory.state_bytes(found.build(), params)
        if size <= state_bytes:
            return found._replace(state_bytes=size)
    (name, settings), least = min(sizes.items(), key=lambda item: item[1])
    raise ValueError(
        f"state_bytes is {state_bytes:g}, but the smallest state is that of {name} with {settings}, {least} bytes; allow that "
        "many, or freeze a part of the parameters."
    )


@functools.cache
def _points() -> list[Recommendation]:
    """The measurements, with 0 bytes."""
    file = importlib.resources.files("galore_jax.presets") / "frontier.json"
    points = json.loads(file.read_text())["points"]
    return [
        Recommendation(**point | {"arguments": _arguments(point["arguments"]), "state_bytes": 0}) for point in points
    ]


def _arguments(stored: dict[str, Any]) -> dict[str, Any]:
    """``stored`` with its codec as an object."""
    return {name: MatrixCodec(**value) if name == "codec" else value for name, value in stored.items()}
