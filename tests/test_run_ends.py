# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How a run ends that is not let to its last step: it diverges, a signal stops it, or its folder is another's."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import leniency, shared_programs  # noqa: F401
from runs import TINY

from galore_jax.cli import main
from galore_jax.presets import PRESETS
from galore_jax.training import checkpoint, loop, program, run_folder
from galore_jax.training.checkpoint import CheckpointWriter, saved_steps
from galore_jax.training.config import PretrainConfig, preset_arguments
from galore_jax.training.divergence import STUCK_STEPS, Diverged
from galore_jax.training.examples import load_examples
from galore_jax.training.loop import StopSignals, run_pretrain, take_steps
from galore_jax.training.metrics import Meter, MetricsLog, read_metrics
from galore_jax.training.optimizers import OPTIMIZERS, make_optimizer
from galore_jax.training.progress import Progress
from galore_jax.training.step import galore_counts
from galore_jax.training.tokenizer import ByteTokenizer

MODEL = dataclasses.replace(TINY, vocab_size=257)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the low rank gradient of a matrix\n\n" * 400)
    return str(path)


# A run that diverges


class Batches:
    def __init__(self, taken):
        self.taken = taken

    def __next__(self):
        self.taken += 1
        return self.taken

    def get_state(self):
        return {"taken": self.taken}


