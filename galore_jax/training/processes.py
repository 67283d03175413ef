# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One run in many processes, with ``jax.distributed``: as many as there are hosts, or one for each GPU.

All processes go through the same steps.  Each reads the text, of a stream its share (:mod:`galore_jax.training.shares`), and puts
on its own devices only their part of a batch.  The first one writes the log and says how far the run is; a checkpoint is written
by all of them, into a folder that all of them see.

When a process dies the others cannot go on.  The coordination service of JAX, which runs in the first process, misses its
heartbeats, names it on stderr and ends the others; the run is then continued from its last checkpoint, by as many processes as
there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from galore_jax.training.divergence import Diverged

HEARTBEAT_SECONDS = 30
"""So long after its last sign of life a process is taken for dead."""

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Become one of the processes of a run; before anything else is asked of JAX.

    Who the others are is in the environment: that of Slurm, Open MPI or a TPU slice, or JAX_COORDINATOR_ADDRESS (host:port of the
    first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID (0 for the first).

    Raises:
      ValueError: the environment does not say, or the others cannot be reached.
    """
    number, index = (_whole_number(name) for name in _VARIABLES[1:])
    try:
        jax.distributed.initialize(num_processes=number, process_id=index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--distributed found no other processes ({reason}): start one on each host by Slurm, Open MPI or on a TPU slice, or "
            f"set {', '.join(_VARIABLES[:-1])} and {_VARIABLES[-1]}."
        ) from error


def _whole_number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise ValueError(f"{name} is {text!r}, and must be a whole number.")


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes what all of them know.

    >>> first(), several()
    (True, False)
    """
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when every process has come here."""
    if several():
        multihost_utils.sync_global_devices(what)


def largest(value: int) -> int:
    """The largest of the values that the processes have; all have to ask.

    >>> largest(15)
    15
    """
    return int(np.max(multihost_utils.process_allgather(np.array(value)))) if several() else value


def gathered(value: Any) -> list[Any]:
    """The values, of what JSON has, that the processes have, in their order; all have to ask.

    >>> gathered({"block": 3})
    [{'block': 3}]
    """
    if not several():
        return [value]
    text = json.dumps(value).encode()
    padded = np.frombuffer(text.ljust(largest(len(text))), np.uint8)
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def place(batch: np.ndarray, sharding: Any) -> jax.Array:
    """A batch of which each device gets its part; a process needs to have only the rows of its devices."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])


@contextlib.contextmanager
def until_the_dead_are_named() -> Iterator[None]:
    """A collective fails at once where a process has died; only the heartbeats tell which, and the service then ends this one.

    So an error in one of several processes is kept until that must have happened.  Above all the first process, which runs the
    service, must not be gone before.  That a run has diverged all of them find at the same step.
    """
    try:
        yield
    except Diverged:
        raise
    except Exception as error:
        if several():
            line = next(iter(str(error).splitlines()), "") or type(error).__name__
            print(
                f"Process {jax.process_index()} of {jax.process_count()} cannot go on ({line}); if another has died, it is named "
                f"in about {HEARTBEAT_SECONDS} seconds.",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(3 * HEARTBEAT_SECONDS)
        raise


class Silent:
    """Takes the place of what only the first process writes: a context manager all of whose methods do nothing.

    >>> with Silent() as log:
    ...     log.write({"step": 1})
    """

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Nothing is left open."""

    def _nothing(self, *_: Any) -> None:
        """Not here."""

    write = show = say = advance = _nothing
    compiling = contextlib.nullcontext
