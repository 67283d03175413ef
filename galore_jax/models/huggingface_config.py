# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The ``config.json`` of Hugging Face's repositories, both ways.

Read are the spellings of transformers 4 (``rope_theta`` beside ``rope_scaling``) and 5 (``rope_parameters``); written is
that of 4, which both read.  What :class:`Llama` would not compute as the file says is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from galore_jax.models.config import ACTIVATIONS, ROPE_TYPES, LlamaConfig

_SHAPE = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
"""Fields that have the same name and meaning there."""


class _Family(NamedTuple):
    """The models of one ``model_type``."""

    architecture: str  # before ForCausalLM
    defaults: dict[str, Any]  # what a missing field means there, where it is not our default
    fixed: dict[str, Any]  # fields of ours that its models all have
    biases: tuple[str, ...]  # the fields of biases that it reads
    windows: str  # which layers are local: none, all, or by layer_types and, without them, by a rule of this name


_QWEN = {
    "vocab_size": 151936, "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
}  # fmt: skip
_BIASES = ("attention_bias", "mlp_bias")
_FAMILIES = {
    "llama": _Family("Llama", {"max_position_embeddings": 2048}, {}, _BIASES, "none"),
    "mistral": _Family(
        "Mistral", {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}, {}, (), "all"
    ),
    "qwen2": _Family("Qwen2", _QWEN, {"attention_bias": True}, (), "last"),
    "qwen3": _Family("Qwen3", _QWEN | {"head_dim": 128}, {"qk_norm": True}, ("attention_bias",), "last"),
    "smollm3": _Family(
        "SmolLM3",
        {
            "vocab_size": 128256, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        {},
        _BIASES,
        "unrotated",
    ),
    "gemma3_text": _Family(
        "Gemma3",
        {
            "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rope_theta": 1e6,
            "max_position_embeddings": 131072, "tie_word_embeddings": True, "sliding_window": 4096,
            "rope_local_base_freq": 10000.0, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
        },
        {"sandwich_norms": True, "zero_centered_norms": True, "scaled_embeddings": True, "qk_norm": True},
        ("attention_bias",),
        "pattern",
    ),
}  # fmt: skip

_ROPE = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "truncate": "rope_truncate",
    "attention_factor": "rope_attention_factor",
}
"""Field of ``rope_scaling`` or ``rope_parameters`` -> ours."""

_NEEDED = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",), "llama3": tuple(_ROPE)[:4],
}  # fmt: skip
_OPTIONAL = {"yarn": tuple(_ROPE)[3:]}

_UNSUPPORTED = {
    "final_logit_softcapping": (None,), "attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False),
}  # fmt: skip
"""Settings of these families that are supported with these values only."""

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def config_from_huggingface(path: Path, **overrides: Any) -> LlamaConfig:
    """The configuration in a ``config.json``; keyword arguments replace fields.

    Raises:
      ValueError: the file is not such a ``config.json``, or it asks for what :class:`Llama` lacks.
      FileNotFoundError: there is no such file.
    """
    return _config(path, _read(path), **overrides)


def config_to_huggingface(config: LlamaConfig, num_labels: int | None = None) -> dict[str, Any]:
    """The fields of a ``config.json`` from which transformers builds the same model, or a classifier with so many labels.

    Raises:
      ValueError: no family of models that is supported is like this one.

    >>> fields = config_to_huggingface(LlamaConfig.preset("llama3-8b", dtype="bfloat16", param_dtype="bfloat16"))
    >>> fields["architectures"], fields["rope_theta"], fields["rope_scaling"], fields["torch_dtype"]
    (['LlamaForCausalLM'], 500000.0, None, 'bfloat16')
    """
    kind = _kind(config)
    family = _FAMILIES[kind]
    architecture, head, labels = family.architecture, "CausalLM", {}
    if num_labels is not None:
        architecture, head = "Gemma3Text" if kind == "gemma3_text" else architecture, "SequenceClassification"
        labels = {"id2label": {str(label): f"LABEL_{label}" for label in range(num_labels)}}
        labels |= {"label2id": {name: int(label) for label, name in labels["id2label"].items()}}
        labels |= {"problem_type": "single_label_classification"}
    fields = {
        "architectures": [f"{architecture}For{head}"],
        "model_type": kind,
        **{name: getattr(config, name) for name in _SHAPE},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_activation" if kind == "gemma3_text" else "hidden_act": config.hidden_act,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling(config),
        **_family_fields(config, kind),
        "torch_dtype": config.param_dtype,
        **labels,
    }
    read = _config(Path("config.json"), fields)
    wrong = [name for name in _STRUCTURE if getattr(read, name) != getattr(config, name)]
    wrong += ["query_pre_attn_scalar"] * (_attention_scale(read) != _attention_scale(config))
    if wrong:
        raise ValueError(
            f"{wrong[0]}={getattr(config, wrong[0])!r} does not occur in the nearest model_type, {kind!r}; "
            "transformers could not read this model."
        )
    return fields


