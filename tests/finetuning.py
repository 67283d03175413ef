# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny Hugging Face folder, and examples that it can learn, shared by the tests of fine-tuning."""

import dataclasses
import json

import numpy as np
from test_llama import random_model

from galore_jax.models import LlamaConfig, save_hf
from galore_jax.training.tokenizer import ByteTokenizer

BYTES = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=257,
    max_position_embeddings=64,
)  # fmt: skip


def write_model(folder, scale=0.2, **overrides):
    """A random LLaMA on bytes."""
    save_hf(random_model(dataclasses.replace(BYTES, **overrides), scale=scale), folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    return folder


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def labelled(count, seed=0):
    """Short texts that end in a letter, and say by it which label they have."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("mnopqrst"), rng.integers(24, 33))) for _ in range(count)]
    labels = [int(label) for label in rng.integers(0, 2, count)]
    return [{"text": text + "ab"[label], "label": label} for text, label in zip(texts, labels, strict=True)]


def answered(count, seed=0):
    """A prompt of one letter, whose response is that letter three times."""
    rng = np.random.default_rng(seed)
    letters = rng.choice(list("abcd"), count)
    return [{"prompt": f"say {letter}: ", "response": str(letter) * 3} for letter in letters]
