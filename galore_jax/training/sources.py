# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Where documents come from: the Python standard library, files and folders, and Hugging Face datasets.

A document is a string whose lines end in "\\n"; documents with nothing but white space are left out.  Files are those of
:mod:`galore_jax.training.files`.  Local sources are read whole into memory and divided into training and validation documents
here; Hugging Face datasets, and files after "hf:", are streamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from galore_jax.training.files import (
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    bare_suffix,
    looks_like_json_lines,
    plain_lines,
    read_rows,
    read_text,
    source_path,
)

if TYPE_CHECKING:
    import datasets

# Third-party packages, tests, editor resources, a frozen Python 2 grammar, and tables of character codes:
# together most of the bytes under the standard library's folder, and no part of what a model should learn
# from it.
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
_VALIDATION = re.compile(r"(^|[-_.])validation([-_.]|$)")
# Documents held out from the head of a stream that has no validation or test split.
HELD_OUT_DOCUMENTS = 1000


class Corpus(NamedTuple):
    """Documents, and in words what was left out: "" if nothing was."""

    documents: list[str]
    left_out: str
    validation: Sequence[str] = ()  # of a folder that has files for it

    def divided(self) -> tuple[list[str], list[str]]:
        """Training and validation documents: as the folder has them, or as `split_documents` draws them."""
        return (self.documents, list(self.validation)) if self.validation else split_documents(self.documents)


def read_documents(source: str, text_column: str = "text") -> Corpus:
    """The documents of a local source: "python", a file, or a folder of files.

    "python" is the standard library of the running interpreter. A file of text is divided at its blank lines, and each row of
    a file of rows is a document. In a folder, every text file is a document as a whole, in the order of their paths; hidden
    files, links to folders, links that lead nowhere, files of other kinds, and .json files that are no rows with that column
    (such as a package.json) are left out and counted. Files of rows with "validation" in their name, such as
    c4-validation.00000-of-00008.json.gz, are for validation, if there are others.

    Args:
      source: "python" or a path.
      text_column: The field of a row that holds its text.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: it is empty, holds no text, or has a file that cannot be read as what it is.
    """
    path = Path(sysconfig.get_paths()["stdlib"]) if source == "python" else source_path(source)
    left_out: Counter[str] = Counter()
    documents: list[str] = []
    validation: list[str] = []
    if source == "python":
        for file in _files(path, NOT_THE_LIBRARY, left_out):
            if bare_suffix(file) in TEXT_SUFFIXES:
                documents.append(read_text(file))
    elif path.is_dir():
        for file in _files(path, set(), left_out):
            held_out = bare_suffix(file) in ROW_SUFFIXES and _VALIDATION.search(file.name)
            (validation if held_out else documents).extend(_in_folder(file, text_column, left_out))
    elif path.exists():
        documents = _texts(path, text_column, re.compile(r"\n\s*\n"), left_out)
    else:
        raise FileNotFoundError(
            f'data source {source!r} does not exist: use "python", a file, a folder or "hf:NAME[:CONFIG]".'
        )
    documents, validation = ([text for text in part if text.strip()] for part in (documents, validation))
    if not documents:
        documents, validation = validation, []
    said = "" if source == "python" else _counted(left_out)
    if not documents:
        kinds = f" in {', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} files or .gz or .zst of these" if path.is_dir() else ""
        what = f"; left out are {said}" if said else ""
        raise ValueError(f"data source {str(path)!r} holds no text{kinds}{what}: give one that does.")
    return Corpus(documents, said, validation)


def column_texts(path: Path, column: str) -> Iterator[str]:
    """The text of every row of a file; a null is an empty one.

    Raises:
      ValueError: a row has no such field, or holds something else there.
    """
    for place, fields in read_rows(path, column):
        if column not in fields:
            found = ", ".join(map(repr, list(fields)[:8])) or "none"
            raise MissingColumn(f"{path} {place} has no field {column!r}, only {found}: choose with --text-column.")
        text = fields[column]
        if not isinstance(text, str | None):
            raise ValueError(
                f"{path} {place} has {type(text).__name__} in its field {column!r}, and not text: choose another "
                "with --text-column."
            )
        yield plain_lines(text or "")


