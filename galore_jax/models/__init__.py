# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""LLaMA and its relatives (Mistral, Qwen, SmolLM, Gemma 3) in Flax nnx.

Configurations, the model, a classifier, LoRA, sampling, and weights from or for Hugging Face.
"""

from galore_jax.models.classifier import LlamaClassifier
from galore_jax.models.config import LlamaConfig
from galore_jax.models.huggingface import load_hf, load_hf_classifier, save_hf
from galore_jax.models.llama import Llama
from galore_jax.models.lora import add_lora, merge_lora
from galore_jax.models.sampling import generate

__all__ = [
    "Llama",
    "LlamaClassifier",
    "LlamaConfig",
    "add_lora",
    "generate",
    "load_hf",
    "load_hf_classifier",
    "merge_lora",
    "save_hf",
]
