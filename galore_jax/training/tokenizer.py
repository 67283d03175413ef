# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text to int32 ids and back.

Three kinds behind one interface, chosen by a string:

* `"bytes"`: the id of a byte is its value, 0..255; id 256 ends a document, so the vocabulary has 257 ids.
* `"bpe"`: byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2),
  trained on the caller's documents with the `tokenizers` library. Training is deterministic.
* the path of a `tokenizer.json`, such as those published beside model weights, or a file written by `save`.

Text is only ever text: the characters "<|endoftext|>" inside a document do not become the end-of-document id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# The end-of-document tokens of GPT-2 and NeoX, LLaMA and T5, Gemma, LLaMA 3, Qwen, and BERT, in order of
# preference.
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]", "[SEP]")
# 256 bytes and the end-of-document token: the vocabulary of "bytes", and the smallest one "bpe" can have.
BYTE_VOCAB_SIZE = 257
# The "model" of a byte tokenizer as runs saved it once, which only `load_tokenizer` reads.
_OLD_BYTE_MODEL = {"type": "Bytes"}


class Tokenizer(Protocol):
    """Text to ids and back; `vocab_size` is one more than the largest id; `eos_id`, of `eos_token`, ends a document."""

    vocab_size: int
    eos_id: int
    eos_token: str
    special_ids: frozenset[int]

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [n], without any special token."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of `text` for a model to continue: after the special tokens that the file puts before a text."""

    def encode_marked(self, text: str) -> np.ndarray:
        """The ids of a text in which the names of special tokens stand for them, as chat templates write it."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, in parallel where the library can."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens decode to nothing, bytes that are not UTF-8 to U+FFFD."""

    def save(self, path: str | os.PathLike) -> None:
        """Writes a tokenizer.json that `load_tokenizer` and transformers read; it appears whole or not at all."""


class ByteTokenizer:
    """The bytes of the text in UTF-8 are its ids.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("é!")
    array([195, 169,  33], dtype=int32)
    >>> tokenizer.decode([195, 169, 33, tokenizer.eos_id])
    'é!'
    """

    vocab_size = BYTE_VOCAB_SIZE
    eos_id = 256
    eos_token = END_OF_TEXT
    special_ids = frozenset([eos_id])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def encode_marked(self, text: str) -> np.ndarray:
        first, *others = (self.encode(piece) for piece in text.split(self.eos_token))
        end = np.array([self.eos_id], np.int32)
        return np.concatenate([first, *(part for other in others for part in (end, other))])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        _write(path, json.dumps(_byte_fields(), ensure_ascii=False))


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, used without its special tokens, truncation and padding.

    Raises ValueError when the vocabulary has no end-of-document token.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, name: str):
        self._tokenizer = tokenizer
        # A tokenizer.json may ask for either; both would break the packing of documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1  # ids may have holes, so this is not their number
        eos = next((token for token in END_OF_TEXT_NAMES if token in ids), None)
        if eos is None:
            raise ValueError(
                f"tokenizer {name} has none of the end-of-document tokens {', '.join(END_OF_TEXT_NAMES)}: "
                f"add one of them to its vocabulary."
            )
        self.eos_id, self.eos_token = ids[eos], eos
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> np.ndarray:
        encoding = self._tokenizer.encode(text, add_special_tokens=True)
        count = len(encoding.ids)
        while count and encoding.special_tokens_mask[count - 1]:
            count -= 1  # such as the end of a document
        return np.array(encoding.ids[:count] or encoding.ids[:1], dtype=np.int32)

    def encode_marked(self, text: str) -> np.ndarray:
        self._tokenizer.encode_special_tokens = False
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | os.PathLike) -> None:
        _write(path, self._tokenizer.to_str())


def load_tokenizer(spec: str, documents: Iterable[str] | None = None, *, vocab_size: int = 4096) -> Tokenizer:
    """The tokenizer named by `spec`: "bytes", "bpe", or the path of a tokenizer.json or of its folder.

    `documents` and `vocab_size` are for "bpe", which is trained on the documents; on little text the
    vocabulary may come out smaller than `vocab_size`, so read `vocab_size` from the result.

    Raises FileNotFoundError when `spec` is neither a known name nor a file, and ValueError when the file is
    not a tokenizer, has no end-of-document token, or "bpe" has no documents or a `vocab_size` below 257.

    >>> load_tokenizer("bytes").vocab_size
    257
    >>> tokenizer = load_tokenizer("bpe", ["low lower lowest"], vocab_size=260)
    >>> [tokenizer.decode([i]) for i in tokenizer.encode(" lowest")]
    [' low', 'e', 's', 't']
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "bpe":
        return _train_bpe(documents, vocab_size)
    path = Path(spec)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer {spec!r} is unknown and {path} is no file: "
            f'use "bytes", "bpe" or the path of a tokenizer.json or of its folder.'
        )
    return _read(path)


def model_tokenizer(folder: Path) -> Tokenizer:
    """The ``tokenizer.json`` in the folder of a model; FileNotFoundError or ValueError as :func:`load_tokenizer`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; put the tokenizer that the model was trained with there.")
    return _read(path)


def _train_bpe(documents: Iterable[str] | None, vocab_size: int) -> SubwordTokenizer:
    if documents is None:
        raise ValueError('tokenizer "bpe" needs documents to be trained on: pass some, or use "bytes".')
    if vocab_size < BYTE_VOCAB_SIZE:
        raise ValueError(
            f'vocab_size={vocab_size} is too small for tokenizer "bpe": use at least {BYTE_VOCAB_SIZE} '
            f"(256 bytes and the end-of-document token)."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return SubwordTokenizer(tokenizer, "bpe")


def _read(path: Path) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text)
        if fields["model"] == _OLD_BYTE_MODEL or fields == _byte_fields():
            return ByteTokenizer()
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise ValueError(
            f"{path} is not a tokenizer.json ({error!r}): give a file that the tokenizers library can read."
        ) from error
    return SubwordTokenizer(tokenizer, str(path))


def _byte_fields() -> dict[str, Any]:
    """The tokenizer.json of "bytes": byte-level BPE without merges, in which the id of a byte is its value."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # As in GPT-2, a byte that is no printable character of Latin-1 stands as one of those after it.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    end = {"id": ByteTokenizer.eos_id, "content": END_OF_TEXT, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
    }


def _write(path: str | os.PathLike, text: str) -> None:
    # By way of a second file: a run killed while it saves must not leave half a tokenizer for its
    # continuation.
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
