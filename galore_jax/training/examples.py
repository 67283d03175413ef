# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Examples for fine-tuning, and their batches: prompts with responses, labelled texts, or plain text.

A file of rows (:mod:`galore_jax.training.files`) holds answers, {"prompt": str, "response": str}, {"instruction": str, "output":
str} with or without an "input", or {"messages": [{"role": str, "content": str}, ...]}; or labels, {"text": str, "label": int or
str}; the first row says which.  Anything else is text: rows of {"text": str}, a file of text or a folder, whose documents are
packed into windows as for pre-training.

    task         inputs                                          loss on
    text         x_0 .. x_(S-1) of a window of S + 1 tokens      x_1 .. x_S
    response     prompt, response                                the response, and the end of the document
                 a conversation, as the chat template has it     what the assistant says, and the mark after it
    label        text                                            the label, from the last token

An example is padded on the right to the next of few lengths, 16, 24, 32, 48, 64, ... and the longest allowed (where that is more
than 256 they start higher), so that a program compiled for each length serves every batch.  Each epoch is shuffled anew; within
pools of a few batches examples of like length go together, which saves padding.  The order is a function of the seed and the
step alone.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from galore_jax.training.chat import ChatTemplate
from galore_jax.training.data import cut_windows, encode_documents
from galore_jax.training.files import Row, holds_rows, read_rows, source_path
from galore_jax.training.sources import Corpus, read_documents
from galore_jax.training.tokenizer import Tokenizer

Task = Literal["text", "response", "label"]

_SHORTEST, _SPAN = 16, 16  # the least length that examples are padded to, unless a 16th of the longest is more
POOL = 16
"""Batches whose examples are put in order of length together."""

NO_LOSS = -1
"""Target of a position, or label of an example, on which there is no loss."""

_PROMPT, _INSTRUCTION, _MESSAGES = ("prompt", "response"), ("instruction", "output"), ("messages",)
_HELD_OUT = 20  # one in so many rows, where no file for validation is named


class Example(NamedTuple):
    """One example, tokenised: int32 [n] inputs, and what is to be said of them."""

    tokens: np.ndarray
    targets: np.ndarray  # int32 [n], the next tokens, NO_LOSS where there is no loss; [1] the label
    cut: bool = False  # whether it was longer


class Batch(NamedTuple):
    """Examples of one length, as arrays."""

    tokens: np.ndarray  # int32 [batch, length], padded on the right
    lengths: np.ndarray  # int32 [batch], the tokens of each
    targets: np.ndarray  # int32 [batch, length], or [batch] labels; NO_LOSS on padding


