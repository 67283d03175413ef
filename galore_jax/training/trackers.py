# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a run go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

A tracker has ``write(step, scalars)`` and ``close()``.  TensorBoard's files lie in the run folder and are written wherever its
writer is installed.  ``--track`` asks for one of the others, whose own environment variables configure it (WANDB_MODE,
MLFLOW_TRACKING_URI, ...).  ``track.json`` in the run folder keeps their name of the run, so that a resumed run goes on there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from galore_jax.training import processes, run_folder

_IDS = "track.json"


class Tracker(Protocol):
    """Takes the scalars of a run."""

    name: str

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Takes the scalars of a step; more of the same step may follow."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoard:
    """Files of TensorBoard, by tensorboardX or else by TensorBoard itself; ModuleNotFoundError if neither is installed.

    Records of steps after ``step``, from before a resume, are hidden where the writer can do that; elsewhere steps that a resumed
    run repeats stand there twice, with the same numbers.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int):
        if importlib.util.find_spec("tensorboardX"):
            self._writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder), purge_step=step + 1)
        else:
            self._writer = importlib.import_module("tensorboard.summary").Writer(str(folder))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases: a new one, or the one called ``run_id`` again."""

    name = "wandb"

    def __init__(self, folder: Path, run_id: str | None, settings: dict[str, Any]):
        wandb = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", "galore-jax")
        how = {"id": run_id, "resume": "allow", "config": settings}
        self._run = wandb.init(project=project, name=folder.name, dir=str(folder), **how)
        self.run_id = self._run.id

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow: a new one, or the one called ``run_id`` again."""

    name = "mlflow"

    def __init__(self, folder: Path, run_id: str | None, settings: dict[str, Any]):
        mlflow = importlib.import_module("mlflow")
        self._client = mlflow.MlflowClient()
        self._metric = mlflow.entities.Metric
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "galore-jax")
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run_id = self._client.create_run(number, run_name=folder.name).info.run_id
            for field, value in settings.items():
                self._client.log_param(run_id, field, value)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id: str = run_id

    def write(self, step: int, scalars: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [self._metric(name, value, now, step) for name, value in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


TRACKERS: dict[str, Callable[[Path, str | None, dict[str, Any]], Any]] = {"wandb": WandB, "mlflow": MLflow}


@contextlib.contextmanager
def tracked(track: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[list[Tracker]]:
    """The tracker called ``track`` of the run in ``folder``, closed at the end; only the first of several processes has it.

    Raises:
      ValueError: it is not installed, or refuses (as one that nobody has logged in to).
    """
    found: list[Any] = []
    reason = ""
    if track is not None:
        if processes.first():
            try:
                found.append(_opened(track, folder, settings))
            except ModuleNotFoundError as error:
                reason = f"needs a package ({error}): pip install {track}"
            except Exception as error:  # each has its own kinds
                reason = f"cannot start ({first_line(error)}); set it up, or leave it out"
        if processes.largest(int(bool(reason))):
            raise ValueError(f"--track {track} {reason or 'cannot start: the first process says why'}.")
    try:
        yield found
    finally:
        for tracker in found:
            tracker.close()


def _opened(track: str, folder: Path, settings: dict[str, Any]) -> Any:
    path = folder / _IDS
    ids = run_folder.read_json(path) if path.exists() else {}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    tracker = TRACKERS[track](folder, ids.get(track), plain)
    run_folder.write_json(path, ids | {track: tracker.run_id})
    return tracker


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something, or else the name of its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
