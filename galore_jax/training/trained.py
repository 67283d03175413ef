# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Trained language models in folders, whoever wrote them: a run of ``galore-jax pretrain``, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from galore_jax.models import Llama, LlamaConfig, load_hf, merge_lora
from galore_jax.models.huggingface_config import config_from_huggingface
from galore_jax.training import checkpoint, run_folder
from galore_jax.training.program import program
from galore_jax.training.tokenizer import Tokenizer, model_tokenizer
from galore_jax.weights import dequantize


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a folder holds; only ``load`` reads the weights."""

    tokenizer: Tokenizer
    encode: Callable[[str], np.ndarray]  # a prompt
    model_config: LlamaConfig
    ends: tuple[int, ...]  # tokens that end a document, the first one foremost
    load: Callable[[Any], Llama]  # dtype of parameters and activations, or None: as they are stored
    dtype: str | None  # of its weights; None: the weights themselves say


def open_trained(folder: Path, step: int | None = None, said: str = "--model") -> Trained:
    """The language model in a folder.

    Args:
      folder: of a run of ``galore-jax pretrain``, or from Hugging Face.
      step: of the checkpoint to take, of a run.  None: the last one.
      said: the flag that names the folder, for messages.

    Raises:
      FileNotFoundError, ValueError: the folder holds something else, or lacks a file or that checkpoint.
    """
    if run_folder.expect(f"{said} {folder}", folder, "pretrained", "model") == "pretrained":
        return _run(folder, step)
    if step is not None:
        raise ValueError(f"--step {step} is for a run of galore-jax pretrain, and {said} {folder} has no checkpoints.")
    return _huggingface(folder)


def _run(folder: Path, step: int | None) -> Trained:
    run, model_config, _ = run_folder.load_config(folder)
    checkpoints = folder / "checkpoints"
    saved = checkpoint.last_step(checkpoints)
    if step is not None and step not in (steps := checkpoint.saved_steps(checkpoints)):
        raise ValueError(
            f"--step {step} has no checkpoint in {checkpoints}; choose one of {', '.join(map(str, steps))}."
        )
    tokenizer = model_tokenizer(folder)

    def load(dtype: Any) -> Llama:
        built = program(run, model_config)
        restored = checkpoint.restore_params(checkpoints, saved if step is None else step, built.state[0])
        model = nnx.merge(built.graphdef, restored)
        merge_lora(model)
        return model if dtype is None else with_dtype(model, jnp.dtype(dtype))

    return Trained(tokenizer, tokenizer.encode, model_config, (tokenizer.eos_id,), load, model_config.param_dtype)


def with_dtype(model: Llama, dtype: jnp.dtype) -> Llama:
    """The same model with ordinary weights of a dtype, in which it also computes."""
    config = dataclasses.replace(model.config, dtype=dtype.name, param_dtype=dtype.name, remat=False, attention="xla")
    params = dequantize(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    graphdef = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)[0]
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


def _huggingface(folder: Path) -> Trained:
    model_config = config_from_huggingface(folder / "config.json")
    tokenizer = model_tokenizer(folder)
    ends = tuple(end_ids(folder, tokenizer))
    return Trained(tokenizer, tokenizer.encode_prompt, model_config, ends, lambda dtype: load_hf(folder, dtype), None)


def end_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The token ids that end a text of the Hugging Face model in a folder, the first one foremost."""
    fields = _json(folder / "config.json") | _json(folder / "generation_config.json")
    ends = fields.get("eos_token_id")
    ends = tokenizer.eos_id if ends is None else ends
    return ends if isinstance(ends, list) else [ends]


def _json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        fields = run_folder.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy.") from error
    return fields if isinstance(fields, dict) else {}
