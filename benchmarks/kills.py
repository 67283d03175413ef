# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Does a run survive ``kill -9``?  Runs of a tiny model with a checkpoint after every step, killed at random moments.

    python benchmarks/kills.py OUT         50 kills, about 15 minutes on two cores

Every fifth kill comes at any moment from the start of the process on, and the others while it trains, which for such a model is
mostly while it writes a checkpoint.  After each kill the run is resumed, and at its end compared with a run that nothing
interrupted: metrics.jsonl must have every step once with the same numbers, and the last checkpoint the same bits.  Where one
differs, the script fails.  Prints a line a run, and writes OUT/kills.json.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np

from galore_jax.training import checkpoint, run_folder
from galore_jax.training.program import program

CLOCKED = ("tokens_per_second", "peak_memory_bytes", "mfu", "data_wait")
"""Of a record, what another run of the same settings has otherwise."""

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 257,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip

FLAGS = [
    "--seq", "32", "--batch", "2", "--log-every", "1", "--save-every", "1", "--eval-every", "5", "--eval-tokens", "200",
    "--update-proj-gap", "4", "--sample-tokens", "0", "--rank", "8",
]  # fmt: skip


def start(out: pathlib.Path, *arguments: object) -> subprocess.Popen:
    """A process of ``galore-jax pretrain``; all of them share their compiled programs."""
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "galore_jax", "pretrain", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"A run that nothing interrupted ended with {process.returncode}:\n{errors}")


def newest(folder: pathlib.Path) -> int:
    """Step of the last complete checkpoint; -1 if there is none."""
    return max(checkpoint.saved_steps(folder / "checkpoints"), default=-1)


def kill(process: subprocess.Popen, folder: pathlib.Path, rng: random.Random, anywhere: bool, seconds: float) -> dict:
    """Kill a run at a random moment; says where it was, or that it had ended.

    Args:
      anywhere: any moment of ``seconds`` from now on, and not so long at most after the process's first checkpoint.
    """
    before = newest(folder)
    while not anywhere and newest(folder) == before and process.poll() is None:
        time.sleep(0.005)
    try:
        process.wait(rng.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    if process.returncode not in (0, -9):
        raise SystemExit(f"A resumed run in {folder} ended with {process.returncode}.")
    checkpoints = folder / "checkpoints"
    partial = [path for path in checkpoints.iterdir() if not path.name.isdigit()] if checkpoints.is_dir() else []
    return {"killed": process.returncode != 0, "step": newest(folder), "in_a_write": bool(partial)}


def records(folder: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKED} for line in lines]


def last_checkpoint(folder: pathlib.Path) -> checkpoint.Checkpoint:
    config, model, _ = run_folder.load_config(folder)
    return checkpoint.restore(folder / "checkpoints", newest(folder), *program(config, model).state)


def differences(folder: pathlib.Path, whole: pathlib.Path) -> list[str]:
    """In what a run differs from the one that nothing interrupted."""
    found = []
    steps = [record["step"] for record in records(folder) if "loss" in record]
    if steps != list(range(1, len(steps) + 1)):
        found.append(f"metrics.jsonl has the steps {steps}")
    if records(folder) != records(whole):
        found.append("metrics.jsonl has other numbers")
    ours, others = last_checkpoint(folder), last_checkpoint(whole)
    if (ours.step, ours.data, ours.losses) != (others.step, others.data, others.losses):
        found.append("the last checkpoint is at another place")
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path((ours.params, ours.opt_state)),
        jax.tree.leaves((others.params, others.opt_state)),
        strict=True,
    ):
        if np.asarray(leaf).tobytes() != np.asarray(other).tobytes():
            found.append(f"{jax.tree_util.keystr(path)} differs")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder to write, emptied first")
    parser.add_argument("--optimizer", default="galore_adamw")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100, help="of every run")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="so long a process trains at most before it is killed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="python")
    options = parser.parse_args()
    out, rng = options.out, random.Random(options.seed)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = out / "config.json"
    model.write_text(json.dumps(SHAPE))
    new = ["--model", model, "--optimizer", options.optimizer, "--data", options.data, "--steps", options.steps, *FLAGS]
    whole = out / "whole"
    began = time.perf_counter()
    finish(start(out, *new, "--out", whole))
    duration = time.perf_counter() - began

    kills: list[dict] = []
    runs: list[dict] = []
    while len(kills) < options.kills:
        folder, first = out / f"run-{len(runs)}", len(kills)
        while True:
            if newest(folder) < 0:  # there is nothing to resume
                shutil.rmtree(folder, ignore_errors=True)
            arguments = ["--resume"] if folder.exists() else new
            process = start(out, *arguments, "--out", folder)
            if len(kills) == options.kills:
                finish(process)
                break
            anywhere = len(kills) % 5 == 4
            found = kill(process, folder, rng, anywhere, duration if anywhere else options.seconds)
            if not found["killed"]:
                break
            kills.append(found)
        runs.append({"kills": len(kills) - first, "differences": differences(folder, whole)})
        print(
            f"{folder.name}: {runs[-1]['kills']} kills, {'; '.join(runs[-1]['differences']) or 'the same bits'}",
            flush=True,
        )
    written = sum(found["in_a_write"] for found in kills)
    print(f"{len(kills)} kills, {written} of them with a checkpoint half written")
    (out / "kills.json").write_text(json.dumps({"kills": kills, "runs": runs}, indent=2) + "\n")
    if any(run["differences"] for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
