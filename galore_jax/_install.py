# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How an extra is installed, as every message says it; docs/installation.md has the same command."""


def how_to_install(extra: str) -> str:
    """The command that installs ``extra``, and where to run it.

    >>> how_to_install("train")
    "pip install '.[train]' in the folder of galore_jax's source"
    """
    return f"pip install '.[{extra}]' in the folder of galore_jax's source"
