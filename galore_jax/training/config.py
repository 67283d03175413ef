# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The settings of a pre-training run: one dataclass, its checks, and its ``config.json``.

``galore-jax pretrain`` has one flag for each field, and the text under a field is that flag's help.  ``config.json`` in
the run folder holds every field, the model's shape, the versions of the libraries, and fingerprints of the tokenizer and
the text, so that a run can be repeated, and continued with nothing but what it was started with.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any, Literal

from galore_jax._core.names import did_you_mean
from galore_jax.matrix_view import PROJ_TYPES
from galore_jax.models import LlamaConfig
from galore_jax.models.huggingface_config import config_from_huggingface
from galore_jax.presets import PRESETS, RANK_ONE, WHOLE_GRADIENT
from galore_jax.projectors import PROJECTORS
from galore_jax.refresh import REFRESHES
from galore_jax.training.mesh import axis_sizes
from galore_jax.transport import TRANSPORTS

DTYPES = {"f32": "float32", "bf16": "bfloat16"}

PROMPT_TOKENS = 32
"""Tokens of validation text that the sample at the end of a run continues."""


OF_THE_PRESET = ("rank", "update_proj_gap", "scale", "proj_type", "projector", "refresh", "transport")
"""Fields in which None stands for the default of the preset that ``optimizer`` names."""

_RANK = 0.25
"""But for the rank: the 128 or 256 of most presets is no less than the smaller side of a small model's matrices."""

LOW_RANK_WEIGHTS = ("lora", "relora", "low_rank")
"""Optimizers for which the model itself has low-rank weights."""

