# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Private helpers that run and check an optimizer step."""
