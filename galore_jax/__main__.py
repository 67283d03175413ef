# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m galore_jax`` is ``galore-jax``."""

import sys

from galore_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
