# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Files of text and files of rows, as people have them: plain, gzipped (.gz) or in Zstandard (.zst).

Rows are JSON lines, a JSON array of objects, or Parquet; the suffix says which, in any case, and the first lines of a file with
another suffix tell whether it holds JSON lines all the same.  Every fault of a file is a ValueError with its path.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")

_PACKED = (".gz", ".zst")
_MARK = "\ufeff".encode()  # which some editors put first
# json.loads joins the two halves of a pair, so these are halves that stand alone, which no encoding can write.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """One row, and its place for messages, such as "line 3"."""

    place: str
    fields: dict[str, Any]


def source_path(source: str) -> Path:
    """The path that a source names; ValueError if it is empty, which as a path would be the current folder."""
    if not source:
        raise ValueError('The name of the data is empty; give a file, a folder, "python" or hf:NAME.')
    return Path(source)


def bare_suffix(path: Path) -> str:
    """The suffix in lower case, without that of the compression.

    >>> bare_suffix(Path("c4-train.00000-of-01024.JSON.gz")), bare_suffix(Path("notes.gz")), bare_suffix(Path("a.txt"))
    ('.json', '', '.txt')
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def holds_rows(path: Path) -> bool:
    """Whether a file holds rows, by its suffix or because it looks like JSON lines."""
    return bare_suffix(path) in ROW_SUFFIXES or looks_like_json_lines(read_text(path))


def looks_like_json_lines(text: str) -> bool:
    """Whether the first two lines that are not blank, or the only one, are JSON objects.

    >>> looks_like_json_lines('{"text": "a"}\\n{"text": "b"}'), looks_like_json_lines("{}\\nand so on")
    (True, False)
    """
    start = text.lstrip()
    if not start.startswith("{"):
        return False
    for _ in range(2):
        line, _, start = start.partition("\n")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(found, dict):
            return False
        start = start.lstrip()
        if not start:
            break
    return True


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; every line ends in "\\n", whatever it ends in there."""
    with _opened(path) as file:
        data = file.read()
    try:
        return plain_lines(data.decode("utf-8").removeprefix(_MARK.decode()))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): "
            f"convert it or leave it out."
        ) from error


def plain_lines(text: str) -> str:
    """The text with "\\n" at the end of every line.

    >>> plain_lines("a\\r\\nb\\rc")
    'a\\nb\\nc'
    """
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """The rows of a file, in order; of Parquet only ``column`` is read, if it is named and there.

    A lone surrogate, which JSON can write and UTF-8 cannot, becomes U+FFFD.

    Raises:
      ValueError: a line is not an object, a package is missing, or the file cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, column)
    return _json_rows(path)


def rows_of(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    """The objects in JSON lines; ``name`` is that of their place, for messages.

    >>> list(rows_of([b'{"text": "a"}'], "stdin"))
    [Row(place='line 1', fields={'text': 'a'})]
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"line {number}"
            yield Row(place, _object(name, place, _parsed(name, place, line)))


def _json_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        first = next((line for line in _lines(file) if line.strip()), b"")
    with _opened(path) as file:
        if not first.lstrip().startswith(b"["):
            yield from rows_of(_lines(file), str(path))
            return
        values = _parsed(str(path), "as a whole", file.read().removeprefix(_MARK))
        for number, value in enumerate(values, 1):
            yield Row(f"row {number}", _object(str(path), f"row {number}", value))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines without their ends; JSON has no bare carriage return, so one that stands there ends a line too."""
    mark = _MARK
    for chunk in file:
        yield from chunk.removeprefix(mark).splitlines()
        mark = b""


def _parsed(name: str, place: str, data: bytes) -> Any:
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} {place} is not UTF-8 text (byte {error.start} of it is 0x{data[error.start]:02x}): convert the file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} {place} is not JSON ({error}); every line must be one object.") from error
    return _mended(value) if b"\\u" in data else value


def _mended(value: Any) -> Any:
    """The value with U+FFFD in the place of every lone surrogate."""
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(name): _mended(item) for name, item in value.items()}
    return value


def _object(name: str, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} {place} is {type(value).__name__} and not an object with fields.")
    return value


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path} needs a library: pip install pyarrow") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a valid Parquet file ({reason}): copy or download it again.") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed; its faults become ValueErrors in the body of the ``with`` statement too."""
    packed = path.suffix.lower()
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(path.open("rb"))
            if packed == ".gz":
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif packed == ".zst":
                file = stack.enter_context(io.BufferedReader(_zstandard(path, file)))
            yield file
    except EOFError as error:
        raise ValueError(f"{path} is a truncated gzip file: copy or download it again.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a valid gzip file ({error}): copy or download it again.") from error
    except OSError as error:
        if error.errno is None and packed == ".zst":  # from the library
            raise ValueError(f"{path} is not a valid zst file ({error}): copy or download it again.") from error
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}): make it readable or leave it out."
        ) from error


def _zstandard(path: Path, file: BinaryIO) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path} needs a library: pip install pyarrow, or decompress it.") from error
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
