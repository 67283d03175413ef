# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The command line: ``galore-jax COMMAND [flags]``.

A mistake in the flags, a path or a file ends with one sentence on stderr and exit code 2; a run that had to give up
ends with one sentence and exit code 1; one that was told to stop by SIGINT or SIGTERM ends with 130 or 143; anything else that
goes wrong is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile, takewhile
from typing import Any, TypeVar, cast

from galore_jax import GaLoreMemoryWarning
from galore_jax._core.names import did_you_mean
from galore_jax._install import how_to_install
from galore_jax.planning import targets

Settings = TypeVar("Settings")


class UsageError(Exception):
    """The command line cannot be carried out; the message is one sentence."""


def pretrain(arguments: Sequence[str]) -> int:
    """Pre-train a LLaMA model, or --resume a run."""
    with needed_packages("pretrain", extra="train"):
        from galore_jax.training import checkpoint, config, divergence, loop, processes, recipes, run_folder

        with usage_errors():
            arguments, default = recipes.without_recipe(arguments)
            if default is not None and "--resume" in arguments:
                raise ValueError(
                    "--recipe starts a run, and --resume continues one with its own settings: leave one out."
                )
        settings = parse(config.PretrainConfig, arguments, "pretrain", default)
    with usage_errors():
        if settings.resume and settings.out is not None:
            # The run's own settings become the defaults, so that only flags that were given can differ from them.
            settings = parse(config.PretrainConfig, arguments, "pretrain", run_folder.load_config(settings.out)[0])
        if settings.distributed:
            config.check(settings)
            processes.join()
        run = loop.prepare(settings)
    return _carried_out(lambda: loop.train(run), checkpoint.CheckpointError, divergence.Diverged)


def finetune(arguments: Sequence[str]) -> int:
    """Fine-tune a model from Hugging Face, or --resume a run."""
    with needed_packages("finetune", extra="train"):
        from galore_jax.training import checkpoint, divergence, finetune as loop, finetune_config

        kind, default = finetune_config.FinetuneConfig, None
        if "--resume" in arguments:  # which needs neither --model nor --data
            default = finetune_config.BLANK
        settings = parse(kind, arguments, "finetune", default)
    with usage_errors():
        if settings.resume and settings.out is not None:
            settings = parse(kind, arguments, "finetune", finetune_config.load_config(settings.out)[0])
        run = loop.prepare(settings)
    return _carried_out(lambda: loop.train(run), checkpoint.CheckpointError, divergence.Diverged)


