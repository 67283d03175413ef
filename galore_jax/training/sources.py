# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Where documents come from: the Python standard library, files and folders, and Hugging Face datasets.

A document is a string; documents with nothing but white space are left out. Local sources are read whole into
memory and divided into training and validation documents here; Hugging Face datasets are streamed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
# Third-party packages, tests, editor resources, a frozen Python 2 grammar, and tables of character codes:
# together most of the bytes under the standard library's folder, and no part of what a model should learn
# from it.
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
# Documents held out from the head of a stream that has no validation or test split.
HELD_OUT_DOCUMENTS = 1000


def read_documents(source: str) -> list[str]:
    """The documents of a local source: "python", a text file, or a folder of text files.

    "python" is the standard library of the running interpreter. A file is divided at its blank lines. A
    folder gives one document for every .txt, .md, .rst and .py file below it, in the order of their paths.
    Files may be gzipped.

    Raises FileNotFoundError when the path does not exist, and ValueError when it holds no text, or a file
    that is not UTF-8 or is a damaged gzip file.
    """
    path = Path(sysconfig.get_paths()["stdlib"] if source == "python" else source)
    if source == "python":
        documents = [read_text(file) for file in _text_files(path, skip=NOT_THE_LIBRARY)]
    elif path.is_dir():
        documents = [read_text(file) for file in _text_files(path, skip=set())]
    elif path.exists():
        documents = re.split(r"\n\s*\n", read_text(path))
    else:
        raise FileNotFoundError(
            f'data source {source!r} does not exist: use "python", a text file, a folder or "hf:NAME[:CONFIG]".'
        )
    documents = [text for text in documents if text.strip()]
    if not documents:
        kinds = f" in {', '.join(TEXT_SUFFIXES)} files or .gz of these" if path.is_dir() else ""
        raise ValueError(f"data source {str(path)!r} holds no text{kinds}: give one that does.")
    return documents


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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, gzipped when its name ends in .gz; ValueError names the file and the fault."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8").removeprefix("\ufeff")  # the mark that some editors put first
    except EOFError as error:
        raise ValueError(f"{path} is a truncated gzip file: copy or download it again.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a valid gzip file ({error}): copy or download it again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): "
            f"convert it or leave it out."
        ) from error


def _text_files(folder: Path, *, skip: set[str]) -> Iterator[Path]:
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for name in sorted(files):
            if name.removesuffix(".gz").endswith(TEXT_SUFFIXES) and not name.startswith("."):
                yield Path(directory, name)


def open_stream(source: str) -> tuple[datasets.IterableDataset, datasets.IterableDataset, str]:
    """The training and validation streams of "hf:NAME[:CONFIG]", and what the validation documents are.

    NAME is a dataset of the Hugging Face hub, or a folder of JSON, Parquet or text files. The streams yield
    `{"text": ...}`. Validation is the split "validation" or else "test", or else the first documents of
    "train".

    Raises ValueError when the dataset cannot be loaded or has no "train" split or no "text" column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data source {source!r} needs a library: pip install datasets") from error
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        with _quiet_hub():
            splits = datasets.load_dataset(name, config or None, streaming=True)
    except (OSError, ValueError) as error:  # no such dataset or configuration, or no network
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot load data source {source!r}: {reason}") from error
    if "train" not in splits:
        found = ", ".join(map(str, splits))
        raise ValueError(f'data source {source!r} has no "train" split, only {found}: choose another.')
    train = _text_column(source, splits["train"])
    for split in ("validation", "test"):
        if split in splits:
            return train, _text_column(source, splits[split]), f'the "{split}" split'
    held_out = f'the first {HELD_OUT_DOCUMENTS:,} documents of "train"'
    return train.skip(HELD_OUT_DOCUMENTS), train.take(HELD_OUT_DOCUMENTS), held_out


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without a network the Hub's library warns of each attempt, and then raises what says it all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _text_column(source: str, stream: datasets.IterableDataset) -> datasets.IterableDataset:
    # Some formats name no columns before they are read.
    columns = stream.column_names or list(next(iter(stream), {}))
    if "text" not in columns:
        found = ", ".join(columns)
        raise ValueError(f'data source {source!r} has no column "text", only {found}: choose another dataset.')
    return stream.select_columns(["text"])


def stream_texts(examples: Iterable[dict[str, str | None]]) -> Iterator[str]:
    """The documents of a stream from `open_stream`."""
    for example in examples:
        text = example["text"]
        if text is not None and text.strip():
            yield text
