# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run from end to end, on tiny shapes and few steps, and what they write holds on any machine."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from finetuning import write_lines, write_model
from problems import leniency
from runs import TINY

import galore_jax
from galore_jax import projectors, refresh
from galore_jax.matrix_codec import MatrixCodec
from galore_jax.presets import PRESETS
from galore_jax.projectors import ProjectorInput
from galore_jax.training import FinetuneConfig, PretrainConfig, finetune_config, run_pretrain

pytestmark = pytest.mark.pages
BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A short text."""
    choose = random.Random(0).choice
    words = ["the", "low", "rank", "gradient", "of", "matrix", "state", "train", "step", "loss", "model", "token"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(" ".join(choose(words) for _ in range(60)) for _ in range(100)))
    return path


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """The config.json of a LLaMA that compiles quickly."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 256,
    }
    path.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64} | sizes))
    return path


def run(name, text, *arguments):
    """What the script prints.  The scripts share their compiled programs."""
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(text.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, arguments), "--data", str(text)],
        env=environment, capture_output=True, text=True, timeout=480,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(output):
    """The cells of each line of the tables, but for the lines under a header."""
    lines = [line for line in output.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def assert_picture(folder, name):
    """A light and a dark one."""
    for theme in ("light", "dark"):
        root = ElementTree.parse(folder / f"{name}-{theme}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_every_benchmark_has_a_test():
    tested = {
        "compile.py",
        "finetune.py",
        "gpu.py",
        "kills.py",
        "learns.py",
        "memory.py",
        "quality.py",
        "refresh.py",
        "step.py",
        "transport.py",
    }
    # test_memory.py, test_generate.py, test_mesh.py, test_figures.py, test_tables.py
    elsewhere = {"optimizer_bytes.py", "generate.py", "huggingface.py", "sharded_steps.py", "report.py"}
    elsewhere |= {"landing.py", "tables.py"}
    assert {path.name for path in BENCHMARKS.glob("*.py")} == tested | elsewhere | {
        "_common.py",
        "_gpu.py",
        "_style.py",
    }


def test_refresh_measures_every_projector_on_gradients_of_a_run(tmp_path, text):
    steps = [0, 2, 5]
    out = run(
        "refresh.py", text, tmp_path, "--presets", "demo", "--tokenizer", "bytes", "--steps", *steps, "--batch", 8, "--seq", 16,
        "--rounds", 1,
    )  # fmt: skip
    results = json.loads((tmp_path / "refresh.json").read_text())
    found = {record["projector"]: record for record in results["refreshes"]}
    assert found.keys() >= {"power (default)", "randomized", "svd", "eigh", "optax.contrib.galore"}
    assert found.keys() >= projectors.PROJECTORS.keys() - {"power", "gaussian"}  # which captures no share of the energy
    for name, record in found.items():
        assert (record["preset"], record["shape"], record["rank"]) == ("demo", [128, 352], 32)
        assert len(record["captured_energy"]) == len(steps)
        assert len(record["seconds"]) == 1
        assert 0 < min(record["captured_energy"]) <= max(record["captured_energy"]) < 1 + 1e-5
        assert record["defect"] < 1e-5, name
    for name in ("svd", "eigh", "optax.contrib.galore"):
        np.testing.assert_allclose(found[name]["captured_energy"], 1, atol=1e-5)
    assert found["svd"]["times_faster_than_svd"] == 1
    assert min(found["power (default)"]["captured_energy"]) > max(found["random"]["captured_energy"])
    gradients = results["gradients"]["demo"]
    assert len(gradients["losses"]) == len(gradients["optimal_shares"]) == len(steps)
    assert gradients["losses"][0] == pytest.approx(np.log(257), abs=0.2)  # of random weights
    assert gradients["losses"][-1] < gradients["losses"][0]
    assert all(0 < share <= 1 for share in gradients["optimal_shares"])
    archive = np.load(tmp_path / "gradients-demo.npz")
    assert archive["gradients"].shape == (3, 128, 352)
    assert np.linalg.matrix_rank(archive["gradients"][0]) > 32
    speeds, energies = rows(out)[: 1 + len(found)], rows(out)[1 + len(found) :]
    assert [row[1] for row in speeds[1:]] == list(found)
    assert energies[0][2:] == ["step 0", "step 2", "step 5"]
    assert [row[1] for row in energies[1:]] == ["(loss)", "(optimum, of the whole)", *found]
    assert_picture(tmp_path, "refresh")


def test_quality_trains_the_same_model_with_each_optimizer(tmp_path, text):
    arguments = (
        "quality.py", text, tmp_path, "--model", "demo", "--steps", 3, "--batch", 2, "--seq", 16, "--val-tokens", 64,
        "--only", "adamw", "galore_muon", "--seeds", 1, "--rates",
    )  # fmt: skip
    out = run(*arguments, 0.01, 0.001)
    results = {line["optimizer"]: line for line in json.loads((tmp_path / "quality.json").read_text())["results"]}
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").iterdir()}
    assert records.keys() == {f"{name}-{rate}-0" for name in ("adamw", "galore_muon") for rate in ("0.01", "0.001")}
    for name, line in results.items():
        assert line["val_losses"] == [min(records[f"{name}-{rate}-0"]["val_loss"] for rate in ("0.01", "0.001"))]
    first = [record["train_loss"][0] for record in records.values()]
    assert first == pytest.approx([first[0]] * 4)  # the same weights and tokens
    numbers = 2 * 4 * (4 * 128 * 128 + 3 * 128 * 352)  # Adam's, of the matrices of four layers
    assert 4 * numbers <= results["adamw"]["matrix_state_bytes"] < 4 * numbers + 100
    assert 0.15 < results["galore_muon"]["share"] < 0.25
    assert rows(out)[0][0] == "matrices on"
    for name in ("quality-state", "quality-rates", "quality-steps"):
        assert_picture(tmp_path, name)

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert run(*arguments, 0.01, 0.001) == out
    assert run(*arguments, 0.01, 0.001, 0.0001, 0.1, "--report") == out  # of the runs that are there
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == times


@pytest.mark.parametrize(
    ("losses", "made"),
    [
        ((5, 4, 3, 2, 3), [3, 2, 3]),
        ((5, 4, 3, 2, 1), [3, 2, 1]),
        ((5, 2, 3, 4, 5), [5, 2, 3, 4]),
        ((1, 2, 3, np.nan, 5), [1, 2, 3, np.nan]),
        ((3, 2, 1, 1, 0), [2, 1, 1]),
    ],
)
def test_quality_walks_the_learning_rates_from_the_middle_as_far_as_the_loss_falls(script, losses, made):
    quality = script("quality")
    rates = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    found = quality.walk(rates, lambda rate: {"val_loss": losses[rates.index(rate)]})
    np.testing.assert_array_equal([found[rate]["val_loss"] for rate in sorted(found)], made)


def test_quality_makes_the_runs_of_a_batch_as_it_makes_them_one_by_one(tmp_path, text, one_layer):
    arguments = [
        "--model", one_layer, "--steps", 9, "--batch", 2, "--seq", 16, "--val-tokens", 64, "--seeds", 2, "--leaders", 9,
        "--rates", 0.003, 0.01, "--only", "galore_muon", "muon_8bit-b.9-nor",
    ]  # fmt: skip
    run("quality.py", text, tmp_path / "one", *arguments)
    run("quality.py", text, tmp_path / "several", *arguments, "--together")
    several = {path.name: json.loads(path.read_text()) for path in (tmp_path / "several" / "runs").iterdir()}
    assert len(several) == 2 * 2 * 2
    for path in (tmp_path / "one" / "runs").iterdir():
        alone, batched = json.loads(path.read_text()), several[path.name]
        assert alone.keys() == batched.keys()
        for name in ("train_loss", "validation", "val_loss", "update_rms"):
            np.testing.assert_allclose(batched[name], alone[name], rtol=2e-4)
        for name in ("optimizer", "learning_rate", "seed", "settings", "matrix_state_bytes", "bytes_per_weight"):
            assert batched[name] == alone[name]


def test_quality_draws_the_frontier_through_what_nothing_smaller_is_better_than(script):
    found = {"a": (1.0, 2.0), "b": (0.5, 2.5), "c": (0.5, 2.4), "d": (2.0, 2.0), "e": (4.0, 1.9), "f": (0.6, 2.45)}
    assert script("quality").undominated(found) == ["c", "a", "e"]


def test_quality_makes_every_contestant_and_says_at_which_bytes(script):
    quality = script("quality")
    groups = (quality.contestants, quality.ablation, quality.frontier, quality.variants)
    known = {name: make(0.01, 0.25) for of in groups for name, make in of(400).items()}
    params = {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    for name, size in {
        "adamw": 8, "optax_muon-b.9": 4, "muon-b.9-nor": 4, "muon_8bit-b.9": 1, "muon_4bit-b.9": 0.65, "muon_4bit-pr4-b.9": 0.58,
        "muon_3bit-pr4-b.9": 0.46, "muon_2bit-b.9": 0.4, "muon_0bit-k16-b.9": 0.13, "galore_muon-b.9-c8": 2,
        "galore_muon_8bit-seeded-b.9": 0.25, "galore_muon_4bit-rows-b.9": 0.15, "adamw_factored": 4, "adamw_4bit": 0.66,
    }.items():  # fmt: skip
        state = jax.tree.leaves(jax.eval_shape(known[name].init, params))
        assert sum(x.size * x.dtype.itemsize for x in state) / 256**2 == pytest.approx(size, abs=0.04), name
    sizes = [galore_jax.state_bytes(known[name], params) for name in ("muon-b.9-nor", "muon-b.9", "optax_muon-b.9")]
    assert sizes[0] - sizes[1] == 4 * 256  # only what is called so has NorMuon's mean squares
    assert sizes[1] == pytest.approx(sizes[2], abs=16)


def test_quality_publishes_the_presets_of_the_frontier_in_place_of_those_of_as_many_steps(tmp_path, script):
    quality, path = script("quality"), tmp_path / "frontier.json"
    old = [
        {"preset": "muon", "arguments": {}, "steps": steps, "loss": 2.0, "learning_rate": 0.1} for steps in (400, 800)
    ]
    path.write_text(json.dumps({"source": "a test", "points": old}))
    measured = {
        "muon_4bit-b.9-nor": (0.64, [1.75, 1.77]), "muon_3bit-pr4-b.8": (0.45, [1.8]), "galore_muon-b.9-c8": (2.0, [1.7]),
        "adamw": (8.0, [1.6]), "muon_8bit-b.9": (1.0, [1.76]),
    }  # fmt: skip
    lines = [
        {"optimizer": name, "bytes_per_weight": size, "val_losses": losses, "learning_rate": 0.01}
        for name, (size, losses) in measured.items()
    ]
    quality.publish(lines, quality.frontier(400), 400, 0.25, path)
    preset, arguments, losses = zip(
        *((x["preset"], x["arguments"], x["loss"]) for x in json.loads(path.read_text())["points"]), strict=True
    )
    assert preset == ("muon", "galore_muon", "muon_4bit", "muon_4bit")
    assert losses == (2.0, 1.7, 1.76, 1.8)
    assert arguments[1] == {"rank": 0.25, "momentum": 0.9, "factor": 8.0}
    assert arguments[2] == {"momentum": 0.9, "neuron_decay": 0.95}
    assert MatrixCodec(**arguments[3]["codec"]) == MatrixCodec(bits=3, leading_bits=4)


def test_quality_trains_low_rank_weights_in_place_of_the_matrices(tmp_path, text):
    run(
        "quality.py", text, tmp_path, "--model", "demo", "--steps", 8, "--batch", 2, "--seq", 16, "--val-tokens", 64,
        "--only", "low_rank", "relora", "--seeds", 1, "--rates", 0.01,
    )  # fmt: skip
    results = {line["optimizer"]: line for line in json.loads((tmp_path / "quality.json").read_text())["results"]}
    factors = 4 * 32 * (4 * (128 + 128) + 3 * (128 + 352))  # a quarter of the rank, four layers
    for name, line in results.items():
        assert 8 * factors <= line["matrix_state_bytes"] < 8 * factors + 100
        record = json.loads((tmp_path / "runs" / f"{name}-0.01-0.json").read_text())
        assert record["train_loss"][0] == pytest.approx(np.log(257), abs=0.3)
        assert record["train_loss"][-1] < record["train_loss"][0] - 0.3


def test_step_times_three_optimizers_that_start_alike(tmp_path, text):
    out = run(
        "step.py", text, tmp_path, "--model", "demo", "--layers", 1, "--batch", 2, "--seq", 16, "--rank", 8, "--gap", 3,
        "--steps", 9,
    )  # fmt: skip
    results = json.loads((tmp_path / "step.json").read_text())
    assert results["matrices"] == 7
    plain, theirs, ours = (results["steps"][name] for name in results["steps"])
    assert [[r["step"] for r in records] for records in (plain, theirs, ours)] == [
        list(range(9)), [0, 3, 6, 8], list(range(9)),
    ]  # fmt: skip
    assert {r["refreshes"] for r in plain} == {False}
    assert [r["refreshes"] for r in theirs] == [True, True, True, False]
    assert {r["refreshes"] for r in ours} == {True}  # 7 matrices over 3 steps
    assert plain[0]["loss"] == pytest.approx(ours[0]["loss"], rel=1e-5)
    assert theirs[0]["loss"] == pytest.approx(ours[0]["loss"], rel=1e-5)
    assert all(np.isfinite(r["loss"]) and r["seconds"] > 0 for records in (plain, theirs, ours) for r in records)
    assert len({records[-1]["loss"] for records in (plain, theirs, ours)}) == 3
    assert [row[0] for row in rows(out)[1:]] == ["optax.adamw", "optax.contrib.galore", "galore_jax.galore_adamw"]
    assert rows(out)[1][2] == "1.00"
    assert_picture(tmp_path, "step")


def test_step_times_momenta_in_few_bits_beside_muon(tmp_path, text):
    out = run(
        "step.py", text, tmp_path, "--muon", "--model", "demo", "--layers", 1, "--batch", 2, "--seq", 16, "--steps", 4,
    )  # fmt: skip
    found = json.loads((tmp_path / "step-muon.json").read_text())
    assert list(found) == ["optax.contrib.muon", *(f"galore_jax.{name}" for name in ("muon", "muon_4bit", "muon_2bit"))]
    assert [row[0] for row in rows(out)[1:]] == list(found)
    assert found["optax.contrib.muon"]["ratio"] == 1
    assert found["galore_jax.muon"]["ratio"] > 0


@pytest.mark.parametrize(("matrices", "gap"), [(56, 64), (28, 3), (5, 20), (7, 7)])
def test_step_knows_at_which_steps_a_staggered_run_refreshes(script, matrices, gap):
    policy, slots = refresh.staggered(gap), refresh.Slots(np.arange(matrices, dtype=np.int32), matrices)
    due = jax.vmap(lambda step: policy.due(step, slots, ()))(jnp.arange(2 * gap, dtype=jnp.int32))  # [steps, matrices]
    found = jnp.any(due, axis=1).tolist()
    assert [script("step").refreshing(step, matrices, gap) for step in range(2 * gap)] == [True, *found[1:]]


def test_step_shows_a_refreshing_step_beside_the_others(script):
    """Medians without step 0, and their ratio."""
    records = [{"step": i, "seconds": s, "refreshes": i % 3 == 0} for i, s in enumerate([90, 1, 2, 6, 3, 2, 4])]
    medians = script("step").summary({"steps": {script("step").PLAIN: records}})
    assert medians == {
        "optax.adamw": {"median": 2.5, "maximum": 6, "first": 90, "plain_median": 2.0, "refresh_median": 5.0}
    }
    assert rows(script("step").table(medians))[1] == ["optax.adamw", "2.50", "1.00", "2.00", "5.00", "2.50", "90.00"]


def test_transport_compares_runs_that_differ_in_nothing_else(tmp_path, text):
    out = run(
        "transport.py", text, tmp_path, "--gap", 2, "--seeds", 1, "--steps", 5, "--projector", "rows",
    )  # fmt: skip
    keep, rotate = json.loads((tmp_path / "transport.json").read_text())
    assert keep | {"transport": "rotate", "final_val_loss": rotate["final_val_loss"]} == rotate
    assert (keep["data"], keep["update_proj_gap"], keep["seed"], keep["steps"]) == ("words", 2, 0, 5)
    assert 0 < keep["final_val_loss"] != rotate["final_val_loss"] > 0
    for record, row in zip((keep, rotate), rows(out)[1:], strict=True):
        loss = f"{record['final_val_loss']:.4f}"
        assert row == ["words", "2", record["transport"], loss, loss]
        [folder] = tmp_path.glob(f"*-{record['transport']}-*")
        config = json.loads((folder / "config.json").read_text())
        assert {name: config[name] for name in record if name in config and name != "data"} == {
            name: value for name, value in record.items() if name not in ("data", "final_val_loss")
        }


def test_learns_compares_the_best_of_each_optimizer(tmp_path, text):
    out = run("learns.py", text, tmp_path, "--steps", 2, "--adamw", 1e-3, "--galore-adamw", 3e-3)
    results = json.loads((tmp_path / "learns.json").read_text())
    best = {name: runs[rate]["final_val_loss"] for name, rate in RATES.items() for runs in [results["runs"][name]]}
    assert results["best"] == best
    assert results["ratio"] == best["galore_adamw"] / best["adamw"]
    sizes = {name: results["runs"][name][rate]["optimizer_state_bytes"] for name, rate in RATES.items()}
    assert sizes["galore_adamw"] < 0.5 * sizes["adamw"]
    assert [row[:2] for row in rows(out)[1:]] == [list(pair) for pair in RATES.items()]
    assert_picture(tmp_path, "learns")


RATES = {"adamw": "0.001", "galore_adamw": "0.003"}


def test_a_run_that_is_killed_ten_times_ends_with_the_bits_of_one_that_is_not(tmp_path, text):
    out = run("kills.py", text, tmp_path, "--kills", 10, "--steps", 30, "--optimizer", "adamw")
    results = json.loads((tmp_path / "kills.json").read_text())
    assert len(results["kills"]) == sum(found["kills"] for found in results["runs"]) == 10
    assert all(found["killed"] for found in results["kills"])
    assert [found["differences"] for found in results["runs"]] == [[]] * len(results["runs"])
    assert out.count("the same bits") == len(results["runs"])


def test_a_run_that_ended_otherwise_is_noticed_by_the_script_of_kills(tmp_path, text, script):
    kills = script("kills")
    config = PretrainConfig(
        optimizer="adamw", data=str(text), out=tmp_path / "whole", steps=3, batch=2, seq=16, log_every=1, save_every=1,
        sample_tokens=0, eval_tokens=100,
    )  # fmt: skip
    shape = dataclasses.replace(TINY, vocab_size=257)
    for out, rate in (("whole", 0.01), ("other", 0.02)):
        with leniency():
            run_pretrain(dataclasses.replace(config, out=tmp_path / out, learning_rate=rate), shape)
    shutil.copytree(tmp_path / "whole", tmp_path / "twice")
    metrics = tmp_path / "twice" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n" + '{"step": 3, "loss": 1.0}\n')
    assert kills.differences(tmp_path / "whole", tmp_path / "whole") == []
    assert "metrics.jsonl has the steps [1, 2, 3, 3]" in kills.differences(tmp_path / "twice", tmp_path / "whole")
    assert [words for words in kills.differences(tmp_path / "other", tmp_path / "whole") if "embed_tokens" in words]


def test_finetune_judges_a_setting_at_the_rate_that_was_best_on_other_rows(tmp_path, script, monkeypatch, capsys):
    finetune = script("finetune")

    def benchmark(*arguments):
        paths = [tmp_path / "out", "--model", tmp_path / "model", "--data", tmp_path]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, [*paths, *arguments])])
        with leniency():
            finetune.main()
        return capsys.readouterr().out

    write_model(tmp_path / "model")
    texts = [{"text": f"{number:04}" * 4, "label": number % 2} for number in range(80)]
    write_lines(tmp_path / "train.jsonl", texts[:64])
    write_lines(tmp_path / "test.jsonl", texts[64:])
    common = ["--only", "LoRA r=4", "--steps", 2, "--tune-steps", 1, "--tune-rows", 16, "--rates", 1e-5, 0.1]
    out = benchmark(*common)
    results = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert results["rows"] == {"train": 32, "tune": 16, "test": 16}
    learnt, chose = ((tmp_path / "out" / f"{part}.jsonl").read_text() for part in ("train", "tune"))
    assert not set(learnt.splitlines()) & set(chose.splitlines())
    ((name, found),) = results["results"].items()
    p = found["accuracy"]
    assert found["error"] == pytest.approx(np.sqrt(p * (1 - p) / 16))
    assert found["learning_rate"] == float(min(found["tuning_losses"], key=found["tuning_losses"].get))
    assert len(set(found["tuning_losses"].values())) == 2
    assert rows(out)[-1][:2] == [name, f"{p:.3f} ± {found['error']:.3f}"]
    assert_picture(tmp_path / "out", "finetune")
    assert len(list((tmp_path / "out" / "runs").glob("*/summary.json"))) == 3
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoints"))

    def unreachable(config):
        raise AssertionError("a finished run is repeated")

    monkeypatch.setattr(finetune, "run_finetune", unreachable)
    assert benchmark(*common).splitlines() == out.splitlines()[-3:]
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        benchmark(*common, "--test-rows", 8)


