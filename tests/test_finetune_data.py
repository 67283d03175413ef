# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Examples for fine-tuning: what is learnt, what is cut, how they are batched, and every mistake in a file."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from finetuning import answered, labelled, write_lines

from galore_jax.training.examples import NO_LOSS, Example, Examples, label_counts, load_examples, num_labels
from galore_jax.training.tokenizer import ByteTokenizer, load_tokenizer

EOS = 256
LENGTHS = (16, 24, 32, 48, 64, 96, 100)


def load(data, held_out=None, **settings):
    defaults = {"batch": 4, "seq": 64, "seed": 0, "eos": EOS}
    held_out = None if held_out is None else str(held_out)
    return load_examples(str(data), held_out, ByteTokenizer(), **(defaults | settings))


def said(tokens):
    return ByteTokenizer().decode(tokens)


# What an example is


def test_the_loss_is_on_the_response_and_the_end_after_it(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "2+2=", "response": "4."}] * 4)
    train, _, description = load(file, file)
    (example, *_) = train.examples
    assert said(example.tokens) == "2+2=4."
    np.testing.assert_array_equal(example.targets, [NO_LOSS] * 3 + [ord("4"), ord("."), EOS])
    assert description.splitlines()[0] == f"{file}: 4 prompts with a response, 24 tokens"


def test_a_response_that_is_too_long_loses_its_end_and_one_with_nothing_left_is_left_out(tmp_path):
    rows = [
        {"prompt": "ab", "response": "cdef"},
        {"prompt": "a" * 9, "response": "b"},
        {"prompt": "", "response": "xyz"},
    ]
    file = write_lines(tmp_path / "a.jsonl", rows)
    train, _, description = load(file, file, batch=2, seq=4)
    cut, whole = train.examples
    assert (said(cut.tokens), cut.targets.tolist()) == ("abcd", [NO_LOSS, ord("c"), ord("d"), ord("e")])
    assert (said(whole.tokens), whole.targets.tolist()) == ("xyz", [ord("y"), ord("z"), EOS])
    assert (train.cut, train.left_out) == (2, 1)
    assert "2 are longer than --seq 4 and lose their end, 1 of them all of the response" in description


def test_a_label_belongs_to_a_text_that_is_cut_on_its_right(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "abcdef", "label": 1}, {"text": "xy", "label": 0}] * 2)
    train, validation, _ = load(file, file, seq=4)
    assert [(said(e.tokens), e.targets.tolist()) for e in train.examples[:2]] == [("abcd", [1]), ("xy", [0])]
    assert (train.cut, num_labels(train, validation)) == (2, 2)


def test_text_is_packed_as_for_pretraining(tmp_path):
    (tmp_path / "train.txt").write_text("abcdefgh\n\nijkl")
    (tmp_path / "test.txt").write_text("mnopqrst")
    train, validation, _ = load(tmp_path / "train.txt", tmp_path / "test.txt", batch=1, seq=5)
    assert [said(e.tokens) for e in train.examples] == ["abcde", "fghi"]
    np.testing.assert_array_equal(train.examples[1].targets, [*b"gh", EOS, *b"ij"])
    assert [said(e.targets) for e in validation.examples] == ["nopqr"]


def test_special_tokens_that_begin_a_text_are_put_before_it(tmp_path):
    import tokenizers
    from tokenizers import processors

    load_tokenizer("bpe", ["low lower lowest"], vocab_size=260).save(tmp_path / "plain.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "plain.json"))
    bos = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "", "response": "low"}])
    started = load_tokenizer(str(tmp_path / "tokenizer.json"))
    train, _, _ = load_examples(str(file), str(file), started, batch=1, seq=8, seed=0, eos=bos)
    (example,) = train.examples
    assert example.tokens[0] == bos
    np.testing.assert_array_equal(example.targets, [*example.tokens[1:], bos])


# Batches


@pytest.fixture(scope="module")
def texts():
    """101 labelled texts of 1 to 100 tokens, the first of which is their number."""
    rng = np.random.default_rng(0)
    return [
        Example(
            np.concatenate([[i], rng.integers(200, 256, rng.integers(0, 100))]).astype(np.int32),
            np.array([i % 2], np.int32),
        )
        for i in range(101)
    ]


