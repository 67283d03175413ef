# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Files as people have them: rows of every kind, compressed or not, line ends, encodings, and folders that hold other things."""

from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pyarrow
import pytest
from finetuning import write_lines
from hypothesis import HealthCheck, given, settings, strategies as st
from pyarrow import parquet

from galore_jax.training.data import load_data
from galore_jax.training.examples import load_examples
from galore_jax.training.files import read_rows, read_text
from galore_jax.training.sources import open_stream, read_documents, stream_texts
from galore_jax.training.tokenizer import ByteTokenizer

TEXTS = ["one\ntwo", 'a "quoted" text', "pär €", "the last"]


def zstandard(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".GZ": gzip.compress, ".zst": zstandard, ".Zst": zstandard}


def write_rows(path, rows):
    """The rows as the suffix says, compressed or not."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(PACK["" if path.suffix not in PACK else path.suffix](lines.encode()))
    return path


def refused(function, *says):
    """A ValueError of one sentence."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        function()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in says), caught.value


# Rows


KINDS = [
    f"corpus.00001-of-00002{suffix}{packed}"
    for suffix in (".jsonl", ".json", ".ndjson", ".JSONL", ".Json")
    for packed in PACK
]


@pytest.mark.parametrize("name", [*KINDS, "corpus.parquet", "corpus.PARQUET", "corpus.txt", "corpus", "corpus.log.gz"])
def test_rows_are_read_by_column_and_never_taken_for_prose(name, tmp_path):
    """Also where only the first lines tell: the last three names."""
    for column in ("text", "body"):
        rows = [{"id": i, column: text, "url": None} for i, text in enumerate(TEXTS)]
        file = write_rows(tmp_path / name, rows)
        assert read_documents(str(file), column) == (TEXTS, "", [])
        assert [row.fields for row in read_rows(file)] == rows
        windows, _, _ = load_examples(
            str(file), str(file), ByteTokenizer(), batch=1, seq=4, seed=0, eos=256, text_column=column
        )
        assert windows.task == "text"
        assert bytes(windows.examples[0].tokens.tolist()) == b"one\n"
        says = ("row 1" if "parq" in name.lower() else "line 1", "has no field 'content', only 'id'", "--text-column")
        refused(lambda file=file: read_documents(str(file), "content"), *says)


def test_a_json_array_is_rows_too(tmp_path):
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert read_documents(str(tmp_path / "a.json")).documents == TEXTS
    (tmp_path / "a.json").write_text('[{"text": "a"},\n 3]')
    refused(lambda: read_documents(str(tmp_path / "a.json")), "a.json row 2 is int and not an object")