def test_compile_counts_instructions_and_refuses_an_update_that_is_traced_twice(script, monkeypatch, capsys):
    compile_ = script("compile")
    monkeypatch.setattr(sys, "argv", ["compile.py", "--layers", "1", "--presets", "galore_adamw"])
    with leniency():
        compile_.main()
        found = rows(capsys.readouterr().out)[1:]
        assert [row[0].strip("`") for row in found] == [
            "optax.adamw", "optax.contrib.galore", "galore_adamw", "optax.adamw", "galore_adamw",
        ]  # fmt: skip
        assert [row[1] for row in found] == ["unstacked"] * 3 + ["stacked"] * 2
        assert all(float(cell) >= 0 for row in found for cell in row[2:7])
        assert {row[7] for row in found} <= {"", "yes", "no"}

        growing = optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), lambda u, s, p: (u, s + 0.5))
        with pytest.raises(SystemExit, match="traced again"):
            compile_.measured(growing, {"w": jax.ShapeDtypeStruct((2, 2), "float32")})


def test_compile_has_the_arguments_of_every_preset(script):
    for build in script("compile").optimizers(list(PRESETS), "small").values():
        assert isinstance(build(), optax.GradientTransformation)


def test_every_setting_of_finetune_is_one_that_the_trainer_knows(script):
    for setting in script("finetune").SETTINGS.values():
        finetune_config.check(FinetuneConfig(pathlib.Path("model"), "data", **setting))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: jnp.linalg.svd(x, full_matrices=False), {"gesdd", "svd"}),
        (lambda x: jnp.linalg.eigh(x @ x.T), {"eigh", "syev"}),
        (lambda x: jnp.linalg.qr(x), {"geqrf", "householder", "orgqr", "qr"}),
        (lambda x: jnp.linalg.cholesky(jnp.eye(8) + x @ x.T), set()),
        (lambda x: jax.lax.rsqrt(jnp.sqrt(x)), set()),
    ],
)
def test_a_factorisation_is_found_in_a_program(script, function, names):
    lowered = jax.jit(function).lower(jnp.ones((8, 8)))
    for text in (lowered.as_text(), lowered.compile().as_text()):
        found = set(script("_common").factorisations_in(text))
        assert found <= names
        assert bool(found) == bool(names)


