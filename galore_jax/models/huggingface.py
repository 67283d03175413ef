# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights from and for Hugging Face: a folder with ``config.json`` and safetensors, without torch.

A weight there is (out, in), the transpose of a kernel here, and every layer has tensors of its own, which are stacked here.
Tensors are read and written one by one, so that no second copy of the model is held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from galore_jax.models.classifier import LlamaClassifier
from galore_jax.models.config import LlamaConfig
from galore_jax.models.huggingface_config import config_from_huggingface, config_to_huggingface
from galore_jax.models.llama import Llama
from galore_jax.weights import dequantize

SHARD_BYTES = 5 * 10**9
"""Bytes of tensors in one file; a larger model is written into several, with an index."""

_LM_HEAD, _SCORE = "lm_head.weight", "score.weight"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_PROJECTIONS = {
    "attention/q_proj": "self_attn.q_proj",
    "attention/k_proj": "self_attn.k_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.o_proj",
    "mlp/gate_proj": "mlp.gate_proj",
    "mlp/up_proj": "mlp.up_proj",
    "mlp/down_proj": "mlp.down_proj",
}
_NORMS = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_SANDWICH = {
    "input_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attention/q_norm": "self_attn.q_norm", "attention/k_norm": "self_attn.k_norm"}
"""Path of a module in a layer -> its name there."""

