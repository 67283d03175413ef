# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Labels for texts from a classifier: what ``galore-jax classify`` prints."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from galore_jax.models import load_hf_classifier
from galore_jax.models.huggingface_config import config_from_huggingface
from galore_jax.training import config as settings, run_folder
from galore_jax.training.examples import POOL, bucket
from galore_jax.training.files import Row, holds_rows, looks_like_json_lines, plain_lines, read_rows, read_text, rows_of
from galore_jax.training.tokenizer import model_tokenizer


@dataclasses.dataclass(frozen=True)
class ClassifyConfig:
    """Label texts with a classifier: one that galore-jax finetune has trained on labels, or LlamaForSequenceClassification.

    Each text gets a line with its label and the label's probability. Where rows have a "label" of their own, the last line,
    on stderr, says how many are right.
    """

    model: Path
    """Hugging Face folder of a classifier, such as best/ in a run folder of galore-jax finetune."""
    data: str | None = None
    """A file of rows (.jsonl, .json, .ndjson, .parquet), or of text, each line of which is one. None or -: standard input."""
    text: str | None = None
    """One text, instead of --data."""
    text_column: str = "text"
    """The field of rows that holds the text."""
    batch: int = 16
    """Texts that are computed together."""
    json: bool = False
    """Print JSON lines: the text, the label, its probability, and those of all labels."""


class Labelled(NamedTuple):
    """A text with what the classifier says of it."""

    text: str
    label: str | int
    probability: float
    probabilities: dict[str | int, float]
    right: bool | None  # None: the row had no label


def classify(config: ClassifyConfig) -> Iterator[Labelled]:
    """The texts in their order, each with its label; mistakes are raised here.

    Raises:
      ValueError, FileNotFoundError: a setting, the folder, the file or a row of it cannot be used.
    """
    settings.at_least("batch", config.batch, 1)
    if config.text is not None and config.data is not None:
        raise ValueError("--text and --data are both given; leave one out.")
    run_folder.expect(f"--model {config.model}", config.model, "classifier")
    longest = config_from_huggingface(config.model / "config.json").longest
    tokenizer = model_tokenizer(config.model)
    texts, ids, golds, cut = [], [], [], 0
    for place, fields in _rows(config):
        text = fields.get(config.text_column)
        if not isinstance(text, str):
            found = ", ".join(map(repr, list(fields)[:8]))
            raise ValueError(f"{place} has no text in {config.text_column!r}, only {found}: choose with --text-column.")
        tokens = tokenizer.encode_prompt(text)
        if not tokens.size:
            raise ValueError(f"{place} has an empty text, which has no label.")
        cut += tokens.size > longest
        texts.append(text)
        ids.append(tokens[:longest])
        golds.append(fields.get("label"))
    if not texts:
        raise ValueError(f"{_name(config)} holds no text; give one that does.")
    if cut:
        print(f"{cut:,} texts are longer than the model's {longest} positions and lose their end", file=sys.stderr)
    model = load_hf_classifier(config.model)
    largest = max(int(tokens.max()) for tokens in ids)
    if largest >= model.body.config.vocab_size:
        raise ValueError(
            f"{config.model / 'tokenizer.json'} has the id {largest}, but the model's vocabulary has "
            f"{model.body.config.vocab_size}; use the tokenizer that the model was trained with."
        )
    names = label_names(config.model, model.num_labels)
    return _labelled(texts, golds, names, _probabilities(model, ids, config.batch, longest))


def lines(labelled: Iterator[Labelled], *, as_json: bool) -> Iterator[str]:
    """What is printed of each text; at the end the accuracy goes to stderr, if there were labels to compare with."""
    right = []
    for one in labelled:
        if one.right is not None:
            right.append(one.right)
        if as_json:
            yield json.dumps(
                {name: value for name, value in one._asdict().items() if name != "right"}, ensure_ascii=False
            )
        else:
            yield f"{one.label}\t{one.probability:.4f}"
    if right:
        print(f"accuracy {np.mean(right):.4f} on {len(right):,} texts with a label", file=sys.stderr)


def label_names(folder: Path, count: int) -> list[str | int]:
    """The names of a classifier's labels; their numbers where it has only the names that transformers makes up."""
    given = run_folder.read_json(folder / "config.json").get("id2label") or {}
    names = [given.get(str(number), f"LABEL_{number}") for number in range(count)]
    return list(range(count)) if names == [f"LABEL_{number}" for number in range(count)] else names


def _name(config: ClassifyConfig) -> str:
    return "--text" if config.text is not None else f"--data {config.data or '-'}"


def _rows(config: ClassifyConfig) -> Iterator[Row]:
    """Every text as a row, with its place for messages."""
    name = _name(config)
    if config.text is not None:
        return iter([Row(name, {config.text_column: config.text})])
    if config.data in (None, "-"):
        try:
            text = plain_lines(sys.stdin.read())
        except UnicodeDecodeError as error:
            raise ValueError(f"Standard input is not UTF-8 text ({error.reason}): convert it.") from error
        is_rows, rows = looks_like_json_lines(text), rows_of(text.encode("utf-8", "replace").split(b"\n"), name)
    else:
        path = Path(config.data)
        if not path.is_file():
            raise FileNotFoundError(f"{name} does not exist; name a file of rows or of text.")
        is_rows = holds_rows(path)
        text, rows = "" if is_rows else read_text(path), read_rows(path)
    if is_rows:
        return (row._replace(place=f"{name} {row.place}") for row in rows)
    return (
        Row(f"{name} line {number}", {config.text_column: line})
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )


def _probabilities(model: Any, ids: list[np.ndarray], batch: int, longest: int) -> Iterator[np.ndarray]:
    """The probability of each label for each text, float32 [labels], in order; texts of like length go together."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def probabilities(state: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        return jax.nn.softmax(nnx.merge(graphdef, state)(tokens, lengths), axis=-1)

    for start in range(0, len(ids), POOL * batch):
        pool = ids[start : start + POOL * batch]
        order = np.argsort([tokens.size for tokens in pool], kind="stable")
        found: dict[int, np.ndarray] = {}
        for first in range(0, len(pool), batch):
            numbers = order[first : first + batch]
            tokens = np.zeros((batch, bucket(max(pool[i].size for i in numbers), longest)), np.int32)
            lengths = np.ones(batch, np.int32)
            for row, number in enumerate(numbers):
                lengths[row] = pool[number].size
                tokens[row, : lengths[row]] = pool[number]
            found |= dict(zip(numbers.tolist(), np.asarray(probabilities(state, tokens, lengths)), strict=False))
        yield from (found[i] for i in range(len(pool)))


def _labelled(
    texts: list[str], golds: list[Any], names: list[str | int], found: Iterator[np.ndarray]
) -> Iterator[Labelled]:
    for text, gold, values in zip(texts, golds, found, strict=True):
        best = int(np.argmax(values))
        right = None if gold is None else gold == names[best]
        probabilities = {name: float(value) for name, value in zip(names, values, strict=True)}
        yield Labelled(text, names[best], float(values[best]), probabilities, right)