@pytest.mark.parametrize("name", ["power", "randomized", "random", "rows"])
def test_the_fast_projectors_hold_no_factorisation_but_cholesky(script, name):
    projector = projectors.get(name)
    basis = projector.storage.zeros((8, 2), jnp.float32, None, None)
    seen = ProjectorInput(jax.random.key(0), jnp.ones((8, 12)), basis, jnp.zeros((2, 12)), jnp.int32(0), False)
    fields = jax.tree.leaves((seen.gradient, seen.coordinates))
    traced = jax.jit(lambda g, c: projector.refresh(seen._replace(gradient=g, coordinates=c))).trace(*fields)
    for_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert script("_common").factorisations_in(for_tpu) == []


@pytest.mark.slow
def test_memory_plans_every_row_once_and_goes_on_where_it_was(tmp_path, script, monkeypatch, capsys):
    memory = script("memory")
    names = ["adamw", "galore 8-bit, layer-wise"]
    monkeypatch.setattr(memory, "ROWS", {name: memory.ROWS[name] for name in names})
    arguments = ["--models", "demo", "--targets", "here", "--seq", "16"]
    monkeypatch.setattr(sys, "argv", ["memory.py", str(tmp_path), *arguments])
    with leniency():  # jax.nn.dot_product_attention mixes dtypes inside
        memory.main()
    found = rows(capsys.readouterr().out)[1:]
    assert [row[:3] for row in found] == [["demo", "here", name] for name in names]
    plans = json.loads((tmp_path / "memory.json").read_text()).values()
    states = {row["name"]: row["optimizer_state_bytes"] for row in plans}
    assert states["galore 8-bit, layer-wise"] < states["adamw"] / 3
    assert_picture(tmp_path, "memory")
    assert_picture(tmp_path, "models")
    monkeypatch.setattr(memory, "planned", None)  # nothing is compiled again
    memory.main()
    assert rows(capsys.readouterr().out)[1:] == found