_STRUCTURE = (
    "attention_bias", "attention_output_bias", "mlp_bias", "qk_norm", "sandwich_norms", "zero_centered_norms",
    "scaled_embeddings", "hidden_act", "sliding_window", "local_layers", "rope_layers", "rope_local_theta",
)  # fmt: skip
"""Fields that a family decides."""


def _attention_scale(config: LlamaConfig) -> float:
    return config.head_size if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar


def _kind(config: LlamaConfig) -> str:
    """The model_type that is nearest to a configuration."""
    if config.sandwich_norms:
        return "gemma3_text"
    if config.qk_norm:
        return "qwen3"
    if config.attention_bias and not config.attention_output_bias:
        return "qwen2"
    if config.rope_layers is not None or config.local_layers is not None:
        return "smollm3"
    return "llama" if config.sliding_window is None else "mistral"


def _family_fields(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """What only this family's ``config.json`` has."""
    number, local = config.num_hidden_layers, config.sliding_window is not None
    found: dict[str, Any] = {}
    if _FAMILIES[kind].windows != "none":
        found["sliding_window"] = config.sliding_window
    if _FAMILIES[kind].windows in ("last", "unrotated", "pattern"):
        flags = config.local_layers or ("1" if local else "0") * number
        found["layer_types"] = [_LOCAL if flag == "1" else _GLOBAL for flag in flags]
    if _FAMILIES[kind].windows in ("last", "unrotated"):
        found["use_sliding_window"] = local
    if kind == "smollm3":
        found["no_rope_layers"] = [int(flag) for flag in config.rope_layers or "1" * number]
        found["pad_token_id"] = None  # by default an id that a small vocabulary lacks
    if kind == "gemma3_text":
        theta = config.rope_local_theta
        found["rope_local_base_freq"] = config.rope_theta if theta is None else theta
        scale = _attention_scale(config)
        found["query_pre_attn_scalar"] = int(scale) if scale == int(scale) else scale  # transformers takes no 256.0
    return found


def _scaling(config: LlamaConfig) -> dict[str, Any] | None:
    """The ``rope_scaling``."""
    kind = config.rope_type
    if kind == "default":
        return None
    values = {name: getattr(config, _ROPE[name]) for name in (*_NEEDED[kind], *_OPTIONAL.get(kind, ()))}
    if kind == "llama3" and values["original_max_position_embeddings"] is None:
        values["original_max_position_embeddings"] = config.max_position_embeddings
    return {"rope_type": kind} | {name: value for name, value in values.items() if value is not None}


def _config(path: Path, fields: dict[str, Any], **overrides: Any) -> LlamaConfig:
    kind = fields.get("model_type")
    if kind == "gemma3" and isinstance(fields.get("text_config"), dict):  # with a vision tower, which is left aside
        quantization = {"quantization_config": fields.get("quantization_config")}
        fields, kind = quantization | fields["text_config"], "gemma3_text"
    if kind not in _FAMILIES:
        known = ", ".join(map(repr, _FAMILIES))
        raise ValueError(f"{path} has model_type {kind!r}; only {known} and 'gemma3' are supported.")
    family = _FAMILIES[kind]
    fields = family.defaults | fields
    _refuse_what_llama_lacks(path, fields)
    missing = [name for name in _SHAPE[:4] if name not in {**fields, **overrides}]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}; name the complete config.json of a model.")
    shape = {name: fields[name] for name in _SHAPE if name in fields}
    attention, mlp = (name in family.biases and bool(fields.get(name)) for name in ("attention_bias", "mlp_bias"))
    biases = {"attention_bias": attention, "attention_output_bias": attention, "mlp_bias": mlp}
    scale = {"query_pre_attn_scalar": fields["query_pre_attn_scalar"]} if kind == "gemma3_text" else {}
    number = {**fields, **overrides}["num_hidden_layers"]
    layers = _layers(path, fields, family, number) if isinstance(number, int) else {}
    rope = _rotary(path, fields)
    if layers.get("sliding_window") is None:
        rope.pop("rope_local_theta", None)
    found: dict[str, Any] = {
        **shape,
        **biases,
        **_activation(path, fields),
        **scale,
        **layers,
        **rope,
        **family.fixed,
        **overrides,
    }
    try:
        return LlamaConfig(**found)
    except ValueError as error:
        raise ValueError(f"{path} describes no model that can be built: {error}") from error


