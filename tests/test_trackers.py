# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Trackers of other makers get the numbers of a run, and never end it."""

import sys
import types

import pytest

from galore_jax.cli import main
from galore_jax.training import metrics
from galore_jax.training.trackers import TRACKERS, tracked


class Server:
    """What both trackers have stored: settings, scalars by step, and how often each run was opened and closed."""

    def __init__(self):
        self.settings, self.scalars, self.opened, self.closed, self.down = {}, {}, 0, 0, False

    def log(self, scalars, step):
        if self.down:
            raise ConnectionError("the server is gone\nand more")
        self.scalars.setdefault(step, {}).update(scalars)

    def finish(self):
        self.closed += 1


def fake_wandb(server):
    def init(*, project, name, dir, id, resume, config):
        assert (project, name, resume, id) == ("galore-jax", "my-run", "allow", "run-1" if server.opened else None)
        server.opened += 1
        server.settings |= config
        return types.SimpleNamespace(id="run-1", log=server.log, finish=server.finish)

    return {"wandb": types.SimpleNamespace(init=init)}


def fake_mlflow(server):
    class MlflowClient:
        def get_experiment_by_name(self, name):
            assert name == "galore-jax"

        def create_experiment(self, name):
            return "7"

        def create_run(self, experiment, run_name):
            assert (experiment, run_name) == ("7", "my-run")
            server.opened += 1
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1"))

        def log_param(self, run_id, name, value):
            server.settings[name] = value

        def update_run(self, run_id, status):
            assert (run_id, status) == ("run-1", "RUNNING")
            server.opened += 1

        def log_batch(self, run_id, found):
            for name, value, _, step in found:
                server.log({name: value}, step)

        def set_terminated(self, run_id):
            server.finish()

    entities = types.SimpleNamespace(Metric=lambda *parts: parts)
    return {"mlflow": types.SimpleNamespace(MlflowClient=MlflowClient, entities=entities)}


FAKES = {"wandb": fake_wandb, "mlflow": fake_mlflow}


@pytest.fixture(params=TRACKERS)
def track(request, monkeypatch):
    """The name of a tracker, and what it stores."""
    server = Server()
    for name, module in FAKES[request.param](server).items():
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return request.param, server


def write(folder, name, steps):
    settings = {"steps": 4, "out": folder}
    with tracked(name, folder, settings) as trackers, metrics.MetricsLog(folder, steps[0] - 1, trackers) as log:
        for step in steps:
            log.write(
                {"step": step, "loss": 5.0 - step, "subspace": {"q": {"overlap": [0.5, 1.0]}}, "basis_overlap": None}
            )


def test_a_tracker_gets_the_scalars_of_every_step_also_after_a_resume(track, tmp_path):
    name, server = track
    folder = tmp_path / "my-run"
    folder.mkdir()
    write(folder, name, [1, 2])
    write(folder, name, [3, 4])
    assert server.scalars == {step: {"loss": 5.0 - step, "subspace/overlap/q": 0.75} for step in (1, 2, 3, 4)}
    assert server.settings == {"steps": 4, "out": str(folder)}
    assert (server.opened, server.closed) == (2, 2)
    assert [record["step"] for record in metrics.read_metrics(folder)] == [1, 2, 3, 4]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(track, tmp_path, capsys):
    name, server = track
    folder = tmp_path / "my-run"
    folder.mkdir()
    server.down = True
    write(folder, name, [1, 2])
    assert capsys.readouterr().err == (
        f"warning: {name} gets no more numbers (the server is gone); metrics.jsonl has all.\n"
    )
    assert [record["step"] for record in metrics.read_metrics(folder)] == [1, 2]
    assert server.closed == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_or_cannot_start_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(ValueError, match=rf"--track {name} needs a package \(.*\): pip install {name}\."),
        tracked(name, tmp_path, {}),
    ):
        pass

    def refuse(*_, **__):
        raise RuntimeError("\nnobody is logged in\n")

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=refuse, MlflowClient=refuse))
    with (
        pytest.raises(
            ValueError, match=rf"--track {name} cannot start \(nobody is logged in\); set it up, or leave it out"
        ),
        tracked(name, tmp_path, {}),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused(capsys):
    assert main(["pretrain", "--track", "clearml"]) == 2
    assert "invalid choice 'clearml' for argument '--track'" in capsys.readouterr().err
