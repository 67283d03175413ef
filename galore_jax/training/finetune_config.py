# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The settings of a fine-tuning run: one dataclass, its checks, and its ``config.json``.

``galore-jax finetune`` has one flag for each field, and the text under a field is that flag's help.  What is said of the
optimizer is what :class:`PretrainConfig` says, whose pieces do the work: see :attr:`FinetuneConfig.training`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from galore_jax._core.names import did_you_mean
from galore_jax.training import config as settings, run_folder
from galore_jax.training.config import PretrainConfig
from galore_jax.training.optimizers import OPTIMIZERS

LORA = "lora"

MAY_CHANGE = {
    "model", "data", "eval_data", "steps", "learning_rate", "save_every", "keep", "eval_every", "log_every", "track", "out",
    "resume",
}  # fmt: skip
"""Fields that a resumed run may set anew: paths because fingerprints tell what they hold, the learning rate because a run that
diverged needs a lower one; any other would be another run."""

_RANK, _SCALE, _PRETRAINING_SCALE = 8, 2.0, 0.25
"""GaLore's rank and scale in the paper's fine-tuning (arXiv 2403.03507, table 7), and the scale of its pre-training."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a model from Hugging Face, or one of galore-jax pretrain, and write the result as a Hugging Face folder.

    --data decides what is learned: rows {"prompt", "response"} (the response), rows {"text", "label"} (a classifier), or plain
    text. The run folder gets best/ and last/, which transformers opens: the weights that did best on held-out examples,
    and the last ones.
    """

    model: Path
    """Hugging Face folder with config.json, safetensors and tokenizer.json; or run folder of galore-jax pretrain."""
    data: str
    """Examples: a file of rows (.jsonl, .json, .ndjson, .parquet); or a text file, a folder of text, or "python" (the standard
    library). Files may be in .gz or .zst."""
    eval_data: str | None = None
    """Held-out examples, of the same kind. None: a twentieth of --data."""
    text_column: str = "text"
    """The field of rows that holds their text, unless they are prompts and responses."""
    optimizer: str = "galore_adamw"
    """lora, or one that galore-jax pretrain knows: galore_adamw, fira_adamw, ..., adamw (full-rank), adamw_8bit, muon."""
    rank: int | float | None = None
    """GaLore: rank of the projected gradients, a number, or a fraction of each matrix's smaller side. None: mostly 8."""
    update_proj_gap: int = 200
    """GaLore: steps between two refreshes of the subspaces."""
    scale: float | Literal["rms"] | None = None
    """GaLore: factor of the projected update; "rms" keeps the size the full-rank optimizer would give it. None: mostly 2."""
    proj_type: str | None = None
    """GaLore: side of each matrix that is projected: std (the smaller), reverse_std, left, right or full. None: automatic."""
    projector: str | None = None
    """GaLore: how subspaces are found: power, randomized, svd, eigh, random, gaussian, rows or sampled. None: mostly power."""
    refresh: str | None = None
    """GaLore: refresh subspaces together, staggered (a few a step), lazy (rarer if stable) or every_step. None: automatic."""
    transport: str | None = None
    """GaLore: when a subspace changes, rotate the moments into it, keep them as they are, or reset them. None: automatic."""
    lora_rank: int = 8
    """LoRA: rank of the adapters, which every matrix of the blocks has."""
    lora_alpha: float = 16.0
    """LoRA: the adapters' product is multiplied by this, divided by the rank."""
    learning_rate: float = 1e-4
    """Peak learning rate; it rises linearly from 0 and falls as a cosine to a tenth of this."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""
    clip: float = 1.0
    """Largest global norm of a gradient; larger ones are scaled down. 0: no bound."""
    steps: int = 500
    """Optimizer steps in all, the ones before a resume included."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. None: a tenth of --steps."""
    batch: int = 16
    """Examples of an optimizer step."""
    seq: int = 256
    """Tokens of an example at most; longer ones lose their end."""
    dtype: Literal["f32", "bf16"] | None = None
    """Precision of the computation and the weights. None: bf16 if they are stored so, else f32."""
    seed: int = 0
    """Decides the order of the examples, and every other random number."""
    out: Path | None = None
    """Run folder. None: the first free one of runs/MODEL-OPTIMIZER, runs/MODEL-OPTIMIZER-2, ..."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with its own settings."""
    save_every: int = 100
    """Steps between two checkpoints; the first and the last step are always saved."""
    keep: int = 1
    """Checkpoints kept, the newest ones."""
    eval_every: int = 100
    """Steps between two validations; the last step is always validated."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    track: Literal["wandb", "mlflow"] | None = None
    """Weights & Biases or MLflow, if installed: gets the numbers of metrics.jsonl, too. TensorBoard needs no flag."""

    @property
    def training(self) -> PretrainConfig:
        """What pre-training calls the same settings; LoRA is AdamW on the adapters.

        >>> settings = FinetuneConfig(Path("smollm2"), "reviews.jsonl", optimizer="lora", steps=50).training
        >>> settings.model, settings.optimizer, settings.resolved_warmup_steps
        ('smollm2', 'adamw', 5)
        >>> settings = FinetuneConfig(Path("smollm2"), "reviews.jsonl", optimizer="apollo_mini").resolved
        >>> settings.rank, settings.scale, settings.projector
        (1, 11.313708498984761, 'gaussian')
        """
        names = {field.name for field in dataclasses.fields(PretrainConfig)}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        optimizer = "adamw" if self.optimizer == LORA else self.optimizer
        preset = settings.preset_arguments(optimizer)
        if self.rank is None and preset.get("rank") != 1:
            shared["rank"] = _RANK
        if self.scale is None and preset.get("scale") == _PRETRAINING_SCALE:
            shared["scale"] = _SCALE
        shared |= {"model": self.model.name, "optimizer": optimizer, "dtype": self.dtype or "f32"}
        return PretrainConfig(**shared, diagnostics=False, sample_tokens=0)

    @property
    def resolved(self) -> FinetuneConfig:
        """The same settings, with what None stands for in place of it where it is known."""
        known = self.training.resolved
        names = ("warmup_steps", "rank", "scale", "proj_type", "projector", "refresh", "transport")
        return dataclasses.replace(self, **{name: getattr(known, name) for name in names})


BLANK = FinetuneConfig(Path(), "")
"""What --resume starts from until the run's own settings are read."""


