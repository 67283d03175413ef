# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Folders that hold models: from a run to ``export``, ``finetune`` and ``classify``, and what each command says of the others."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from finetuning import BYTES, labelled, write_lines
from flax import nnx
from problems import leniency, shared_programs  # noqa: F401
from test_llama import forward

from galore_jax.cli import main
from galore_jax.models import load_hf, load_hf_classifier, merge_lora
from galore_jax.training import FinetuneConfig, PretrainConfig, checkpoint, run_finetune, run_pretrain
from galore_jax.training.finetune import prepare
from galore_jax.training.program import program
from galore_jax.training.run_folder import kind_of, load_config
from galore_jax.training.tokenizer import load_tokenizer

# They train.
pytestmark = pytest.mark.slow

TEXT = "\n\n".join(f"Paragraph {n} of a text that is long enough for some batches of a tiny run." for n in range(100))
# All as long, so that one program serves them, and names in the place of 0 and 1.
ROWS = [{"text": row["text"][-24:], "label": ("bad", "good")[row["label"]]} for row in labelled(120)]
TOKENS = np.array([[*b"Paragraph 7 of a text"]], np.int32)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder of everything: a pre-trained run, a classifier fine-tuned from it, and the Hugging Face folder of either."""
    folder = tmp_path_factory.mktemp("shop with a space")
    (folder / "text.txt").write_text(TEXT)
    write_lines(folder / "rows.jsonl", ROWS)
    short = {"data": str(folder / "text.txt"), "seq": 16, "batch": 2, "sample_tokens": 0, "steps": 2, "save_every": 1}
    with leniency():
        run_pretrain(PretrainConfig(**short, optimizer="lora", rank=2, out=folder / "run"), BYTES)
        assert main(["export", str(folder / "run"), str(folder / "exported")]) == 0
        run_finetune(
            FinetuneConfig(
                folder / "run", str(folder / "rows.jsonl"), optimizer="adamw", learning_rate=0.02, steps=24,
                batch=8, seq=24, eval_every=24, log_every=24, out=folder / "tuned",
            )
        )  # fmt: skip
    return folder


def model_of(run, step):
    """The model of a checkpoint, by the parts that training is made of."""
    config, model_config, _ = load_config(run)
    built = program(config, model_config)
    model = nnx.merge(built.graphdef, checkpoint.restore_params(run / "checkpoints", step, built.state[0]))
    merge_lora(model)
    return model


# Export


@pytest.mark.parametrize("step", [1, 2])
def test_an_exported_model_has_the_logits_of_its_checkpoint(shop, tmp_path, step):
    out = tmp_path / "new" / "out"
    assert main(["export", str(shop / "run"), str(out), "--step", str(step)]) == 0
    expected = forward(model_of(shop / "run", step), jnp.asarray(TOKENS))
    np.testing.assert_allclose(forward(load_hf(out), jnp.asarray(TOKENS)), expected, atol=1e-6)
    other = forward(model_of(shop / "run", 3 - step), jnp.asarray(TOKENS))
    assert np.abs(other - expected).max() > 1e-4
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_tokenizers_library_reads_an_exported_tokenizer(shop):
    """It is what transformers opens."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(shop / "exported" / "tokenizer.json"))
    text = "a\tpär €\n" + "".join(map(chr, range(256)))
    assert theirs.encode(text).ids == list(text.encode())
    assert theirs.decode(list(text.encode())) == text
    assert theirs.token_to_id("<|endoftext|>") == 256
    assert load_tokenizer(str(shop / "exported" / "tokenizer.json")).vocab_size == 257


def test_transformers_opens_an_exported_model_and_computes_its_logits(shop):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(shop / "exported").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(shop / "exported")
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (256, 256)
    assert tokenizer("Paragraph 7 of a text").input_ids == TOKENS[0].tolist()
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(theirs, forward(model_of(shop / "run", 2), jnp.asarray(TOKENS)), atol=1e-4)


