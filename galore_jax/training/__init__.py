# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-training on text: data, optimizers by name, the loop, checkpoints and reports (needs the extra ``train``)."""

from galore_jax.training.config import PretrainConfig as PretrainConfig
from galore_jax.training.loop import run_pretrain as run_pretrain
