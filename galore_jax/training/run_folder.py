# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its making, its ``config.json``, and whether what goes on there is the run that was started."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from galore_jax.models import LlamaConfig
from galore_jax.training import processes
from galore_jax.training.config import OF_THE_PRESET, PretrainConfig, flag

_MAY_CHANGE = {
    "distributed", "mesh", "steps", "learning_rate", "save_every", "keep", "eval_every", "eval_tokens", "log_every",
    "sample_tokens", "state_memory", "track", "out", "resume",
}  # fmt: skip
"""Fields that a resumed run may set anew, the learning rate because one that diverged needs a lower one; any other would make it
a different run."""

_BEFORE_THE_FIELD = {"refresh": "together", "transport": "keep", "diagnostics": False}
"""What a run did whose ``config.json`` is older than these fields."""

_WRITTEN = (
    "metrics.jsonl",
    "summary.json",
    "tokenizer.json",
    "loss.png",
    "subspace.png",
    "tensorboard",
    "track.json",
    "best",
    "last",
)
"""Files and folders that a run writes beside ``config.json`` and ``checkpoints``."""

_ONCE_CALLED = {"param_dtype": "weights"}
"""Fields that an older ``config.json`` has under another name."""

_WHERE_NULL = {"refresh": "staggered", "transport": "rotate"}
"""What a run did whose ``config.json`` has null there, which is not written any more; with svd it did as before the fields."""


def resume_command(folder: Path, command: str = "pretrain") -> str:
    """What to type to continue the run in ``folder``, with the path of a ``galore-jax`` that is not on PATH.

    >>> resume_command(Path("runs/x")).endswith("galore-jax pretrain --resume --out runs/x")
    True
    >>> resume_command(Path("my runs/x")).endswith("--out 'my runs/x'")
    True
    """
    started_as = Path(sys.argv[0])
    elsewhere = started_as.name == "galore-jax" and shutil.which("galore-jax") is None
    program = str(started_as) if elsewhere else "galore-jax"
    return shlex.join([program, command, "--resume", "--out", str(folder)])


def to_resume(config: Any) -> Path:
    """The folder of the run that ``config`` continues."""
    if config.out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue.")
    return config.out


FolderKind = Literal["nothing", "pretrained", "finetuned", "model", "classifier"]


def kind_of(folder: Path) -> FolderKind:
    """What a folder holds by its ``config.json``: a run of either command, a Hugging Face model or classifier, or none of these.

    Raises:
      ValueError: the ``config.json`` is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return "nothing"
    try:
        fields = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy.") from error
    if not isinstance(fields, dict):
        return "nothing"
    if "task" in fields:
        return "finetuned"
    if "model_config" in fields:
        return "pretrained"
    if "ForSequenceClassification" in str(fields.get("architectures")):
        return "classifier"
    return "model" if "model_type" in fields else "nothing"


def expect(said: str, folder: Path, *kinds: FolderKind) -> FolderKind:
    """The kind of a folder, if it is one of ``kinds``.

    Args:
      said: how the message begins, such as ``f"--model {folder}"``.
      folder: what was named.
      kinds: what the command can use.

    Raises:
      FileNotFoundError: the path is no folder.
      ValueError: it holds something else; the message says what, and which command is for it.
    """
    wanted = " or ".join(_KINDS[kind] for kind in kinds)
    if not folder.is_dir():
        raise FileNotFoundError(f"{said} is no folder; name {wanted}.")
    kind = kind_of(folder)
    if kind in kinds:
        return kind
    if kind == "nothing":
        raise ValueError(f"{said} holds no config.json of a model; name {wanted}.")
    if kind == "finetuned":
        best = folder / "best"
        remedy = f"continue it with `{resume_command(folder, 'finetune')}`"
        if best.is_dir():
            inside, remedy = kind_of(best), f"name the model in it, {best}"
            if inside in _COMMAND and inside not in kinds:
                remedy = f"the model in it is for `{_COMMAND[inside]} {shlex.quote(str(best))}`"
        raise ValueError(f"{said} is a run of galore-jax finetune; {remedy}.")
    raise ValueError(
        f"{said} is {_KINDS[kind]}, which is for `{_COMMAND[kind]} {shlex.quote(str(folder))}`; name {wanted}."
    )


_KINDS: dict[FolderKind, str] = {
    "nothing": "another folder",
    "pretrained": "a run folder of galore-jax pretrain",
    "finetuned": "a run folder of galore-jax finetune",
    "model": "a Hugging Face folder with config.json, safetensors and tokenizer.json",
    "classifier": "a classifier",
}
_COMMAND: dict[FolderKind, str] = {
    "pretrained": "galore-jax generate --model",
    "model": "galore-jax generate --model",
    "classifier": "galore-jax classify --model",
}


def as_started(config: Any, saved: Any) -> Any:
    """``config`` of a run that goes on, in which what it leaves to a default is what the run was started with."""
    names = {"warmup_steps", *OF_THE_PRESET} & {field.name for field in dataclasses.fields(config)}
    unset = {name: getattr(saved, name) for name in names if getattr(config, name) is None}
    return dataclasses.replace(config, **unset)


def check_same_run(config: Any, saved: Any, may_change: set[str] = _MAY_CHANGE) -> None:
    """Raises a ValueError that names the first field, ``may_change`` left out, in which ``config`` and ``saved`` differ."""
    for field in dataclasses.fields(config):
        new, old = getattr(config, field.name), getattr(saved, field.name)
        # repr, because a rank of 1 and one of 1.0 are equal and mean different things.
        if field.name not in may_change and repr(new) != repr(old):
            raise ValueError(
                f"{flag(field.name)} is {new!r}, but the run in {saved.out} was started with {old!r}; "
                f"leave {flag(field.name)} out to continue that run, or start another one with a new --out."
            )


def check_same_tokenizer(folder: Path, fingerprints: dict[str, str]) -> None:
    """Raises a ValueError if the run's ``tokenizer.json`` is not the file that the run wrote."""
    found = _tokenizer_fingerprint(folder)
    if fingerprints.get("tokenizer_fingerprint", found) != found:
        raise ValueError(
            f"{folder / 'tokenizer.json'} is not the tokenizer that the run was started with; "
            "put that file back, or start a new run with another --out."
        )


