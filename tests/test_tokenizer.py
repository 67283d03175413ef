# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: exact round trips, determinism, saving, and errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import models, pre_tokenizers

from galore_jax.training.tokenizer import load_tokenizer

DOCUMENTS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x + 1\n" * 20, "naïve café — 日本語\r\n\t" * 5]
BPE = load_tokenizer("bpe", DOCUMENTS, vocab_size=300)
TOKENIZERS = [load_tokenizer("bytes"), BPE]
both = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])


@both
@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))  # a lone surrogate is not encodable text
def test_any_unicode_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.eos_id not in ids
    assert ids.max(initial=0) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


@both
@pytest.mark.parametrize(
    "text", ["", " ", "a<|endoftext|>b", "  two\n\n\tspaces ", "\x00\ufeff\U0001f600e\u0301", *DOCUMENTS]
)
def test_hard_texts_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
def test_batches_equal_single_texts(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(DOCUMENTS), DOCUMENTS, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@both
def test_end_of_text_is_in_the_vocabulary_and_decodes_to_nothing(tokenizer):
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    ids = [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "onetwo"


def test_byte_ids_are_the_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    np.testing.assert_array_equal(tokenizer.encode("aé"), [97, 195, 169])
    assert tokenizer.decode([195, 33]) == "\ufffd!"


def test_bpe_training_is_deterministic_and_keeps_to_the_vocabulary_size(tmp_path):
    BPE.save(tmp_path / "a.json")
    load_tokenizer("bpe", iter(DOCUMENTS), vocab_size=300).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert BPE.vocab_size == 300
    assert BPE.encode(DOCUMENTS[0]).size < len(DOCUMENTS[0]) / 2


@both
def test_save_and_load_keep_the_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "run" / "tokenizer.json"
    tokenizer.save(path)
    again = load_tokenizer(str(path))
    assert type(again) is type(tokenizer)
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    for text in [*DOCUMENTS, "a<|endoftext|>b"]:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]
    assert load_tokenizer(str(path.parent)).vocab_size == tokenizer.vocab_size  # the folder names it too


def _word_tokenizer(words: dict[str, int]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_foreign_tokenizer_json_finds_its_end_and_ignores_truncation_and_padding(tmp_path):
    tokenizer = _word_tokenizer({"[UNK]": 0, "a": 1, "b": 2, "</s>": 9})
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(str(tmp_path / "words.json"))
    assert (loaded.eos_id, loaded.vocab_size) == (9, 10)  # the ids have a hole
    np.testing.assert_array_equal(loaded.encode("a b a b a"), [1, 2, 1, 2, 1])


def test_errors_are_one_sentence_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'byte' is unknown.*\"bytes\", \"bpe\" or the path"):
        load_tokenizer("byte")
    with pytest.raises(ValueError, match="needs documents"):
        load_tokenizer("bpe")
    with pytest.raises(ValueError, match=r"vocab_size=256 is too small.*257"):
        load_tokenizer("bpe", DOCUMENTS, vocab_size=256)
    _word_tokenizer({"[UNK]": 0, "a": 1}).save(str(tmp_path / "endless.json"))
    with pytest.raises(ValueError, match=r"endless\.json has none of the end-of-document tokens"):
        load_tokenizer(str(tmp_path / "endless.json"))


@pytest.mark.parametrize("content", ["not json", "[]", "{}", json.dumps({"model": {"type": "No"}}), ""])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(str(path))
