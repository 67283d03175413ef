# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The machinery behind the public modules; private, and may change without notice."""