def check_same_text(source: str, folder: Path, fingerprint: str, fingerprints: dict[str, str]) -> None:
    """Raises a ValueError if the text of ``source`` is not the one that the run in ``folder`` was started with."""
    if fingerprints.get("data_fingerprint", fingerprint) != fingerprint:
        remedy = "put that text back"
        if source == "python":
            remedy = "another version of Python has another library: resume with the interpreter that started the run"
        raise ValueError(
            f"--data {source} is not the text that the run in {folder} was started with; "
            f"{remedy}, or start a new run with another --out."
        )


@contextlib.contextmanager
def new_folder(config: PretrainConfig) -> Iterator[Path]:
    """Creates and locks the folder of a new run; if the ``with`` block fails, what was created is removed again.

    Raises:
      ValueError: it cannot be created, is a file, holds a run already, or is another process's.
    """
    created: list[Path] = []
    try:
        try:
            folder = choose_folder(config)
            created = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            place = config.out or "runs"
            raise ValueError(f"--out {place} cannot be created: {error.strerror}; name another folder.") from error
        with locked(folder):
            yield folder
    except BaseException:
        for path in created:
            with contextlib.suppress(OSError):  # it was not reached, or holds something by now
                path.rmdir()
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the folder of a run; the processes of one run share it, and a kill gives it back.

    Raises:
      ValueError: another process has it, or nothing can be written there.
    """
    path = folder / ".lock"
    held, reason = _take(path) if processes.first() else (None, "its first process says why")
    if processes.largest(int(processes.first() and held is None)):
        raise ValueError(f"The run in {folder} cannot be used: {reason}.")
    try:
        yield
    finally:
        if held is not None:
            path.unlink(missing_ok=True)
            os.close(held)


def _take(path: Path) -> tuple[int | None, str]:
    """The descriptor of a lock file that is this process's now; or None, and why it is not."""
    try:
        while True:
            held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(held, 1000).decode()
                os.close(held)
                return None, f"{holder or 'another process'} is training there; wait for it, or stop it"
            # Whoever had it before removes the file, and then this is a lock on nothing.
            if path.exists() and os.path.samestat(os.fstat(held), path.stat()):
                os.truncate(held, 0)
                os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return held, ""
            os.close(held)
    except OSError as error:
        return None, f"{path} cannot be written ({error.strerror}); a run needs a folder that it can write to"


