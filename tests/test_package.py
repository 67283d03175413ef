# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a release promises and `.ci/package` checks in full: import time, one version, and constraints that can be met."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import galore_jax

ROOT = pathlib.Path(__file__).parent.parent


def script(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / name)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_time_of_an_import_is_printed():
    """.ci/package holds it to two seconds; here other tests share the machine."""
    assert float(re.search(r"beyond them: ([\d.]+) s", script("import_time.py"))[1]) > 0


def test_the_core_imports_nothing_but_jax_and_optax():
    code = "import sys, galore_jax; print({'flax', 'orbax', 'grain', 'tokenizers', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_a_training_step_is_made_without_what_reads_text_writes_checkpoints_or_draws():
    others = {"grain", "orbax", "tokenizers", "tyro", "matplotlib", "tqdm", "datasets"}
    code = f"import sys, galore_jax.training.program; print({others} & {{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_the_version_is_in_one_place():
    assert importlib.metadata.version("galore-jax") == galore_jax.__version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = [Requirement(line) for line in script("oldest.py").splitlines()]
    assert {"jax", "jaxlib", "optax", "numpy", "flax"} <= {requirement.name for requirement in pinned}
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    # Optax has a galore of its own, which ours is compared with, since a later version than ours needs.
    tests = {r.name: r.specifier for r in map(Requirement, project["optional-dependencies"]["test"])}
    bounds |= {"optax": tests["optax"]}
    for requirement in pinned:
        [pin] = requirement.specifier
        assert pin.operator == "=="
        if requirement.name in bounds:
            assert str(bounds[requirement.name]) == f">={pin.version}"