def test_an_epoch_has_every_example_at_most_once_in_batches_of_few_lengths(texts):
    examples = Examples(texts, "label", batch=4, seq=100, pad=EOS)
    batches, taken = examples.training(seed=0), []
    for _ in range(examples.steps_per_epoch):
        batch = next(batches)
        assert batch.tokens.shape[1] in LENGTHS
        for tokens, length, label in zip(batch.tokens, batch.lengths, batch.targets, strict=True):
            number = int(tokens[0])
            np.testing.assert_array_equal(tokens[:length], texts[number].tokens)
            assert np.all(tokens[length:] == EOS)
            assert label == number % 2
            taken.append(number)
    assert max(Counter(taken).values()) == 1
    assert len(taken) == 100
    second = [int(row[0]) for _ in range(examples.steps_per_epoch) for row in next(batches).tokens]
    assert len(set(second)) == 100
    assert second != taken


def test_like_lengths_go_together(texts):
    examples = Examples(texts, "label", batch=4, seq=100, pad=EOS)
    lengths, tokens = examples.shapes(seed=0, steps=25)
    drawn = np.random.default_rng(0).permutation(101)[:100].reshape(25, 4)
    at_random = [max(texts[i].tokens.size for i in row) for row in drawn]
    assert lengths.sum() < 0.9 * sum(at_random)
    batches = examples.training(seed=0)
    for length, count in zip(lengths, tokens, strict=True):
        batch = next(batches)
        assert (batch.tokens.shape[1], batch.lengths.sum()) == (length, count)


