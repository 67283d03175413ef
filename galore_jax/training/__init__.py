# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-training and fine-tuning: data, optimizers by name, the loop, checkpoints and reports (needs the extra ``train``)."""

import importlib
from typing import TYPE_CHECKING, Any

from galore_jax.training.config import PretrainConfig as PretrainConfig

if TYPE_CHECKING:
    from galore_jax.training.finetune import run_finetune as run_finetune
    from galore_jax.training.finetune_config import FinetuneConfig as FinetuneConfig
    from galore_jax.training.loop import run_pretrain as run_pretrain

__all__ = ["FinetuneConfig", "PretrainConfig", "run_finetune", "run_pretrain"]

# The rest is imported when it is asked for, so that a training step can be planned and run without Grain, Orbax or tokenizers.
_LATER = {"run_finetune": "finetune", "FinetuneConfig": "finetune_config", "run_pretrain": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