_OF_TEXT = ("language_model.model.", "model.language_model.")
_OF_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""What names begin with where a model also sees images, of transformers 4 and 5."""

_FLOATS = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class _Tensor(NamedTuple):
    """Where one tensor of a folder belongs."""

    name: str
    path: str  # of the parameter
    layer: int | None  # None: the parameter is not stacked

    @property
    def transposed(self) -> bool:
        return self.path.endswith("/kernel")


class _Stored(NamedTuple):
    """A tensor in a file."""

    file: Any
    name: str

    def slice(self) -> Any:
        return self.file.get_slice(self.name)


def load_hf(path: str | Path, dtype: Any = None) -> Llama:
    """The model in a Hugging Face folder: LLaMA (1, 2, 3), Mistral, Qwen (2, 2.5, 3), SmolLM (1, 2, 3), or the text of Gemma 3.

    Where there is an index, it decides which file a tensor is read from.  Tensors that it does not place there, and those of
    a vision tower, are left aside with a warning.

    Args:
      path: a folder with ``config.json`` and ``model.safetensors``, or its shards and their index.
      dtype: of parameters and activations, float32 or bfloat16.  None: bfloat16 if it is stored so, else float32.

    Returns:
      The model; ``model(tokens)`` takes int32 [batch, sequence].

    Raises:
      FileNotFoundError: ``config.json`` or a file of weights is missing.
      ValueError: the model is of another kind, a file is damaged, or a tensor is missing or has another shape.
    """
    folder = Path(path)
    config = config_from_huggingface(folder / "config.json")
    if dtype is not None:
        config = _with_dtype(config, jnp.dtype(dtype).name)
    with contextlib.ExitStack() as stack:
        found = _open(folder, stack)
        if _SCORE in found:
            raise ValueError(
                f"{folder} holds a classifier: load_hf_classifier reads it, and `galore-jax classify` labels texts with it."
            )
        if dtype is None:
            stored = found.get("model.embed_tokens.weight")
            halved = stored is not None and stored.slice().get_dtype() == "BF16"
            config = _with_dtype(config, "bfloat16" if halved else "float32")
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        graphdef, abstract = nnx.split(model, nnx.Param)
        leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
        tensors = list(_tensors(config))
        _check(folder, found, tensors, leaves, config)
        values = {path: _read([t for t in tensors if t.path == path], found, leaf) for path, leaf in leaves.items()}
    return nnx.merge(graphdef, _nested(values))


def save_hf(model: Llama | LlamaClassifier, path: str | Path) -> None:
    """Write the model into a folder, as transformers reads it; weights in 8 bits are written in the model's dtype.

    The tokenizer is not part of the model: copy its ``tokenizer.json`` there.

    Args:
      model: what to write; a classifier as ``LlamaForSequenceClassification`` (or its family's), without adapters of LoRA.
      path: the folder; made if it is not there.

    Raises:
      ValueError: the folder holds a ``config.json`` or weights already; nothing is written over.  Or no model of transformers
        has this configuration.
    """
    folder = Path(path)
    taken = [folder / "config.json", *sorted(folder.glob("*.safetensors")), folder / _INDEX]
    for file in taken:
        if file.exists():
            raise ValueError(f"{file} exists, and save_hf writes over nothing; name another folder.")
    config, tensors = _described(model)
    folder.mkdir(parents=True, exist_ok=True)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    shards = _cut(tensors, params)
    total, files = 0, {}
    for number, shard in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {tensor.name: _written(tensor, params) for tensor in shard}
        # "pt" tells transformers that the tensors are laid out as torch's.
        save_file(arrays, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    if len(shards) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    _write_json(folder / "config.json", config)


def load_hf_classifier(path: str | Path, dtype: Any = None) -> LlamaClassifier:
    """The classifier in a Hugging Face folder, such as :func:`save_hf` and ``galore-jax finetune`` write.

    Args:
      path: a folder as for :func:`load_hf`, of ``LlamaForSequenceClassification`` or Mistral's.
      dtype: of parameters and activations, float32 or bfloat16.  None: bfloat16 if the head is stored so, else float32.

    Returns:
      The model; ``model(tokens, lengths)`` takes int32 [batch, sequence], padded on the right, and int32 [batch].

    Raises:
      FileNotFoundError, ValueError: as :func:`load_hf`, and if there is no classification head.
    """
    folder = Path(path)
    config = config_from_huggingface(folder / "config.json")
    with contextlib.ExitStack() as stack:
        found = _open(folder, stack)
        if _SCORE not in found:
            raise ValueError(
                f"{folder} has no tensor {_SCORE}: it is no classifier, and load_hf reads language models."
            )
        score = found[_SCORE].slice()
        stored = "bfloat16" if score.get_dtype() == "BF16" else "float32"
        config = _with_dtype(config, stored if dtype is None else jnp.dtype(dtype).name)
        labels = score.get_shape()[0]
        model = nnx.eval_shape(lambda: LlamaClassifier(Llama(config, rngs=nnx.Rngs(0)), labels, rngs=nnx.Rngs(0)))
        graphdef, abstract = nnx.split(model, nnx.Param)
        leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
        tensors = _described(model)[1]
        _check(folder, found, tensors, leaves, config)
        values = {path: _read([t for t in tensors if t.path == path], found, leaf) for path, leaf in leaves.items()}
    return nnx.merge(graphdef, _nested(values))


def _described(model: Llama | LlamaClassifier) -> tuple[dict[str, Any], list[_Tensor]]:
    """The fields of a model's ``config.json``, and its tensors."""
    if isinstance(model, Llama):
        return config_to_huggingface(model.config), list(_tensors(model.config))
    config = model.body.config
    body = [tensor._replace(path=f"body/{tensor.path}") for tensor in _tensors(config) if tensor.name != _LM_HEAD]
    fields = config_to_huggingface(config, num_labels=model.num_labels)
    return fields, [*body, _Tensor(_SCORE, "classification_head/kernel", None)]


def _tensors(config: LlamaConfig) -> Iterator[_Tensor]:
    """Every tensor of a model, in the order in which it is computed."""
    yield _Tensor("model.embed_tokens.weight", "embed_tokens/embedding", None)
    for layer in range(config.num_hidden_layers):
        for path, name in _names(config).items():
            yield _Tensor(f"model.layers.{layer}.{name}", f"layers/{path}", layer)
    yield _Tensor("model.norm.weight", "norm/scale", None)
    if not config.tie_word_embeddings:
        yield _Tensor(_LM_HEAD, "lm_head/kernel", None)


def _names(config: LlamaConfig) -> dict[str, str]:
    """Path of a parameter in a layer -> name of its tensor there."""
    norms = (_SANDWICH if config.sandwich_norms else _NORMS) | (_QK_NORMS if config.qk_norm else {})
    biased = ["q_proj", "k_proj", "v_proj"] * config.attention_bias + ["o_proj"] * config.attention_output_bias
    biased += ["gate_proj", "up_proj", "down_proj"] * config.mlp_bias
    return (
        {f"{path}/scale": f"{name}.weight" for path, name in norms.items()}
        | {f"{path}/kernel": f"{name}.weight" for path, name in _PROJECTIONS.items()}
        | {f"{path}/bias": f"{name}.bias" for path, name in _PROJECTIONS.items() if path.split("/")[1] in biased}
    )


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """Name of each tensor of a text model -> where it is stored."""
    index = folder / _INDEX
    places: dict[str, str] | None = None
    if index.is_file():
        try:
            places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            files = sorted(set(places.values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); download it again.") from error
    elif (folder / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        raise FileNotFoundError(f"{folder} holds neither {_SINGLE} nor {_INDEX}; other formats are not read.")
    found: dict[str, _Stored] = {}
    aside: list[str] = []
    for name in files:
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, and {index.name} names it; download it again.")
        try:
            opened = stack.enter_context(safe_open(file, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete ({error}); download it again.") from error
        keys = set(opened.keys())
        placed = keys if places is None else {tensor for tensor, place in places.items() if place == name}
        if placed - keys:
            raise ValueError(
                f"{file} has no tensor {min(placed - keys)}, which {index.name} places there; "
                "download the files again, all from one place."
            )
        aside += [f"{tensor} in {name}" for tensor in sorted(keys - placed)]
        found |= {tensor: _Stored(opened, tensor) for tensor in placed}
    images = [name for name in found if name.startswith(_OF_IMAGES)]
    _warn(aside, f"of {folder} that {index.name} does not place there")
    _warn(sorted(images), f"of {folder} that are not of the text model")
    return {_of_text(name): stored for name, stored in found.items() if name not in images}


def _of_text(name: str) -> str:
    """The name of a tensor in a model that sees no images."""
    prefix = next((prefix for prefix in _OF_TEXT if name.startswith(prefix)), None)
    if prefix is not None:
        return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def _warn(aside: list[str], whose: str) -> None:
    if aside:
        warnings.warn(
            f"Left aside {len(aside)} tensor{'s' * (len(aside) > 1)} {whose}, the first of them {aside[0]}.",
            stacklevel=4,
        )


def _check(
    folder: Path, found: dict[str, _Stored], tensors: list[_Tensor], leaves: dict[str, Any], config: LlamaConfig
) -> None:
    """ValueError for the first tensor that is missing, of another shape or type, or of no use."""
    for tensor in tensors:
        if tensor.name not in found:
            raise ValueError(
                f"{folder} has no tensor {tensor.name}, which the model of its config.json needs; "
                "download the files again, all from one place."
            )
        stored = found[tensor.name].slice()
        shape, wanted = list(stored.get_shape()), _shape(tensor, leaves[tensor.path].shape)
        if shape != wanted:
            raise ValueError(
                f"{tensor.name} in {folder} has the shape {shape}, but the model of its config.json needs {wanted}; "
                "download the files again, all from one place."
            )
        if stored.get_dtype() not in _FLOATS:
            raise ValueError(
                f"{tensor.name} in {folder} is stored as {stored.get_dtype()}; "
                f"only {', '.join(_FLOATS)} are read, so get a version that is not quantized."
            )
    # A bias or one more layer would change what the model computes; old files list what rotary embeddings derive.
    known = {tensor.name for tensor in tensors} | ({_LM_HEAD} if config.tie_word_embeddings else set())
    others = sorted(name for name in found.keys() - known if not name.endswith("rotary_emb.inv_freq"))
    if others:
        raise ValueError(
            f"{folder} has a tensor {others[0]}, which the model of its config.json does not have; "
            "its config.json is of another model."
        )


def _shape(tensor: _Tensor, shape: tuple[int, ...]) -> list[int]:
    """The shape of a tensor in a file, from that of its parameter."""
    own = shape if tensor.layer is None else shape[1:]
    return list(own[::-1] if tensor.transposed else own)


def _read(tensors: list[_Tensor], found: dict[str, _Stored], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter, filled tensor by tensor."""
    whole = np.empty(leaf.shape, leaf.dtype)
    for tensor in tensors:
        stored = found[tensor.name]
        value = stored.file.get_tensor(stored.name)
        whole[... if tensor.layer is None else tensor.layer] = value.T if tensor.transposed else value
    return jnp.asarray(whole)


def _cut(tensors: list[_Tensor], params: Any) -> list[list[_Tensor]]:
    """The tensors in order, in groups of at most SHARD_BYTES each, or of one tensor."""
    groups: list[list[_Tensor]] = [[]]
    room = SHARD_BYTES
    for tensor in tensors:
        abstract = jax.eval_shape(dequantize, _at(params, tensor.path))
        size = abstract.size // (1 if tensor.layer is None else abstract.shape[0]) * abstract.dtype.itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(tensor)
        room -= size
    return groups


def _written(tensor: _Tensor, params: Any) -> np.ndarray:
    """A tensor as a file has it."""
    value = _at(params, tensor.path)
    if tensor.layer is not None:
        value = jax.tree.map(lambda leaf: leaf[tensor.layer], value)
    array = np.asarray(dequantize(value))
    # safetensors writes memory as it lies.
    return np.ascontiguousarray(array.T if tensor.transposed else array)


def _at(params: Any, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params


def _nested(values: dict[str, jax.Array]) -> dict[str, Any]:
    """A tree from paths."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def _with_dtype(config: LlamaConfig, dtype: str) -> LlamaConfig:
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
