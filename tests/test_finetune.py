# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``galore-jax finetune``: what a run learns and leaves behind, one that is interrupted, and every mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetuning import answered, labelled, write_lines, write_model
from problems import leniency, shared_programs  # noqa: F401
from safetensors.numpy import load_file
from test_llama import forward

from galore_jax.cli import main
from galore_jax.models import load_hf
from galore_jax.training import FinetuneConfig, checkpoint, run_finetune
from galore_jax.training.examples import TrainingBatches
from galore_jax.training.finetune_config import load_config
from galore_jax.training.metrics import read_metrics
from galore_jax.training.tokenizer import load_tokenizer

SHORT = {"seq": 32, "batch": 8, "learning_rate": 0.02, "log_every": 3, "eval_every": 12, "save_every": 5}
CLOCKED = ("tokens_per_second", "peak_memory_bytes", "data_wait")
LABELLED, ANSWERED = labelled(120), answered(64)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with a model and examples of both kinds."""
    folder = tmp_path_factory.mktemp("shop")
    write_model(folder / "model")
    write_lines(folder / "labels.jsonl", LABELLED[:96])
    write_lines(folder / "labels-held-out.jsonl", LABELLED[96:])
    write_lines(folder / "answers.jsonl", ANSWERED)
    return folder


def settings(shop, out, kind="labels", **changes):
    held_out = shop / ("labels-held-out.jsonl" if kind == "labels" else "answers.jsonl")
    paths = {
        "model": shop / "model",
        "data": str(shop / f"{kind}.jsonl"),
        "eval_data": str(held_out),
        "out": shop / out,
    }
    return FinetuneConfig(**paths, **(SHORT | changes))


def run(config):
    with leniency():
        return run_finetune(config)


@pytest.fixture(scope="module")
def labels(shop):
    """The summary of a run of full AdamW on labels."""
    return run(settings(shop, "labels", optimizer="adamw", steps=24))


@pytest.fixture(scope="module")
def answers(shop):
    """The summary of a run of GaLore on responses."""
    return run(settings(shop, "answers", "answers", optimizer="galore_adamw", rank=4, steps=60, eval_every=60))


@pytest.fixture(scope="module")
def lora(shop):
    """The summary of a run of LoRA on labels."""
    return run(settings(shop, "lora", optimizer="lora", lora_rank=2, steps=12))


def tensors(folder):
    return load_file(folder / "model.safetensors")


def told(folder):
    """The records of a run without its durations."""
    return [{k: v for k, v in record.items() if k not in CLOCKED} for record in read_metrics(folder)]


# What a run learns and leaves behind


def test_a_classifier_learns_and_its_run_folder_is_complete(shop, labels):
    folder = shop / "labels"
    assert labels["final_val_accuracy"] > 0.9
    assert (labels["steps"], labels["training_examples"], labels["validation_examples"]) == (24, 96, 24)
    sizes = [min(len(row["text"]), 32) for row in LABELLED]
    assert labels["cut_examples"] == sum(len(row["text"]) > 32 for row in LABELLED)
    assert labels["tokens"] == 2 * sum(sizes[:96])  # 24 steps are two epochs
    assert labels["optimizer_state_bytes"] == labels["adamw_state_bytes"] == 8 * labels["trained_params"] + 8
    assert json.loads((folder / "summary.json").read_text()) == labels
    records = read_metrics(folder)
    assert [r["step"] for r in records if "loss" in r] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [r["step"] for r in records if "val_accuracy" in r] == [12, 24]
    assert records[-1]["val_accuracy"] == labels["final_val_accuracy"]
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    config, facts = load_config(folder)
    assert config == dataclasses.replace(settings(shop, "labels", optimizer="adamw", steps=24), resume=True).resolved
    assert (facts["task"], set(facts["versions"])) == (
        "label",
        {"jax", "optax", "flax", "orbax-checkpoint", "galore_jax"},
    )


def test_accuracy_and_loss_are_those_of_the_weights_that_are_written(shop, labels):
    weights = tensors(shop / "labels" / "last")
    fields = json.loads((shop / "labels" / "last" / "config.json").read_text())
    assert (fields["architectures"], fields["pad_token_id"]) == (["LlamaForSequenceClassification"], 256)
    body, score = load_hf(shop / "model"), weights["score.weight"].astype(np.float64)
    body.embed_tokens.embedding[...] = jnp.asarray(weights["model.embed_tokens.weight"])
    layers = body.layers
    places = {
        "self_attn.q_proj": layers.attention.q_proj.kernel, "self_attn.k_proj": layers.attention.k_proj.kernel,
        "self_attn.v_proj": layers.attention.v_proj.kernel, "self_attn.o_proj": layers.attention.o_proj.kernel,
        "mlp.gate_proj": layers.mlp.gate_proj.kernel, "mlp.up_proj": layers.mlp.up_proj.kernel,
        "mlp.down_proj": layers.mlp.down_proj.kernel, "input_layernorm": layers.input_norm.scale,
        "post_attention_layernorm": layers.post_attention_norm.scale,
    }  # fmt: skip
    for name, place in places.items():
        place[...] = jnp.stack([jnp.asarray(weights[f"model.layers.{i}.{name}.weight"].T) for i in range(2)])
    hidden = jax.jit(lambda tokens: body.run_layers(body.embed(tokens)))
    right, losses = 0, []
    for row in LABELLED[96:]:
        ids = np.frombuffer(row["text"].encode()[:32], np.uint8).astype(np.int32)
        x = np.asarray(hidden(np.pad(ids, (0, 32 - ids.size))[None]), np.float64)[0, ids.size - 1]
        x = x / np.sqrt(np.mean(x**2) + body.config.rms_norm_eps) * weights["model.norm.weight"]
        logits = score @ x
        losses.append(np.log(np.exp(logits).sum()) - logits[row["label"]])
        right += np.argmax(logits) == row["label"]
    assert right / 24 == labels["final_val_accuracy"]
    assert np.mean(losses) == pytest.approx(labels["final_val_loss"], rel=1e-4)


@pytest.mark.slow
def test_responses_are_learnt_and_the_perplexity_is_that_of_the_responses_alone(shop, answers):
    model = load_hf(shop / "answers" / "last")
    text = [*(row["prompt"] + row["response"] for row in ANSWERED)]
    ids = np.array([[*line.encode(), 256] for line in text], np.int32)  # all as long: 7 of the prompt, 3 and the end
    logits = np.asarray(forward(model, ids[:, :-1]), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    assert answers["final_val_loss"] == pytest.approx(losses[:, 6:].mean(), rel=1e-4)
    assert answers["final_val_perplexity"] == pytest.approx(np.exp(losses[:, 6:].mean()), rel=1e-4)
    assert answers["final_val_perplexity"] < 1.5
    assert answers["optimizer_state_bytes"] < answers["adamw_state_bytes"]
    assert load_tokenizer(str(shop / "answers" / "last" / "tokenizer.json")).decode(ids[0]) == text[0]


def test_lora_trains_adapters_and_the_head_and_writes_ordinary_weights(shop, lora):
    before, after = tensors(shop / "model"), tensors(shop / "lora" / "last")
    assert after.keys() == before.keys() - {"lm_head.weight"} | {"score.weight"}
    adapters = sum(2 * 2 * sum(value.shape) // 2 for name, value in before.items() if "proj" in name)
    assert lora["trained_params"] == adapters + 2 * 16
    assert lora["optimizer_state_bytes"] == 8 * lora["trained_params"] + 8
    for name in before.keys() - {"lm_head.weight"}:
        difference = after[name].astype(np.float64) - before[name]
        if "proj" not in name:
            assert not np.any(difference), name
        else:
            values = np.linalg.svd(difference, compute_uv=False)
            assert values[1] > 100 * values[2], name  # of rank 2
    assert lora["final_val_loss"] < np.log(2)


@pytest.mark.slow
def test_the_best_weights_are_kept_when_later_ones_are_worse(shop):
    rates = {"learning_rate": 3.0, "warmup_steps": 19, "optimizer": "adamw", "steps": 20, "eval_every": 1, "clip": 0.0}
    summary = run(settings(shop, "worse", seq=32, **rates))
    records = [r for r in read_metrics(shop / "worse") if "val_loss" in r]
    order = sorted(
        records, key=lambda r: (-r["val_accuracy"], np.inf if r["val_loss"] is None else r["val_loss"], r["step"])
    )
    assert summary["best_step"] == order[0]["step"] < 20
    assert summary["best_val_accuracy"] == order[0]["val_accuracy"]
    best, last = (tensors(shop / "worse" / name)["score.weight"] for name in ("best", "last"))
    assert np.any(best != last)
    assert {path.name for path in (shop / "worse").iterdir()} >= {"best", "last"}
    assert not [path for path in (shop / "worse").iterdir() if path.suffix in (".partial", ".old")]


@pytest.mark.slow
def test_a_diverged_run_ends_with_the_way_back_and_writes_no_weights(shop, capsys):
    config = settings(shop, "diverged")
    flags = ["--learning-rate=1e30", "--clip=0", "--optimizer=adamw", "--steps=12", "--eval-every=1", "--save-every=1"]
    paths = [
        f"--model={config.model}",
        f"--data={config.data}",
        f"--eval-data={config.eval_data}",
        f"--out={config.out}",
    ]
    with leniency():
        assert main(["finetune", *paths, *flags, "--seq=32", "--batch=8", "--warmup-steps=2"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "error: The run diverged: " in error
    assert f"galore-jax finetune --resume --out {config.out} --learning-rate 5e+29" in error
    step = checkpoint.saved_steps(config.out / "checkpoints")[-1]
    assert f"continue from the checkpoint of step {step} at a lower learning rate" in error
    assert not (config.out / "last").exists()
    assert all(np.all(np.isfinite(value)) for value in tensors(config.out / "best").values())
    summary = run(dataclasses.replace(load_config(config.out)[0], learning_rate=1e-3))
    assert (summary["steps"], summary["resumed_from_step"]) == (12, step)


@pytest.mark.slow
def test_transformers_opens_what_is_written(shop, labels, answers):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(shop / "labels" / "last").eval()
        causal = transformers.AutoModelForCausalLM.from_pretrained(shop / "answers" / "last").eval()
    texts = [row["text"].encode()[:32] for row in LABELLED[96:]]
    ids = torch.tensor([[*text, *[256] * (32 - len(text))] for text in texts])
    with torch.no_grad():
        found = model(ids, attention_mask=ids != 256).logits.argmax(-1).tolist()
        said = causal.generate(torch.tensor([[*b"say c: "]]), max_new_tokens=4, do_sample=False)[0, 7:].tolist()
    assert (
        np.mean([a == row["label"] for a, row in zip(found, LABELLED[96:], strict=True)])
        == labels["final_val_accuracy"]
    )
    assert said == [*b"ccc", 256]


# Interruptions


def interrupted_at(monkeypatch, step, action):
    original = TrainingBatches.__next__

    def take(batches):
        if batches.get_state()["taken"] == step:
            action()
        return original(batches)

    monkeypatch.setattr(TrainingBatches, "__next__", take)


def assert_same_run(shop, name, other):
    assert told(shop / name) == told(shop / other)
    for kind in ("best", "last"):
        ours, theirs = tensors(shop / name / kind), tensors(shop / other / kind)
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())


@pytest.mark.slow
def test_a_run_of_lora_that_was_killed_goes_on_to_the_same_weights(shop, lora, monkeypatch):
    config = settings(shop, "killed", optimizer="lora", lora_rank=2, steps=12)

    def crash():
        raise MemoryError

    with monkeypatch.context() as patch:
        interrupted_at(patch, 8, crash)
        with pytest.raises(MemoryError):
            run(config)
    assert not (shop / "killed" / "last").exists()
    summary = run(dataclasses.replace(load_config(shop / "killed")[0], out=shop / "killed"))
    assert summary["resumed_from_step"] == 5
    assert_same_run(shop, "killed", "lora")


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_goes_on_from_the_command_line(shop, labels, monkeypatch, capsys):
    config = settings(shop, "stopped", optimizer="adamw", steps=24)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
        received = []
        patch.setattr(signal, "raise_signal", received.append)  # to whoever called this
        summary = run(config)
    assert (summary["steps"], summary["best_step"], summary["stopped"]) == (14, 12, "SIGTERM")
    assert received == [signal.SIGTERM]
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith(f"galore-jax finetune --resume --out {shop / 'stopped'}")
    with leniency():
        assert main(command.split("galore-jax ")[-1].split()) == 0
    assert_same_run(shop, "stopped", "labels")
    with leniency():
        assert main(["finetune", "--resume", "--out", str(shop / "stopped")]) == 0
    assert "already has its 24 steps" in capsys.readouterr().out


# Mistakes


def refused(capsys, *arguments, says):
    assert main(["finetune", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err, err


def spoil(folder, how):
    write_model(folder)
    if how == "config":
        (folder / "config.json").unlink()
    elif how == "weights":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("config", "holds no config.json of a model"),
        ("weights", "model.safetensors is damaged or incomplete"),
        ("tokenizer", "tokenizer.json does not exist"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_and_nothing_is_written(how, says, shop, tmp_path, capsys):
    spoil(tmp_path / "model", how)
    out = tmp_path / "runs" / "one"
    refused(
        capsys, "--model", tmp_path / "model", "--data", shop / "labels.jsonl", "--seq", 32, "--out", out, says=says
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--optimizer", "sgd"], "--optimizer 'sgd' is not known; choose one of lora, galore_adamw"),
        (["--seq", "65"], "--seq 65 is longer than the 64 positions"),
        (["--batch", "97"], "labels.jsonl gives 92 examples at --seq 32, and at least 97 are needed"),
        (
            ["--optimizer", "lora", "--lora-rank", "17"],
            "rank=17 is more than the smaller side of layers/attention/k_proj",
        ),
        (["--lora-alpha", "-1"], "--lora-alpha -1.0 must be a positive finite number"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--resume"], "--resume needs --out"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_nothing_is_written(flags, says, shop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, "--model", shop / "model", "--data", shop / "labels.jsonl", "--seq", "32", *flags, says=says)
    assert not list(tmp_path.iterdir())


def test_the_model_and_the_examples_must_be_named(capsys):
    refused(capsys, "--data", "x.jsonl", says="--model")
    refused(capsys, "--model", "x", says="--data")


def test_nothing_is_written_over(shop, labels, capsys):
    common = ["--model", shop / "model", "--data", shop / "labels.jsonl", "--out", shop / "labels"]
    refused(capsys, *common, says="already holds a run; add --resume")


def test_a_run_goes_on_with_files_that_have_moved(shop, lora, tmp_path, capsys):
    shutil.copytree(shop / "model", tmp_path / "elsewhere")
    with leniency():
        assert main(["finetune", "--resume", "--out", str(shop / "lora"), "--model", str(tmp_path / "elsewhere")]) == 0
    assert "already has its 12 steps" in capsys.readouterr().out


def test_a_run_goes_on_only_as_it_was_started(shop, lora, tmp_path, capsys):
    resume = ["--resume", "--out", shop / "lora"]
    refused(capsys, *resume, "--lora-rank", "3", says="--lora-rank is 3, but the run in")
    refused(capsys, *resume, "--steps", "7", says="--steps 7 is less than the 12 steps")
    refused(capsys, "--resume", "--out", tmp_path, says="There is no run to resume")
    (tmp_path / "config.json").write_text("{}")
    refused(capsys, "--resume", "--out", tmp_path, says="holds no run of galore-jax finetune")


@pytest.mark.parametrize(
    ("change", "says"), [("data", "is not the text that the run"), ("model", "is not the model that the run")]
)
def test_a_run_goes_on_only_with_what_it_was_started_with(change, says, shop, lora, capsys):
    file = shop / {"data": "labels.jsonl", "model": "model/model.safetensors"}[change]
    before = file.read_bytes()
    try:
        if change == "data":
            file.write_bytes(before.replace(b'"label": 1', b'"label": 0', 1))
        else:
            file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        refused(capsys, "--resume", "--out", shop / "lora", says=says)
    finally:
        file.write_bytes(before)


def test_generate_says_which_folder_of_the_run_it_wants(shop, lora, capsys):
    assert main(["generate", "--model", str(shop / "lora"), "--prompt", "a"]) == 2
    says = f"is a run of galore-jax finetune; the model in it is for `galore-jax classify --model {shop / 'lora' / 'best'}`."
    assert says in capsys.readouterr().err
