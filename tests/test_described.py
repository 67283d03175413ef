# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``galore-jax describe``, and what it describes: the parameters of a run and those of a Hugging Face folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import galore_jax
from galore_jax import cli
from galore_jax.models import Llama, LlamaConfig, save_hf
from galore_jax.training.config import PretrainConfig

MODEL = LlamaConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    save_hf(Llama(MODEL, rngs=nnx.Rngs(0)), path)
    return path


def described(capsys, *arguments):
    assert cli.main(["describe", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_hugging_face_folder_has_the_matrices_and_the_bytes_of_the_model_in_it(folder, capsys):
    found = described(capsys, folder, "--rank", "8")
    by_path = {record["path"]: record for record in found["parameters"]}
    q, k, down = (
        by_path[f"model.layers.1.{name}.weight"] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    )
    # (inputs, outputs), which torch has the other way round.
    assert [record["matrix"] for record in (q, k, down)] == [[32, 32], [32, 16], [48, 32]]
    assert [record["rank"] for record in (q, k, down)] == [8, 8, 8]
    assert k["state_bytes"] == 4 * (2 * 32 * 8 + 16 * 8 + 3)  # with three numbers of diagnostics
    reasons = {path: record["reason"] for path, record in by_path.items() if not record["matrix"]}
    assert reasons == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        "model.norm.weight": "one axis",
    } | {
        f"model.layers.{i}.{name}.weight": "one axis"
        for i in (0, 1)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    params = nnx.state(nnx.eval_shape(lambda: Llama(MODEL, rngs=nnx.Rngs(0))), nnx.Param)
    assert found["params_bytes"] == galore_jax.tree_bytes(params)
    stacked = galore_jax.state_bytes(galore_jax.galore_adamw(1e-3, rank=8), params)
    assert abs(found["state_bytes"] - stacked) < 100 * len(by_path)  # counters and diagnostics of each parameter


def test_a_table_for_people(folder, capsys):
    assert cli.main(["describe", str(folder), "--rank", "8"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn.k_proj.weight" in printed
    assert "14 of 21 parameters are projected" in printed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is no folder; name a run folder"),
        (lambda path: path.mkdir(), "holds no config.json of a model"),
        (
            lambda path: (path / "best").mkdir(parents=True) or (path / "config.json").write_text('{"task": "text"}'),
            "is a run of galore-jax finetune",
        ),
        (
            lambda path: path.mkdir() or (path / "config.json").write_text('{"model_type": "llama"}'),
            "holds a config.json and no safetensors",
        ),
        (lambda path: path.mkdir() or (path / "a.safetensors").write_bytes(b"not"), "is damaged"),
    ],
)
def test_a_folder_that_cannot_be_described_ends_with_one_sentence(make, message, tmp_path, capsys):
    make(tmp_path / "model")
    assert cli.main(["describe", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


PARAMS = {
    "attn": {"q": {"kernel": jax.ShapeDtypeStruct((32, 64), jnp.float32)}},
    "lm_head": {"kernel": jax.ShapeDtypeStruct((32, 101), jnp.float32)},
    "scale": jax.ShapeDtypeStruct((3,), jnp.float32),
}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.inject_hyperparams(lambda learning_rate: optax.chain(tx, optax.scale(learning_rate)))(0.1),
        lambda tx: optax.partition(
            {"low": tx, "full": optax.adam(0.1)}, {"attn": "low", "lm_head": "full", "scale": "full"}
        ),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.masked(tx, {"attn": True, "lm_head": False, "scale": True}),
    ],
    ids=["alone", "chain", "injected", "partition", "multi-steps", "masked"],
)
@pytest.mark.parametrize("preset", ["galore_adamw", "galore_muon", "ldadam", "galore_adamw_8bit"])
def test_an_optimizer_inside_others_is_described(preset, wrap):
    tx = wrap(getattr(galore_jax, preset)(0.1, rank=8))
    found = galore_jax.describe(tx, PARAMS)
    assert found.state_bytes == galore_jax.state_bytes(tx, PARAMS)
    kernel, head, scale = found.parameters
    assert (kernel.path, kernel.matrix, kernel.batch, kernel.rank, kernel.side) == (
        "attn/q/kernel",
        (32, 64),
        (),
        8,
        "left",
    )
    assert head.reason in ("head", "no transformation of galore_jax has it")
    assert scale.matrix is None
    assert [record.path for record in found.projected] == ["attn/q/kernel"]
    assert sum(record.state_bytes for record in found.parameters) <= found.state_bytes


def test_a_run_is_described_with_its_own_optimizer(tmp_path, capsys):
    run = PretrainConfig(optimizer="fira_adamw", rank=4)
    fingerprints = {"data_fingerprint": "", "tokenizer_fingerprint": ""}
    fields = dataclasses.asdict(run.resolved) | {"model_config": dataclasses.asdict(MODEL)} | fingerprints
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = described(capsys, tmp_path)
    ranks = {record["rank"] for record in found["parameters"]}
    assert ranks == {4, None}
    assert {tuple(record["batch"]) for record in found["parameters"] if record["matrix"]} == {(2,)}
    assert described(capsys, tmp_path, "--optimizer", "adamw")["state_bytes"] > found["state_bytes"]


def test_a_transformation_that_was_initialized_before_is_described_too():
    """JAX doesn't trace a function again for shapes that it knows."""
    tx, params = galore_jax.galore_adamw(0.1, rank=8), {"w": jnp.ones((16, 32))}
    galore_jax.state_bytes(tx, params)
    for _ in range(2):
        assert galore_jax.describe(tx, params).projected