class MissingColumn(ValueError):
    """A row has no field of the name that was asked for."""


def _in_folder(file: Path, text_column: str, left_out: Counter[str]) -> list[str]:
    """The documents of one file; none if it is JSON of another make than rows, as settings and lists are."""
    try:
        return _texts(file, text_column, None, left_out)
    except ValueError as error:
        if bare_suffix(file) != ".json" or not _is_other_json(file, error):
            raise
        left_out[f"without the field {text_column!r}"] += 1
        return []


def _is_other_json(file: Path, error: ValueError) -> bool:
    """Whether a file from which no rows could be read is sound JSON of another make."""
    if isinstance(error, MissingColumn):
        return True
    try:
        json.loads(read_text(file))
    except (ValueError, RecursionError):
        return False
    return True


def _texts(file: Path, text_column: str, divider: re.Pattern[str] | None, left_out: Counter[str]) -> list[str]:
    """The rows of a file, or its text: in one piece, or what lies between the matches of ``divider``."""
    if bare_suffix(file) not in ROW_SUFFIXES:
        text = read_text(file)
        if not looks_like_json_lines(text):
            left_out["empty"] += not text.strip()
            return [text] if divider is None else divider.split(text)
    texts = list(column_texts(file, text_column))
    left_out["empty rows"] += sum(not text.strip() for text in texts)
    return texts


