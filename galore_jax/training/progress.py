# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run shows on stderr: a clock while it prepares, and then a bar on a terminal, or a line for each record elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from galore_jax.training.metrics import Record
from galore_jax.training.report import format_bytes

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
"""Without the speed of tqdm, which counts compilation, validations and checkpoints as steps."""


@contextlib.contextmanager
def clock(what: str) -> Iterator[None]:
    """Shows ``what`` and the seconds since the start on a terminal until the block ends; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield
        return
    began, over = time.perf_counter(), threading.Event()

    def show() -> None:
        while True:
            print(f"\r{what} ... {time.perf_counter() - began:.0f} s", end="", file=sys.stderr, flush=True)
            if over.wait(1):
                break

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        print("\r\033[K", end="", file=sys.stderr, flush=True)  # the line is empty again


class Progress:
    """The state of a run on stderr; a context manager."""

    def __init__(self, step: int, steps: int):
        self._step, self._steps = step, steps
        self._bar: Any = None

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Around the compilation of the step, before the first :meth:`advance`: says how long it takes."""
        began = time.perf_counter()
        if not sys.stderr.isatty():
            self.say("compiling the training step ...")
        with clock("compiling the training step"):
            yield
        self.say(f"compiled in {time.perf_counter() - began:.1f} s")
        if sys.stderr.isatty():
            self._bar = tqdm(initial=self._step, total=self._steps, dynamic_ncols=True, bar_format=_BAR)

    def advance(self) -> None:
        """One step was dispatched."""
        if self._bar is not None:
            self._bar.update()

    def show(self, record: Record, step_seconds: float) -> None:
        """Show a training or a validation record; the steps that are left take ``step_seconds`` each."""
        if "val_loss" in record:
            self.say(f"step {record['step']}: validation {validation_words(record)}")
            return
        text = training_words(record, (self._steps - record["step"]) * step_seconds)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            print(f"step {record['step']}/{self._steps}: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def training_words(record: Record, seconds_left: float) -> str:
    """What a record of training says, on a terminal and elsewhere.

    >>> record = {"loss": 2.5, "learning_rate": 0.01, "tokens_per_second": 51234.5, "peak_memory_bytes": 3 * 2**30, "mfu": 0.413}
    >>> training_words(record | {"data_wait": 0.0}, 200)
    'loss 2.5000, learning rate 1.00e-02, 51,234 tokens/s, MFU 41.3%, 3.0 GiB, 03:20 left'
    >>> training_words(record | {"data_wait": 0.25}, 200)
    'loss 2.5000, learning rate 1.00e-02, 51,234 tokens/s, MFU 41.3%, 25% waiting for data, 3.0 GiB, 03:20 left'
    """
    words = [
        f"loss {record['loss']:.4f}, learning rate {record['learning_rate']:.2e}, {record['tokens_per_second']:,.0f} tokens/s"
    ]
    if "mfu" in record:
        words.append(f"MFU {record['mfu']:.1%}")
    if record["data_wait"] >= 0.01:
        words.append(f"{record['data_wait']:.0%} waiting for data")
    words += [format_bytes(record["peak_memory_bytes"]), f"{tqdm.format_interval(seconds_left)} left"]
    return ", ".join(words)


def validation_words(record: Record) -> str:
    """What a validation found.

    >>> validation_words({"val_loss": 0.4, "val_accuracy": 0.825})
    'loss 0.4000, accuracy 0.825'
    """
    if "val_accuracy" in record:
        return f"loss {record['val_loss']:.4f}, accuracy {record['val_accuracy']:.3f}"
    return f"loss {record['val_loss']:.4f}, perplexity {record['val_perplexity']:.2f}"