def test_generate_says_the_same_of_a_run_and_of_its_export(shop, capsys):
    texts = []
    for model in ("run", "exported"):
        flags = ["--prompt", "Para", "--max-new-tokens", "8", "--temperature", "0"]
        assert main(["generate", "--model", str(shop / model), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# Classify


def classified(capsys, *arguments):
    assert main(["classify", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_a_pretrained_run_becomes_a_classifier_of_named_labels_that_classify_uses(shop, capsys):
    summary = json.loads((shop / "tuned" / "summary.json").read_text())
    assert summary["labels"] == ["bad", "good"]
    assert sum(summary["label_counts"]) == 114
    matrix = np.array(summary["confusion"])
    assert (matrix.shape, matrix.sum()) == ((2, 2), 6)
    assert np.trace(matrix) / 6 == summary["final_val_accuracy"]
    fields = json.loads((shop / "tuned" / "best" / "config.json").read_text())
    assert fields["id2label"] == {"0": "bad", "1": "good"}

    best = shop / "tuned" / "best"
    lines, err = classified(capsys, "--model", best, "--data", shop / "rows.jsonl", "--json", "--batch", "7")
    found = [json.loads(line) for line in lines]
    assert [one["text"] for one in found] == [row["text"] for row in ROWS]
    right = [one["label"] == row["label"] for one, row in zip(found, ROWS, strict=True)]
    assert np.mean(right) > 0.9
    assert err == f"accuracy {np.mean(right):.4f} on 120 texts with a label\n"
    # One at a time, without padding.
    model = load_hf_classifier(best)
    ids = np.frombuffer(ROWS[0]["text"].encode(), np.uint8).astype(np.int32)
    logits = np.asarray(model(jnp.asarray(ids[None]), jnp.asarray([ids.size], jnp.int32)))[0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(list(found[0]["probabilities"].values()), expected, rtol=1e-4)
    assert found[0]["probability"] == max(found[0]["probabilities"].values())


def test_a_run_with_labels_says_how_many_each_has_and_how_often_the_most_frequent_one_is_right(shop, tmp_path):
    rows = [{"text": "abcd", "label": "good" if i % 4 else "bad"} for i in range(80)]
    data = str(write_lines(tmp_path / "rows.jsonl", rows))
    run = prepare(FinetuneConfig(shop / "run", data, optimizer="adamw", steps=2, batch=4, seq=16, out=tmp_path / "out"))
    held = [int(example.targets[0]) for example in run.validation.examples]
    assert sorted(set(held)) == [0, 1]
    assert run.description.splitlines()[-1] == (
        f"labels: bad: {20 - held.count(0)}, good: {60 - held.count(1)}; "
        f"the most frequent one is right on {held.count(1) / len(held):.1%} of the held-out texts"
    )


def test_texts_come_from_a_flag_a_file_of_lines_or_standard_input(shop, tmp_path, capsys, monkeypatch):
    model = ["--model", shop / "tuned" / "best"]
    texts = [row["text"] for row in ROWS[:3]]
    (tmp_path / "lines.txt").write_text("\r\n".join(texts) + "\r\n\r\n")
    wanted, _ = classified(capsys, *model, "--data", tmp_path / "lines.txt")
    assert len(wanted) == 3
    assert all(line.split("\t")[0] in ("bad", "good") for line in wanted)
    assert classified(capsys, *model, "--text", texts[0])[0] == wanted[:1]
    rows = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    for given, flags in (("\n".join(texts), []), (rows, ["--data", "-", "--text-column", "body"])):
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        assert classified(capsys, *model, *flags)[0] == wanted


def refused(capsys, *arguments, says):
    assert main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err, err


@pytest.mark.parametrize(
    ("data", "flags", "says"),
    [
        (None, ["--text", "a", "--data", "b"], "--text and --data are both given"),
        (None, ["--text", ""], "--text is empty; "),
        (None, ["--data", "nowhere.txt"], "--data nowhere.txt does not exist"),
        ("", [], "holds no text"),
        ('{"body": "a"}\n', [], "line 1 has no text in 'text', only 'body': choose with --text-column."),
        ('{"text": "a"}\n{"text": 3}\n', [], "line 2 has no text in 'text', only 'text'"),
    ],
)
def test_mistakes_of_classify_are_one_sentence(shop, tmp_path, capsys, data, flags, says):
    if data is not None:
        (tmp_path / "data.txt").write_text(data)
        flags = ["--data", tmp_path / "data.txt"]
    refused(capsys, "classify", "--model", shop / "tuned" / "best", *flags, says=says)


# What a folder is


def test_every_command_says_what_a_folder_is_and_which_command_is_for_it(shop, tmp_path, capsys):
    run, tuned, model, classifier = (shop / name for name in ("run", "tuned", "exported", "tuned/best"))
    assert [kind_of(folder) for folder in (run, tuned, model, classifier, shop)] == [
        "pretrained", "finetuned", "model", "classifier", "nothing",
    ]  # fmt: skip

    def command(name, folder):
        return f"which is for `galore-jax {name} --model '{folder}'`"

    inside = f"is a run of galore-jax finetune; the model in it is for `galore-jax classify --model '{classifier}'`."
    data = ["--data", shop / "rows.jsonl", "--out", tmp_path / "out"]
    refused(capsys, "generate", "--model", classifier, "--prompt", "a", says=command("classify", classifier))
    refused(capsys, "generate", "--model", tuned, "--prompt", "a", says=inside)
    refused(capsys, "finetune", "--model", classifier, *data, says=command("classify", classifier))
    refused(capsys, "finetune", "--model", tuned, *data, says=inside)
    refused(capsys, "classify", "--model", run, "--text", "a", says=command("generate", run))
    refused(capsys, "classify", "--model", model, "--text", "a", says=command("generate", model))
    says = f"is a run of galore-jax finetune; name the model in it, {classifier}."
    refused(capsys, "classify", "--model", tuned, "--text", "a", says=says)
    refused(capsys, "describe", tuned, says=says)
    out = tmp_path / "out"
    refused(capsys, "export", tuned, out, says=inside)
    refused(capsys, "export", model, out, says=command("generate", model))
    for name, folder in (("generate", shop), ("classify", shop)):
        flag = {"generate": "--prompt", "classify": "--text"}[name]
        refused(capsys, name, "--model", folder, flag, "a", says="holds no config.json of a model; name")
    refused(capsys, "export", shop, out, says="holds no config.json of a model; name a run folder")
    refused(capsys, "export", shop / "no", out, says="is no folder; name a run folder")
    refused(capsys, "pretrain", "--resume", "--out", tuned, says="continue it with `galore-jax finetune --resume")
    refused(capsys, "finetune", "--resume", "--out", run, says="continue it with `galore-jax pretrain --resume")
    assert list(tmp_path.iterdir()) == []


def test_the_library_says_what_is_a_classifier_and_what_a_language_model(shop):
    with pytest.raises(
        ValueError, match=r"best holds a classifier: load_hf_classifier reads it, and `galore-jax classify`"
    ):
        load_hf(shop / "tuned" / "best")
    with pytest.raises(
        ValueError, match=r"has no tensor score\.weight: it is no classifier, and load_hf reads language models"
    ):
        load_hf_classifier(shop / "exported")
    assert load_hf_classifier(shop / "tuned" / "best", "bfloat16").body.norm.scale.dtype == jnp.bfloat16


def test_a_folder_that_only_can_be_read_is_one_sentence_for_every_command(shop, tmp_path, capsys, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    opened = os.open
    (tmp_path / "empty").mkdir()
    commands = [
        ["pretrain", "--data", shop / "text.txt", "--out"],
        ["finetune", "--model", shop / "exported", "--data", shop / "text.txt", "--out"],
        ["tokenize", "--data", shop / "text.txt", "--out"],
        ["export", shop / "run"],
    ]
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        # The lock of a run is the first that it writes into a folder that is there.
        patch.setattr(os, "open", lambda path, *rest: (refuse if str(path).endswith(".lock") else opened)(path, *rest))
        for command in commands:
            for out in (tmp_path / "new", tmp_path / "empty"):
                refused(capsys, *command, out, says="Read-only file system")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_export_writes_over_nothing_and_names_checkpoints_that_are_there(shop, tmp_path, capsys):
    refused(capsys, "export", shop / "run", shop / "exported", says="exists, and nothing is written over")
    refused(capsys, "export", shop / "run", tmp_path / "a", "--step", "7", says="--step 7 has no checkpoint in")
    refused(capsys, "generate", "--model", shop / "exported", "--prompt", "a", "--step", "1", says="has no checkpoints")
    (tmp_path / "file").touch()
    refused(capsys, "export", shop / "run", tmp_path / "file" / "b", says="b cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_with_an_older_byte_tokenizer_is_read_and_exported_as_transformers_reads_it(shop, tmp_path, capsys):
    shutil.copytree(shop / "run", tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "Bytes"}}))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written, expected = ((place / "tokenizer.json").read_text() for place in (tmp_path / "out", shop / "exported"))
    assert written == expected