def check(config: FinetuneConfig) -> None:
    """Raises a ValueError that names the first field whose value no run can have.

    >>> check(FinetuneConfig(Path("smollm2"), "reviews.jsonl", lora_rank=0))
    Traceback (most recent call last):
    ValueError: --lora-rank 0 must be at least 1.
    """
    settings.at_least("lora_rank", config.lora_rank, 1)
    known = (LORA, *(name for name in OPTIMIZERS if name not in settings.LOW_RANK_WEIGHTS))
    if config.optimizer not in known:
        hint = did_you_mean(config.optimizer, known)
        raise ValueError(f"--optimizer {config.optimizer!r} is not known{hint}; choose one of {', '.join(known)}.")
    settings.check(config.training)


def save_config(config: FinetuneConfig, folder: Path, facts: dict[str, Any]) -> None:
    """Write ``config.json``: every field, resolved, the versions of what computed it, and ``facts``."""
    fields = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config.resolved).items()}
    run_folder.write_json(
        folder / "config.json", fields | {"out": str(folder), "versions": run_folder.versions()} | facts
    )


def load_config(folder: Path) -> tuple[FinetuneConfig, dict[str, Any]]:
    """Read ``config.json`` of a run folder, which may have been moved: the settings, and all that it holds.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: its ``config.json`` is damaged, or of another command.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no run to resume in {folder}: {path} does not exist.")
    if (kind := run_folder.kind_of(folder)) != "finetuned":
        remedy = f"; continue it with `{run_folder.resume_command(folder)}`" if kind == "pretrained" else ""
        raise ValueError(
            f"{folder} holds {'a run of galore-jax pretrain' if remedy else 'no run of galore-jax finetune'}{remedy}."
        )
    try:
        fields = run_folder.read_json(path)
        known = {field.name for field in dataclasses.fields(FinetuneConfig)}
        config = run_folder.from_json(FinetuneConfig, {k: v for k, v in fields.items() if k in known})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore it from a copy.") from error
    return dataclasses.replace(config, model=Path(config.model), out=folder, resume=True), fields