def _carried_out(train: Callable[[], dict[str, Any]], *reasons: type[Exception]) -> int:
    """The exit code of a training run, which ends with one sentence where it cannot go on for one of the ``reasons``."""
    try:
        with _sigterm_raises():
            stopped = train().get("stopped")  # nothing is returned but by the first of several processes
    except (*reasons, OSError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1
    except _Terminated:
        return 128 + signal.SIGTERM
    # A shell lets its background jobs ignore SIGINT, which then raises nothing when it is passed on.
    return 128 + signal.Signals[stopped] if stopped else 0


class _Terminated(BaseException):
    """SIGTERM was received: what KeyboardInterrupt is to SIGINT."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """A run that SIGTERM has stopped passes the signal on, which here becomes an exception."""

    def terminate(number: int, frame: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handler
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def plan(arguments: Sequence[str]) -> int:
    """Say whether a training step fits a GPU or TPU that need not be there."""
    with needed_packages("plan", extra="train"):
        from galore_jax.training import plan as planner, plan_report

        settings = parse(planner.PlanConfig, arguments, "plan")
    if settings.target != targets.HERE:
        targets.compile_only()
    with usage_errors():
        rows = planner.plan_all(settings, lambda message: print(message, file=sys.stderr))
        if settings.plot is not None:
            plan_report.plot(settings, rows, settings.plot)
    if settings.json:
        print(json.dumps(rows if settings.compare else rows[0], indent=2))
    else:
        print(plan_report.table(settings, rows))
    return 0


def generate(arguments: Sequence[str]) -> int:
    """Continue a text with the model of a run, or with one from Hugging Face."""
    with needed_packages("generate", extra="train"):
        from galore_jax.training import generation

        settings = parse(generation.GenerateConfig, arguments, "generate")
    with usage_errors():
        pieces = generation.generate_text(settings)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def tokenize(arguments: Sequence[str]) -> int:
    """Write a text as tokens once, for runs that start at once."""
    with needed_packages("tokenize", extra="train"):
        from galore_jax.training import tokenized

        settings = parse(tokenized.TokenizeConfig, arguments, "tokenize")
    with usage_errors():
        print(f"{settings.out}: {tokenized.tokenize(settings)}")
    return 0


def classify(arguments: Sequence[str]) -> int:
    """Label texts with a classifier that finetune has trained."""
    with needed_packages("classify", extra="train"):
        from galore_jax.training import classification

        settings = parse(classification.ClassifyConfig, arguments, "classify")
    with usage_errors():
        labelled = classification.classify(settings)
        for line in classification.lines(labelled, as_json=settings.json):
            print(line, flush=True)
    return 0


def export(arguments: Sequence[str]) -> int:
    """Write the model of a run as a Hugging Face folder with its tokenizer."""
    with needed_packages("export", extra="train"):
        from galore_jax.training import export as exporter

        settings = parse(exporter.ExportConfig, arguments, "export")
    with usage_errors():
        exporter.export(settings)
    print(f"{settings.out}: the model of {settings.run}, for transformers and every command of galore-jax")
    return 0


def describe(arguments: Sequence[str]) -> int:
    """Say which matrices of a model are projected, and what state each parameter costs."""
    with needed_packages("describe", extra="train"):
        from galore_jax.training import described

        settings = parse(described.DescribeConfig, arguments, "describe")
    with usage_errors():
        found = described.describe_folder(settings)
    print(json.dumps(dataclasses.asdict(found), indent=2) if settings.json else found)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "tokenize": tokenize,
    "plan": plan,
    "generate": generate,
    "classify": classify,
    "export": export,
    "describe": describe,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    >>> main(["--help"])
    usage: galore-jax COMMAND [flags]
    <BLANKLINE>
      pretrain    Pre-train a LLaMA model, or --resume a run.
      finetune    Fine-tune a model from Hugging Face, or --resume a run.
      tokenize    Write a text as tokens once, for runs that start at once.
      plan        Say whether a training step fits a GPU or TPU that need not be there.
      generate    Continue a text with the model of a run, or with one from Hugging Face.
      classify    Label texts with a classifier that finetune has trained.
      export      Write the model of a run as a Hugging Face folder with its tokenizer.
      describe    Say which matrices of a model are projected, and what state each parameter costs.
    <BLANKLINE>
    galore-jax COMMAND --help lists the flags of a command.
    0
    """
    program = arguments is None
    if program:
        # On a CPU, the idle threads of LAPACK would spin for 25 ms after each small factorization, on the cores of the step.
        os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    name, *rest = (sys.argv[1:] if program else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(_usage())
        return 0
    restore = _quiet_orbax()
    targets.hush_idle_compilers()
    try:
        if name not in COMMANDS:
            raise UsageError(
                f"{name!r} is not a command{did_you_mean(name, COMMANDS)}; choose one of {', '.join(COMMANDS)}."
            )
        with _plain_warnings():
            return COMMANDS[name](rest)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # as a shell reports a program that a signal ended
    finally:
        if not program:  # the background threads of a program may outlive this function
            restore()


def parse(kind: type[Settings], arguments: Sequence[str], command: str, default: Settings | None = None) -> Settings:
    """The dataclass ``kind`` from flags, one for each field; UsageError if they are wrong, SystemExit after --help."""
    import tyro

    _refuse_empty(arguments)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            program = f"galore-jax {command}"
            if default is None:
                return tyro.cli(kind, args=list(arguments), prog=program)
            return tyro.cli(kind, args=list(arguments), prog=program, default=default)
    except SystemExit as exit_:
        if exit_.code == 0:
            raise
        wrong = _first_sentence(message.getvalue())
        flags = [flag for flag in re.findall(r"--[\w-]+", wrong) if wrong.startswith("Unrecognized")]
        known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(cast(Any, kind))]
        known += ["--recipe"] if command == "pretrain" else []
        hint = next(filter(None, (did_you_mean(flag, known) for flag in flags)), "")
        raise UsageError(f"{wrong}{hint}; see galore-jax {command} --help.") from None


def _refuse_empty(arguments: Sequence[str]) -> None:
    """UsageError for an empty value, which as a path would be the current folder; a prompt may be empty."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        name, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if not value and (not word or word.endswith("=")) and name != "--prompt":
            named = name if name.startswith("--") else "An argument"
            raise UsageError(f"{named} is empty; give it a value, or leave it out.")


@contextlib.contextmanager
def needed_packages(command: str, *, extra: str) -> Iterator[None]:
    """A package of ``extra`` that is not installed becomes UsageError; a missing module of ours is a bug."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "galore_jax":
            raise
        raise UsageError(f"galore-jax {command} needs more packages ({error}): {how_to_install(extra)}") from error


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Errors that say what is wrong with a setting, a path or a file become UsageError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    """What an error says; of one from the operating system, its path and reason without the number.

    >>> _sentence(OSError(30, "Read-only file system", "runs/a"))
    'runs/a cannot be read or written (Read-only file system); name another place, or make it one that can.'
    """
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    what = "A file" if error.filename is None else error.filename
    return f"{what} cannot be read or written ({error.strerror}); name another place, or make it one that can."


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """What the library warns of is a line on stderr, without the place in the code."""
    show = warnings.showwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any, **others: Any) -> None:
        if issubclass(category, GaLoreMemoryWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            show(message, category, *place, **others)

    with warnings.catch_warnings():
        warnings.showwarning = plain
        yield


def _quiet_orbax() -> Callable[[], None]:
    """Orbax logs what it also raises, and prints a traceback for each array that waited when a write failed.

    Returns what ends the silence.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, show = [logger.level for logger in loggers], sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    def restore() -> None:
        sys.unraisablehook = show
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

    sys.unraisablehook = show_others
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    return restore


def _usage() -> str:
    commands = "\n".join(f"  {name:<12}{command.__doc__}" for name, command in COMMANDS.items())
    return f"usage: galore-jax COMMAND [flags]\n\n{commands}\n\ngalore-jax COMMAND --help lists the flags of a command."


def _first_sentence(box: str) -> str:
    """What tyro's box says, without its frame (drawn with dashes where there is no UTF-8), title and help.

    >>> _first_sentence("╭─ Error ─╮\\n│ Unrecognized options: --stepz │\\n│ ─── │\\n│ See --help │\\n╰─╯")
    'Unrecognized options: --stepz'
    >>> _first_sentence("╭─ Error ─╮\\n│ Error parsing --steps: no type could be made of '3.x' │\\n╰─╯")
    "--steps '3.x' is not a value that this flag takes"
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │") for line in box.splitlines()]
    after_title = ["" if set(line) <= set("─-╰╯") else line for line in lines[1:]]
    sentence = list(takewhile(bool, dropwhile(lambda line: not line, after_title)))
    paragraph = " ".join(sentence)
    if paragraph.startswith("Missing from "):  # names, with the help of each below it
        names = [line for line in sentence if re.fullmatch(r"(--[\w-]+ )?[A-Z]+", line)]
        return f"{paragraph.partition(':')[0]}: {' and '.join(names)}"
    if unread := re.fullmatch(r"Error parsing (--[\w-]+): .*('[^']*')\]?\.?", paragraph):
        return f"{unread[1]} {unread[2]} is not a value that this flag takes"
    return re.sub(r"\s+(?=[.,](\s|$))", "", paragraph).rstrip(".")