def test_batches_go_on_from_a_saved_position_across_epochs(texts):
    examples = Examples(texts, "label", batch=4, seq=100, pad=EOS)
    straight = examples.training(seed=3)
    for _ in range(23):
        next(straight)
    resumed = examples.training(seed=3)
    resumed.set_state(json.loads(json.dumps(straight.get_state())))
    for _ in range(7):
        for ours, theirs in zip(next(resumed), next(straight), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_held_out_examples_come_once_and_rows_that_fill_a_batch_have_no_loss(texts):
    examples = Examples(texts, "label", batch=8, seq=100, pad=EOS)
    batches = list(examples.in_turn())
    assert {batch.tokens.shape for batch in batches} == {(8, length) for length in LENGTHS}
    rows = [
        int(row[0])
        for batch in batches
        for row, label in zip(batch.tokens, batch.targets, strict=True)
        if label != NO_LOSS
    ]
    assert sorted(rows) == list(range(101))


def test_without_a_file_for_it_a_twentieth_is_held_out_and_none_of_it_is_trained_on(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", labelled(100))
    train, validation, _ = load(file, seed=1)
    parts = [[said(e.tokens) for e in part.examples] for part in (train, validation)]
    assert [len(part) for part in parts] == [95, 5]
    assert sorted([*parts[0], *parts[1]]) == sorted(row["text"] for row in labelled(100))
    assert load(file, seed=1)[1].fingerprint == validation.fingerprint != load(file, seed=2)[1].fingerprint


def test_the_fingerprint_knows_every_token_and_target(texts):
    def fingerprint(examples):
        return Examples(examples, "label", batch=4, seq=100, pad=EOS).fingerprint

    original = fingerprint(texts)
    assert fingerprint(list(texts)) == original
    assert fingerprint([texts[0]._replace(targets=np.array([1], np.int32)), *texts[1:]]) != original
    assert fingerprint([texts[0]._replace(tokens=texts[0].tokens + 1), *texts[1:]]) != original


def test_the_rows_held_out_have_every_label_and_leave_some_of_each(tmp_path):
    """In proportion, but at least one of a label that has two; a label with one row keeps it."""
    counts = {"a": 900, "b": 80, "c": 18, "d": 2, "e": 1}
    rows = [{"text": f"{label}{i}", "label": label} for label, count in counts.items() for i in range(count)]
    train, validation, _ = load(write_lines(tmp_path / "a.jsonl", rows), seed=3)
    assert train.labels == tuple("abcde")
    held, kept = ({"abcde"[i]: n for i, n in sorted(label_counts(part).items())} for part in (validation, train))
    assert held == {"a": 44, "b": 4, "c": 1, "d": 1}
    assert kept == {"a": 856, "b": 76, "c": 17, "d": 1, "e": 1}
    assert all(said(e.tokens)[0] == "abcde"[e.targets[0]] for part in (train, validation) for e in part.examples)
    assert num_labels(train, validation) == 5


def test_labels_may_be_names_and_the_text_may_have_another_field(tmp_path):
    rows = [{"review": "fine", "label": "pos"}, {"review": "dull", "label": "neg"}] * 2
    file = write_lines(tmp_path / "a.NDJSON", rows)
    train, _, _ = load(file, file, text_column="review")
    assert (train.task, train.labels) == ("label", ("neg", "pos"))
    assert [(said(e.tokens), e.targets.tolist()) for e in train.examples[:2]] == [("fine", [1]), ("dull", [0])]
    other = write_lines(tmp_path / "b.jsonl", [{"review": "?", "label": "new"}])
    with pytest.raises(
        ValueError, match=r"b.jsonl line 1 has the label 'new', which --data has not; its labels are neg, pos"
    ):
        load(file, other, text_column="review")


# Mistakes

GOOD = {"text": "good", "label": 1}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "a.jsonl is empty"),
        (["", "  "], "a.jsonl is empty"),
        ([GOOD, '{"text": "half'], "a.jsonl line 2 is not JSON"),
        ([GOOD, "", "[1]"], "a.jsonl line 3 is list and not an object"),
        ([{"sentence": "a", "label": 1}], "a.jsonl line 1 has the fields sentence, label; needed are"),
        ([GOOD, {"text": "no label"}], 'a.jsonl line 2 has "label": null, which must be a whole number'),
        ([GOOD, {"text": "a", "label": True}], 'line 2 has "label": true, which must be a whole number'),
        ([GOOD, {"text": "a", "label": "pos"}], 'line 2 has "label": "pos", which must be a whole number'),
        ([GOOD, {"text": 3, "label": 0}], 'line 2 has "text": 3, which must be a string'),
        ([GOOD, {"text": "a", "label": -1}], "line 2 has the label -1"),
        ([GOOD, {"text": "", "label": 0}], "line 2 has an empty text"),
        (
            [{"prompt": "a", "response": "b"}, {"prompt": "", "response": ""}],
            "line 2 has an empty prompt and an empty resp",
        ),
        ([GOOD | {"label": "a"}, GOOD], 'line 2 has "label": 1, which must be a string'),
        ([GOOD | {"label": "a"}] * 2, "The labels of --data are a, but at least two different ones are needed"),
        ([GOOD], "a.jsonl gives 1 examples at --seq 64, and at least 4 are needed"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(rows, says, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"\.$") as caught:
        load(file, file)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_of_another_task_is_refused(tmp_path):
    labels, responses = (
        write_lines(tmp_path / name, rows) for name, rows in (("a.jsonl", labelled(9)), ("b.jsonl", answered(9)))
    )
    with pytest.raises(FileNotFoundError, match=r"c\.jsonl does not exist"):
        load(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match=r"b\.jsonl holds response examples, but --data holds label ones"):
        load(labels, responses)


@pytest.mark.parametrize(
    ("labels", "held_out", "says"),
    [
        ([0, 2, 2, 0], [0], "The labels of --data are 0, 2, but they must be 0 .. k-1"),
        ([1, 2, 1, 2], [1], "The labels of --data are 1, 2, but"),
        ([0, 0, 0, 0], [0], "The labels of --data are 0, but they must be 0 .. k-1 with at least two"),
        ([0, 1, 0, 1], [0, 2], r"--eval-data has the label 2, which --data has not; its labels are 0 .. 1"),
    ],
)
def test_labels_that_are_not_0_to_k_are_refused(labels, held_out, says, tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, values in zip(files, (labels, held_out), strict=True):
        write_lines(file, [{"text": "t", "label": label} for label in values])
    train, validation, _ = load(*files)
    with pytest.raises(ValueError, match=says):
        num_labels(train, validation)