def _layers(path: Path, fields: dict[str, Any], family: _Family, number: int) -> dict[str, Any]:
    """Our fields of the layers that differ from others."""
    found: dict[str, Any] = {}
    rotated = [True] * number
    if family.windows == "unrotated":
        interval = fields.get("no_rope_layer_interval", 4)
        given = fields.get("no_rope_layers") or [(i + 1) % interval for i in range(number)]
        rotated = [bool(flag) for flag in _each_layer(path, "no_rope_layers", given, number)]
    if not all(rotated):
        found["rope_layers"] = _flags(rotated)
    window = fields.get("sliding_window")
    if family.windows == "none" or (family.windows in ("last", "unrotated") and not fields.get("use_sliding_window")):
        window = None
    if window is None or family.windows == "all":
        return found | {"sliding_window": window}
    types = fields.get("layer_types")
    if types is None:
        by_rule = {
            "last": lambda i: i >= fields.get("max_window_layers", 28),
            "unrotated": lambda i: not rotated[i],
            "pattern": lambda i: (i + 1) % fields.get("sliding_window_pattern", 6) != 0,
        }[family.windows]
        local = [by_rule(i) for i in range(number)]
    else:
        unknown = [kind for kind in types if kind not in (_LOCAL, _GLOBAL)]
        if unknown:
            raise ValueError(f"{path} has layer_types {unknown[0]!r}; only {_LOCAL!r} and {_GLOBAL!r} are supported.")
        local = [kind == _LOCAL for kind in _each_layer(path, "layer_types", types, number)]
    if not any(local):
        return found | {"sliding_window": None}
    return found | {"sliding_window": window, "local_layers": None if all(local) else _flags(local)}


def _each_layer(path: Path, name: str, values: list[Any], number: int) -> list[Any]:
    if len(values) < number:
        raise ValueError(
            f"{path} has {len(values)} {name} for {number} layers; name the complete config.json of a model."
        )
    return values[:number]


def _flags(values: list[bool]) -> str:
    return "".join(str(int(value)) for value in values)


def _activation(path: Path, fields: dict[str, Any]) -> dict[str, str]:
    name = "hidden_activation" if fields.get("hidden_activation") else "hidden_act"
    activation = fields.get(name, "silu")
    activation = "silu" if activation == "swish" else activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path} has {name} {activation!r}; only {', '.join(map(repr, ACTIVATIONS))} are supported.")
    return {"hidden_act": activation}


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
    for name, supported in _UNSUPPORTED.items():
        if fields.get(name) not in supported:
            raise ValueError(f"{path} has {name} {fields[name]!r}; only {supported[-1]!r} is supported.")
    if fields.get("quantization_config"):
        raise ValueError(
            f"{path} has a quantization_config; only models whose weights are not quantized are supported."
        )


def _rotary(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Our fields of the rotary embedding, from either spelling."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path} has rope parameters {rope!r}; they must be an object with a rope_type.")
    local = {"rope_theta": fields["rope_local_base_freq"]} if "rope_local_base_freq" in fields else None
    if _GLOBAL in rope or _LOCAL in rope:  # of each kind of layer
        local = (local or {}) | (rope.get(_LOCAL) or {})
        rope = rope.get(_GLOBAL) or {}
    found = _one_rotary(path, rope, fields)
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"{path} has rope_type {local['rope_type']!r} for its local layers; only 'default' is supported."
            )
        found["rope_local_theta"] = local.get("rope_theta", fields.get("rope_theta"))
    return found


def _one_rotary(path: Path, rope: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"{path} has rope_type {kind!r}; only {', '.join(ROPE_TYPES)} are supported.")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1):
        raise ValueError(f"{path} has partial_rotary_factor {partial!r}; only heads rotated as a whole are supported.")
    if kind == "yarn":
        rope = _yarn(rope, fields)
    missing = [name for name in _NEEDED[kind] if rope.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}, which rope_type {kind!r} needs; name the complete config.json.")
    names = (*_NEEDED[kind], *_OPTIONAL.get(kind, ()))
    found = {_ROPE[name]: rope[name] for name in names if rope.get(name) is not None}
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    return found | {"rope_type": kind} | ({} if theta is None else {"rope_theta": theta})


def _yarn(rope: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The parameters of yarn, with those that follow from others."""
    original, most = rope.get("original_max_position_embeddings"), fields.get("max_position_embeddings")
    if rope.get("factor") is None and original and most:
        rope = rope | {"factor": most / original}
    if (
        rope.get("attention_factor") is None
        and rope.get("mscale")
        and rope.get("mscale_all_dim")
        and rope.get("factor")
    ):
        longer = math.log(max(rope["factor"], 1))
        scales = [0.1 * rope[name] * longer + 1 for name in ("mscale", "mscale_all_dim")]
        rope = rope | {"attention_factor": scales[0] / scales[1]}
    return rope