def test_launches_are_counted_once_an_iteration_and_apart_in_branches(script):
    text = """
%fused (x: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} negate(%x)
}
%body (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[3]{0} parameter(0)
  %a = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %b = (f32[8]{0}, /*index=1*/s8[64]{0}) custom-call(%a), custom_call_target="__cublas$gemm"
  ROOT %t = (s32[], f32[8]) tuple(%a)
}
%yes (x: f32[8]) -> f32[8] {
  %c = f32[8]{0} copy(%x)
  ROOT %s = f32[8]{0} sort(%c)
}
%no (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %g = f32[8]{0} get-tuple-element(%w), index=1
  ROOT %o = f32[8]{0} conditional(%p, %g, %g), branch_computations={%yes, %no}
}"""
    assert script("_common").launches_in(text) == {
        "always": {"bytes": 5 * (32 + 12 + 32 + 96), "conditionals": 1, "fusions": 5, "library calls": 5, "loops": 1},
        "in branches": {"bytes": 32 + 2 * 32, "copies": 1, "others": 1},
    }


@pytest.fixture
def gpu_script(script, monkeypatch, tmp_path, capsys):
    """Runs gpu.py in this process, whose measurements run in processes of their own."""
    gpu = script("gpu")

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), *arguments])
        gpu.main()
        return capsys.readouterr().out

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return gpu, main


