# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``galore-jax pretrain`` from outside: a run, a run that is killed, stopped or out of disk, and every mistake."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from problems import leniency, shared_programs  # noqa: F401

from galore_jax.cli import main, needed_packages
from galore_jax.training.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
CLOCKED = ("tokens_per_second", "peak_memory_bytes", "data_wait")
"""Of a record, what another run of the same settings has otherwise."""

# Records every 4 steps, a refresh of each matrix in every 4 updates, validation at 6 and 12.
FLAGS = [
    "--steps", "12", "--seq", "32", "--batch", "4", "--log-every", "4", "--eval-every", "6", "--save-every", "5",
    "--eval-tokens", "1000", "--update-proj-gap", "4", "--sample-tokens", "8", "--weight-decay", "0.1",
]  # fmt: skip

# Runs the command line in a process that does something to itself when it asks for batch number {batch}.
INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from galore_jax.cli import main
from galore_jax.training import data

def train_iterator(self, original=data.PackedText.train_iterator):
    return Interrupted(original(self))

class Interrupted:
    def __init__(self, batches):
        self.batches, self.count = batches, 0
        self.get_state, self.set_state = batches.get_state, batches.set_state
    def __next__(self):
        self.count += 1
        if self.count == {batch}:
            {action}
        return next(self.batches)

data.PackedText.train_iterator = train_iterator
sys.exit(main())
"""
KILL = """
            while not Path("{folder}/checkpoints/{step}").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
"""
TERMINATE = "os.kill(os.getpid(), signal.SIGTERM)"

# As on a full disk, a large file cannot be written.
FULL_DISK = """
import resource, sys
from galore_jax.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main())
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with a text."""
    folder = tmp_path_factory.mktemp("shop")
    words = ["the", "low", "rank", "gradient", "of", "matrix", "state", "train", "step", "loss", "model", "token"]
    choose = random.Random(0).choice
    (folder / "text.txt").write_text("\n\n".join(" ".join(choose(words) for _ in range(60)) for _ in range(100)))
    return folder


def galore(shop, *arguments, script=None):
    """``galore-jax ARGUMENTS`` in a process of its own, in the folder ``shop``, with the compiled programs of this module."""
    start = ["-m", "galore_jax"] if script is None else ["-c", script]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=shop, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def resume(out, *flags):
    """``galore-jax pretrain --resume`` in this process, in the folder that holds the text."""
    with leniency():  # Optax's schedules mix dtypes
        assert main(["pretrain", "--resume", "--out", str(out), *flags]) == 0


def pretrain(shop, out, *flags, **options):
    return galore(shop, "pretrain", "--data", "text.txt", *FLAGS, "--out", out, *flags, **options)


@pytest.fixture(scope="module")
def whole(shop):
    """A run that nothing interrupts."""
    result = pretrain(shop, "whole")
    assert result.returncode == 0, result.stderr
    return shop / "whole", result


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run, to damage."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


def records(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKED} for line in lines]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def contents(folder):
    """Every file of a folder and what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_same_run(folder, whole):
    """Bit for bit."""
    assert records(folder) == records(whole)
    for name in ("steps", "tokens", "final_val_loss", "final_val_perplexity", "optimizer_state_bytes"):
        assert summary(folder)[name] == summary(whole)[name]


