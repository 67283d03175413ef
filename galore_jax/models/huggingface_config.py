# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The ``config.json`` of Hugging Face's repositories, both ways.

Read are the spellings of transformers 4 (``rope_theta`` beside ``rope_scaling``) and 5 (``rope_parameters``); written is
that of 4, which both read.  What :class:`Llama` would not compute as the file says is refused.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from galore_jax.models.config import ROPE_TYPES, LlamaConfig

_SHAPE = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range", "sliding_window",
)  # fmt: skip
"""Fields that have the same name and meaning there."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
"""The kinds of model that are read, and what a missing field means there where it is not our default."""

_ROPE = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}
"""Field of ``rope_scaling`` or ``rope_parameters`` -> ours."""

_NEEDED = {"default": (), "linear": ("factor",), "llama3": tuple(_ROPE)}


def config_from_huggingface(path: Path, **overrides: Any) -> LlamaConfig:
    """The configuration in a ``config.json`` of a LLaMA or a Mistral; keyword arguments replace fields.

    Raises:
      ValueError: the file is not such a ``config.json``, or it asks for what :class:`Llama` lacks.
      FileNotFoundError: there is no such file.
    """
    fields = _read(path)
    kind = fields.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(f"{path} has model_type {kind!r}; only {' and '.join(map(repr, _DEFAULTS))} are supported.")
    _refuse_what_llama_lacks(path, fields)
    missing = [name for name in _SHAPE[:4] if name not in {**fields, **overrides}]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}; name the complete config.json of a LLaMA.")
    shape = _DEFAULTS[kind] | {name: fields[name] for name in _SHAPE if name in fields}
    if kind == "llama":
        shape.pop("sliding_window", None)  # which transformers does not read there either
    try:
        return LlamaConfig(**{**shape, **_rotary(path, fields), **overrides})
    except ValueError as error:
        raise ValueError(f"{path} describes no model that can be built: {error}") from error


def config_to_huggingface(config: LlamaConfig, num_labels: int | None = None) -> dict[str, Any]:
    """The fields of a ``config.json`` from which transformers builds the same model, or a classifier with so many labels.

    >>> fields = config_to_huggingface(LlamaConfig.preset("llama3-8b", dtype="bfloat16", param_dtype="bfloat16"))
    >>> fields["architectures"], fields["rope_theta"], fields["rope_scaling"], fields["torch_dtype"]
    (['LlamaForCausalLM'], 500000.0, None, 'bfloat16')
    """
    kind = "llama" if config.sliding_window is None else "mistral"
    names = [name for name in _SHAPE if name != "sliding_window" or kind == "mistral"]
    scaling = None
    if config.rope_type != "default":
        resolved = dataclasses.replace(
            config,
            rope_original_max_position_embeddings=config.rope_original_max_position_embeddings
            or config.max_position_embeddings,
        )
        scaling = {"rope_type": config.rope_type}
        scaling |= {name: getattr(resolved, _ROPE[name]) for name in _NEEDED[config.rope_type]}
    head, labels = "CausalLM", {}
    if num_labels is not None:
        head = "SequenceClassification"
        labels = {"id2label": {str(label): f"LABEL_{label}" for label in range(num_labels)}}
        labels |= {"label2id": {name: int(label) for label, name in labels["id2label"].items()}}
        labels |= {"problem_type": "single_label_classification"}
    return {
        "architectures": [f"{kind.capitalize()}For{head}"],
        "model_type": kind,
        **{name: getattr(config, name) for name in names},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "torch_dtype": config.param_dtype,
        **labels,
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name the config.json of a Hugging Face model.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); name the config.json of a Hugging Face model.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a JSON object; name the config.json of a Hugging Face model.")
    return fields


def _refuse_what_llama_lacks(path: Path, fields: dict[str, Any]) -> None:
    biased = [name for name in ("attention_bias", "mlp_bias") if fields.get(name)]
    if biased:
        raise ValueError(f"{path} has {biased[0]}=true; a LLaMA with biases is not supported.")
    activation = fields.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"{path} has hidden_act {activation!r}; only 'silu' is supported.")
    if fields.get("quantization_config"):
        raise ValueError(
            f"{path} has a quantization_config; only models whose weights are not quantized are supported."
        )


def _rotary(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Our fields of the rotary embedding, from either spelling."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path} has rope parameters {rope!r}; they must be an object with a rope_type.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"{path} has rope_type {kind!r}; only {', '.join(ROPE_TYPES)} are supported.")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1):
        raise ValueError(f"{path} has partial_rotary_factor {partial!r}; only heads rotated as a whole are supported.")
    missing = [name for name in _NEEDED[kind] if rope.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}, which rope_type {kind!r} needs; name the complete config.json.")
    found = {_ROPE[name]: rope[name] for name in _NEEDED[kind]}
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    return found | {"rope_type": kind} | ({} if theta is None else {"rope_theta": theta})