@pytest.mark.slow
def test_gpu_measures_every_part_and_goes_on_where_it_was(tmp_path, gpu_script, monkeypatch):
    gpu, main = gpu_script
    out = main("--tiny")
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in found.values()} == set("abcde")
    statuses = {key: row["status"] for key, row in found.items()}
    assert {s for key, s in statuses.items() if key[0] not in "d" and "torch" not in key} == {"done"}, statuses
    large = next(row for row in found.values() if row["kind"] == "memory")
    assert large["falls"]
    assert large["losses"][0] == pytest.approx(np.log(64), abs=0.3)
    assert len(large["steps_seconds"]) == 3
    steps = next(row for row in found.values() if row["kind"] == "steps")["optimizers"]
    assert steps.keys() == {"adamw", "optax.contrib.galore", "galore_adamw"}
    assert all(len(o["steps_seconds"]) == 3 and o["update_seconds"] > 0 for o in steps.values())
    assert steps["galore_adamw"]["update_bytes"] < steps["adamw"]["update_bytes"]
    assert [steps[name]["refreshes"] for name in steps] == [None, [True, False, False], [True, False, False]]
    power, rows_ = next(row for row in found.values() if row["kind"] == "refreshes")["refreshes"].values()
    assert power["energy"] > rows_["energy"] > 0
    assert (tmp_path / "gpu.md").read_text() in out

    monkeypatch.setattr(gpu, "measured", None)  # nothing is measured again
    assert (tmp_path / "gpu.md").read_text() in main("--tiny")