def choose_folder(config: PretrainConfig) -> Path:
    """The folder of a new run; it is not created here.

    Raises:
      ValueError: ``config.out`` is a file, or holds a run already, or a file that a run would write over.
    """
    if config.out is None:
        model = Path(config.model).resolve().parent.name if config.model.endswith(".json") else config.model
        stem, number = Path("runs", f"{model}-{config.optimizer}"), 1
        while (folder := stem if number == 1 else Path(f"{stem}-{number}")).exists():
            number += 1
        return folder
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out {config.out} is a file; name a folder.")
    if (config.out / "config.json").exists() or (config.out / "checkpoints").exists():
        raise ValueError(
            f"--out {config.out} already holds a run; add --resume to continue it, or name another folder."
        )
    for name in _WRITTEN:
        if (config.out / name).exists():
            raise ValueError(f"--out {config.out} holds {name}, which a run would write over; name another folder.")
    return config.out


def save_config(config: PretrainConfig, model: LlamaConfig, folder: Path, data_fingerprint: str) -> None:
    """Write ``config.json``: every field, resolved, ``model_config``, ``versions`` of what computed it, and two fingerprints.

    They are ``data_fingerprint`` and ``tokenizer_fingerprint``, the SHA-256 of the ``tokenizer.json`` in ``folder``.
    """
    fields = dataclasses.asdict(config.resolved) | {
        "out": str(folder),
        "distributed": False,
    }  # which the next launch says
    fields |= {"model_config": dataclasses.asdict(model), "versions": versions()}
    fields |= {"data_fingerprint": data_fingerprint, "tokenizer_fingerprint": _tokenizer_fingerprint(folder)}
    write_json(folder / "config.json", fields)


def load_config(folder: Path) -> tuple[PretrainConfig, LlamaConfig, dict[str, str]]:
    """Read ``config.json`` of a run folder, which may have been moved: the settings, the model, the fingerprints.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: its ``config.json`` is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no run to resume in {folder}: {path} does not exist.")
    if kind_of(folder) == "finetuned":
        raise ValueError(
            f"{folder} is a run of galore-jax finetune; continue it with `{resume_command(folder, 'finetune')}`."
        )
    try:
        fields = read_json(path)
        model = from_json(LlamaConfig, fields["model_config"])
        known = {field.name for field in dataclasses.fields(PretrainConfig)}
        renamed = {_ONCE_CALLED.get(name, name): value for name, value in fields.items()}
        settings = _BEFORE_THE_FIELD | {name: value for name, value in renamed.items() if name in known}
        config = from_json(PretrainConfig, settings)
        meant = _BEFORE_THE_FIELD if config.projector == "svd" else _WHERE_NULL
        nulls = {name: meant[name] for name in _WHERE_NULL if settings[name] is None}
        # The earliest runs have none, so what they read cannot be compared.
        names = ("data_fingerprint", "tokenizer_fingerprint")
        fingerprints = {name: fields[name] for name in names if name in fields}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore it from a copy.") from error
    return dataclasses.replace(config, out=folder, resume=True, **nulls), model, fingerprints


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return json.loads(path.read_text())


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file so that a crash leaves either the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(fields, indent=2) + "\n")
    partial.replace(path)


def from_json(kind: type, fields: dict[str, Any]) -> Any:
    """The dataclass ``kind`` from what a JSON file says; TypeError if a field has a value of another type."""
    types = get_type_hints(kind)
    for name, value in fields.items():
        if name in types and not _fits(value, types[name]):
            raise TypeError(f"{name} is {value!r}")
    return kind(**fields)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read from JSON has a field's type.

    >>> _fits(8, int | float), _fits("rms", float | Literal["rms"]), _fits("8", int | None), _fits(True, int)
    (True, True, False, False)
    """
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    # JSON has no paths, may write 1.0 as 1, and Python counts bool as int.
    return isinstance(value, {float: (int, float), Path: str}.get(kind, kind)) and (
        isinstance(value, bool) == (kind is bool)
    )


def _tokenizer_fingerprint(folder: Path) -> str:
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Of the libraries that compute a run, and of this one."""
    import galore_jax

    others = {name: version(name) for name in ("jax", "optax", "flax", "orbax-checkpoint")}
    return others | {"galore_jax": galore_jax.__version__}
