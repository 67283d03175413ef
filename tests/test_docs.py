# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The documentation: its code runs, its commands are ones that exist, and the site builds without a warning."""

import importlib.util
import inspect
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from run_pages import blocks

import galore_jax
from galore_jax import cli
from galore_jax.presets import PRESETS
from galore_jax.training import (
    classification,
    config,
    described,
    export,
    finetune_config,
    generation,
    plan,
    recipes,
    tokenized,
)

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
SETTINGS = {
    "pretrain": config.PretrainConfig,
    "plan": plan.PlanConfig,
    "generate": generation.GenerateConfig,
    "tokenize": tokenized.TokenizeConfig,
    "classify": classification.ClassifyConfig,
    "export": export.ExportConfig,
    "finetune": finetune_config.FinetuneConfig,
    "describe": described.DescribeConfig,
}
NEEDS_EQUINOX = {"own-model.md"}
SNIPPETS = {"presets": "<code>galore_adamw(learning_rate, ...)</code></td>", "optimizer_bytes": "<td>7b</td>"}
"""Files that pages include, and what the site then has."""


@pytest.mark.pages
def test_python_blocks_run_and_print_what_they_say():
    """In a process of its own, with JAX's defaults and warnings as errors; test_readme.py runs the README's."""
    left_out = set() if importlib.util.find_spec("equinox") else NEEDS_EQUINOX
    pages = [str(page) for page in DOCS if page.name not in left_out]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "run_pages.py"), *pages],
        capture_output=True,
        text=True,
        timeout=480,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if left_out:
        pytest.skip(f"{', '.join(left_out)} was left out: Equinox is not installed (extra test)")


@pytest.mark.pages
def test_a_page_that_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n\n```text\n2\n```\n\n```python\nprint(3)\n```\n\n```python\n1 / 0\n```\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_pages.py"), str(page)], capture_output=True, text=True
    )
    assert done.returncode == 1
    for line in ("page.md:6: printed\n1\n", "prints\n3\n", "ZeroDivisionError"):
        assert line in done.stdout


def commands(page):
    """The command lines of the blocks of ``console``: words, without comments."""
    for block in blocks(page.read_text()):
        if block.language == "console":
            lines = block.body.replace("\\\n", " ").splitlines()
            prompted = [line[2:] for line in lines if line.startswith("$ ")]  # the rest is what they print
            for line in prompted or lines:
                if words := shlex.split(line, comments=True):
                    yield words


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: getattr(value, "name", None))
def test_commands_exist_and_take_these_flags(page, words):
    while re.match(r"[A-Z_]+=", words[0]):  # of the environment
        words = words[1:]
    match words:
        case ["galore-jax", command, *flags]:
            default = finetune_config.BLANK if command == "finetune" and "--resume" in flags else None
            if command == "pretrain":
                flags, default = recipes.without_recipe(flags)
            cli.parse(SETTINGS[command], [flag for flag in flags if flag != "..."], command, default)
        case ["python", script, *flags]:
            source = (ROOT / script).read_text()
            assert all(flag in source for flag in flags if flag.startswith("--"))
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["pip", "install", *packages]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            archive = f"dist/galore_jax-{galore_jax.__version__}.tar.gz"  # of make package
            ours = [re.fullmatch(rf"(?:\.|{re.escape(archive)})(?:\[(.+)\])?", package) for package in packages]
            assert any(ours)
            assert all(extra in extras for match in ours if match and match[1] for extra in match[1].split(","))
        case _:
            raise AssertionError(f"{page} has a command of another kind: {words}")


def test_no_page_and_no_message_installs_from_an_index():
    """The package is on none yet; the installation page says what to write once it is."""
    files = [
        *PAGES,
        *(path for folder in ("galore_jax", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")),
    ]
    says = {path.name for path in files if re.search(r"install\W+galore-jax", path.read_text())}
    assert says == {"installation.md"}


def test_the_table_of_presets_names_every_public_preset_and_no_other():
    table = (ROOT / "docs" / "_snippets" / "presets.md").read_text()
    named = set(re.findall(r"^\| `(\w+)\(learning_rate", table, re.MULTILINE))
    functions = inspect.getmembers(galore_jax, inspect.isfunction)
    takers = {name for name, function in functions if "learning_rate" in inspect.signature(function).parameters}
    assert named == takers == PRESETS.keys()


def test_the_versions_on_the_installation_page_are_the_bounds_of_the_package():
    page = (ROOT / "docs" / "installation.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = "\n".join(project["dependencies"] + project["optional-dependencies"]["train"])
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", needed, re.MULTILINE)) | {"python": project["requires-python"][2:]}
    oldest = dict(re.findall(r"^\| (\w+)[^|]*\| ([\d.]+) \|", page, re.MULTILINE))
    assert {name.lower(): version for name, version in oldest.items()} == {
        name: bounds[name] for name in ("python", "jax", "flax", "optax")
    }
    extras = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert extras == project["optional-dependencies"].keys()


def test_what_is_cited_has_this_version_and_the_papers_of_every_preset():
    page = (ROOT / "docs" / "about" / "citing.md").read_text()
    cff = (ROOT / "CITATION.cff").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\nversion: {galore_jax.__version__}\n" in cff
    assert f"version = {{{galore_jax.__version__}}}" in page
    assert f"\nlicense: {project['license']}\n" in cff
    assert f"license = {{{project['license']}}}" in page
    (author,) = project["authors"]
    assert f"\nauthors:\n  - name: {author['name']}\n" in cff
    assert author["name"].replace("_", r"\_") in page
    assert set(re.findall(r"`(\w+)`", page)) >= PRESETS.keys()
    sources = "\n".join(path.read_text() for path in (ROOT / "galore_jax").rglob("*.py"))
    for paper in re.findall(r"arxiv.org/abs/([\d.]+)", page):
        assert f"arXiv {paper}" in sources, paper


@pytest.mark.pages
def test_the_site_is_readable(site):
    """Formulas are MathML, included files are there, roles and markers of docstrings are gone."""
    pages = {str(page.relative_to(site)): page.read_text() for page in site.rglob("index.html")}
    assert "<math" in pages["mathematics/index.html"]
    assert f">{galore_jax.__version__} " in pages["about/changelog/index.html"]
    for page in DOCS:
        place = page.relative_to(ROOT / "docs").with_suffix("") / "index.html"
        for included in re.findall(r'^--8<-- "docs/_snippets/(\w+)\.md"', page.read_text(), re.MULTILINE):
            assert SNIPPETS[included] in pages[str(place)], page
    for name, text in pages.items():
        assert ":func:" not in text, name
        assert "--8&lt;--" not in text, name
        assert "$$" not in text, name
