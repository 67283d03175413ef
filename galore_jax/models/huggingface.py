# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The shape of a model from the ``config.json`` that Hugging Face's repositories hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from galore_jax.models.config import LlamaConfig

_SHAPE = {field.name for field in dataclasses.fields(LlamaConfig)} - {"dtype", "param_dtype", "remat"}
"""Fields that mean the same there; their names are Hugging Face's."""


def config_from_huggingface(path: Path, **overrides: Any) -> LlamaConfig:
    """The configuration in a LLaMA's ``config.json``; keyword arguments replace fields.

    ``rope_scaling``, which moves the positions of long sequences and has no weights, is left aside.

    Raises:
      ValueError: the file is not a ``config.json`` of a LLaMA, or of one with biases, which :class:`Llama` lacks.
      FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name the config.json of a Hugging Face model.")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); name the config.json of a Hugging Face model.") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != "llama":
        raise ValueError(f"{path} has model_type {kind!r}; only 'llama' is supported.")
    biased = [name for name in ("attention_bias", "mlp_bias") if fields.get(name)]
    if biased:
        raise ValueError(f"{path} has {biased[0]}=true; a LLaMA with biases is not supported.")
    shape = {name: value for name, value in fields.items() if name in _SHAPE}
    try:
        return LlamaConfig(**{**shape, **overrides})
    except TypeError as error:
        missing = str(error).partition(": ")[2]
        raise ValueError(f"{path} lacks {missing}; name the complete config.json of a LLaMA.") from error