def assert_refused(capsys, *arguments, says):
    """Exit code 2 and one sentence; ``says`` is part of it."""
    assert main(["pretrain", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


# A run


def test_a_run_leaves_everything_in_its_folder(whole):
    folder, result = whole
    assert "Warning" not in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in folder.iterdir() if path.name != "tensorboard") == [
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "subspace.png", "summary.json", "tokenizer.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["10", "12"]
    training = [record for record in records(folder) if "loss" in record]
    assert [record["step"] for record in training] == [4, 8, 12]
    assert [record["tokens"] for record in training] == [512, 1024, 1536]
    assert training[0].keys() == {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "skipped", "kept_bases", "rejected_bases",
        "captured_energy", "basis_overlap", "update_rms", "subspace",
    }  # fmt: skip
    assert training[-1]["loss"] < training[0]["loss"]
    validation = [record for record in records(folder) if "val_loss" in record]
    assert [record["step"] for record in validation] == [6, 12]
    config = json.loads((folder / "config.json").read_text())
    assert (config["rank"], config["warmup_steps"], config["model_config"]["vocab_size"]) == (0.25, 1, 257)


def test_the_subspaces_of_a_run_are_staggered_and_measured_matrix_by_matrix(whole):
    first, *_, last = (record for record in records(whole[0]) if "loss" in record)
    for record in (first, last):
        assert len(record["subspace"]) == 7
        for quantities in record["subspace"].values():
            assert {name: len(values) for name, values in quantities.items()} == {
                "captured_energy": 4, "overlap": 4, "update_rms": 4,
            }  # fmt: skip
            assert all(0 < value <= 1 for value in quantities["captured_energy"])
            assert all(value > 0 for value in quantities["update_rms"])
    # Updates 0 to 3 replace no basis of the quarter that is due at 0, 4 and 8, and later ones replace them all.
    nulls = [sum(q["overlap"].count(None) for q in r["subspace"].values()) for r in (first, last)]
    assert nulls == [7, 0]
    assert [(r["skipped"], r["kept_bases"], r["rejected_bases"]) for r in (first, last)] == [(0, 0, 0)] * 2
    assert (whole[0] / "subspace.png").read_bytes()[:4] == b"\x89PNG"


def test_the_summary_is_complete_and_agrees_with_the_metrics(whole):
    result = summary(whole[0])
    assert result.keys() == {
        "steps", "stopped", "tokens", "final_val_loss", "final_val_perplexity", "params_bytes", "optimizer_state_bytes",
        "adamw_params_bytes", "adamw_state_bytes", "compile_seconds", "step_seconds_median", "step_seconds_max",
        "save_seconds_median", "save_seconds_max", "data_wait", "tokens_per_second", "peak_memory_bytes",
        "resumed_from_step", "wall_seconds",
    }  # fmt: skip
    assert (result["steps"], result["tokens"], result["resumed_from_step"]) == (12, 1536, None)
    last = records(whole[0])[-1]
    assert (result["final_val_loss"], result["final_val_perplexity"]) == (last["val_loss"], last["val_perplexity"])
    assert 0 < result["step_seconds_median"] <= result["step_seconds_max"] < result["wall_seconds"]
    assert 0 < result["compile_seconds"] < result["wall_seconds"]
    mean = result["tokens"] / 12 / result["tokens_per_second"]
    assert result["step_seconds_median"] / 12 < mean <= result["step_seconds_max"]
    assert result["optimizer_state_bytes"] < result["adamw_state_bytes"]


def test_a_run_ends_with_its_memory_its_loss_a_sample_and_its_folder(whole):
    output = whole[1].stdout
    assert "galore_adamw" in output
    assert "100.0%" in output
    assert f"validation loss {summary(whole[0])['final_val_loss']:.4f}" in output
    assert "whole/loss.png" in output
    assert "whole/subspace.png" in output
    assert "sample" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_every", "saved", "batch"),
    [
        pytest.param(5, 5, 8, id="in the middle of an interval"),
        pytest.param(4, 8, 12, id="at the end of an interval"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(shop, whole, tmp_path, monkeypatch, save_every, saved, batch):
    out = tmp_path / "killed"
    action = KILL.format(folder=out, step=saved)
    script = INTERRUPTED.format(batch=batch, action=action)
    assert pretrain(shop, out, "--save-every", save_every, script=script).returncode == -9
    assert not (out / "summary.json").exists()
    monkeypatch.chdir(shop)
    resume(out)
    assert summary(out)["resumed_from_step"] == saved
    assert_same_run(out, whole[0])


@pytest.mark.slow
def test_a_terminated_run_saves_survives_a_full_disk_and_resumes_bit_for_bit(shop, whole, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    result = pretrain(shop, out, script=INTERRUPTED.format(batch=7, action=TERMINATE))
    assert result.returncode == 143, result.stderr
    assert f"Stopped after step 7; continue with: galore-jax pretrain --resume --out {out}" in result.stdout
    assert summary(out)["steps"] == 7
    assert all((out / name).exists() for name in ("loss.png", "subspace.png", "checkpoints/7"))

    before = contents(out / "checkpoints/7")
    result = galore(shop, "pretrain", "--resume", "--out", out, script=FULL_DISK)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    # Orbax's abandoned coroutines may warn after it, when the interpreter ends.
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: The checkpoint of step 10 could not be written (")
    assert "the last good one is of step 7" in error
    assert error.endswith(f"continue with `galore-jax pretrain --resume --out {out}`.")
    assert contents(out / "checkpoints/7") == before

    monkeypatch.chdir(shop)
    resume(out)
    assert summary(out)["resumed_from_step"] == 7
    assert_same_run(out, whole[0])


def test_resuming_a_finished_run_only_reports(copy, shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    before = contents(copy)
    assert main(["pretrain", "--resume", "--out", str(copy), "--sample-tokens", "0"]) == 0
    assert "already has its 12 steps" in capsys.readouterr().out
    assert contents(copy) == before


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(shop, copy, monkeypatch):
    monkeypatch.chdir(shop)
    resume(copy, "--steps", "14", "--sample-tokens", "0")
    assert (summary(copy)["steps"], summary(copy)["resumed_from_step"]) == (14, 12)
    assert [record["step"] for record in records(copy) if "val_loss" in record] == [6, 12, 14]
    assert json.loads((copy / "config.json").read_text())["steps"] == 14


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stepz", "3"], "Unrecognized options: --stepz, 3 (did you mean --steps?); see"),
        (["--Update_gap=3"], "--Update_gap=3 (did you mean --update-proj-gap?)"),
        (["--xyz", "3"], "Unrecognized options: --xyz, 3; see"),
        (["--steps", "many"], "--steps 'many' is not a value that this flag takes; see galore-jax pretrain --help."),
        (["--rank", "1/4"], "--rank '1/4' is not a value that this flag takes; see"),
        (["--dtype", "f16"], "invalid choice 'f16' for argument '--dtype'"),
        (["--steps", "-1"], "--steps -1 must be at least 1."),
        (["--attention", "cudnn"], "--attention cudnn computes in bfloat16, and --dtype is f32; write --dtype bf16."),
        (
            ["--state-memory", "host"],
            "--state-memory host needs --layerwise: a step on the whole model would bring all",
        ),
        (
            ["--state-memory", "host", "--layerwise", "--mesh", "data=2"],
            "--state-memory host is for one device, and --mesh data=2 spreads the state over several; leave out one",
        ),
        (["--batch", "6", "--accumulate", "4"], "--batch 6 is not a multiple of --accumulate 4"),
        (["--model", "huge"], "Unknown model preset 'huge'; choose one of demo"),
        (["--model", "350M"], "Unknown model preset '350M' (did you mean 350m?); choose one of demo"),
        (["--recipe", "galore_60m"], "--recipe galore_60m is not known (did you mean galore-60m?); choose one of"),
        (["--refresh", "stagered"], "--refresh 'stagered' is not known (did you mean staggered?); choose one of"),
        (
            ["--optimizer", "adamm"],
            "--optimizer 'adamm' is not known (did you mean adamw?); choose one of galore_adamw",
        ),
        (["--seq", "4096"], "--seq 4096 is longer than the 1024 positions of --model demo."),
        (["--rank", "1.5"], "--rank 1.5 must be a positive whole number, or a fraction of the smaller side in (0, 1]."),
        (["--proj-type", "up"], "--proj-type 'up' is not known; choose one of std,"),
        (["--projector", "magic"], "--projector 'magic' is not known; choose one of power,"),
        (["--refresh", "now"], "--refresh 'now' is not known; choose one of together,"),
        (["--transport", "fly"], "--transport 'fly' is not known; choose one of keep,"),
        (["--diagnostics", "yes"], "Unrecognized options: yes"),
        (["--update-proj-gap", "0"], "--update-proj-gap 0 must be at least 1."),
        (["--clip", "inf"], "--clip inf must be a finite number of at least 0."),
        (["--out", "a/b", "--data", "no/such/text"], "no/such/text"),
        (["--data", "no/such/text"], "no/such/text"),
        (["--tokenizer", "no/such/tokenizer.json"], "no/such/tokenizer.json"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "no/such/run"], "There is no run to resume in no/such/run"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, *arguments, says=says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "used"), [(None, "4"), ("9", "9")])
def test_the_program_lets_idle_threads_of_lapack_sleep(monkeypatch, given, used):
    # Set first, so that monkeypatch takes it back in both cases.
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", given or "")
    if given is None:
        monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")
    monkeypatch.setattr(sys, "argv", ["galore-jax", "--help"])
    assert main() == 0
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == used


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["finetune"], "--model PATH and --data STR"),
        (["generate", "--model", "run"], "--prompt STR"),
        (["export", "run"], "OUT"),
        (["describe"], "FOLDER"),
    ],
)
def test_what_is_missing_is_named(capsys, command, missing):
    assert main(command) == 2
    name = f"galore-jax {command[0]}"
    assert capsys.readouterr().err == f"error: Missing from {name}: {missing}; see {name} --help.\n"


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert main(["pretrian"]) == 2
    names = "pretrain, finetune, tokenize, plan, generate, classify, export, describe"
    says = f"error: 'pretrian' is not a command (did you mean pretrain?); choose one of {names}.\n"
    assert capsys.readouterr().err == says


@pytest.mark.covering(1)
@pytest.mark.parametrize("package", ["flax", "tyro"])
def test_a_missing_extra_is_one_sentence(shop, package):
    script = f"""
import sys
from galore_jax.cli import main

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
sys.exit(main())
"""
    result = galore(shop, "pretrain", script=script)
    needs = f"galore-jax pretrain needs more packages (No module named '{package}')"
    says = f"error: {needs}: pip install '.[train]' in the folder of galore_jax's source\n"
    assert (result.returncode, result.stderr) == (2, says)


def test_a_missing_module_of_ours_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError, match=r"galore_jax\.no_such"), needed_packages("pretrain", extra="train"):
        importlib.import_module("galore_jax.no_such")


def test_a_folder_that_cannot_be_created_is_named_before_the_text_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("galore_jax.training.loop.load_data", lambda *_, **__: pytest.fail("the text was read"))
    (tmp_path / "file").touch()
    for out, reason in ((tmp_path / "file" / "run", "Not a directory"), (tmp_path / ("x" * 300), "File name too long")):
        assert_refused(capsys, "--out", out, says=f"--out {out} cannot be created: {reason}; name another folder.")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def bug(run):
        raise ValueError("a bug")

    monkeypatch.setattr("galore_jax.training.loop.train", bug)
    monkeypatch.setattr("galore_jax.training.loop.prepare", lambda settings: None)
    with pytest.raises(ValueError, match="a bug"):
        main(["pretrain", "--out", str(tmp_path / "run")])


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--model", "--rank", "--refresh", "--transport", "--no-diagnostics", "--resume"):
        assert flag in text


def test_a_folder_that_holds_a_run_is_not_overwritten(copy, capsys):
    before = contents(copy)
    assert_refused(capsys, "--out", copy, says="already holds a run; add --resume to continue it")
    file = copy / "loss.png"
    assert_refused(capsys, "--out", file, says="is a file; name a folder.")
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rank", "8"], "--rank is 8, but the run in"),
        (["--seed", "1"], "--seed is 1, but the run in"),
        (["--data", "python"], "--data is 'python', but the run in"),
        (["--optimizer", "adamw"], "was started with 'galore_adamw'"),
        (["--projector", "svd"], "--projector is 'svd', but the run in"),
        (["--refresh", "together"], "--refresh is 'together', but the run in"),
        (["--transport", "rotate"], "--transport is 'rotate', but the run in"),
        (["--no-diagnostics"], "--diagnostics is False, but the run in"),
        (["--steps", "9"], "--steps 9 is less than the 12 steps"),
    ],
)
def test_a_resumed_run_stays_the_same_run(copy, capsys, flags, says):
    before = contents(copy)
    assert_refused(capsys, "--resume", "--out", copy, *flags, says=says)
    assert contents(copy) == before