_REFRESHES = tuple(name for name in REFRESHES if name != "manual")  # the loop leaves refreshes to the optimizer


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Pre-train a LLaMA model from random weights and write everything about the run into one folder.

    Without any flag: a tiny model on the text of Python's own standard library, a few minutes on two CPU cores. --recipe NAME
    starts from the GaLore paper's settings, which the other flags change: galore-60m, galore-130m, galore-350m, galore-1b,
    galore-7b, adamw-60m, adamw-130m, adamw-350m, adamw-1b, lora-60m, lora-130m, lora-350m, lora-1b, relora-60m, relora-130m,
    relora-350m, relora-1b, low-rank-60m, low-rank-130m, low-rank-350m, low-rank-1b, scale-60m, scale-130m, scale-350m or
    scale-1b.
    """

    model: str = "demo"
    """Model size: demo, 9m, 20m, 35m, 60m, 130m, 250m, 350m, 1b, 3b, 7b, 13b or llama3-8b; or the path of a config.json from
    Hugging Face, for the shape of that model."""
    optimizer: str = "galore_adamw"
    """galore_adamw, galore_adamw_8bit, q_galore_adamw_8bit, galore_adafactor, grass_adamw, golore_adamw;
    with the gradient outside the subspaces too: fira_adamw, apollo_adamw, apollo_mini, q_apollo_mini, ldadam, galore_muon;
    full-rank: adamw, adamw_8bit, adamw_4bit, adafactor, muon, muon_8bit, muon_4bit, muon_2bit, scale;
    AdamW on low-rank weights: lora, relora, low_rank.
    Settings of GaLore that are None are what suits the optimizer."""
    rank: int | float | None = None
    """GaLore: rank of the projected gradients, a number, or a fraction of each matrix's smaller side. None: mostly 0.25.
    lora, relora, low_rank: rank of the weights."""
    update_proj_gap: int | None = None
    """GaLore: steps between two refreshes of the subspaces. None: mostly 200. relora: steps between two merges."""
    scale: float | Literal["rms"] | None = None
    """GaLore: factor of the projected update; "rms" keeps the size the full-rank optimizer would give it. None: mostly 0.25."""
    proj_type: str | None = None
    """GaLore: side of each matrix that is projected: std (the smaller), reverse_std, left, right or full. None: mostly std."""
    projector: str | None = None
    """GaLore: how subspaces are found: power, randomized, svd, eigh, random, gaussian, rows or sampled. None: mostly power."""
    refresh: str | None = None
    """GaLore: refresh subspaces together, staggered, lazy (rarer if stable) or every_step. None: mostly staggered."""
    transport: str | None = None
    """GaLore: when a subspace changes, rotate the moments into it, keep them as they are, or reset them. None: mostly keep."""
    lora_alpha: float = 32.0
    """lora, relora: the adapters' product is multiplied by this, divided by the rank."""
    diagnostics: bool = True
    """GaLore: measure how well the subspaces do, matrix by matrix, for metrics.jsonl and subspace.png; costs little."""
    learning_rate: float = 0.01
    """Peak learning rate; it rises linearly from 0 and falls as a cosine to a tenth of this. relora: and again after a merge."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""
    clip: float = 1.0
    """Largest global norm of a gradient; larger ones are scaled down. 0: no bound. Layer-wise it takes a second backward pass."""
    steps: int = 500
    """Optimizer steps in all, the ones before a resume included."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. None: a tenth of --steps."""
    batch: int = 16
    """Sequences of an optimizer step."""
    accumulate: int = 1
    """Micro-batches that --batch is cut into and whose gradients are summed: less memory, the same result."""
    accumulate_low_rank: bool = False
    """GaLore: sum the gradients of micro-batches in the subspaces, which come from the first; needs --clip 0."""
    seq: int = 128
    """Tokens of a sequence."""
    data: str = "python"
    """Text: "python" (the standard library, always there), a file, a folder, or hf:NAME[:CONFIG], which is streamed. Files: text,
    or rows (.jsonl, .json, .ndjson, .parquet), also in .gz and .zst. Also a folder that galore-jax tokenize wrote."""
    text_column: str = "text"
    """The field of rows that holds the text."""
    data_workers: int = 0
    """Processes that read and tokenize a stream (hf:...) ahead of the training, each its own part. 0: the training's own."""
    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on the text), or a path to a tokenizer.json or its folder."""
    vocab_size: int = 4096
    """Vocabulary of a trained bpe tokenizer."""
    dtype: Literal["f32", "bf16"] = "f32"
    """Precision of the computation and, unless --weights says otherwise, of the parameters."""
    weights: Literal["f32", "bf16", "int8"] | None = None
    """Precision of the parameters. None: as --dtype. int8 (needs --layerwise): 8 bits for the matrices of the blocks."""
    layerwise: bool = False
    """Update layer by layer during the backward pass: no more than one layer's gradient exists at a time."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Kernel of attention. cudnn: NVIDIA's flash attention on a GPU, faster and with less memory; needs --dtype bf16."""
    state_memory: Literal["device", "host"] = "device"
    """Where the optimizer state is. host (needs --layerwise): in the host's memory, and on the device one layer's at a time."""
    reduce_low_rank: bool = False
    """GaLore: along the axis data of --mesh, send gradients between devices in the subspaces; needs --clip 0."""
    mesh: str | None = None
    """Devices to spread over: data=2,fsdp=4,model=1, their product being the number there is. None: the first one alone."""
    distributed: bool = False
    """One of several processes, each started with the same flags: see the guide on scaling. Needs --mesh and --out."""
    seed: int = 0
    """Decides the weights, the order of the text, and every other random number."""
    out: Path | None = None
    """Run folder. None: the first free one of runs/MODEL-OPTIMIZER, runs/MODEL-OPTIMIZER-2, ..."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with its own settings."""
    save_every: int = 100
    """Steps between two checkpoints; the first and the last step are always saved."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    eval_every: int = 100
    """Steps between two validations; the last step is always validated."""
    eval_tokens: int | None = 100_000
    """Validation tokens used each time. None: all of them."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    track: Literal["wandb", "mlflow"] | None = None
    """Weights & Biases or MLflow, if installed: gets the numbers of metrics.jsonl, too. TensorBoard needs no flag."""
    sample_tokens: int = 200
    """Tokens of sample text written at the end. 0: none."""

    @property
    def resolved_warmup_steps(self) -> int:
        """Steps of warm-up, with None resolved."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def resolved(self) -> PretrainConfig:
        """The same settings, with what None stands for in place of it, but for ``weights``, which follow ``dtype``.

        >>> settings = PretrainConfig(steps=50, projector="svd").resolved
        >>> settings.warmup_steps, settings.rank, settings.proj_type, settings.refresh, settings.transport
        (5, 0.25, 'std', 'together', 'keep')
        >>> PretrainConfig(optimizer="apollo_mini").resolved.projector
        'gaussian'
        """
        arguments = preset_arguments("galore_adamw") | preset_arguments(self.optimizer)
        defaults = {name: arguments[name] for name in OF_THE_PRESET}
        if defaults["rank"] != 1:
            defaults["rank"] = _RANK
        given = {name: value for name in defaults if (value := getattr(self, name)) is not None}
        chosen = defaults | given
        chosen["refresh"] = chosen["refresh"] or ("together" if chosen["projector"] == "svd" else "staggered")
        chosen["transport"] = chosen["transport"] or "keep"
        return dataclasses.replace(self, warmup_steps=self.resolved_warmup_steps, **chosen)

    @property
    def merge_period(self) -> int | None:
        """Steps between two merges of relora; None for every other optimizer.

        >>> PretrainConfig(optimizer="relora").merge_period, PretrainConfig(optimizer="lora").merge_period
        (200, None)
        """
        return self.resolved.update_proj_gap if self.optimizer == "relora" else None

    def model_config(self, vocab_size: int) -> LlamaConfig:
        """The model's shape for a vocabulary of that size; ValueError if the preset is unknown.

        >>> PretrainConfig(dtype="bf16").model_config(257).param_dtype
        'bfloat16'
        """
        if self.model.endswith(".json"):
            return config_from_huggingface(Path(self.model), vocab_size=vocab_size, **self.numerics)
        return LlamaConfig.preset(self.model, vocab_size=vocab_size, **self.numerics)

    @property
    def numerics(self) -> dict[str, Any]:
        """What the settings say of a model apart from its shape: fields of LlamaConfig.

        >>> PretrainConfig(dtype="bf16", weights="f32").numerics
        {'dtype': 'bfloat16', 'param_dtype': 'float32', 'remat': False, 'attention': 'xla'}
        """
        return {
            "dtype": DTYPES[self.dtype],
            "param_dtype": DTYPES[self.weights if self.weights in DTYPES else self.dtype],
            "remat": self.remat,
            "attention": self.attention,
        }


def preset_arguments(optimizer: str) -> dict[str, Any]:
    """The arguments of a preset of the library, and their defaults; {} for any other optimizer.

    >>> preset_arguments("fira_adamw")["residual"], preset_arguments("adamw")
    ('fira', {})
    """
    if optimizer not in PRESETS:
        return {}
    arguments = {name: argument.default for name, argument in inspect.signature(PRESETS[optimizer]).parameters.items()}
    return arguments | ({"rank": 1} if optimizer in RANK_ONE else {})


def flag(field: str) -> str:
    """The command-line flag of a field.

    >>> flag("update_proj_gap")
    '--update-proj-gap'
    """
    return "--" + field.replace("_", "-")


def check(config: PretrainConfig) -> None:
    """Raises a ValueError that names the first field whose value no run can have.

    >>> check(PretrainConfig(batch=6, accumulate=4))
    Traceback (most recent call last):
    ValueError: --batch 6 is not a multiple of --accumulate 4; choose micro-batches of equal size.
    """
    sizes = ("steps", "batch", "accumulate", "seq", "save_every", "keep", "eval_every", "log_every")
    for name in sizes:
        at_least(name, getattr(config, name), 1)
        if getattr(config, name) >= 2**31:
            raise ValueError(f"{flag(name)} {getattr(config, name)} must be less than 2**31.")
    for name in ("update_proj_gap", "eval_tokens"):
        if getattr(config, name) is not None:
            at_least(name, getattr(config, name), 1)
    for name in ("sample_tokens", "data_workers"):
        at_least(name, getattr(config, name), 0)
    if config.data_workers and not config.data.startswith("hf:"):
        raise ValueError(
            f"--data-workers {config.data_workers} is for a stream, hf:NAME or hf:FILE; other text is in memory."
        )
    for name in ("clip", "weight_decay"):
        value = getattr(config, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{flag(name)} {value} must be a finite number of at least 0.")
    rank, scale = config.rank, config.scale
    if rank is not None and not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ValueError(f"--rank {rank} must be a positive whole number, or a fraction of the smaller side in (0, 1].")
    known = {"proj_type": PROJ_TYPES, "projector": PROJECTORS, "refresh": _REFRESHES, "transport": TRANSPORTS}
    for name, choices in known.items():
        value = getattr(config, name)
        if value is not None and value not in choices:
            hint = did_you_mean(value, choices)
            raise ValueError(f"{flag(name)} {value!r} is not known{hint}; choose one of {', '.join(choices)}.")
    if not (config.learning_rate > 0 and math.isfinite(config.learning_rate)):
        raise ValueError(f"--learning-rate {config.learning_rate} must be a positive finite number.")
    if scale is not None and not isinstance(scale, str) and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"--scale {scale} must be a positive finite number or rms.")
    if not (config.lora_alpha > 0 and math.isfinite(config.lora_alpha)):
        raise ValueError(f"--lora-alpha {config.lora_alpha} must be a positive finite number.")
    check_seed(config.seed)
    if config.optimizer in LOW_RANK_WEIGHTS:
        _check_low_rank_weights(config)
    if config.weights == "int8" and not config.layerwise:
        raise ValueError(
            "--weights int8 needs --layerwise: a step on the whole model would widen all of its weights at once."
        )
    if config.attention == "cudnn" and config.dtype != "bf16":
        raise ValueError(f"--attention cudnn computes in bfloat16, and --dtype is {config.dtype}; write --dtype bf16.")
    if config.state_memory == "host":
        _check_state_on_host(config)
    if config.batch % config.accumulate:
        raise ValueError(
            f"--batch {config.batch} is not a multiple of --accumulate {config.accumulate}; "
            "choose micro-batches of equal size."
        )
    for name in ("accumulate_low_rank", "reduce_low_rank"):
        if getattr(config, name):
            _check_low_rank(config, name)
    if config.distributed and (config.mesh is None or config.out is None):
        missing = (
            "--mesh, over the devices of all processes"
            if config.mesh is None
            else "--out, a folder that all of them see"
        )
        raise ValueError(f"--distributed needs {missing}.")
    if config.mesh is not None:
        _check_mesh(config, config.mesh)
    if not 0 <= config.resolved_warmup_steps < config.steps:
        raise ValueError(
            f"--warmup-steps {config.warmup_steps} must be at least 0 and less than --steps {config.steps}."
        )


def _check_state_on_host(config: PretrainConfig) -> None:
    if not config.layerwise:
        raise ValueError(
            "--state-memory host needs --layerwise: a step on the whole model would bring all of the state to the device at once."
        )
    if config.mesh is not None:
        raise ValueError(
            f"--state-memory host is for one device, and --mesh {config.mesh} spreads the state over several; leave out one."
        )


def _check_low_rank_weights(config: PretrainConfig) -> None:
    optimizer = f"--optimizer {config.optimizer}"
    impossible = {
        "--layerwise": config.layerwise,
        "--weights int8": config.weights == "int8",
        f"--mesh {config.mesh}": config.mesh is not None,
    }
    for setting, applies in impossible.items():
        if applies:
            raise ValueError(
                f"{setting} does not go with {optimizer}: low-rank weights are for one device and a plain step."
            )
    if config.optimizer == "relora" and config.update_proj_gap == 1:
        raise ValueError(
            f"--update-proj-gap 1 must be at least 2 with {optimizer}: a step that merges has a learning rate of 0."
        )


def _check_low_rank(config: PretrainConfig, name: str) -> None:
    optimizer = f"--optimizer {config.optimizer}"
    wrong = {
        f"an optimizer with subspaces, which {optimizer} is not": config.optimizer not in PRESETS,
        "an optimizer that does without the gradient outside the subspaces, and "
        f"{optimizer} uses the whole gradient": config.optimizer in WHOLE_GRADIENT,
        f"--clip 0 instead of {config.clip}: the norm of the whole gradient is not known": config.clip > 0,
    }
    if name == "accumulate_low_rank":
        wrong["a step without --layerwise, which sums one layer's gradients at a time already"] = config.layerwise
    else:
        sizes = axis_sizes(config.mesh or "data=1")
        alone = sizes["data"] > 1 and sizes["fsdp"] == sizes["model"] == 1
        wrong["--mesh data=N, N more than 1, and no other axis, on which every device has whole gradients"] = not alone
    for need, applies in wrong.items():
        if applies:
            raise ValueError(f"{flag(name)} needs {need}.")


def _check_mesh(config: PretrainConfig, mesh: str) -> None:
    sizes = axis_sizes(mesh)
    micro_batch, parts = config.batch // config.accumulate, sizes["data"] * sizes["fsdp"]
    if micro_batch % parts:
        raise ValueError(
            f"--mesh {mesh} cuts a batch into data x fsdp = {parts} parts, which does not divide the {micro_batch} sequences of "
            "--batch / --accumulate."
        )


def check_lengths(config: PretrainConfig, model: LlamaConfig) -> None:
    """Raises a ValueError if the model's positions are too few for the sequences or for the sample."""
    longest = model.longest
    if config.seq > longest:
        raise ValueError(f"--seq {config.seq} is longer than the {longest} positions of --model {config.model}.")
    if config.sample_tokens + PROMPT_TOKENS > longest:
        raise ValueError(
            f"--sample-tokens {config.sample_tokens} and a prompt of {PROMPT_TOKENS} are longer than the {longest} "
            f"positions of --model {config.model}; ask for at most {longest - PROMPT_TOKENS}."
        )


def at_least(name: str, value: int, least: int) -> None:
    """Raises a ValueError if the field ``name`` is less than it can be."""
    if value < least:
        raise ValueError(f"{flag(name)} {value} must be at least {least}.")


def check_seed(seed: int) -> None:
    """Raises a ValueError unless ``seed`` can be that of a PRNG key."""
    at_least("seed", seed, 0)
    if seed >= 2**31:
        raise ValueError(f"--seed {seed} must be less than 2**31.")