@pytest.mark.parametrize(
    "prose",
    ["{} is a set of braces,\nand this is prose.", '{"a": 1}\nis an object.', "[1] a footnote", '{"a": 1,\n"b": 2}'],
)
def test_prose_with_braces_is_prose(prose, tmp_path):
    (tmp_path / "a.txt").write_text(prose)
    assert read_documents(str(tmp_path / "a.txt")).documents == [prose]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (b'{"text": "a"}\n\n{"text": "half', "line 3 is not JSON"),
        (b'{"text": "a"}\r\n{"text": "\xff"}', "line 2 is not UTF-8 text (byte 10 of it is 0xff)"),
        (b'{"text": "a"}\n[1]\n', "line 2 is list and not an object"),
        (b'{"text": "a"}\n{"text": [1]}\n', "line 2 has list in its field 'text', and not text"),
        (b'{"a":' * 100_000, "line 1 is not JSON (maximum recursion depth"),
        (b"[" * 100_000, "as a whole is not JSON (maximum recursion depth"),
        (b"", "holds no text"),
        (b'{"text": null}\n{"text": " "}\n', "holds no text; left out are empty rows (2)"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(lines, says, packed, tmp_path):
    file = tmp_path / f"rows.jsonl{packed}"
    file.write_bytes(PACK[packed](lines))
    refused(lambda: read_documents(str(file)), str(file), says)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("stem", ["a.txt", "a.jsonl"])
def test_a_damaged_compressed_file_is_named(stem, suffix, tmp_path):
    file = tmp_path / f"{stem}{suffix}"
    whole = PACK[suffix]("".join(f'{{"text": "row {i}"}}\n' for i in range(5000)).encode())
    for data, says in (
        (whole[:-9], "trunc"),
        (b"not compressed", "is not a valid"),
        (whole[:9] + b"\xff" * 9, "valid"),
    ):
        file.write_bytes(data)
        refused(lambda: read_documents(str(file)), str(file), says if says != "trunc" or suffix == ".gz" else "Trunc")


def test_a_damaged_parquet_file_is_named(tmp_path):
    file = write_rows(tmp_path / "a.parquet", [{"text": text} for text in TEXTS])
    data = file.read_bytes()
    for damaged in (b"", b"PAR1", data[:-5], data[: len(data) // 2]):
        file.write_bytes(damaged)
        refused(lambda: read_documents(str(file)), "a.parquet is not a valid Parquet file")


def test_a_lone_surrogate_is_replaced_and_a_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        r'{"text": "a\ud83db \ud83d\ude00", "label": "x\udc00"}' + "\n" + r'{"text": "c\\ud83d", "label": "y"}'
    )
    rows = [row.fields for row in read_rows(tmp_path / "a.jsonl")]
    assert rows == [{"text": "a\ufffdb 😀", "label": "x\ufffd"}, {"text": r"c\ud83d", "label": "y"}]
    data = [{"text": "\ud800" * 3 + str(i)} for i in range(200)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    corpus = load_data(str(tmp_path / "b.jsonl"), tokenizer="bytes", sequence_length=8, batch_size=2, seed=0)
    assert next(corpus.train_iterator()).shape == (2, 9)
    write_lines(tmp_path / "c.jsonl", [json.dumps({"prompt": "\udfff", "response": "a"})] * 4)
    train, *_ = load_examples(
        str(tmp_path / "c.jsonl"), str(tmp_path / "c.jsonl"), ByteTokenizer(), batch=1, seq=8, seed=0, eos=256
    )
    assert train.examples[0].tokens.tolist() == [*"\ufffda".encode()]


# Line ends


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_a_line_end(end, tmp_path):
    paragraphs = [f"paragraph {i}\nof two lines" for i in range(5)]
    (tmp_path / "a.txt").write_bytes("\n\n".join(paragraphs).replace("\n", end).encode())
    assert read_documents(str(tmp_path / "a.txt")).documents == paragraphs
    assert read_text(tmp_path / "a.txt") == "\n\n".join(paragraphs)
    rows = [{"text": "one\r\ntwo\rthree"}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_bytes(end.join(map(json.dumps, rows)).encode())
    assert read_documents(str(tmp_path / "a.jsonl")).documents == ["one\ntwo\nthree", "b"]
    assert list(stream_texts(rows)) == ["one\ntwo\nthree", "b"]


# Folders


def test_a_folder_reads_rows_and_text_and_counts_what_it_leaves_out(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub" / ".git").mkdir(parents=True)
    write_rows(folder / "a.jsonl.gz", [{"text": "row 1"}, {"text": None}, {"text": "row 2"}])
    write_rows(folder / "sub" / "b.parquet", [{"text": "row 3"}])
    (folder / "c.TXT").write_text("prose")
    (folder / "blank.md").write_text(" \n")
    (folder / "package.json").write_text('{\n "name": "not rows"\n}')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "tags.json").write_text('{"tag": 1}\n{"tag": 2}\n')
    for name in ("one.png", "two.PNG", "three.csv", "LICENSE", ".hidden.txt"):
        (folder / name).write_text("x")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    documents, left_out, validation = read_documents(str(folder))
    assert validation == []
    assert documents == ["row 1", "row 2", "prose", "row 3"]
    assert sorted(left_out.split(", ")) == sorted([
        "without the field 'text' (3)", ".png (2)", "hidden (2)", ".csv (1)", "without a suffix (1)", "empty rows (1)",
        "empty (1)", "links that lead nowhere (1)", "linked folders (1)", "pipes and devices (1)",
    ])  # fmt: skip
    corpus = load_data(str(folder), tokenizer="bytes", sequence_length=2, batch_size=1, seed=0)
    assert corpus.description.endswith(f"\nleft out: {left_out}")
    _, _, said = load_examples(str(folder), None, ByteTokenizer(), batch=1, seq=1, seed=0, eos=256)
    assert said.splitlines()[0].endswith(f"; left out: {left_out}")


def test_a_folder_with_broken_lines_or_rows_without_the_column_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("prose")
    for name, text, says in (
        ("b.jsonl", '{"body": "a"}\n', "b.jsonl line 1 has no field 'text', only 'body'"),
        ("b.json", '{"text": "a"}\n{"text": "half\n', "b.json line 2 is not JSON"),
        ("b.json", "[" * 100_000, "b.json as a whole is not JSON"),
    ):
        (tmp_path / name).write_text(text)
        refused(lambda: read_documents(str(tmp_path)), says)
        (tmp_path / name).unlink()
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.json").write_text('{"body": "a"}\n')
    (tmp_path / "b.png").touch()
    refused(
        lambda: read_documents(str(tmp_path)), "holds no text", "left out are without the field 'text' (1), .png (1)"
    )
    refused(lambda: read_documents(""), "The name of the data is empty")


def test_what_cannot_be_read_is_one_sentence_with_its_path(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("prose")

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", denied)
        refused(lambda: read_documents(str(tmp_path)), f"{tmp_path / 'a.txt'} cannot be read (Permission denied)")
    monkeypatch.setattr("os.scandir", denied)
    refused(lambda: read_documents(str(tmp_path)), f"{tmp_path} cannot be read (Permission denied)")


# Streams


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSON.gz", "a.parquet", "a.txt"])
def test_one_local_file_is_streamed(name, tmp_path, monkeypatch):
    monkeypatch.setattr("galore_jax.training.sources.HELD_OUT_DOCUMENTS", 1)
    texts = [text.replace("\n", " ") for text in TEXTS]
    if name == "a.txt":
        (tmp_path / name).write_text("\n\n".join(texts))
    else:
        write_rows(tmp_path / name, [{"body": text} for text in texts])
    column = "text" if name == "a.txt" else "body"
    train, validation, held_out = open_stream(f"hf:{tmp_path / name}", column)
    assert [*stream_texts(validation), *stream_texts(train)] == texts
    assert held_out == 'the first 1 documents of "train"'
    with pytest.raises(ValueError, match=f'no column "content", only {column}: choose with --text-column'):
        open_stream(f"hf:{tmp_path / name}", "content")


def test_the_layout_of_c4_is_read_and_streamed_as_it_comes(tmp_path):
    (tmp_path / "en").mkdir()
    for part, number in (("train", 0), ("train", 1), ("validation", 0)):
        rows = [{"text": f"{part} {number} {i}", "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for i in range(20)]
        write_rows(tmp_path / "en" / f"c4-{part}.{number:05}-of-{2 if part == 'train' else 1:05}.json.gz", rows)
    train, validation, held_out = open_stream(f"hf:{tmp_path}")
    assert [text.rsplit(" ", 1)[0] for text in stream_texts(train)] == ["train 0"] * 20 + ["train 1"] * 20
    assert list(stream_texts(validation)) == [f"validation 0 {i}" for i in range(20)]
    assert held_out == 'the "validation" split'
    corpora = [
        load_data(f"{kind}{tmp_path}", tokenizer="bytes", sequence_length=8, batch_size=2, seed=0)
        for kind in ("hf:", "")
    ]
    assert next(corpora[0].train_iterator()).dtype == np.int32
    batches = [np.stack(list(corpus.validation_batches())) for corpus in corpora]
    np.testing.assert_array_equal(*batches)
    assert "40 training and 20 validation documents" in corpora[1].description
    for file in (tmp_path / "en").glob("c4-train*"):
        file.unlink()
    assert read_documents(str(tmp_path)) == ([f"validation 0 {i}" for i in range(20)], "", [])


def test_a_broken_local_file_is_one_sentence_at_its_start_and_where_it_breaks_off(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    for bad in ('{"text": "half\n', json.dumps({"text": "\ud800"}) + "\n"):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"cannot load data source 'hf:.*a\.jsonl': ") as caught:
            open_stream(f"hf:{file}")
        assert "\n" not in str(caught.value)
        assert caplog.records == []
        # The library reads so much at a time.
        file.write_text("".join(f'{{"text": "row {i} {"x" * 1000}"}}\n' for i in range(11_000)) + bad)
        train, _, _ = open_stream(f"hf:{file}")
        with pytest.raises(OSError, match=r"the stream of text broke off .*: mend its source, and continue") as caught:
            list(stream_texts(train))
        assert "\n" not in str(caught.value)
        caplog.clear()


# Whatever there may be

PIECES = [
    b'{"text": "a"}', b'{"text": null}', b'{"text": 1}', b'{"text": "a", "label": "x"}', b'{"text": "b", "label": 1}',
    b'{"prompt": "a", "response": "b"}', b'{"messages": [{"role": "assistant", "content": "a"}]}', b'"\\ud800"',
    b'{"instruction": "a", "output": 1}', b'{"text": "\\udfff"}', b"[", b"]", b"{", b"}", b",", b"1e999", b"NaN", b"\xff",
    b"\xef\xbb\xbf", b"\r", b"\n", b"\n", b"\x00", b"PAR1", b"prose",
]  # fmt: skip


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    suffix=st.sampled_from([".txt", ".jsonl", ".json", ".parquet", ""]),
    packed=st.sampled_from(["", ".gz", ".zst"]),
    whole=st.booleans(),
)
def test_any_bytes_are_read_or_refused_with_one_sentence(tmp_path, data, suffix, packed, whole):
    file = tmp_path / f"a{suffix}{packed}"
    file.write_bytes(PACK[packed](data) if whole else data)
    for function in (
        lambda: read_documents(str(file)).documents,
        lambda: read_documents(str(tmp_path)).documents,
        lambda: load_examples(str(file), str(file), ByteTokenizer(), batch=1, seq=4, seed=0, eos=256)[0].examples,
    ):
        error = None
        try:
            assert function()
        except ValueError as caught:
            error = caught
        if error is not None:
            assert not isinstance(error, UnicodeError)  # which names no file
            assert str(tmp_path) in str(error) or "--data" in str(error)
            assert "\n" not in str(error)
    file.unlink()
