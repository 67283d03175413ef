# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-training demos: data, configuration, loop, checkpoints and reports. Needs the `train` dependencies."""
