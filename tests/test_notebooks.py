# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The notebooks' code runs top to bottom, with GALORE_JAX_FAST on small sizes, and their outputs are committed."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.pages
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = r"https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/notebooks/(\w+)\.ipynb"
MACHINE_PATH = re.compile(
    r"(?<![\w./])/(?:bin|content|home|mnt|opt|root|tmp|usr|var|work|Users)/|site-packages|[A-Z]:\\\\"
)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_runs_with_warnings_as_errors(path, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code_cells(path)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:FigureCanvasAgg is non-interactive", str(script)],
        capture_output=True,
        text=True,
        timeout=480,
        env=os.environ
        | {
            "GALORE_JAX_FAST": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "MPLBACKEND": "agg",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_hold_no_error_and_no_path(path):
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output["output_type"] != "error" for output in outputs)
    texts = [
        json.dumps({**output, "data": {"text/plain": output.get("data", {}).get("text/plain")}}) for output in outputs
    ]
    assert not [text for text in texts if MACHINE_PATH.search(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_in_colab_and_installs_what_is_missing(path):
    first, *_ = json.loads(path.read_text())["cells"]
    [(_, name)] = re.findall(COLAB, "".join(first["source"]))
    assert name == path.stem
    assert 'find_spec("galore_jax") is None' in "".join(code_cells(path)[0]["source"])
