# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Batches of tokens for pre-training: documents, packed into windows, shuffled, batched, and resumable.

The tokens of all documents, each followed by the end-of-document id, form one sequence x. Window i is

    x[i S], x[i S + 1], ..., x[i S + S],        S = sequence_length,

S + 1 tokens of which the first S are inputs and the last S are targets. Windows start S apart, so every
token except the first is a target exactly once an epoch (a remainder shorter than S at the end is left
out), and nothing is padded.

Local text is tokenized once and its windows are shuffled anew each epoch by Grain, whose batches are a pure
function of the seed and the step; its iterator state is one integer. A Hugging Face stream has no random
access: it is read in blocks of documents, which are shuffled within the block, and its state is the
position in the stream and the tokens left over from the last batch. Worker processes of Grain can do that
ahead of the training; each reads its own part of the stream, and their batches come in turn. Several
processes of a run read their shares of it (see `shares`). Every state is JSON, and a run that restores it
goes on with exactly the same batches.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy, deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import grain
import numpy as np
from absl import flags

from galore_jax.training.sources import open_stream, read_documents, stream_texts
from galore_jax.training.tokenized import TOKENIZER_DOCUMENTS, is_tokenized, open_tokenized
from galore_jax.training.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import datasets

# Documents of a stream that are shuffled together. They are also read again on resuming, so this stays small.
SHUFFLE_DOCUMENTS = 1000

# Batches that each worker process has ready: enough for the time in which it reads its next block of documents.
BATCHES_AHEAD = 16


class TrainIterator(Protocol):
    """Endless training batches whose position can be saved."""

    def __next__(self) -> np.ndarray:
        """The next batch, int32 [batch_size, sequence_length + 1]."""

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON-serialisable values."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position from `get_state` of an iterator over the same data with the same settings."""


class TextData(Protocol):
    """A corpus as batches of tokens. `description` is for the log.

    `fingerprint` tells whether a resumed run has the tokens it began with: it changes with any token of a local
    text. A stream is not read whole, so its fingerprint only names the source and what it holds out.
    """

    tokenizer: Tokenizer
    description: str
    fingerprint: str

    def train_iterator(self) -> TrainIterator:
        """A new iterator at the start of the first epoch."""

    def validation_batches(self, max_tokens: int | None = None) -> Iterator[np.ndarray]:
        """The validation windows, int32 [batch_size, sequence_length + 1], in the same order each time.

        At most `max_tokens` targets, rounded down to whole batches but at least one batch. The only batch
        that can be smaller is that of a validation set with fewer than `batch_size` windows. Every shard
        sees the same batches.
        """


