# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The README's code runs as a newcomer would run it: in a process of its own, with JAX's defaults and warnings as errors."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest
from flax import nnx
from run_pages import blocks

import galore_jax
from galore_jax.models import Llama, LlamaConfig, save_hf
from galore_jax.presets import PRESETS

pytestmark = pytest.mark.pages
README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_code_blocks_print_what_they_say():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "doctest", "-o", "ELLIPSIS", str(README)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_blocks_that_are_no_doctests_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = LlamaConfig.preset("demo", num_hidden_layers=1, vocab_size=64)
    save_hf(Llama(tiny, rngs=nnx.Rngs(0)), "SmolLM2-135M")
    code = [
        block.body for block in blocks(README.read_text()) if block.language == "python" and ">>> " not in block.body
    ]
    assert code
    for body in code:
        exec(body, {})
    assert (tmp_path / "SmolLM2-135M-mine" / "config.json").is_file()


def test_the_table_of_presets_names_every_public_preset_and_no_other():
    named = set(re.findall(r"^\| `(\w+)\(learning_rate", README.read_text(), re.MULTILINE))
    functions = inspect.getmembers(galore_jax, inspect.isfunction)
    takers = {name for name, function in functions if "learning_rate" in inspect.signature(function).parameters}
    assert named == takers == PRESETS.keys()