def _counted(left_out: Counter[str]) -> str:
    """In words, the most frequent ones first.

    >>> _counted(Counter({".png": 7, "hidden": 1}))
    '.png (7), hidden (1)'
    """
    return ", ".join(f"{what} ({count:,})" for what, count in left_out.most_common() if count)


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents, about 95 % and 5 % of the characters.

    Order is kept, and equal texts stay together. Documents are drawn by the hash of their text, so that the
    division depends on neither names, order nor seeds, and adding a document moves few others. When the
    documents are too few or too large for that (one long file), the last 5 % of each is held out instead.

    >>> split_documents(["a" * 20])
    (['aaaaaaaaaaaaaaaaaaa'], ['a'])
    """
    held_out = _held_out(documents, 20) or _held_out(documents, 10)
    if held_out:
        train = [text for text in documents if text not in held_out]
        return train, [text for text in documents if text in held_out]
    cuts = [(text, len(text) * 19 // 20) for text in documents]
    train, validation = [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    return [text for text in train if text], [text for text in validation if text]


def _held_out(documents: list[str], share: int) -> set[str]:
    """At most a `share`-th of the text in whole documents, or none if these would be less than a fortieth."""
    copies = Counter(documents)
    total = sum(map(len, documents))
    held_out, size = set(), 0
    for text in sorted(copies, key=lambda text: hashlib.sha256(text.encode("utf-8")).digest()):
        characters = len(text) * copies[text]
        if (size + characters) * share <= total:
            held_out.add(text)
            size += characters
    return held_out if size * 40 >= total else set()


def _files(folder: Path, skip: set[str], left_out: Counter[str]) -> Iterator[Path]:
    """The files of text and of rows below a folder; what else is there is counted."""

    def fail(error: OSError) -> None:
        raise ValueError(
            f"{error.filename} cannot be read ({error.strerror}): make it readable or leave it out."
        ) from error

    for directory, folders, names in os.walk(folder, onerror=fail):
        for name in sorted(folders):
            if name.startswith("."):
                left_out["hidden"] += 1
            elif Path(directory, name).is_symlink():
                left_out["linked folders"] += 1
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for path in (Path(directory, name) for name in sorted(names)):
            if path.name.startswith("."):
                left_out["hidden"] += 1
            elif not path.exists():
                left_out["links that lead nowhere"] += 1
            elif not path.is_file():
                left_out["pipes and devices"] += 1
            elif bare_suffix(path) not in TEXT_SUFFIXES + ROW_SUFFIXES:
                left_out[bare_suffix(path) or "without a suffix"] += 1
            else:
                yield path


def open_stream(
    source: str, text_column: str = "text"
) -> tuple[datasets.IterableDataset, datasets.IterableDataset, str]:
    """The training and validation streams of "hf:NAME[:CONFIG]", and what the validation documents are.

    NAME is a dataset of the Hugging Face hub, a folder of JSON, Parquet or text files, or one such file. The streams yield
    `{"text": ...}`. Validation is the split "validation" or else "test", or else the first documents of
    "train".

    Args:
      source: "hf:NAME[:CONFIG]".
      text_column: The column that holds the text.

    Raises:
      FileNotFoundError: NAME is a path, and nothing is there.
      ValueError: the dataset cannot be loaded or has no "train" split or no such column.
    """
    name, _, config = source.removeprefix("hf:").partition(":")
    local = _local(source, name)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data source {source!r} needs a library: pip install datasets") from error
    try:
        with _quiet_hub():
            if local is not None:
                kind, options = local
                splits = datasets.load_dataset(kind, data_files={"train": name}, streaming=True, **options)
            else:
                splits = datasets.load_dataset(name, config or None, streaming=True)
            return _splits(source, splits, text_column)
    except SourceError:
        raise
    except Exception as error:  # the libraries below raise many kinds: no such dataset, no network, a damaged file
        raise ValueError(f"cannot load data source {source!r}: {_reason(error)}") from error


class SourceError(ValueError):
    """A dataset lacks what is needed of it."""


def _local(source: str, name: str) -> tuple[str, dict[str, Any]] | None:
    """How the library calls a file, and its options; None for a folder and for a dataset of the hub."""
    if not name:
        raise ValueError(
            f"data source {source!r} names no dataset: write hf:NAME or hf:NAME:CONFIG, such as hf:allenai/c4:en."
        )
    path, suffix = Path(name), bare_suffix(Path(name))
    if path.is_file():
        if suffix == ".parquet":
            return "parquet", {}
        return ("json", {}) if suffix in ROW_SUFFIXES else ("text", {"sample_by": "paragraph"})
    # A name on the hub is NAME or OWNER/NAME.
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if not path.exists() and (is_path or suffix in TEXT_SUFFIXES + ROW_SUFFIXES):
        raise FileNotFoundError(
            f"data source {source!r} does not exist: name a file, a folder or a dataset of the hub."
        )
    return None


def _splits(
    source: str, splits: Any, text_column: str
) -> tuple[datasets.IterableDataset, datasets.IterableDataset, str]:
    if "train" not in splits:
        found = ", ".join(map(str, splits))
        raise SourceError(f'data source {source!r} has no "train" split, only {found}: choose another.')
    train = _text_column(source, splits["train"], text_column)
    for split in ("validation", "test"):
        if split in splits:
            return train, _text_column(source, splits[split], text_column), f'the "{split}" split'
    held_out = f'the first {HELD_OUT_DOCUMENTS:,} documents of "train"'
    return train.skip(HELD_OUT_DOCUMENTS), train.take(HELD_OUT_DOCUMENTS), held_out


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The libraries log each attempt to reach the hub and each fault of a file, and then raise what says it all."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for logger, level in zip(loggers, (logging.ERROR, logging.CRITICAL), strict=True):
            logger.setLevel(level)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _text_column(source: str, stream: datasets.IterableDataset, column: str) -> datasets.IterableDataset:
    # Some formats name no columns before they are read.
    columns = stream.column_names or list(next(iter(stream), {}))
    if column not in columns:
        found = ", ".join(columns)
        raise SourceError(f'data source {source!r} has no column "{column}", only {found}: choose with --text-column.')
    stream = stream.select_columns([column])
    return stream if column == "text" else stream.rename_column(column, "text")


class StreamError(OSError):
    """A stream broke off."""


def stream_texts(examples: Iterable[dict[str, str | None]]) -> Iterator[str]:
    """The documents of a stream from `open_stream`; StreamError where it breaks off."""
    rows = iter(examples)
    while True:
        try:
            example = next(rows, None)
        except Exception as error:  # as in open_stream
            raise StreamError(
                f"the stream of text broke off ({_reason(error)}): mend its source, and continue with --resume."
            ) from error
        if example is None:
            return
        text = example["text"]
        if text is not None and text.strip():
            yield plain_lines(text)


def _reason(error: Exception) -> str:
    """The first line of what a library says is the matter."""
    return str(error.__cause__ or error).strip().partition("\n")[0]
