# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A corpus as tokens in files, which a run maps into memory: what ``galore-jax tokenize`` writes.

    tokens.json                     the source, what it held, the type of the tokens, and a checksum of each file
    tokenizer.json                  what made them
    train.bin, validation.bin       the tokens, each document followed by the end-of-document id

A corpus larger than memory is tokenized as it streams, and its windows are shuffled as a whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from galore_jax.training.files import source_path
from galore_jax.training.sources import StreamError, open_stream, read_documents, stream_texts
from galore_jax.training.tokenizer import Tokenizer, load_tokenizer, model_tokenizer

TOKENIZER_DOCUMENTS = 10_000
"""Documents of a stream that "bpe" is trained on: some 20 MB of C4."""

_FACTS = "tokens.json"
_PARTS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Write a corpus as tokens, once, so that galore-jax pretrain --data OUT starts at once and shuffles all of it."""

    out: Path
    """Folder to write, which must not exist or be empty."""
    data: str = "python"
    """Text, as in galore-jax pretrain; of hf:NAME[:CONFIG] all is read, in a stream."""
    text_column: str = "text"
    """The field of rows that holds the text."""
    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on the text), or a path to a tokenizer.json or its folder."""
    vocab_size: int = 4096
    """Vocabulary of a trained bpe tokenizer."""


class Tokenized(NamedTuple):
    """The tokens in a folder, mapped into memory."""

    tokenizer: Tokenizer
    train: np.ndarray  # [n], uint16 or int32
    validation: np.ndarray
    description: str
    fingerprint: str


def tokenize(config: TokenizeConfig) -> str:
    """Write the folder, whole or not at all; returns a line on what it holds.

    Raises:
      ValueError, FileNotFoundError: the text or the tokenizer cannot be used, or the folder cannot be written.
    """
    out, source = config.out, config.data
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out} exists, and nothing is written over; name another folder.")
    if is_tokenized(source):
        raise ValueError(f"--data {source} holds tokens already.")
    left_out = ""
    if source.startswith("hf:"):
        streams = open_stream(source, config.text_column)[:2]
        sample: Iterable[str] = islice(stream_texts(streams[0]), TOKENIZER_DOCUMENTS)
        parts: list[Iterable[str]] = [stream_texts(stream) for stream in streams]
    else:
        corpus = read_documents(source, config.text_column)
        left_out = corpus.left_out
        parts = [*corpus.divided()]
        sample = parts[0]
    tokenizer = load_tokenizer(config.tokenizer, sample, vocab_size=config.vocab_size)
    partial = out.with_name(out.name + ".partial")
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<i4"
    facts: dict[str, Any] = {"source": source, "text_column": config.text_column, "dtype": dtype, "left_out": left_out}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, texts in zip(_PARTS, parts, strict=True):
            facts[name] = _write(partial / f"{name}.bin", tokenizer, texts, dtype)
        tokenizer.save(partial / "tokenizer.json")
        (partial / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, StreamError):
            raise ValueError(f"--out {out} cannot be written ({error.strerror or error}).") from error
        raise
    return _described(facts)


def is_tokenized(source: str) -> bool:
    """Whether a source is a folder that :func:`tokenize` wrote."""
    return not source.startswith("hf:") and (source_path(source) / _FACTS).is_file()


def open_tokenized(source: str) -> Tokenized:
    """The tokens in a folder.

    Raises:
      ValueError, FileNotFoundError: a file is missing, damaged, or not as long as it was.
    """
    folder = Path(source)
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        train, validation = (_mapped(folder / f"{name}.bin", facts[name]["tokens"], facts["dtype"]) for name in _PARTS)
        fingerprint = " ".join(f"{facts[name]['tokens']}:{facts[name]['crc32']}" for name in _PARTS)
        description = f"{source}: {_described(facts)}"
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / _FACTS} is damaged ({error!r}): write the tokens again.") from error
    return Tokenized(model_tokenizer(folder), train, validation, description, fingerprint)


def _mapped(file: Path, count: int, dtype: str) -> np.ndarray:
    """So many tokens in a file, mapped into memory."""
    size, wanted = file.stat().st_size if file.is_file() else 0, count * np.dtype(dtype).itemsize
    if size != wanted:
        raise ValueError(f"{file} has {size} bytes, not {wanted}: write the tokens again.")
    # An empty file cannot be mapped.
    return np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)


def _write(path: Path, tokenizer: Tokenizer, documents: Iterable[str], dtype: str) -> dict[str, Any]:
    """Append the tokens of every document and the end after it to a file; returns what it holds."""
    count = tokens = crc = 0
    left = iter(documents)
    with path.open("wb") as file:
        # In parts, since what a tokenizer records of a text is many times larger than its ids.
        while texts := list(islice(left, 256)):
            for ids in tokenizer.encode_batch(texts):
                data = np.append(ids, tokenizer.eos_id).astype(dtype).tobytes()
                file.write(data)
                crc = zlib.crc32(data, crc)
                count, tokens = count + 1, tokens + ids.size + 1
    return {"documents": count, "tokens": tokens, "crc32": f"{crc:08x}"}


def _described(facts: dict[str, Any]) -> str:
    documents, tokens = (" and ".join(f"{facts[name][what]:,}" for name in _PARTS) for what in ("documents", "tokens"))
    said = f"{documents} documents of {facts['source']} for training and validation, {tokens} tokens"
    return said + (f"\nleft out: {facts['left_out']}" if facts["left_out"] else "")