def test_gpu_runs_what_is_worth_most_first_and_ends_in_time(tmp_path, gpu_script, monkeypatch):
    gpu, main = gpu_script
    order = []
    monkeypatch.setattr(gpu, "driver", lambda: {"card": "A card", "memory": 80 * 10**9, "version": "1"})
    monkeypatch.setattr(gpu, "missing", lambda needs: [])
    monkeypatch.setattr(gpu, "measured", lambda row, *_: order.append(row) or {"status": "cut off"})
    monkeypatch.setattr(gpu, "compile_all", lambda *_: None)
    main("--minutes", "8")
    assert [row.worth for row in order] == sorted(row.worth for row in order)
    assert [row.limit for row in order if row.worth == 1] == [23.64, 11.75, 11.75, 15.6]
    assert len({row.key for row in order}) == len(order)
    tried = len(order)
    main("--minutes", "0.1")
    assert len(order) == tried
    main("--parts", "e")  # and the card, which the others are compared with
    assert {row.part for row in order[tried + 1 :]} == {"e"}
    order.clear()
    main("--rows", "^b: 1b$")
    assert [row.key for row in order] == ["a: card", "b: 1b"]
    order.clear()
    assert main("--compile").startswith("driver: ")
    assert order == []


def test_gpu_compiles_each_program_once_before_it_measures(tmp_path, gpu_script, monkeypatch):
    gpu, _ = gpu_script
    jobs = []

    def run(command, env, **_):
        assert env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        jobs.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, 0, '{"compile_seconds": 1.0}', "")

    monkeypatch.setattr(subprocess, "run", run)
    chosen = [row for row in gpu.rows(False, None) if row.part in "abcde"]
    gpu.compile_all(chosen, {}, tmp_path / "log", None)
    assert {kind for kind, _ in jobs} == {"programs"}
    assert len({json.dumps(job) for job in jobs}) == len(jobs)
    trained = [
        settings | {name: row.arguments[name] for name in ("batch", "seq")}
        for row in chosen
        if row.kind in ("memory", "steps", "learning")
        for settings in gpu.settings_of(row).values()
    ]
    found = [job["settings"] | {name: job[name] for name in ("batch", "seq")} for _, job in jobs]
    assert {json.dumps(one, sort_keys=True) for one in found} == {json.dumps(one, sort_keys=True) for one in trained}
    assert (tmp_path / "log").read_text().count("--- compiled in") == len(jobs)


