# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Real processes over loopback: the losses of one process, the end of all when one dies, and a resume by another number."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from galore_jax.training import config as settings, processes
from galore_jax.training.config import PretrainConfig
from galore_jax.training.metrics import read_metrics

SETTINGS = {
    "data": "text.txt", "seq": 16, "batch": 8, "steps": 24, "log-every": 1, "save-every": 2, "eval-every": 12,
    "eval-tokens": 256, "optimizer": "galore_adamw", "rank": 4, "update-proj-gap": 4, "projector": "random",
    "learning-rate": 0.001, "keep": 20, "sample-tokens": 0,
}  # fmt: skip
FLAGS = ["--no-diagnostics", *(f"--{name}={value}" for name, value in SETTINGS.items())]
SCRIPT = """
import sys
from galore_jax.training import processes
processes.HEARTBEAT_SECONDS = 10
from galore_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""
DEADLINE = 300  # seconds


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 400)
    return folder


def start(shop, number, *arguments, script=SCRIPT):
    """``galore-jax pretrain``, or another script, in so many processes, four devices in all."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONWARNINGS")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // number), "NPROC": "16"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compilation is nearly all of the work
    distributed = ["--distributed"] if number > 1 else []
    if number > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(number)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, "pretrain", *arguments, *distributed],
            cwd=shop,
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(number)
    ]


def finish(jobs):
    printed = [job.communicate(timeout=DEADLINE)[0] for job in jobs]
    return [job.returncode for job in jobs], printed


def losses(folder):
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


@pytest.fixture(scope="module")
def alone(shop):
    codes, printed = finish(start(shop, 1, *FLAGS, "--mesh", "data=2,fsdp=2", "--out", "alone"))
    assert codes == [0], printed
    return shop / "alone"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_write_one_log(shop, alone):
    codes, printed = finish(start(shop, 2, *FLAGS, "--mesh", "data=2,fsdp=2", "--out", "two"))
    assert codes == [0, 0], printed
    np.testing.assert_allclose(losses(shop / "two"), losses(alone), rtol=0, atol=1e-5)
    summary = json.loads((shop / "two" / "summary.json").read_text())
    assert summary["steps"] == 24
    assert "galore-jax generate" in printed[0]
    assert "step 24/24" in printed[0]
    assert "step 24/24" not in printed[1]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_by_name_and_two_go_on_where_four_were(shop, alone):
    jobs = start(shop, 4, *FLAGS, "--mesh", "data=2,fsdp=2", "--out", "four")
    checkpoints, before = shop / "four" / "checkpoints", time.monotonic()
    while not (checkpoints / "4").exists():
        assert time.monotonic() < before + DEADLINE
        assert all(job.poll() is None for job in jobs), finish(jobs)
        time.sleep(0.02)
    jobs[2].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes, printed = finish(jobs)
    assert time.monotonic() < killed + 60
    assert all(code != 0 for code in codes)
    told = [line for text in printed for line in text.splitlines() if "@ " not in line]
    assert any("stopped sending heartbeats" in line for line in told), told
    assert any(re.fullmatch(r"(/job:jax_worker/replica:0/task:)?2", line) for line in told), told
    codes, printed = finish(start(shop, 2, "--resume", "--out", "four", "--mesh", "data=4"))
    assert codes == [0, 0], printed
    resumed_from = json.loads((shop / "four" / "summary.json").read_text())["resumed_from_step"]
    assert 4 <= resumed_from < 24
    np.testing.assert_allclose(losses(shop / "four"), losses(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"out": "x"}, "--distributed needs --mesh, over the devices of all processes"),
        ({"mesh": "data=2"}, "--distributed needs --out, a folder that all of them see"),
    ],
)
def test_what_several_processes_need_is_said_before_they_meet(overrides, message):
    with pytest.raises(ValueError, match=message):
        settings.check(PretrainConfig(distributed=True, **overrides))


def test_an_environment_that_names_nobody_is_one_sentence(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="--distributed found no other processes"):
        processes.join()
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is 'one', and must be a whole number"):
        processes.join()
