# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run records while it trains: ``metrics.jsonl``, whose scalars the trackers get, too.

A step's scalars are read while the device works on the step after it, so that logging never leaves the device idle; the
time between two such reads is the duration of a step.

A record of a GaLore run with diagnostics has ``captured_energy``, ``basis_overlap`` and ``update_rms``, means over all
projected matrices, and each matrix's own in ``subspace``:

    {"layers/attention/q_proj": {"captured_energy": [0.71, ...], "overlap": [null, ...], "update_rms": [...]}, ...}

null, here and everywhere, is a number that is not finite or not defined yet; means leave it out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from galore_jax.training import device_use
from galore_jax.training.divergence import Watch
from galore_jax.training.step import COUNTS, Metrics
from galore_jax.training.trackers import TensorBoard, Tracker, first_line

__all__ = ["read_metrics"]

Record = dict[str, Any]

_MEANS = {"captured_energy": "captured_energy", "basis_overlap": "overlap", "update_rms": "update_rms"}
"""Field of a record -> the quantity in ``subspace`` whose mean it is."""


class MetricsLog:
    """Appends records to ``metrics.jsonl``; TensorBoard, if installed, and other trackers get their scalars.

    A context manager.

    Args:
      folder: of the run.
      step: steps completed; records of later steps, from before a resume, are removed.
      trackers: who gets the scalars besides; they stay open.
    """

    def __init__(self, folder: Path, step: int, trackers: Sequence[Tracker] = ()):
        path = folder / "metrics.jsonl"
        if path.exists():
            _keep_until(path, step)
        self._file = path.open("a")
        self._trackers = list(trackers)
        self._board: TensorBoard | None = None
        with contextlib.suppress(ModuleNotFoundError):
            self._board = TensorBoard(folder / "tensorboard", step)
            self._trackers.append(self._board)

    def write(self, record: Record) -> None:
        """Append one record; a number that is not finite becomes null, which JSON has.  The trackers get its scalars.

        One that fails, such as a server that is not there any more, is left out from then on.
        """
        self._file.write(json.dumps(_with_nulls(record)) + "\n")
        self._file.flush()
        scalars = dict(_scalars(record))
        for tracker in [*self._trackers]:
            try:
                tracker.write(record["step"], scalars)
            except Exception as error:  # each has its own kinds
                self._trackers.remove(tracker)
                reason = first_line(error)
                print(
                    f"warning: {tracker.name} gets no more numbers ({reason}); metrics.jsonl has all.", file=sys.stderr
                )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[Record]:
    """The records of ``metrics.jsonl``, in order; a last line that a crash cut short is left out.

    Raises:
      ValueError: a line that is complete is not a record.

    >>> read_metrics(Path("there is no such run"))
    []
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def finite_mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers that are finite; None if there is none.

    >>> finite_mean([1.0, None, 3.0, math.nan]), finite_mean([None])
    (2.0, None)
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def rank(validation: Record) -> tuple[float, float]:
    """What is smaller the better a validation was: by accuracy where there is one, and then by the loss.

    >>> rank({"val_loss": 0.5, "val_accuracy": 0.75}) < rank({"val_loss": 0.25, "val_accuracy": 0.5})
    True
    """
    loss = validation["val_loss"]
    loss = loss if loss is not None and math.isfinite(loss) else math.inf
    return -validation.get("val_accuracy", 0.0), loss


def subspace_fields(leaves: dict[str, dict[str, np.ndarray]]) -> Record:
    """The fields of a record that come from the diagnostics of :func:`galore_jax.training.step.subspace_metrics`.

    >>> q_proj = {"captured_energy": [0.5, 0.7], "overlap": [np.nan, 0.9], "update_rms": [0.1, 0.3]}
    >>> fields = subspace_fields({"q_proj": {name: np.float32(values) for name, values in q_proj.items()}})
    >>> fields["basis_overlap"], fields["subspace"]["q_proj"]["captured_energy"]
    (0.9, [0.5, 0.7])
    """
    if not leaves:
        return {}
    # The shortest decimals that are these float32 numbers.
    exact = {
        leaf: {quantity: [float(str(value)) for value in values] for quantity, values in quantities.items()}
        for leaf, quantities in leaves.items()
    }
    means = {
        name: finite_mean(value for quantities in exact.values() for value in quantities[quantity])
        for name, quantity in _MEANS.items()
    }
    return means | {"subspace": exact}


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_nulls(part) for part in value]
    return value if value is not None and math.isfinite(value) else None


def _scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Name and value of everything in a record that is one number, and the mean over each leaf's matrices."""
    for name, value in record.items():
        if name == "subspace":
            means = {
                f"subspace/{quantity}/{leaf}": finite_mean(values)
                for leaf, quantities in value.items()
                for quantity, values in quantities.items()
            }
            yield from ((tag, mean) for tag, mean in means.items() if mean is not None)
        elif name != "step" and value is not None:
            yield name, value