@pytest.mark.slow
def test_a_run_whose_config_has_null_goes_on_as_what_null_meant(copy, shop, monkeypatch, capsys):
    """As it was written before config.json named what None stands for; None is taken from the run."""
    config = json.loads((copy / "config.json").read_text())
    assert (config["refresh"], config["transport"]) == ("staggered", "keep")
    (copy / "config.json").write_text(json.dumps(config | {"refresh": None, "transport": None}))
    assert_refused(
        capsys, "--resume", "--out", copy, "--transport", "keep", says="but the run in " f"{copy} was started with 'rotate'"
    )  # fmt: skip
    monkeypatch.chdir(shop)
    for flags in ([], ["--refresh", "staggered"], ["--refresh", "None", "--transport", "None"]):
        assert main(["pretrain", "--resume", "--out", str(copy), *flags]) == 0
        assert "already has its 12 steps" in capsys.readouterr().out


def test_another_tokenizer_is_refused(copy, shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    file = copy / "tokenizer.json"
    load_tokenizer("bpe", ["a b c"], vocab_size=257).save(file)  # as many ids as the run's own
    before = contents(copy)
    assert_refused(capsys, "--resume", "--out", copy, says=f"{file} is not the tokenizer that the run was started with")
    assert contents(copy) == before


def test_another_text_is_refused(copy, shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (shop / "text.txt").read_text()
    Path("text.txt").write_text(text[:-1] + "!")
    before = contents(copy)
    says = f"--data text.txt is not the text that the run in {copy} was started with; put that text back,"
    assert_refused(capsys, "--resume", "--out", copy, says=says)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"data": "python"}))
    assert_refused(capsys, "--resume", "--out", copy, says="resume with the interpreter that started the run,")
    (copy / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert contents(copy) == before


def test_a_damaged_line_of_metrics_stops_a_resume_before_anything_changes(copy, shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    file = copy / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:20] + "\n" + "".join(lines[2:]))
    before = contents(copy)
    assert_refused(capsys, "--resume", "--out", copy, says=f"{file} is damaged at line 2; delete that line,")
    assert contents(copy) == before


