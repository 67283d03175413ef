# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Examples for fine-tuning, and their batches: prompts with responses, labelled texts, or plain text.

A JSON-lines file (``.jsonl``) holds one object a line, {"prompt": str, "response": str} or {"text": str, "label": int}; the
first line says which.  Anything else is text: a file or a folder, whose documents are packed into windows as for pre-training.

    task         inputs                                          loss on
    text         x_0 .. x_(S-1) of a window of S + 1 tokens      x_1 .. x_S
    response     prompt, response                                the response, and the end of the document
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

from galore_jax.training.data import cut_windows, encode_documents
from galore_jax.training.sources import read_documents, read_text, split_documents
from galore_jax.training.tokenizer import Tokenizer

Task = Literal["text", "response", "label"]

_SHORTEST, _SPAN = 16, 16  # the least length that examples are padded to, unless a 16th of the longest is more
POOL = 16
"""Batches whose examples are put in order of length together."""

NO_LOSS = -1
"""Target of a position, or label of an example, on which there is no loss."""

_FIELDS: dict[Task, tuple[str, str]] = {"response": ("prompt", "response"), "label": ("text", "label")}
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
    """

    def __init__(self, examples: Sequence[Example], task: Task, *, batch: int, seq: int, pad: int):
        self.examples, self.task = [one for one in examples if np.any(one.targets != NO_LOSS)], task
        self.left_out = len(examples) - len(self.examples)
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


def load_examples(
    source: str, held_out: str | None, tokenizer: Tokenizer, *, batch: int, seq: int, seed: int, eos: int
) -> tuple[Examples, Examples, str]:
    """The examples to train on and those held out, and a sentence on each.

    Args:
      source: a ``.jsonl`` file; or text, a file or folder, or "python".
      held_out: the same, of the same task.  None: a twentieth of ``source``.
      tokenizer: the model's.
      batch, seq: of a batch, and the longest input; examples that are longer lose their end.
      seed: decides which rows are held out when none are named.
      eos: token id that ends a response and a document, and pads.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a file is empty, a line is not what it should be, the labels are not 0 .. k-1, or the examples are fewer than
        a batch.
    """
    task = task_of(source)
    if held_out is not None and task_of(held_out) != task:
        raise ValueError(f"--eval-data {held_out} holds {task_of(held_out)} examples, but --data holds {task} ones.")
    read = _read_windows if task == "text" else _read_rows
    train, validation = (
        Examples(examples, task, batch=batch, seq=seq, pad=eos)
        for examples in read(source, held_out, task, tokenizer, seq, seed, eos)
    )
    for name, examples, least in ((f"--data {source}", train, batch), (_name(source, held_out), validation, 1)):
        if len(examples.examples) < least:
            raise ValueError(
                f"{name} gives {len(examples.examples)} examples at --seq {seq}, and at least {least} are needed; "
                "give more text, or lower --batch or --seq."
            )
    return train, validation, f"{source}: {_said(train, seq)}\n{_name(source, held_out)}: {_said(validation, seq)}"


def num_labels(train: Examples, validation: Examples) -> int:
    """The number k of labels; ValueError unless the training labels are 0 .. k-1, and no other is held out."""
    found = Counter(int(example.targets[0]) for example in train.examples)
    labels = sorted(found)
    if labels != list(range(len(labels))) or len(labels) < 2:
        raise ValueError(
            f"The labels of --data are {_some(labels)}, but they must be 0 .. k-1 with at least two of them."
        )
    others = sorted({int(example.targets[0]) for example in validation.examples} - set(labels))
    if others:
        raise ValueError(
            f"--eval-data has the label {others[0]}, which --data has not; its labels are 0 .. {labels[-1]}."
        )
    return len(labels)


def task_of(source: str) -> Task:
    """What the examples of a source are for, by its name and its first line.

    Raises:
      FileNotFoundError, ValueError: the file does not exist, is empty, or its first line has other fields.
    """
    if not source.endswith((".jsonl", ".jsonl.gz")):
        return "text"
    number, first = next(_objects(Path(source)))
    for task, fields in _FIELDS.items():
        if set(fields) <= first.keys():
            return task
    raise ValueError(
        f'{source} line {number} has the fields {_some(list(first))}; needed are "prompt" and "response", or "text" and "label".'
    )


def _read_rows(
    source: str, held_out: str | None, task: Task, tokenizer: Tokenizer, seq: int, seed: int, eos: int
) -> tuple[list[Example], list[Example]]:
    make = {"response": _response, "label": _label}[task]

    def read(file: str) -> list[Example]:
        return [make(file, number, row, tokenizer, seq, eos) for number, row in _objects(Path(file))]

    rows = read(source)
    if held_out is not None:
        return rows, read(held_out)
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = len(rows) // _HELD_OUT
    return [rows[i] for i in sorted(order[cut:])], [rows[i] for i in sorted(order[:cut])]


def _read_windows(
    source: str, held_out: str | None, task: Task, tokenizer: Tokenizer, seq: int, seed: int, eos: int
) -> tuple[list[Example], list[Example]]:
    del task, seed, eos
    train = read_documents(source)
    train, validation = split_documents(train) if held_out is None else (train, read_documents(held_out))
    windows = (cut_windows(encode_documents(tokenizer, texts), seq) for texts in (train, validation))
    train, validation = ([Example(window[:-1].copy(), window[1:].copy()) for window in part] for part in windows)
    return train, validation


def _response(file: str, number: int, row: dict[str, Any], tokenizer: Tokenizer, seq: int, eos: int) -> Example:
    prompt, response = (_field(file, number, row, name, str) for name in _FIELDS["response"])
    before = tokenizer.encode_prompt(prompt)
    whole = np.concatenate([before, tokenizer.encode(response), np.array([eos], np.int32)]).astype(np.int32)
    if whole.size < 2:
        raise ValueError(f"{file} line {number} has an empty prompt and an empty response.")
    targets = whole[1:].copy()
    targets[: max(before.size - 1, 0)] = NO_LOSS
    return Example(whole[:-1][:seq].copy(), targets[:seq].copy(), cut=targets.size > seq)


def _label(file: str, number: int, row: dict[str, Any], tokenizer: Tokenizer, seq: int, eos: int) -> Example:
    del eos
    text, label = _field(file, number, row, "text", str), _field(file, number, row, "label", int)
    if label < 0:
        raise ValueError(f"{file} line {number} has the label {label}, but labels are 0 .. k-1.")
    tokens = tokenizer.encode_prompt(text).astype(np.int32)
    if not tokens.size:
        raise ValueError(f"{file} line {number} has an empty text.")
    return Example(tokens[:seq].copy(), np.array([label], np.int32), cut=tokens.size > seq)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank; at least one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a file of JSON lines.")
    empty = True
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); every line must be one object.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is {type(row).__name__} and not an object with fields.")
        empty = False
        yield number, row
    if empty:
        raise ValueError(f"{path} is empty; give a file with an example on each line.")


def _field(file: str, number: int, row: dict[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    if type(value) is not kind:  # a bool is an int, and no label
        wanted = {str: "a string", int: "a whole number"}[kind]
        raise ValueError(f'{file} line {number} has "{name}": {json.dumps(value)[:40]}, which must be {wanted}.')
    return value


def _said(examples: Examples, seq: int) -> str:
    sizes = sum(example.tokens.size for example in examples.examples)
    kind = {"text": "windows of text", "response": "prompts with a response", "label": "labelled texts"}[examples.task]
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
