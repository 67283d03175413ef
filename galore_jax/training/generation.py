# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Text from a trained model: what ``galore-jax generate`` prints.

The model is a checkpoint of a run, or a Hugging Face folder.  Every mistake that can be found without the weights is
found before they are read.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from galore_jax.models import Llama
from galore_jax.models.sampling import stream
from galore_jax.training import config as settings
from galore_jax.training.tokenizer import Tokenizer
from galore_jax.training.trained import Trained, open_trained, with_dtype
from galore_jax.weights import is_int8


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a text with a model that galore-jax pretrain has trained, or with a model from Hugging Face.

    The text is printed as it comes, and ends after --max-new-tokens, or where the model ends the document.
    """

    model: Path
    """Run folder of galore-jax pretrain, or a Hugging Face folder with config.json, safetensors and tokenizer.json."""
    prompt: str
    """Text to continue; "" for the start of a document, and - for what stands in standard input."""
    step: int | None = None
    """Of a run: step of the checkpoint to take. None: the last one."""
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
    samples: int = 1
    """Texts to draw: those of --seed, --seed + 1, ..."""


def check(config: GenerateConfig) -> None:
    """Raises a ValueError that names the first field whose value is out of range.

    >>> check(GenerateConfig(Path("run"), "a", top_p=1.5))
    Traceback (most recent call last):
    ValueError: --top-p 1.5 must be greater than 0 and at most 1.
    """
    settings.at_least("max_new_tokens", config.max_new_tokens, 1)
    if config.top_k is not None:
        settings.at_least("top_k", config.top_k, 1)
    settings.at_least("samples", config.samples, 1)
    settings.check_seed(config.seed)
    if config.seed + config.samples > 2**31:
        raise ValueError(f"--seed {config.seed} + --samples {config.samples} must be at most 2**31.")
    if not (config.temperature >= 0 and math.isfinite(config.temperature)):
        raise ValueError(f"--temperature {config.temperature} must be a finite number of at least 0.")
    if config.samples > 1 and config.temperature == 0:
        raise ValueError(f"--samples {config.samples} are all the same at --temperature 0; leave one of the two out.")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise ValueError(f"--top-p {config.top_p} must be greater than 0 and at most 1.")


def generate_text(config: GenerateConfig) -> Iterator[str]:
    """The prompt, and then what the model goes on with, piece by piece; mistakes are raised here.

    Raises:
      ValueError, FileNotFoundError: a setting, the folder or a file in it cannot be used.
    """
    check(config)
    source = open_trained(config.model, config.step)
    text = sys.stdin.read().removesuffix("\n") if config.prompt == "-" else config.prompt
    prompt = source.encode(text)
    if not prompt.size:  # a text begins where the one before it has ended
        prompt = np.array([source.ends[0]], np.int32)
    longest = source.model_config.longest
    if prompt.size + config.max_new_tokens > longest:
        raise ValueError(
            f"--prompt has {prompt.size} tokens, and with --max-new-tokens {config.max_new_tokens} they are more than the "
            f"{longest} positions of {config.model}; shorten the prompt or ask for fewer tokens."
        )
    model = widened(source.load(None))
    how = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    seeds = range(config.seed, config.seed + config.samples)
    streams = [stream(model, prompt, config.max_new_tokens, key=jax.random.key(seed), **how) for seed in seeds]
    return _texts(text, prompt, seeds, streams, source)


def widened(model: Llama) -> Llama:
    """The model in float32 on a CPU, where XLA would widen all weights of 16 bits anew for every token; else as it is."""
    weights = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)), is_leaf=is_int8)
    if jax.default_backend() != "cpu" or model.config.dtype == "float32" or any(map(is_int8, weights)):
        return model
    return with_dtype(model, jnp.dtype("float32"))


def _texts(text: str, prompt: np.ndarray, seeds: range, streams: list[Iterator[int]], source: Trained) -> Iterator[str]:
    """The pieces of every text; several have a line with their seed before each."""
    for seed, tokens in zip(seeds, streams, strict=True):
        if len(seeds) > 1:
            yield f"{'' if seed == seeds[0] else chr(10)}--- seed {seed}\n"
        yield from _pieces(text, prompt, tokens, source)


def _pieces(text: str, prompt: np.ndarray, tokens: Iterator[int], source: Trained) -> Iterator[str]:
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