@pytest.mark.slow
def test_a_damaged_summary_is_written_anew(copy, shop, whole, monkeypatch):
    (copy / "summary.json").write_text('{"steps": 12, "fin')
    monkeypatch.chdir(shop)
    resume(copy, "--sample-tokens", "0")
    assert summary(copy)["resumed_from_step"] == 12
    assert_same_run(copy, whole[0])


def test_a_damaged_or_missing_checkpoint_is_named(copy, shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    files = [path for path in (copy / "checkpoints/12/params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    before = contents(copy)
    assert_refused(capsys, "--resume", "--out", copy, says="is damaged (")
    assert contents(copy) == before
    largest.unlink()
    assert_refused(capsys, "--resume", "--out", copy, says="move it away to resume from step 10.")
    shutil.rmtree(copy / "checkpoints")
    assert_refused(capsys, "--resume", "--out", copy, says=f"There is no checkpoint in {copy / 'checkpoints'}")


def test_a_checkpoint_of_another_model_is_named(copy, shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    config = json.loads((copy / "config.json").read_text())
    config["model_config"]["hidden_size"] = 256
    (copy / "config.json").write_text(json.dumps(config))
    says = "parameter embed_tokens/embedding is float32[257, 128] there, and float32[257, 256] in this run;"
    assert_refused(capsys, "--resume", "--out", copy, says=says)


def test_a_vocabulary_that_does_not_match_the_model_is_named(copy, shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    config = json.loads((copy / "config.json").read_text())
    config["model_config"]["vocab_size"] = 200
    (copy / "config.json").write_text(json.dumps(config))
    says = "The tokenizer has 257 ids, but the model's vocabulary has 200"
    assert_refused(capsys, "--resume", "--out", copy, says=says)


def test_a_damaged_config_or_a_lost_tokenizer_is_named(copy, capsys):
    (copy / "tokenizer.json").unlink()
    assert_refused(capsys, "--resume", "--out", copy, says="tokenizer.json does not exist")
    config = json.loads((copy / "config.json").read_text())
    for text in ("{", json.dumps(config | {"steps": "abc"})):
        (copy / "config.json").write_text(text)
        assert_refused(capsys, "--resume", "--out", copy, says="config.json is damaged")