def simulated(folder, make, *, steps=30, resumed_from=None, start=0.0):
    """The loop itself, over steps whose metrics are ``make(step)``."""
    config = PretrainConfig(steps=steps, save_every=5, eval_every=10, keep=1, log_every=2)
    begin = resumed_from or 0
    run = types.SimpleNamespace(
        config=config, folder=folder, batches=Batches(begin), params={"w": jnp.full((2,), start)},
        opt_state={"s": jnp.zeros(1)}, step=begin, losses=[], resumed_from=resumed_from,
    )  # fmt: skip
    usual = {"loss": 5.0, "grad_norm": 1.0, "skipped": 0, "params": 1.0, "val_loss": 4.0}

    def step(params, opt_state, number):
        made = usual | make(number)
        metrics = {name: np.float32(made[name]) for name in ("loss", "grad_norm")} | {"subspace": {}}
        counts = {**galore_counts({}), "skipped": made["skipped"]}
        return {"w": jnp.full((2,), made["params"])}, opt_state, metrics | counts

    def evaluate():
        return {"step": run.step, "val_loss": (usual | make(run.step))["val_loss"], "val_perplexity": 1.0}

    folder.mkdir(exist_ok=True)
    meter = Meter(np.ones(steps), 1, config.log_every, run.losses)
    with (
        MetricsLog(folder, begin) as log,
        Progress(begin, steps) as progress,
        CheckpointWriter(folder / "checkpoints", config.keep) as writer,
    ):
        take_steps(
            run, writer, log, progress, StopSignals(), meter, False, compile_step=lambda: step, evaluate=evaluate
        )
    return saved_steps(folder / "checkpoints")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_not_finite_ends_a_run_with_the_way_back(tmp_path, loss):
    broken = random.Random(str(loss)).randint(2, 29)
    with pytest.raises(Diverged) as error:
        simulated(tmp_path, lambda step: {"loss": 50.5 - step if step < broken else loss})
    saved = max(0, 5 * ((broken - 2) // 5))  # its parameters gave a finite loss
    assert str(error.value) == (
        f"The run diverged: the loss of step {broken} is {loss}; the last finite loss was {51.5 - broken:.4f}, of step "
        f"{broken - 1}; continue from the checkpoint of step {saved} at a lower learning rate: "
        f"galore-jax pretrain --resume --out {tmp_path} --learning-rate 0.005"
    )
    assert saved_steps(tmp_path / "checkpoints")[-1] == saved


STUCK = {
    "zero gradient": lambda step: {"grad_norm": 0.0},
    "infinite gradient": lambda step: {"grad_norm": math.inf},
    "skipped": lambda step: {"skipped": step},
}


@pytest.mark.parametrize("kind", STUCK)
def test_updates_that_are_skipped_in_a_row_end_a_run_at_the_checkpoint_before_them(tmp_path, kind):
    def make(step):
        return STUCK[kind](step) if step > 6 else {}

    with pytest.raises(
        Diverged, match=rf"the {STUCK_STEPS} updates to step {6 + STUCK_STEPS} were skipped.* step 5 at"
    ):
        simulated(tmp_path / "long", make)
    assert saved_steps(tmp_path / "long" / "checkpoints") == [0, 5]
    with pytest.raises(Diverged, match=r"the 2 updates to step 8 were skipped"):  # at the end of a run two are enough
        simulated(tmp_path / "short", make, steps=8)


@pytest.mark.parametrize("kind", STUCK)
def test_skipped_updates_now_and_then_are_no_trouble(tmp_path, kind):
    def make(step):
        return STUCK[kind](step) if step % STUCK_STEPS else {"skipped": step - 1 if kind == "skipped" else 0}

    assert simulated(tmp_path, make, steps=2 * STUCK_STEPS)[-1] == 2 * STUCK_STEPS


def test_a_model_that_has_learned_everything_is_no_trouble(tmp_path):
    assert (
        simulated(tmp_path, lambda step: {"loss": 0.0, "grad_norm": 0.0}, steps=STUCK_STEPS + 5)[-1] == STUCK_STEPS + 5
    )


def test_what_is_not_finite_is_neither_validated_nor_saved(tmp_path):
    with pytest.raises(
        Diverged, match=r"after step 20 the parameters are not finite; the last finite loss was 5\.0000"
    ):
        simulated(tmp_path / "parameters", lambda step: {"params": math.nan if step == 20 else 1.0})
    assert saved_steps(tmp_path / "parameters" / "checkpoints") == [10, 15]
    assert [r["step"] for r in read_metrics(tmp_path / "parameters") if "val_loss" in r] == [10]
    with pytest.raises(Diverged, match=r"the validation loss after step 20 is inf"):
        simulated(tmp_path / "validation", lambda step: {"val_loss": math.inf if step == 20 else 1.0})
    assert saved_steps(tmp_path / "validation" / "checkpoints") == [10, 15]
    for broken, reason in (({"start": math.nan}, "after step 0 the parameters"), ({}, "the loss of step 1 is nan")):
        with pytest.raises(Diverged, match=f"{reason}.*; it started so, which no learning rate mends"):
            simulated(tmp_path / reason, lambda step: {"loss": math.nan}, **broken)


def test_a_run_that_diverges_at_once_after_a_resume_goes_back_further(tmp_path):
    assert simulated(tmp_path, lambda step: {}, steps=15) == [10, 15]
    with pytest.raises(Diverged, match=r"the loss of step 16 is nan; continue from the checkpoint of step 10"):
        simulated(tmp_path, lambda step: {"loss": math.nan}, resumed_from=15)
    assert saved_steps(tmp_path / "checkpoints") == [10]


def test_the_best_checkpoint_by_validation_stays_also_after_a_resume(tmp_path):
    losses = {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.75, 50: 1.0}

    def make(step):
        return {"val_loss": losses.get(step, 9.0)}

    assert simulated(tmp_path, make, steps=30) == [20, 25, 30]
    assert simulated(tmp_path, make, steps=45, resumed_from=30) == [20, 40, 45]
    assert simulated(tmp_path, make, steps=60, resumed_from=45) == [50, 55, 60]


SHORT = {
    "steps": 6, "batch": 2, "seq": 16, "log_every": 1, "warmup_steps": 1, "save_every": 1, "sample_tokens": 0,
    "eval_tokens": 100,
}  # fmt: skip


def diverging(name, text, out):
    """A run of one optimizer at a learning rate that no model survives."""
    rank = 4 if name in TAKES_RANK else None
    return PretrainConfig(
        optimizer=name, data=text, out=out, diagnostics=False, rank=rank, clip=0.0, learning_rate=1e30, **SHORT
    )


TAKES_RANK = {name for name in OPTIMIZERS if preset_arguments(name).get("rank", 1) != 1} | {
    "lora",
    "relora",
    "low_rank",
}


def check_way_back(config, error):
    step = saved_steps(config.out / "checkpoints")[-1]
    assert f"continue from the checkpoint of step {step} at a lower learning rate" in str(error.value)
    again = dataclasses.replace(run_folder.load_config(config.out)[0], learning_rate=1e-3)
    with leniency():
        summary = run_pretrain(again)
    assert (summary["steps"], summary["resumed_from_step"], summary["stopped"]) == (6, step, None)
    assert all(math.isfinite(record["loss"]) for record in read_metrics(config.out) if "loss" in record)


@pytest.mark.slow
def test_a_diverged_run_goes_on_at_a_lower_learning_rate(text, tmp_path):
    config = diverging("galore_adamw", text, tmp_path / "my run")
    with leniency(), pytest.raises(Diverged, match=r"--out '.*my run' --learning-rate 5e\+29") as error:
        run_pretrain(config, MODEL)
    check_way_back(config, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_diverged_run_of_any_optimizer_goes_on_at_a_lower_learning_rate(name, text, tmp_path):
    config = diverging(name, text, tmp_path / "run")
    with leniency(), pytest.raises(Diverged) as error:
        run_pretrain(config, MODEL)
    check_way_back(config, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_nan_at_one_step_is_skipped_or_ends_the_run_and_what_is_saved_is_finite(
    name, text, tmp_path, monkeypatch
):
    rng = random.Random(name)
    broken, row = rng.randint(2, 4), rng.randrange(4)

    def with_one_nan(*arguments, **options):
        """The optimizer, to which one row of one matrix is NaN at one step."""
        inner = make_optimizer(*arguments, **options)

        def update(updates, state, params=None, **extra):
            step, inner_state = state
            leaves, structure = jax.tree.flatten(updates)
            stack = max(range(len(leaves)), key=lambda number: leaves[number].ndim)
            poison = jnp.where(step == broken - 1, jnp.nan, 0.0).astype(leaves[stack].dtype)
            leaves[stack] = leaves[stack].at[0, row].add(poison)
            updates, inner_state = inner.update(structure.unflatten(leaves), inner_state, params, **extra)
            return updates, (step + 1, inner_state)

        return optax.GradientTransformationExtraArgs(
            lambda params: (jnp.zeros([], jnp.int32), inner.init(params)), update
        )

    monkeypatch.setattr(program, "make_optimizer", with_one_nan)
    config = dataclasses.replace(diverging(name, text, tmp_path / "run"), learning_rate=1e-3, clip=1.0, keep=9)
    with leniency():
        if name in PRESETS:
            assert run_pretrain(config, MODEL)["steps"] == 6
        else:
            with pytest.raises(
                Diverged, match=rf"after step {broken} the parameters .* checkpoint of step {broken - 1} "
            ):
                run_pretrain(config, MODEL)
        checkpoints = config.out / "checkpoints"
        steps = saved_steps(checkpoints)
        whole = list(range(7 if name in PRESETS else broken))
        # The step that GaLore has counted as skipped is not saved.
        assert steps in (whole, [step for step in whole if step != broken])
        params = {}
        for step in steps:
            saved = checkpoint.restore(checkpoints, step, *program.program(config, MODEL).state)
            leaves = [leaf for leaf in jax.tree.leaves((saved.params, saved.opt_state)) if leaf.dtype.kind == "f"]
            assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in leaves)
            params[step] = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(saved.params))
    # The first update has a learning rate of 0.
    same = [step for step in steps[2:] if params[step] == params.get(step - 1)]
    assert same == [broken] * (name in PRESETS and broken in steps)
    records = [record for record in read_metrics(config.out) if "loss" in record]
    assert [record["step"] for record in records if record["grad_norm"] is None] in ([broken], [])
    assert all(math.isfinite(record["loss"]) for record in records)


# A run that a signal stops


@pytest.mark.slow
def test_the_first_signal_is_noted_and_the_second_kills():
    script = (
        "import os, signal\n"
        "from galore_jax.training.loop import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    assert not signals.received\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert signals.name == 'SIGINT'\n"
        "    print('stopping', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "stopping\n")
    assert "Stopping after this step" in result.stderr


def test_a_stopped_run_says_so_and_whoever_called_it_has_the_signal_after_the_checkpoint(text, tmp_path, monkeypatch):
    config = PretrainConfig(optimizer="adamw", data=text, out=tmp_path / "run", **SHORT)
    signals = {1: signal.SIGTERM, 3: signal.SIGINT, 4: signal.SIGTERM}
    original = loop._compiled_step

    def compiled_step(run):
        take = original(run)

        def step(*arguments):
            if run.step in signals:
                os.kill(os.getpid(), signals.pop(run.step))
            return take(*arguments)

        return step

    def handler(number, frame):
        seen.append((number, json.loads((config.out / "summary.json").read_text())["stopped"]))

    seen, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(loop, "_compiled_step", compiled_step)
    with leniency():
        signal.signal(signal.SIGTERM, handler)
        try:
            summary = run_pretrain(config, MODEL)
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        assert (summary["steps"], summary["stopped"]) == (2, "SIGTERM")
        assert seen == [(signal.SIGTERM, "SIGTERM")]
        command = ["pretrain", "--resume", "--out", str(config.out)]
        assert main(command) == 130
        assert saved_steps(config.out / "checkpoints")[-1] == 4
        assert main(command) == 143
        assert saved_steps(config.out / "checkpoints")[-1] == 5
        assert main(command) == 0
    assert {number: signal.getsignal(number) for number in before} == before
    assert [record["step"] for record in read_metrics(config.out) if "loss" in record] == [1, 2, 3, 4, 5, 6]


# A folder that another process has

HOLDER = """
import sys, time
from pathlib import Path
from galore_jax.training import run_folder
with run_folder.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_folder_belongs_to_one_process_until_it_ends_or_is_killed(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ValueError,
                match=rf"The run in .* process {holder.pid} on \S+ is training there; wait for it, or stop it",
            ),
            run_folder.locked(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / ".lock").exists()  # what a kill leaves is no lock
    with (
        run_folder.locked(tmp_path),
        pytest.raises(ValueError, match=f"process {os.getpid()} on"),
        run_folder.locked(tmp_path),
    ):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.slow
def test_a_run_holds_its_folder_from_its_preparation_to_its_end(text, tmp_path, capsys):
    config = PretrainConfig(optimizer="adamw", data=text, out=tmp_path / "run", **(SHORT | {"steps": 2}))
    run = loop.prepare(config, MODEL)
    before = sorted(config.out.iterdir())
    assert main(["pretrain", "--data", text, "--out", str(config.out)]) == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert sorted(config.out.iterdir()) == before
    with leniency():
        loop.train(run)
    run = loop.prepare(dataclasses.replace(config, resume=True))
    assert main(["pretrain", "--resume", "--out", str(config.out)]) == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err
    del run  # a run that is never trained gives its folder back
    with run_folder.locked(config.out):
        pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    with (
        pytest.raises(ValueError, match=r"The run in .*gone cannot be used: .*\.lock cannot be written \(No such file"),
        run_folder.locked(tmp_path / "gone"),
    ):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "tokenizer.json", "loss.png", "best"])
def test_a_folder_with_files_that_a_run_would_write_over_is_refused_before_anything_is_written(
    name, text, tmp_path, capsys
):
    (tmp_path / name).write_text("not ours")
    for command in (["pretrain"], ["finetune", "--model", "no/such/model"]):
        assert main([*command, "--data", text, "--out", str(tmp_path)]) == 2
        assert f"--out {tmp_path} holds {name}, which a run would write over" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "not ours")]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["pretrain", "--out", ""], "--out"),
        (["pretrain", "--out="], "--out"),
        (["pretrain", "--data", ""], "--data"),
        (["pretrain", "--tokenizer", "", "--steps", "3"], "--tokenizer"),
        (["finetune", "--model", "", "--data", "x"], "--model"),
        (["finetune", "--model", "x", "--data", "y", "--eval-data="], "--eval-data"),
        (["plan", "--plot", ""], "--plot"),
        (["generate", "--prompt", "", "--model", ""], "--model"),
        (["describe", ""], "An argument"),
    ],
)
def test_an_empty_value_is_not_the_current_folder(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {named} is empty; give it a value, or leave it out.\n"
    assert not list(tmp_path.iterdir())


def test_an_empty_text_is_refused_in_the_library_too(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.json").write_text("{}")  # of a folder that tokenize wrote
    names = {"batch": 1, "seq": 4, "seed": 0, "eos": 256}
    for refused in (
        lambda: run_pretrain(PretrainConfig(data="")),
        lambda: load_examples("", None, ByteTokenizer(), **names),
        lambda: load_examples(text, "", ByteTokenizer(), **names),
    ):
        with pytest.raises(ValueError, match="The name of the data is empty; give a file, a folder"):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]
