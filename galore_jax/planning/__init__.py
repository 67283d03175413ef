# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a step costs on hardware that is not attached."""
