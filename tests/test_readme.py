# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The README's code runs as a newcomer would run it: in a process of its own, with JAX's defaults and warnings as errors."""

import inspect
import pathlib
import re
import subprocess
import sys

import galore_jax
from galore_jax.catalogue import PRESETS

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_code_blocks_print_what_they_say():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "doctest", "-o", "ELLIPSIS", str(README)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_table_of_presets_names_every_public_preset_and_no_other():
    named = set(re.findall(r"^\| `(\w+)\(learning_rate", README.read_text(), re.MULTILINE))
    functions = inspect.getmembers(galore_jax, inspect.isfunction)
    takers = {name for name, function in functions if "learning_rate" in inspect.signature(function).parameters}
    assert named == takers == PRESETS.keys()
