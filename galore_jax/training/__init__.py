# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-training and fine-tuning: data, optimizers by name, the loop, checkpoints and reports (needs the extra ``train``)."""

from galore_jax.training.config import PretrainConfig as PretrainConfig
from galore_jax.training.finetune import run_finetune as run_finetune
from galore_jax.training.finetune_config import FinetuneConfig as FinetuneConfig
from galore_jax.training.loop import run_pretrain as run_pretrain