def load_data(
    source: str,
    *,
    tokenizer: str,
    sequence_length: int,
    batch_size: int,
    seed: int,
    vocab_size: int = 4096,
    shard_index: int = 0,
    shard_count: int = 1,
    tokenizer_file: Path | None = None,
    text_column: str = "text",
    workers: int = 0,
) -> TextData:
    """Opens a corpus: "python", a file, a folder, "hf:NAME[:CONFIG]" (see `sources`), or a folder of tokens (see `tokenized`).

    `batch_size` is that of one shard; the batches of the `shard_count` shards at one step make up the
    global batch. `tokenizer` and `vocab_size` are as in `load_tokenizer`. When `tokenizer_file` exists the
    tokenizer is read from it instead, otherwise shard 0 saves it there, so that a resumed run has the
    tokenizer it began with. `text_column` is the field of rows that holds their text. Of a stream, so many
    `workers` processes prepare the batches; other text is in memory.

    Raises FileNotFoundError for a path that does not exist, and ValueError for unusable arguments,
    unreadable text, or too little of it for one global batch and one validation window.
    """
    for name, value, least in (
        ("sequence_length", sequence_length, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("shard_count", shard_count, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is too small: use {least} or more.")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index} is out of range: use 0 to {shard_count - 1}.")
    window = {"sequence_length": sequence_length, "batch_size": batch_size}
    shard = {"seed": seed, "shard_index": shard_index, "shard_count": shard_count}

    if source.startswith("hf:"):
        train, validation, held_out = open_stream(source, text_column)
        sample = islice(stream_texts(train), TOKENIZER_DOCUMENTS)
        text_tokenizer = _saved_tokenizer(tokenizer, sample, vocab_size, tokenizer_file, shard_index)
        column = "" if text_column == "text" else f" (column {text_column!r})"
        description = f"{source}{column}: streamed, validation on {held_out}"
        return StreamedText(description, text_tokenizer, train, validation, workers=workers, **window, **shard)

    if is_tokenized(source):
        if tokenizer != "bytes":
            raise ValueError(
                f"tokenizer {tokenizer!r} cannot be chosen for {source!r}, whose tokens are made: leave it out."
            )
        found = open_tokenized(source)
        if tokenizer_file is not None and shard_index == 0 and not tokenizer_file.exists():
            found.tokenizer.save(tokenizer_file)
        return PackedText(source, *found, **window, **shard)

    corpus = read_documents(source, text_column)
    train, validation = corpus.divided()
    text_tokenizer = _saved_tokenizer(tokenizer, train, vocab_size, tokenizer_file, shard_index)
    tokens, held_out = (encode_documents(text_tokenizer, part) for part in (train, validation))
    description = (
        f"{source}: {len(train):,} training and {len(validation):,} validation documents, "
        f"{sum(map(len, train)):,} and {sum(map(len, validation)):,} characters, "
        f"{tokens.size:,} and {held_out.size:,} tokens"
    ) + (f"\nleft out: {corpus.left_out}" if corpus.left_out else "")
    fingerprint = " ".join(f"{part.size}:{zlib.crc32(part.data):08x}" for part in (tokens, held_out))
    return PackedText(source, text_tokenizer, tokens, held_out, description, fingerprint, **window, **shard)


def _saved_tokenizer(
    spec: str, documents: Iterable[str], vocab_size: int, file: Path | None, shard_index: int
) -> Tokenizer:
    if file is not None and file.exists():
        return load_tokenizer(str(file))
    tokenizer = load_tokenizer(spec, documents, vocab_size=vocab_size)
    if file is not None and shard_index == 0:
        tokenizer.save(file)
    return tokenizer


class PackedText:
    """`TextData` of tokens in memory or mapped into it, [n] of any integer type, shuffled and batched by Grain."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        train: np.ndarray,
        validation: np.ndarray,
        description: str,
        fingerprint: str,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        shard_index: int,
        shard_count: int,
    ):
        self.tokenizer, self.description, self.fingerprint = tokenizer, description, fingerprint
        self._batch_size = batch_size
        self._shard = slice(shard_index, None, shard_count)
        self._seed = seed
        self._train = cut_windows(train, sequence_length)
        self._validation = cut_windows(validation, sequence_length)
        global_batch = batch_size * shard_count
        if len(self._train) < global_batch:
            raise _too_little("training", source, train.size, global_batch, sequence_length)
        if len(self._validation) < 1:
            raise _too_little("validation", source, validation.size, 1, sequence_length)

    def train_iterator(self) -> grain.DatasetIterator:
        order = grain.MapDataset.range(len(self._train)).seed(self._seed).shuffle().repeat()
        # Shards are cut from the endless sequence, so that they finish every epoch together even when its
        # length is not a multiple of their number.
        windows = order[self._shard].map(self._window)
        batches = windows.batch(self._batch_size, drop_remainder=True)
        # The windows are in memory: threads that prefetch would only cost.
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def _window(self, number: int) -> np.ndarray:
        return self._train[number].astype(np.int32, copy=False)

    def validation_batches(self, max_tokens: int | None = None) -> Iterator[np.ndarray]:
        windows = self._validation
        batch_size = min(self._batch_size, len(windows))
        limit = _batch_limit(batch_size * (windows.shape[1] - 1), max_tokens)
        for i in islice(range(len(windows) // batch_size), limit):
            yield windows[i * batch_size : (i + 1) * batch_size].astype(np.int32)  # a copy: windows of a view overlap


class StreamedText:
    """`TextData` of a Hugging Face stream. Shards read different documents of it."""

    def __init__(
        self,
        description: str,
        tokenizer: Tokenizer,
        train: datasets.IterableDataset,
        validation: datasets.IterableDataset,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        shard_index: int,
        shard_count: int,
        workers: int = 0,
    ):
        self.description = self.fingerprint = description
        self.tokenizer, self._workers = tokenizer, workers
        self._train, self._validation = train, validation
        self._sequence_length, self._batch_size = sequence_length, batch_size
        self._seed, self._shard_index, self._shard_count = seed, shard_index, shard_count

    def train_iterator(self) -> grain.DatasetIterator[np.ndarray]:
        for number in range(max(1, self._workers)):
            if next(stream_texts(self._stream(number)), None) is None:
                raise _no_text()
        if not self._workers:
            return self._part(0)
        if not flags.FLAGS.is_parsed():  # Grain asks for flags of its own, which a command line of absl would set
            flags.FLAGS.mark_as_parsed()
        numbers = grain.MapDataset.range(self._workers).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=BATCHES_AHEAD)
        return iter(_Parts(numbers, self._part).mp_prefetch(options, worker_init_fn=_prepare_worker))

    def share(self, index: int, count: int) -> grain.DatasetIterator[np.ndarray]:
        """A new iterator over one of `count` shares of the documents, with as large a share of the rows of each batch."""
        one = copy(self)
        one._batch_size = self._batch_size // count
        one._shard_index, one._shard_count = self._shard_index * count + index, self._shard_count * count
        return one.train_iterator()

    def _part(self, number: int) -> StreamIterator:
        """The batches of one worker."""
        packer = Packer(self._sequence_length, self._batch_size)
        return StreamIterator(partial(self._stream, number), self.tokenizer, packer, seed=self._seed)

    def _stream(self, number: int) -> datasets.IterableDataset:
        """The documents of one worker."""
        from datasets.distributed import split_dataset_by_node

        # Datasets made from one another share the record of their position, so each iterator has its own copy.
        train = deepcopy(self._train)
        parts = max(1, self._workers)
        rank, world_size = self._shard_index * parts + number, self._shard_count * parts
        return split_dataset_by_node(train, rank=rank, world_size=world_size)

    def validation_batches(self, max_tokens: int | None = None) -> Iterator[np.ndarray]:
        packer = Packer(self._sequence_length, self._batch_size)
        limit = _batch_limit(self._batch_size * self._sequence_length, max_tokens)
        produced = 0
        for text in stream_texts(deepcopy(self._validation)):
            packer.add(encode_documents(self.tokenizer, [text]))
            while packer.ready():
                yield packer.pop()
                produced += 1
                if produced == limit:
                    return
        if produced == 0:
            windows = cut_windows(packer.rest(), self._sequence_length)
            if len(windows) == 0:
                raise _too_little("validation", self.description, packer.size, 1, self._sequence_length)
            yield windows.copy()


class _Parts(grain.IterDataset[np.ndarray]):
    """Batches of the part of a stream whose number its parent yields first, of which each worker process sees another one."""

    def __init__(self, numbers: grain.IterDataset[int], part: Callable[[int], StreamIterator]):
        super().__init__(numbers)
        self._numbers, self._part = numbers, part

    def __iter__(self) -> StreamIterator:
        return self._part(int(next(iter(self._numbers))))


def _prepare_worker(index: int, count: int) -> None:
    """Called in each worker process: leaves Ctrl-C to the training process, and ends with it even if that is killed."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        threading.Thread(target=lambda: (trainer.join(), os._exit(1)), daemon=True).start()


class StreamIterator(grain.DatasetIterator[np.ndarray]):
    """Endless batches of a stream, in shuffled blocks of documents; starts the stream again when it ends.

    Nothing is opened or read before the first batch is asked for: with workers, this process only asks for the first position.
    """

    def __init__(
        self, opened: Callable[[], datasets.IterableDataset], tokenizer: Tokenizer, packer: Packer, *, seed: int
    ):
        super().__init__()
        self._opened, self._tokenizer, self._packer, self._seed = opened, tokenizer, packer, seed
        self.set_state({"epoch": 0, "block": 0, "block_start": {}, "next_document": 0, "tokens": []})

    def __next__(self) -> np.ndarray:
        if self._unread is not None:
            self._go_to(self._unread)
        while not self._packer.ready():
            if self._next_document == len(self._documents):
                self._read_block()
            self._packer.add(self._documents[self._next_document])
            self._next_document += 1
        return self._packer.pop()

    def get_state(self) -> dict[str, Any]:
        return self._unread or {
            "epoch": self._epoch,
            "block": self._block,
            "block_start": self._block_start,
            "next_document": self._next_document,
            "tokens": self._packer.rest().tolist(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._unread: dict[str, Any] | None = state

    def _go_to(self, state: dict[str, Any]) -> None:
        self._unread = None
        self._stream = self._opened()
        self._epoch, self._block = state["epoch"], state["block"] - 1
        self._open(state["block_start"])
        self._read_block()
        self._next_document = state["next_document"]
        self._packer.clear()
        self._packer.add(np.array(state["tokens"], dtype=np.int32))

    def _open(self, position: dict[str, Any]) -> None:
        # An empty position is the start of the stream.
        self._stream.load_state_dict(position)
        self._texts = stream_texts(self._stream)
        self._position = position

    def _read_block(self) -> None:
        texts = self._read_texts()
        if not texts:  # the end of the stream: the next epoch
            self._epoch, self._block = self._epoch + 1, -1
            self._open({})
            texts = self._read_texts()
        if not texts:
            raise _no_text()
        self._block += 1
        order = np.random.default_rng([self._seed, self._epoch, self._block]).permutation(len(texts))
        self._documents = [
            np.append(ids, np.int32(self._tokenizer.eos_id))
            for ids in self._tokenizer.encode_batch([texts[i] for i in order])
        ]
        self._next_document = 0

    def _read_texts(self) -> list[str]:
        self._block_start = self._position
        texts = list(islice(self._texts, SHUFFLE_DOCUMENTS))
        self._position = self._stream.state_dict()
        return texts


class Packer:
    """Joins documents, given as tokens, and cuts batches of windows from them.

    >>> packer = Packer(sequence_length=2, batch_size=2)
    >>> packer.add(np.arange(8, dtype=np.int32))
    >>> packer.pop()
    array([[0, 1, 2],
           [2, 3, 4]], dtype=int32)
    >>> packer.rest()
    array([4, 5, 6, 7], dtype=int32)
    """

    def __init__(self, sequence_length: int, batch_size: int):
        self._sequence_length = sequence_length
        self._needed = batch_size * sequence_length + 1
        self.clear()

    def clear(self) -> None:
        self._pieces: list[np.ndarray] = []
        self.size = 0

    def add(self, tokens: np.ndarray) -> None:
        self._pieces.append(tokens)
        self.size += tokens.size

    def ready(self) -> bool:
        return self.size >= self._needed

    def rest(self) -> np.ndarray:
        """The tokens that no batch has taken yet (of which the first was the last target), int32 [n]."""
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.int32)

    def pop(self) -> np.ndarray:
        """The next batch, int32 [batch_size, sequence_length + 1]; only when `ready`."""
        tokens = self.rest()
        self.clear()
        self.add(tokens[self._needed - 1 :])  # the last target is the first input of the next batch
        return cut_windows(tokens[: self._needed], self._sequence_length).copy()


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """The tokens of all documents, each followed by the end-of-document id, int32 [n]."""
    eos = np.array([tokenizer.eos_id], dtype=np.int32)
    pieces = []
    # In parts, since what a tokenizer records of a text is many times larger than its ids.
    for start in range(0, len(documents), 256):
        for ids in tokenizer.encode_batch(documents[start : start + 256]):
            pieces += [ids, eos]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def cut_windows(tokens: np.ndarray, sequence_length: int) -> np.ndarray:
    """All windows of int32 [n] `tokens`: a view, int32 [(n - 1) // sequence_length, sequence_length + 1].

    >>> cut_windows(np.arange(8), 3)
    array([[0, 1, 2, 3],
           [3, 4, 5, 6]])
    """
    if tokens.size <= sequence_length:
        return np.zeros((0, sequence_length + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]


def _no_text() -> ValueError:
    return ValueError(
        "the stream has no training text for one of its shares: use more text, or fewer processes or --data-workers."
    )


def _too_little(kind: str, source: str, tokens: int, windows: int, sequence_length: int) -> ValueError:
    return ValueError(
        f"the {kind} text of {source!r} is {tokens} tokens, but {windows * sequence_length + 1} are needed "
        f"for {windows} sequences of {sequence_length}: use more text, or a smaller --seq or --batch."
    )


def _batch_limit(tokens_per_batch: int, max_tokens: int | None) -> int | None:
    return None if max_tokens is None else max(1, max_tokens // tokens_per_batch)
