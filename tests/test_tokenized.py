# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``galore-jax tokenize``: the same batches as from the text, nothing written by halves, and damage that is found."""

from __future__ import annotations

import json

import numpy as np
import pytest

from galore_jax.cli import main
from galore_jax.training.data import load_data

SIZES = {"sequence_length": 16, "batch_size": 4, "seed": 0}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"document {i} " + "abc" * (i % 9)}) + "\n" for i in range(200)))
    return path


def tokenize(*flags):
    return main(["tokenize", *map(str, flags)])


def batches(corpus):
    iterator = corpus.train_iterator()
    return [*(next(iterator) for _ in range(40)), *corpus.validation_batches()]  # more than an epoch


@pytest.mark.parametrize(("tokenizer", "vocabulary"), [("bytes", 257), ("bpe", 300)])
def test_a_run_has_the_batches_it_has_from_the_text(text, tmp_path, tokenizer, vocabulary, capsys):
    column = ["--text-column", "body"]
    assert (
        tokenize("--data", text, *column, "--tokenizer", tokenizer, "--vocab-size", "300", "--out", tmp_path / "a/t")
        == 0
    )
    assert capsys.readouterr().out.startswith(
        f"{tmp_path / 'a/t'}: 191 and 9 documents of {text} for training and validation, "
    )
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"t"}
    ours = load_data(str(tmp_path / "a/t"), tokenizer="bytes", tokenizer_file=tmp_path / "tokenizer.json", **SIZES)
    theirs = load_data(str(text), tokenizer=tokenizer, vocab_size=300, text_column="body", **SIZES)
    assert ours.tokenizer.vocab_size == theirs.tokenizer.vocab_size == vocabulary
    assert (tmp_path / "tokenizer.json").read_text() == (tmp_path / "a/t/tokenizer.json").read_text()
    for one, other in zip(batches(ours), batches(theirs), strict=True):
        assert one.dtype == np.int32
        np.testing.assert_array_equal(one, other)
    halves = [
        load_data(str(tmp_path / "a/t"), tokenizer="bytes", **SIZES, shard_index=i, shard_count=2) for i in (0, 1)
    ]
    seen = [next(half.train_iterator()) for half in halves]
    assert not np.array_equal(*seen)
    facts = json.loads((tmp_path / "a/t/tokens.json").read_text())
    assert (tmp_path / "a/t/train.bin").stat().st_size == 2 * facts["train"]["tokens"]


def test_a_stream_is_tokenized_as_it_comes(text, tmp_path, monkeypatch):
    monkeypatch.setattr("galore_jax.training.sources.HELD_OUT_DOCUMENTS", 30)
    assert tokenize("--data", f"hf:{text}", "--text-column", "body", "--out", tmp_path / "t") == 0
    tokens = {name: np.fromfile(tmp_path / "t" / f"{name}.bin", np.uint16) for name in ("train", "validation")}
    texts = [json.loads(line)["body"] for line in text.read_text().splitlines()]
    for name, part in (("validation", texts[:30]), ("train", texts[30:])):
        assert tokens[name].tolist() == [i for document in part for i in [*document.encode(), 256]]


def test_a_stream_that_breaks_off_is_named_and_leaves_nothing_behind(text, tmp_path, capsys):
    with text.open("a") as file:
        file.write("".join(json.dumps({"body": "x" * 10_000}) + "\n" for _ in range(1100)) + '{"body": "half')
    assert tokenize("--data", f"hf:{text}", "--text-column", "body", "--out", tmp_path / "t") == 2
    assert capsys.readouterr().err.startswith("error: the stream of text broke off (")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "train.bin").write_bytes(b"1234"), "train.bin has 4 bytes, not"),
        (lambda folder: (folder / "validation.bin").unlink(), "validation.bin has 0 bytes, not"),
        (lambda folder: (folder / "tokens.json").write_text("{"), "tokens.json is damaged"),
        (lambda folder: (folder / "tokens.json").write_text("{}"), "tokens.json is damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    ],
)
def test_damage_is_named(spoil, says, text, tmp_path):
    assert tokenize("--data", text, "--text-column", "body", "--out", tmp_path / "t") == 0
    spoil(tmp_path / "t")
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_data(str(tmp_path / "t"), tokenizer="bytes", **SIZES)


def test_mistakes_are_one_sentence_and_leave_nothing_behind(text, tmp_path, capsys):
    assert tokenize("--data", text, "--text-column", "body", "--out", tmp_path / "t") == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for flags, says in (
        (["--data", text, "--out", tmp_path / "t"], "exists, and nothing is written over"),
        (["--data", text, "--out", tmp_path / "u"], "has no field 'text', only 'body'"),
        (["--data", tmp_path / "t", "--out", tmp_path / "u"], "holds tokens already"),
        (["--data", text, "--text-column", "body", "--out", text / "u"], "cannot be written ("),
        (
            ["--data", text, "--text-column", "body", "--tokenizer", "no", "--out", tmp_path / "u"],
            "tokenizer 'no' is unknown",
        ),
    ):
        assert tokenize(*flags) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match="tokenizer 'bpe' cannot be chosen"):
        load_data(str(tmp_path / "t"), tokenizer="bpe", **SIZES)
    assert sorted(tmp_path.rglob("*")) == before