def test_gpu_reads_kernels_and_copies_from_a_trace(script):
    def named(kind, pid, tid, name):
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    def event(pid, tid, name, start, length):
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start, "dur": length}

    events = [
        {"displayTimeUnit": "ns"}, named("process_name", 1, None, "/device:GPU:0"),
        named("thread_name", 1, 13, "Stream #13(Compute)"), named("thread_name", 1, 14, "XLA Ops"),
        named("process_name", 7, None, "/host:CPU"), named("thread_name", 7, 13, "python"),
        event(1, 13, "fusion_1", 100.0, 30.0), event(1, 13, "MemcpyD2D", 140.0, 10.0), event(1, 13, "fusion_1", 160.0, 40.0),
        event(1, 14, "fusion", 100.0, 100.0), event(7, 13, "call", 0.0, 500.0),
    ]  # fmt: skip
    read_trace = script("_gpu").read_trace
    found = read_trace(events)
    assert (found["kernels"], found["copies"]) == (2, 1)
    assert found["copy_seconds"] == pytest.approx(10e-6)
    assert found["busy_seconds"] == pytest.approx(80e-6)
    assert found["span_seconds"] == pytest.approx(100e-6)
    assert found["longest"] == [["fusion_1", 2, pytest.approx(70e-6)], ["MemcpyD2D", 1, pytest.approx(10e-6)]]
    assert read_trace(events[:1] + events[4:])["lines"]  # a profiler that names its lines otherwise


