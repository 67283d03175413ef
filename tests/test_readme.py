# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The README is short, its code runs as a newcomer would run it, and it says what the documentation and the commands say."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import optax
import pytest
from run_pages import blocks

import galore_jax
from galore_jax.presets import PRESETS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = {block.language: block.body for block in blocks(README)}  # of the language console the last one
EXTRA = all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda13_plugin", "nvidia"))


def section(title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def test_it_is_short():
    assert len(README.encode()) <= 5_000


@pytest.mark.pages
def test_the_flax_example_learns():
    """In a process of its own, with JAX's defaults and warnings as errors."""
    training = """
    import jax
    x, y = jax.random.normal(jax.random.key(0), (32, 64)), jnp.ones((32, 256))
    losses = [float(train_step(model, optimizer, x, y)) for _ in range(50)]
    assert losses[-1] < 0.5 * losses[0], losses
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS["python"] + textwrap.dedent(training)],
        capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_two_lines_of_the_diff_are_the_same_program_with_less_state():
    params = {"kernel": jax.ShapeDtypeStruct((512, 2048), "float32")}
    names = {"optax": optax, "galore_adamw": galore_jax.galore_adamw}
    state = {}
    for line in BLOCKS["diff"].splitlines():
        sign, code = line.split(" ", 1)
        exec(code, names)
        state[sign] = galore_jax.state_bytes(names["tx"], params)
    assert state["+"] < 0.4 * state["-"]


def test_its_links_lead_to_files_and_headings_that_are_there():
    links = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README)
    local = [link.partition("#")[::2] for link in links if not link.startswith("https:")]
    assert len(local) > 15
    for path, anchor in local:
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_presets_that_it_names_are_public_and_their_number_is_right():
    table = section("Which preset?")
    assert set(re.findall(r"^\|[^|]*\| `(\w+)`", table, re.MULTILINE)) <= PRESETS.keys()
    assert int(re.search(r"has all (\d+)", table)[1]) == len(PRESETS)


@pytest.mark.parametrize("title", ["Which preset?", "What is measured"])
def test_its_figures_are_those_of_the_benchmarks_page(title):
    """A figure is one of the page, rounded to the README's digits."""
    page = [float(number) for number in re.findall(r"\d+\.\d+", (ROOT / "docs" / "benchmarks.md").read_text())]
    figures = re.findall(r"\d+\.\d+", section(title))
    assert len(figures) > 2
    for figure in figures:
        digits = len(figure.partition(".")[2])
        assert any(f"{number:.{digits}f}" == figure for number in page), figure


@pytest.mark.slow
@pytest.mark.skipif(not EXTRA, reason="the extra plan is not installed: pip install '.[plan]'")
def test_the_plan_prints_what_it_shows():
    """All but the last column, the seconds of the compiler."""
    (block,) = [block for block in blocks(section("Will it fit?")) if block.language == "console"]
    command, *shown = block.body.splitlines()
    done = subprocess.run(
        [sys.executable, "-m", "galore_jax", *command.split()[2:]],
        capture_output=True, text=True, check=True, timeout=480, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip

    def without_seconds(lines):
        return [re.sub(r" +\d+\.\d s$", "", line) for line in lines]

    assert shown[-1] == "..."
    assert without_seconds(done.stdout.splitlines())[: len(shown) - 1] == without_seconds(shown[:-1])