def _parse(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{path} is damaged at line {number}; delete that line, or restore the file from a copy.")
    return record


def _keep_until(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    partial.replace(path)


SPEED_STEPS = 20
"""A speed over fewer steps jumps with every refresh and every hiccup of the machine."""


@dataclasses.dataclass
class Meter:
    """Makes the records of training steps out of the metrics that the device returns, one step late.

    Args:
      learning_rates: of each step, float [steps].
      tokens: of each step, or of every step alike.
      every: steps between two records; the last step has one too.
      losses: of the steps since the last record, from the checkpoint.
      full_speed: tokens a second at the peak of the devices, None if it is not known.

    Speeds are those of the steps alone, without compilation, validations and checkpoints, over the steps since the last record
    and at least the last :data:`SPEED_STEPS`.
    """

    learning_rates: np.ndarray
    tokens: int | np.ndarray
    every: int
    losses: list[float]
    full_speed: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Duration of every step that was read."""
    waits: list[float] = dataclasses.field(default_factory=list)
    """Of each step, the seconds until its batch was there."""
    _pending: tuple[int, Metrics] | None = None
    _clock: float = 0.0
    _timed: int = 0  # steps since the last record
    _step: int = 0  # the last one that was read

    def __post_init__(self) -> None:
        each = np.broadcast_to(np.asarray(self.tokens, np.int64), self.learning_rates.shape)
        self.watch = Watch(len(self.learning_rates))
        self._tokens_after = np.concatenate([np.zeros(1, np.int64), np.cumsum(each)])  # so many steps

    def start(self) -> None:
        """Start the clock, after work that is not a training step."""
        self._clock = time.perf_counter()

    def batch(self, batches: Iterator[Any]) -> Any:
        """The next batch, and a note of how long it took."""
        began = time.perf_counter()
        batch = next(batches)
        self.waits.append(time.perf_counter() - began)
        return batch

    def add(self, step: int, metrics: Metrics) -> Record | None:
        """Take the metrics of a step that was just dispatched; returns the record of the one before, if one is due.

        Raises:
          Diverged: the step before shows that the run cannot go on.
        """
        record = self.finish()
        self._pending = (step, metrics)
        return record

    def finish(self) -> Record | None:
        """Wait for the step taken last; returns its record, if one is due, and raises what :meth:`add` does."""
        if self._pending is None:
            return None
        step, metrics = self._pending
        self._pending = None
        loss, grad_norm, skipped = (float(metrics[name]) for name in ("loss", "grad_norm", "skipped"))
        now = time.perf_counter()
        self.seconds.append(now - self._clock)
        self._clock = now
        self._timed += 1
        self._step = step
        self.losses.append(loss)
        self.watch.see(step, loss, grad_norm, int(skipped))
        if step % self.every and step != len(self.learning_rates):
            return None
        metrics = jax.device_get(metrics)
        record = {
            "step": step,
            "loss": math.fsum(self.losses) / len(self.losses),
            "learning_rate": float(self.learning_rates[step - 1]),
            **self.speed(max(self._timed, SPEED_STEPS)),
            "grad_norm": grad_norm,
            "tokens": int(self._tokens_after[step]),
            **{name: int(metrics[name]) for name in COUNTS},
            **subspace_fields(metrics["subspace"]),
        }
        self.losses, self._timed = [], 0
        return record

    def speed(self, steps: int) -> Record:
        """Figures of the last ``steps`` steps, or of all if fewer, and ``peak_memory_bytes``.

        They are ``tokens_per_second``, ``mfu``, and ``data_wait``, the share of the time in which the loop waited for a batch;
        the device may still have been at work on the step before.
        """
        steps = min(steps, len(self.seconds))
        if not steps:
            return {"tokens_per_second": None, "data_wait": None, "peak_memory_bytes": device_use.peak_memory_bytes()}
        tokens = int(self._tokens_after[self._step] - self._tokens_after[self._step - steps])
        seconds = sum(self.seconds[-steps:])
        speed = tokens / seconds
        wait = sum(self.waits[: len(self.seconds)][-steps:]) / seconds  # a step that is under way has waited already
        share = {} if self.full_speed is None else {"mfu": speed / self.full_speed}
        return {
            "tokens_per_second": speed,
            **share,
            "data_wait": wait,
            "peak_memory_bytes": device_use.peak_memory_bytes(),
        }

    @property
    def step_seconds(self) -> float:
        """Mean duration of the last steps."""
        return finite_mean(self.seconds[-SPEED_STEPS:]) or 0.0