def test_gpu_keeps_the_last_report_of_a_process_that_failed_or_was_cut_off(tmp_path, gpu_script):
    gpu, _ = gpu_script
    missing = gpu.Row("a", "a kind that is not there", "nothing", {}, 0)
    record = gpu.measured(missing, 60, tmp_path / "log", None, dict(os.environ))
    assert record["status"] == "failed: KeyError: 'nothing'"
    cut = gpu.measured(gpu.rows(True, None)[1], 0.5, tmp_path / "log", None, dict(os.environ))
    assert cut == {"status": "cut off"}


def test_gpu_limits_the_process_to_a_share_of_the_card(tmp_path, gpu_script, monkeypatch):
    gpu, _ = gpu_script
    seen = []

    def run(command, env, **_):
        seen.append(env.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
        return subprocess.CompletedProcess(command, 0, b'{"a": 1}\nsome words\n{"a": 2}\n{"a"')

    monkeypatch.setattr(subprocess, "run", run)
    card = {"card": "A card", "memory": 80 * 10**9, "version": "1"}
    row = next(row for row in gpu.rows(False, None) if row.limit == 23.64)
    assert gpu.measured(row, 1, tmp_path / "log", card, {}) == {"a": 2, "status": "done"}
    assert seen == ["0.3173"]


def test_gpu_tells_what_is_planned_from_what_is_measured(gpu_script):
    gpu, _ = gpu_script
    plan = {"target": "h100", "peak_bytes": 2**33, "update_bytes": 2**30, "flops": 1e12}
    planned = {"7b, 1 x 256": plan, "1b, adamw": plan, "1b, galore_adamw": plan}
    before = gpu.tables({}, planned)
    assert "Nothing in this part has been measured yet." in before
    assert [row[:3] + row[-1:] for row in rows(before)[1:2]] == [["7b, 1 x 256", "", "8.00 GiB", "not yet"]]
    card = {
        "part": "a",
        "name": "card",
        "kind": "card",
        "status": "done",
        "device": "NVIDIA H100 80GB HBM3",
        "jax": "1",
    }
    card |= {"copy_bytes_per_second": 2.0**41, "product_flops_per_second": 7e14}
    large = {
        "part": "a",
        "name": "7b, 1 x 256",
        "kind": "memory",
        "status": "done",
        "limit": 23.64,
        "plan_bytes": 2**33,
    }
    large |= {"losses": [3.0, 2.0], "steps_seconds": [0.1, 0.2, 0.1], "tokens": 256, "flops": 9.89e12}
    large |= {"allocator": {"peak_bytes_in_use": 2**33 * 1.02}}
    adamw = {"steps_seconds": [9.0, 0.2, 0.2], "update_bytes": 2**31, "update_seconds": 0.002, "flops": 1e12}
    ours = {"steps_seconds": [9.0, 0.3, 0.4], "update_bytes": 2**30, "update_seconds": 0.001, "flops": 1e12}
    adamw, ours = adamw | {"refreshes": None}, ours | {"refreshes": [True, False, True]}
    steps = {
        "part": "b",
        "name": "1b",
        "kind": "steps",
        "status": "done",
        "optimizers": {"adamw": adamw, "galore_adamw": ours},
    }
    results = {"driver": {"card": "H100", "version": "1"}, "date": "2026-01-01", "rows": {1: card, 2: large, 3: steps}}
    header, seven, _, plain, galore = rows(gpu.tables(results, planned))
    assert seven[1:] == [
        "23.64 GiB", "8.00 GiB", "8.00 GiB", "8.16 GiB", "+2.0%", "3.00 to 2.00", "100.0 ms", "200.0 ms", "2,560", "10.0%",
    ]  # fmt: skip
    assert plain[3:9] == ["1.0 ms", "2.0 ms", "2.05", "200.0 ms", "1.000", "1.00"]
    assert plain[9:11] == ["", ""]
    assert galore[3:9] == ["0.5 ms", "1.0 ms", "2.05", "350.0 ms", "1.750", "1.14"]
    assert galore[9:11] == ["300.0 ms", "400.0 ms"]
    assert len(header) == len(seven)
