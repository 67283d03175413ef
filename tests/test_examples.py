# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The examples run as a newcomer runs them, with warnings as errors."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.pages
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # of a few steps, compilation is nearly all of the work
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name, *args, warnings="error", **environment):
    done = subprocess.run(
        [sys.executable, "-W", warnings, str(EXAMPLES / name), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "optax_quickstart.py",
        "flax_train_state.py",
        "cnn_tucker.py",
        "pretrain_llama.py",
        "pretrain_7b_24gb.py",
        "other_libraries.py",
        "other_trainers.py",
        "own_blocks.py",
    }


@pytest.mark.slow
def test_own_blocks_train_layer_by_layer_beside_a_plain_step():
    *_, last, largest = run("own_blocks.py", "flax", "--steps", "30", **QUICKLY).splitlines()
    assert float(last.split()[3].rstrip(",")) < 4.5  # log(256) = 5.5 before training
    assert float(largest.split()[3].rstrip(",")) < 1e-4


# Levanter and MaxText use names that JAX has deprecated.
@pytest.mark.parametrize(
    ("example", "library", "warnings"),
    [("other_libraries.py", library, "error") for library in ("equinox", "haiku")]
    + [("other_trainers.py", library, "error") for library in ("keras", "tunix")]
    + [
        pytest.param("other_trainers.py", library, "default", marks=pytest.mark.slow)
        for library in ("levanter", "maxtext")
    ],
)
def test_other_libraries_train_save_and_restore(example, library, warnings):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    lines = run(example, library, "--steps", "20", warnings=warnings, **QUICKLY).splitlines()
    losses = [float(line.split()[2].rstrip(",")) for line in lines if re.match("(galore_)?adamw ", line)]
    assert len(losses) == 2
    assert max(losses) < 4  # log(256) = 5.5 before training
    assert lines[-1] == "a checkpoint restores bit for bit"


def test_optax_quickstart_saves_memory_and_learns():
    adamw, galore = run("optax_quickstart.py").splitlines()
    figures = [(float(line.split()[2]), int(line.split()[-4].replace(",", ""))) for line in (adamw, galore)]
    assert all(loss < 0.01 for loss, _ in figures)
    assert figures[1][1] < 0.4 * figures[0][1]


def test_flax_train_state_learns():
    lines = run("flax_train_state.py").splitlines()
    assert float(lines[-2].split()[-1]) > 0.6  # of four classes
    assert lines[-1].startswith("optimizer state: 31,")


@pytest.mark.slow
def test_cnn_tucker_learns_with_a_third_of_the_state():
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed (extra test)")
    lines = [line.split() for line in run("cnn_tucker.py").splitlines()[1:]]
    accuracies = [float(accuracy.rstrip("%")) for _, accuracy, _ in lines]
    sizes = [int(size.replace(",", "")) for _, _, size in lines]
    assert [name for name, _, _ in lines] == ["adam", "tucker(adam)", "galore(tucker(adam))"]
    assert min(accuracies) > 93
    assert sizes[1] < sizes[0] / 3
    assert sizes[2] < sizes[0] / 6


@pytest.mark.slow
def test_pretrain_llama_writes_a_run(tmp_path):
    output = run("pretrain_llama.py", tmp_path / "run", **QUICKLY)
    assert float(output.splitlines()[-1].split()[2]) < 4.5  # log(257) = 5.5 before training
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_pretrain_7b_runs_as_it_is_with_a_tiny_model(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} is followed by {i + 1}, and {i + 1} by {i + 2}." * 8 for i in range(200)))
    run_folder = tmp_path / "run"
    arguments = [
        "--model",
        "demo",
        "--rank",
        "32",
        "--steps",
        "4",
        "--batch",
        "2",
        "--seq",
        "32",
        "--tokenizer",
        "bytes",
        "--int8",
    ]
    last = run("pretrain_7b_24gb.py", "--data", text, "--out", run_folder, *arguments, **QUICKLY).splitlines()[-1]
    assert 0 < int(last.split("%")[0].split()[-1]) < 50
    settings = json.loads((run_folder / "config.json").read_text())
    assert (settings["weights"], settings["layerwise"], settings["proj_type"]) == ("int8", True, "std")
