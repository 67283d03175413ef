# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Models as Hugging Face folders with their tokenizers, which transformers opens: what ``galore-jax export`` writes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any

import tyro

from galore_jax.models import Llama, LlamaClassifier, save_hf
from galore_jax.training import run_folder
from galore_jax.training.tokenizer import ByteTokenizer, Tokenizer
from galore_jax.training.trained import open_trained

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of the folder a model comes from that are copied beside its weights, where they exist."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write the model of a run as a Hugging Face folder: config.json, safetensors, and the tokenizer's files.

    transformers opens it with AutoModelForCausalLM and AutoTokenizer, and so do galore-jax generate, finetune and describe.
    Low-rank weights are merged, and weights in 8 bits are widened. A run of galore-jax finetune has such folders already.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of galore-jax pretrain."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write, which must not exist or be empty."""
    step: int | None = None
    """Step of the checkpoint to take. None: the last one."""


def export(config: ExportConfig) -> None:
    """Write the model of a run into a Hugging Face folder, whole or not at all.

    Raises:
      ValueError, FileNotFoundError: the run has no such checkpoint, or the folder cannot be written.
    """
    run_folder.expect(str(config.run), config.run, "pretrained")
    out = config.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists, and nothing is written over; name another folder.")
    trained = open_trained(config.run, config.step)
    model = trained.load(None)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_model(model, out, origin=config.run, tokenizer=trained.tokenizer, eos=trained.ends[0])
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror or error}); name another folder.") from error


def write_model(
    model: Llama | LlamaClassifier,
    folder: Path,
    *,
    origin: Path,
    tokenizer: Tokenizer,
    eos: int,
    labels: tuple[str, ...] | None = None,
) -> None:
    """Write a model and its tokenizer; what stood in ``folder`` before is replaced when the new one is complete.

    Args:
      model: without adapters.
      folder: beside which there must be room for another one.
      origin: the folder the model comes from, whose tokenizer files and special ids it keeps.
      tokenizer: that of ``origin``.
      eos: the token id that ends a text, and pads.
      labels: the names of a classifier's labels.  None: LABEL_0, LABEL_1, ...
    """
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_hf(model, partial)
    fields, theirs = (run_folder.read_json(place / "config.json") for place in (partial, origin))
    # transformers needs them to find the last token of a text.
    fields |= {"eos_token_id": eos, "pad_token_id": eos}
    if run_folder.kind_of(origin) == "pretrained":  # there a text begins where the one before it has ended
        fields["bos_token_id"] = eos
    fields |= {
        name: theirs[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if theirs.get(name) is not None
    }
    if labels is not None:
        fields["id2label"] = {str(number): name for number, name in enumerate(labels)}
        fields["label2id"] = {name: number for number, name in enumerate(labels)}
    run_folder.write_json(partial / "config.json", fields)
    for file in TOKENIZER_FILES:
        if (origin / file).is_file():
            shutil.copyfile(origin / file, partial / file)
    if isinstance(tokenizer, ByteTokenizer):  # which an old folder has in a form of our own
        tokenizer.save(partial / "tokenizer.json")
    if not (partial / "tokenizer_config.json").is_file():
        run_folder.write_json(partial / "tokenizer_config.json", _tokenizer_config(tokenizer, eos, fields))
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _tokenizer_config(tokenizer: Tokenizer, eos: int, fields: dict[str, Any]) -> dict[str, Any]:
    """What AutoTokenizer needs to know beside ``tokenizer.json``."""
    end = {}
    if tokenizer.eos_id == eos:
        end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.eos_token)
    return end | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