class Examples:
    """Tokenised examples of one task, as batches.

    Args:
      examples: those that are cut so short that nothing is left to learn are left out.
      task: what is learnt from them.
      batch: examples of a batch.
      seq: the longest input.
      pad: token id that pads.
      labels: the names of the labels, if they have any.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        task: Task,
        *,
        batch: int,
        seq: int,
        pad: int,
        labels: tuple[str, ...] | None = None,
    ):
        self.examples, self.task = [one for one in examples if np.any(one.targets != NO_LOSS)], task
        self.left_out, self.labels = len(examples) - len(self.examples), labels
        self._batch, self._seq, self._pad = batch, seq, pad
        self._buckets = np.array([bucket(example.tokens.size, seq) for example in self.examples])

    @property
    def cut(self) -> int:
        """How many examples were longer than ``seq``, those left out included."""
        return self.left_out + sum(example.cut for example in self.examples)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the examples left over differ from epoch to epoch."""
        return len(self.examples) // self._batch

    @property
    def fingerprint(self) -> str:
        """Changes with any token or target."""
        crc = 0
        for example in self.examples:
            crc = zlib.crc32(example.targets.data, zlib.crc32(example.tokens.data, crc))
        return f"{len(self.examples)}:{crc:08x}"

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The numbers of the examples in every batch of an epoch, int [steps, batch]."""
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(len(self.examples))[: self.steps_per_epoch * self._batch]
        pools = range(0, shuffled.size, POOL * self._batch)
        pieces = [shuffled[start : start + POOL * self._batch] for start in pools]
        ordered = np.concatenate([piece[np.argsort(self._buckets[piece], kind="stable")] for piece in pieces])
        return rng.permutation(ordered.reshape(-1, self._batch))

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """The examples of these numbers, padded to the length of the longest; fewer than a batch are padded to one.

        Rows that fill a batch have one token, and no loss.
        """
        rows = [self.examples[number] for number in numbers]
        length = max(self._buckets[number] for number in numbers)
        tokens = np.full((self._batch, length), self._pad, np.int32)
        lengths = np.ones(self._batch, np.int32)
        targets = np.full(self._batch if self.task == "label" else tokens.shape, NO_LOSS, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : row.tokens.size], lengths[i] = row.tokens, row.tokens.size
            if self.task == "label":
                targets[i] = row.targets[0]
            else:
                targets[i, : row.targets.size] = row.targets
        return Batch(tokens, lengths, targets)

    def training(self, seed: int) -> TrainingBatches:
        """Endless batches whose position can be saved."""
        return TrainingBatches(self, seed)

    def shapes(self, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Length, and tokens without padding, of the batch of each of the first ``steps`` steps, int [steps] both."""
        sizes = np.array([example.tokens.size for example in self.examples])
        epochs = [self.order(seed, epoch) for epoch in range(-(-steps // self.steps_per_epoch))]
        order = np.concatenate(epochs)[:steps]
        return self._buckets[order].max(axis=1), sizes[order].sum(axis=1)

    def in_turn(self) -> Iterator[Batch]:
        """Every example once, in batches of like length; the last of each length is filled up."""
        for length in np.unique(self._buckets):
            numbers = np.flatnonzero(self._buckets == length)
            for start in range(0, numbers.size, self._batch):
                yield self.batch(numbers[start : start + self._batch])


class TrainingBatches:
    """Endless training batches of :class:`Examples`; the position is the number of batches that were taken."""

    def __init__(self, examples: Examples, seed: int):
        self._examples, self._seed, self._taken = examples, seed, 0
        self._epoch, self._order = -1, np.zeros((0, 0), int)

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> Batch:
        epoch, index = divmod(self._taken, self._examples.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._examples.order(self._seed, epoch)
        self._taken += 1
        return self._examples.batch(self._order[index])

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON-serialisable values."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position from ``get_state``."""
        self._taken = state["taken"]


def bucket(length: int, longest: int) -> int:
    """The length that an example is padded to.

    >>> [bucket(length, longest=100) for length in (3, 17, 24, 40, 60, 97)], bucket(3, longest=1024)
    ([16, 24, 24, 48, 64, 100], 64)
    """
    length = max(length, _SHORTEST, longest // _SPAN)
    power = 1 << (length - 1).bit_length()
    return min(power * 3 // 4 if length <= power * 3 // 4 else power, longest)


class _Read(NamedTuple):
    """What a source and what is held out of it hold."""

    train: list[Example]
    validation: list[Example]
    labels: tuple[str, ...] | None = None  # the names of the labels
    notes: tuple[str, str] = ("", "")  # on either


class _How(NamedTuple):
    """How a row becomes an example."""

    tokenizer: Tokenizer
    seq: int
    eos: int
    text_column: str
    chat: ChatTemplate | None


def load_examples(
    source: str,
    held_out: str | None,
    tokenizer: Tokenizer,
    *,
    batch: int,
    seq: int,
    seed: int,
    eos: int,
    text_column: str = "text",
    chat: ChatTemplate | None = None,
) -> tuple[Examples, Examples, str]:
    """The examples to train on and those held out, and a sentence on each.

    Args:
      source: a file of rows; or text, a file or folder, or "python".
      held_out: the same, of the same task.  None: a twentieth of ``source``, with some of every label.
      tokenizer: the model's.
      batch, seq: of a batch, and the longest input; examples that are longer lose their end.
      seed: decides which rows are held out when none are named.
      eos: token id that ends a response and a document, and pads.
      text_column: the field of a row that holds its text, where that is what it holds.
      chat: the model's template for messages, and for instructions; which it needs for the former.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a file is empty, a line is not what it should be, the labels are neither names nor 0 .. k-1, or the examples
        are fewer than a batch.
    """
    task, how = task_of(source, text_column), _How(tokenizer, seq, eos, text_column, chat)
    if held_out is not None and (other := task_of(held_out, text_column)) != task:
        raise ValueError(f"--eval-data {held_out} holds {other} examples, but --data holds {task} ones.")
    if task == "text":
        read = _read_windows(source, held_out, how)
    else:
        read = _read_rows(source, held_out, task, how, seed)
    names = (f"--data {source}", _name(source, held_out))
    train, validation = (
        Examples(examples, task, batch=batch, seq=seq, pad=eos, labels=read.labels)
        for examples in (read.train, read.validation)
    )
    for name, examples, least in zip(names, (train, validation), (batch, 1), strict=True):
        if len(examples.examples) < least:
            raise ValueError(
                f"{name} gives {len(examples.examples)} examples at --seq {seq}, and at least {least} are needed; "
                "give more text, or lower --batch or --seq."
            )
    said = (_said(part, seq) + note for part, note in zip((train, validation), read.notes, strict=True))
    return (
        train,
        validation,
        "\n".join(f"{name}: {words}" for name, words in zip((source, names[1]), said, strict=True)),
    )


def num_labels(train: Examples, validation: Examples) -> int:
    """The number k of labels; ValueError unless the training labels are 0 .. k-1, and no other is held out."""
    found = label_counts(train)
    labels = sorted(found)
    if labels != list(range(len(labels))) or len(labels) < 2:
        raise ValueError(
            f"The labels of --data are {_some(labels)}, but they must be 0 .. k-1 with at least two of them."
        )
    others = sorted(label_counts(validation).keys() - set(labels))
    if others:
        raise ValueError(
            f"--eval-data has the label {others[0]}, which --data has not; its labels are 0 .. {labels[-1]}."
        )
    return len(labels)


def label_counts(examples: Examples) -> Counter[int]:
    """How many examples have each label."""
    return Counter(int(example.targets[0]) for example in examples.examples)


def task_of(source: str, text_column: str = "text") -> Task:
    """What the examples of a source are for, by its name and its first row.

    Raises:
      FileNotFoundError, ValueError: the file does not exist, is empty, or its first row has other fields.
    """
    path = source_path(source)
    if source == "python" or path.is_dir():
        return "text"
    if not path.is_file():
        raise FileNotFoundError(f'{source} does not exist; name a file of rows or of text, a folder, or "python".')
    if not holds_rows(path):
        return "text"
    place, first = next(_rows(path))
    for task, fields in _fields(text_column):
        if set(fields) <= first.keys():
            return task
    raise ValueError(
        f'{source} {place} has the fields {_some(list(first))}; needed are "prompt" and "response", or "text" and "label", '
        'or "messages", or "instruction" and "output", or "text" (which may have another name: --text-column).'
    )


def _fields(text_column: str) -> list[tuple[Task, tuple[str, ...]]]:
    """What rows are for that have these fields; the first that fits decides."""
    answers: list[tuple[Task, tuple[str, ...]]] = [
        ("response", fields) for fields in (_PROMPT, _INSTRUCTION, _MESSAGES)
    ]
    return [*answers, ("label", (text_column, "label")), ("text", (text_column,))]


def _rows(path: Path) -> Iterator[Row]:
    """At least one row."""
    empty = True
    for row in read_rows(path):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path} is empty; give a file with an example on each line.")


def _read_rows(source: str, held_out: str | None, task: Task, how: _How, seed: int) -> _Read:
    rows = list(_rows(source_path(source)))
    others = [] if held_out is None else list(_rows(source_path(held_out)))
    ids = _label_ids(source, rows) if task == "label" else None

    def examples(file: str, rows: list[Row]) -> list[Example]:
        if task == "label":
            return [_label(file, row, how, ids) for row in rows]
        return [_response(file, row, how) for row in rows]

    made, labels = examples(source, rows), None if ids is None else tuple(ids)
    if held_out is not None:
        return _Read(made, examples(held_out, others), labels)
    held = _held_out([int(one.targets[0]) for one in made] if task == "label" else None, len(made), seed)
    chosen = set(held.tolist())
    return _Read([one for i, one in enumerate(made) if i not in chosen], [made[i] for i in sorted(chosen)], labels)


def _held_out(labels: list[int] | None, count: int, seed: int) -> np.ndarray:
    """The rows that are held out: one in twenty, and at least one of every label that has two.

    >>> labels = [0] * 78 + [1, 1, 2]
    >>> sorted(labels[i] for i in _held_out(labels, 81, seed=0))
    [0, 0, 0, 1]
    """
    order = np.random.default_rng(seed).permutation(count)
    if labels is None:
        return order[: count // _HELD_OUT]
    totals, seen, share = Counter(labels), Counter[int](), np.empty(count)
    for place, row in enumerate(order):
        label = labels[row]
        # How much of its label is before it; a label that has one row keeps it.
        share[place] = seen[label] / totals[label] if totals[label] > 1 else np.inf
        seen[label] += 1
    least = sum(total > 1 for total in totals.values())
    return order[np.argsort(share, kind="stable")][: max(count // _HELD_OUT, least)]


def _label_ids(file: str, rows: list[Row]) -> dict[str, int] | None:
    """The number of each label in the order of their names; None if the labels are numbers."""
    if not isinstance(rows[0].fields.get("label"), str):
        return None
    names = sorted({_field(file, row, "label", str) for row in rows})
    if len(names) < 2:
        raise ValueError(f"The labels of --data are {_some(names)}, but at least two different ones are needed.")
    return {name: number for number, name in enumerate(names)}


def _read_windows(source: str, held_out: str | None, how: _How) -> _Read:
    corpus = read_documents(source, how.text_column)
    if held_out is None:
        documents, others = corpus.divided()
        parts = [Corpus(documents, corpus.left_out), Corpus(others, "")]
    else:
        parts = [corpus, read_documents(held_out, how.text_column)]
    windows = (cut_windows(encode_documents(how.tokenizer, part.documents), how.seq) for part in parts)
    train, validation = ([Example(window[:-1].copy(), window[1:].copy()) for window in part] for part in windows)
    first, second = (f"; left out: {part.left_out}" if part.left_out else "" for part in parts)
    return _Read(train, validation, notes=(first, second))


def _response(file: str, row: Row, how: _How) -> Example:
    """What is to be answered and the answer, or a conversation."""
    encode = how.tokenizer.encode
    if set(_MESSAGES) <= row.fields.keys():
        return _conversation(file, row, _messages(file, row), how)
    if set(_INSTRUCTION) <= row.fields.keys():
        instruction, response = (_field(file, row, name, str) for name in _INSTRUCTION)
        given = row.fields.get("input") or ""
        if not isinstance(given, str):
            raise ValueError(f'{file} {row.place} has "input": {json.dumps(given)[:40]}, which must be a string.')
        if how.chat is not None:
            asked = f"{instruction}\n\n{given}" if given else instruction
            roles = {"user": asked, "assistant": response}
            return _conversation(file, row, [{"role": role, "content": text} for role, text in roles.items()], how)
        given = f"### Input:\n{given}\n\n" if given else ""
        prompt = f"### Instruction:\n{instruction}\n\n{given}### Response:\n"
    else:
        prompt, response = (_field(file, row, name, str) for name in _PROMPT)
    before, after = how.tokenizer.encode_prompt(prompt), np.append(encode(response), np.int32(how.eos))
    if before.size + after.size < 2:
        raise ValueError(f"{file} {row.place} has an empty prompt and an empty response.")
    return _answered([(before, False), (after, True)], how)


def _conversation(file: str, row: Row, messages: list[dict[str, Any]], how: _How) -> Example:
    if how.chat is None:
        raise ValueError(
            f"{file} {row.place} has messages, and the folder of --model has no chat template: take a model for chat, or give "
            'rows of "prompt" and "response".'
        )
    try:
        segments = how.chat.segments(messages)
    except ValueError as error:
        raise ValueError(f"{file} {row.place}: {error}") from error
    if not any(segment.learnt for segment in segments):
        raise ValueError(
            f"{file} {row.place} has no message of the assistant that the chat template writes as an answer."
        )
    parts = [(how.tokenizer.encode_marked(segment.text), segment.learnt) for segment in segments]
    last, learnt = parts[-1]
    if learnt and how.tokenizer.special_ids.isdisjoint(last.tolist()):  # the template has no mark for the end
        parts[-1] = np.append(last, np.int32(how.eos)), True
    return _answered(parts, how)


def _messages(file: str, row: Row) -> list[dict[str, Any]]:
    """The messages of a row, in which every role and content is a string."""
    messages = row.fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{file} {row.place} has "messages" that are no list with a message in it.')
    for message in messages:
        if not isinstance(message, dict) or any(not isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f'{file} {row.place} has the message {json.dumps(message, default=str)[:60]}, which must have a "role" and a '
                '"content", both strings.'
            )
    return messages


def _answered(parts: Sequence[tuple[np.ndarray, bool]], how: _How) -> Example:
    """The parts in a row, with loss on the tokens of those that are learnt."""
    whole = np.concatenate([tokens for tokens, _ in parts]).astype(np.int32)
    learnt = np.concatenate([np.full(tokens.size, learn) for tokens, learn in parts])
    targets = np.where(learnt, whole, np.int32(NO_LOSS))[1:]
    return Example(whole[:-1][: how.seq].copy(), targets[: how.seq].copy(), cut=targets.size > how.seq)


def _label(file: str, row: Row, how: _How, ids: dict[str, int] | None) -> Example:
    text = _field(file, row, how.text_column, str)
    if ids is None:
        label = _field(file, row, "label", int)
        if label < 0:
            raise ValueError(f"{file} {row.place} has the label {label}, but labels are 0 .. k-1.")
    else:
        name = _field(file, row, "label", str)
        if name not in ids:
            raise ValueError(
                f"{file} {row.place} has the label {name!r}, which --data has not; its labels are {_some(list(ids))}."
            )
        label = ids[name]
    tokens = how.tokenizer.encode_prompt(text).astype(np.int32)
    if not tokens.size:
        raise ValueError(f"{file} {row.place} has an empty text.")
    return Example(tokens[: how.seq].copy(), np.array([label], np.int32), cut=tokens.size > how.seq)


def _field(file: str, row: Row, name: str, kind: type) -> Any:
    value = row.fields.get(name)
    if type(value) is not kind:  # a bool is an int, and no label
        wanted = {str: "a string", int: "a whole number"}[kind]
        raise ValueError(
            f'{file} {row.place} has "{name}": {json.dumps(value, default=str)[:40]}, which must be {wanted}.'
        )
    return value


def _said(examples: Examples, seq: int) -> str:
    sizes = sum(example.tokens.size for example in examples.examples)
    kind = {"text": "windows of text", "response": "prompts with a response", "label": "labeled texts"}[examples.task]
    said = f"{len(examples.examples):,} {kind}, {sizes:,} tokens"
    if examples.cut:
        said += f"; {examples.cut:,} are longer than --seq {seq} and lose their end"
    if examples.left_out:
        said += f", {examples.left_out:,} of them all of the response, so that they are left out"
    return said


def _name(source: str, held_out: str | None) -> str:
    return f"held out of {source}" if held_out is None else f"--eval-data {held_out}"


def _some(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
