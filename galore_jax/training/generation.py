# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Text from a trained model: what ``galore-jax generate`` prints.

The model is the last checkpoint of a run, or a Hugging Face folder.  Every mistake that can be found without the weights is
found before they are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from galore_jax.models import Llama, LlamaConfig, load_hf, merge_lora
from galore_jax.models.huggingface_config import config_from_huggingface
from galore_jax.models.sampling import stream
from galore_jax.training import checkpoint, config as settings, run_folder
from galore_jax.training.program import program
from galore_jax.training.tokenizer import Tokenizer, model_tokenizer


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a text with a model that galore-jax pretrain has trained, or with a model from Hugging Face.

    The text is printed as it comes, and ends after --max-new-tokens, or where the model ends the document.
    """

    model: Path
    """Run folder of galore-jax pretrain, or a Hugging Face folder with config.json, safetensors and tokenizer.json."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 200
    """Tokens after the prompt, at most."""
    temperature: float = 0.8
    """Below 1 likely tokens become likelier, above 1 less likely. 0: always the likeliest token."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens. None: from all."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that together have this probability. None: from all."""
    seed: int = 0
    """Another number, another text."""


def check(config: GenerateConfig) -> None:
    """Raises a ValueError that names the first field whose value is out of range.

    >>> check(GenerateConfig(Path("run"), "a", top_p=1.5))
    Traceback (most recent call last):
    ValueError: --top-p 1.5 must be greater than 0 and at most 1.
    """
    settings.at_least("max_new_tokens", config.max_new_tokens, 1)
    if config.top_k is not None:
        settings.at_least("top_k", config.top_k, 1)
    settings.check_seed(config.seed)
    if not (config.temperature >= 0 and math.isfinite(config.temperature)):
        raise ValueError(f"--temperature {config.temperature} must be a finite number of at least 0.")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise ValueError(f"--top-p {config.top_p} must be greater than 0 and at most 1.")


def generate_text(config: GenerateConfig) -> Iterator[str]:
    """The prompt, and then what the model goes on with, piece by piece; mistakes are raised here.

    Raises:
      ValueError, FileNotFoundError: a setting, the folder or a file in it cannot be used.
    """
    check(config)
    source = _source(config.model)
    prompt = source.encode(config.prompt)
    if not prompt.size:
        raise ValueError("--prompt is empty; give the model some text to continue.")
    longest = source.model_config.longest
    if prompt.size + config.max_new_tokens > longest:
        raise ValueError(
            f"--prompt has {prompt.size} tokens, and with --max-new-tokens {config.max_new_tokens} they are more than the "
            f"{longest} positions of {config.model}; shorten the prompt or ask for fewer tokens."
        )
    tokens = stream(
        source.load(),
        prompt,
        config.max_new_tokens,
        key=jax.random.key(config.seed),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    return _pieces(config.prompt, prompt, tokens, source)


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a folder holds; only ``load`` reads the weights."""

    tokenizer: Tokenizer
    encode: Callable[[str], np.ndarray]  # a prompt
    model_config: LlamaConfig
    load: Callable[[], Llama]
    ends: frozenset[int]  # tokens that end a document


def _source(folder: Path) -> _Source:
    kinds = "a run folder of galore-jax pretrain or a Hugging Face folder"
    if not folder.is_dir():
        raise FileNotFoundError(f"--model {folder} is no folder; name {kinds}.")
    fields = _json(folder / "config.json")
    if "task" in fields:
        raise ValueError(f"--model {folder} is a run of galore-jax finetune; name the model in it, {folder / 'best'}.")
    if "model_config" in fields:
        return _run(folder)
    if "model_type" in fields:
        return _huggingface(folder)
    raise ValueError(f"--model {folder} holds no config.json of a model; name {kinds}.")


def _run(folder: Path) -> _Source:
    run, model_config, _ = run_folder.load_config(folder)
    checkpoints = folder / "checkpoints"
    step = checkpoint.last_step(checkpoints)
    tokenizer = model_tokenizer(folder)

    def load() -> Llama:
        built = program(run, model_config)
        model = nnx.merge(built.graphdef, checkpoint.restore_params(checkpoints, step, built.state[0]))
        merge_lora(model)
        return model

    return _Source(tokenizer, tokenizer.encode, model_config, load, frozenset([tokenizer.eos_id]))


def _huggingface(folder: Path) -> _Source:
    model_config = config_from_huggingface(folder / "config.json")
    tokenizer = model_tokenizer(folder)
    return _Source(
        tokenizer,
        tokenizer.encode_prompt,
        model_config,
        lambda: load_hf(folder),
        frozenset(end_ids(folder, tokenizer)),
    )


def end_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The token ids that end a text of the Hugging Face model in a folder, the first one foremost."""
    fields = _json(folder / "config.json") | _json(folder / "generation_config.json")
    ends = fields.get("eos_token_id")
    ends = tokenizer.eos_id if ends is None else ends
    return ends if isinstance(ends, list) else [ends]


def _pieces(text: str, prompt: np.ndarray, tokens: Iterator[int], source: _Source) -> Iterator[str]:
    """The text of the tokens, in pieces that end with whole characters.

    A token may hold part of a character, and its text may depend on the token before: so it is decoded together with those
    of the piece before, of which the text is known.
    """
    yield text
    ids, start, told = prompt.tolist(), max(0, prompt.size - 8), prompt.size  # the text of ids[:told] is out
    for token in tokens:
        if token in source.ends:
            break
        ids.append(token)
        piece = _addition(source.tokenizer, ids[start:], told - start)
        if piece and not piece.endswith("\ufffd"):
            yield piece
            start, told = told, len(ids)
    if told < len(ids):
        yield _addition(source.tokenizer, ids[start:], told - start)


def _addition(tokenizer: Tokenizer, ids: list[int], known: int) -> str:
    """What the text of ``ids`` has more than that of the first ``known`` of them."""
    return tokenizer.decode(ids)[len(tokenizer.decode(ids[:known])) :]


def _json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        fields = run_folder.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy.") from error
    return fields if isinstance(fields, dict) else {}
