# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs on a mesh: the same numbers as on one device, made and kept where they belong, and restored on any devices."""

import dataclasses
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P
from problems import leniency, shared_programs  # noqa: F401
from runs import TINY, tokens

from galore_jax.training import checkpoint, config as settings, run_folder
from galore_jax.training.checkpoint import Checkpoint, CheckpointWriter
from galore_jax.training.config import PretrainConfig
from galore_jax.training.loop import run_pretrain
from galore_jax.training.mesh import AXES, axis_sizes, make_mesh, param_shardings
from galore_jax.training.metrics import read_metrics
from galore_jax.training.program import program

MODEL = dataclasses.replace(TINY, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=56)
CONFIG = PretrainConfig(
    rank=8, update_proj_gap=2, batch=8, seq=8, learning_rate=1e-3, warmup_steps=0, diagnostics=False
)


def mesh_of(text):
    """On as many of the eight devices as it is for."""
    return make_mesh(text, jax.devices()[: int(np.prod(list(axis_sizes(text).values())))])


def built(mesh, model=MODEL, **overrides):
    return program(dataclasses.replace(CONFIG, **overrides), model, None if mesh is None else mesh_of(mesh))


def run(made, steps=4):
    """The parameters and losses of some steps; everything has its sharding before and after."""
    with made.on_mesh():
        params, opt_state = made.init(jax.random.key(0))
        step = made.step.lower(params, opt_state, made.batch).compile()
    losses = []
    for number in range(steps):
        if made.mesh is not None:
            assert jax.tree.map(lambda x: x.sharding, (params, opt_state)) == made.shardings
        batch = jax.device_put(tokens(*made.batch.shape, number), made.batch.sharding)
        params, opt_state, metrics = step(params, opt_state, batch)
        losses.append(float(metrics["loss"]))
    return params, losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("data=2,fsdp=2,model=2", {"accumulate": 2}),
        ("fsdp=4,model=2", {"layerwise": True, "weights": "int8", "optimizer": "q_galore_adamw_8bit"}),
    ],
)
def test_steps_on_a_mesh_equal_those_on_one_device(mesh, settings):
    expected, losses = run(built(None, **settings))
    params, sharded_losses = run(built(mesh, **settings))
    np.testing.assert_allclose(sharded_losses, losses, rtol=0, atol=1e-5)
    for (path, found), wanted in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    assert losses[-1] != losses[0]


@pytest.mark.slow
def test_the_benchmark_compares_steps_on_a_mesh_with_those_on_one_device(script, monkeypatch, capsys):
    sharded_steps = script("sharded_steps")
    chosen = ["--optimizers", "galore_adamw", "--meshes", "data=8", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["sharded_steps.py", *chosen])
    sharded_steps.main()
    found = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    assert found[0][1:-1] == ["optimizer", "step", "data=8", "losses"]
    assert [row[1:3] for row in found[2:4]] == [["`galore_adamw`", step] for step in ("plain", "layer-wise")]
    assert all(float(cell) <= 1e-5 for row in found[2:4] for cell in row[3:5])
    monkeypatch.setattr(sharded_steps, "differences", lambda *arguments: [(0.0, 2e-5)])
    with pytest.raises(SystemExit, match=r"2\.0e-05 is above 1e-05"):
        sharded_steps.main()


def test_the_rules_cut_what_they_divide():
    params = built(None).state[0]
    found = param_shardings(mesh_of("data=2,fsdp=2,model=2"), params)
    attention, mlp = found["layers"]["attention"], found["layers"]["mlp"]
    assert attention["q_proj"]["kernel"].spec == mlp["up_proj"]["kernel"].spec == P(None, "fsdp", "model")
    assert attention["o_proj"]["kernel"].spec == mlp["down_proj"]["kernel"].spec == P(None, "model", "fsdp")
    assert found["embed_tokens"]["embedding"].spec == P(("model", "fsdp"), None)
    assert found["lm_head"]["kernel"].spec == P("fsdp", "model")
    assert found["norm"]["scale"].spec == P()
    seven = {"lm_head": {"kernel": jax.ShapeDtypeStruct((32, 7), "float32")}}
    assert param_shardings(mesh_of("fsdp=2,model=2"), seven)["lm_head"]["kernel"].spec == P("fsdp", None)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "q_galore_adamw_8bit", "fira_adamw"])
def test_parameters_and_state_of_a_7b_model_fall_with_the_number_of_devices(name):
    """Within 5 %; shapes alone."""
    config = PretrainConfig(model="7b", optimizer=name, dtype="bf16", batch=16, rank=1024)
    model = config.model_config(32000)

    def bytes_a_device(number):
        mesh = AbstractMesh((1, number, 1), AXES, axis_types=(AxisType.Auto,) * 3)
        parts = program(config, model, mesh).state
        return [
            sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(part))
            for part in parts
        ]

    whole = bytes_a_device(1)
    for number in (4, 16):
        np.testing.assert_allclose(np.array(bytes_a_device(number)) * number, whole, rtol=0.05)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_restores_on_one_and_four_bit_for_bit(tmp_path):
    model = dataclasses.replace(MODEL, vocab_size=256)  # whose embedding is large enough for moments in 8 bits
    settings = {"model": model, "optimizer": "q_galore_adamw_8bit", "weights": "int8", "layerwise": True}
    made = built("data=2,fsdp=2,model=2", **settings)
    state = jax.tree.map(
        lambda x, sharding: jax.device_put(np.arange(x.size).reshape(x.shape).astype(x.dtype), sharding),
        made.state,
        made.shardings,
    )
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(Checkpoint(3, *state, {}, []))
    for mesh in (None, "fsdp=2,model=2"):
        other = built(mesh, **settings)
        restored = checkpoint.restore(tmp_path, 3, *other.state)
        jax.tree.map(np.testing.assert_array_equal, (restored.params, restored.opt_state), state)
        if mesh is not None:
            assert jax.tree.map(lambda x: x.sharding, (restored.params, restored.opt_state)) == other.shardings
    layers, rest = state[1].layers, state[1].rest
    assert optax.tree.get(rest, "mu")["embed_tokens"]["embedding"].codes.dtype == jnp.uint8
    assert optax.tree.get(layers, "left")["layers"]["mlp"]["up_proj"]["kernel"].packed.dtype == jnp.uint8
    assert any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(state[0]))


@pytest.mark.slow
def test_a_run_on_a_mesh_goes_on_without_one(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 60)
    config = dataclasses.replace(
        CONFIG, data=str(text), sample_tokens=0, log_every=1, eval_tokens=64, optimizer="adamw", steps=4, seed=1
    )
    model = dataclasses.replace(MODEL, vocab_size=304)
    with leniency():
        run_pretrain(dataclasses.replace(config, out=tmp_path / "whole"), model)
        run_pretrain(dataclasses.replace(config, save_every=2, out=tmp_path / "mesh", mesh="data=4,fsdp=2"), model)
        shutil.rmtree(tmp_path / "mesh" / "checkpoints" / "4")
        saved, _, _ = run_folder.load_config(tmp_path / "mesh")
        assert saved.mesh == "data=4,fsdp=2"
        resumed = run_pretrain(dataclasses.replace(saved, mesh=None))
    assert resumed["resumed_from_step"] == 2
    whole, moved = ([r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("whole", "mesh"))
    np.testing.assert_allclose(moved, whole, rtol=0, atol=1e-5)
    assert len(whole) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline=2", "--mesh pipeline=2 cannot be read at 'pipeline=2'; write each of data, fsdp and model"),
        ("fsdp=2,fsdp=4", "cannot be read at 'fsdp=4'"),
        ("fsdp=0", "cannot be read at 'fsdp=0'"),
        ("fsdp=3", "--mesh fsdp=3 cuts a batch into data x fsdp = 3 parts, which does not divide the 8 sequences"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        settings.check(dataclasses.replace(CONFIG, mesh=text))


def test_a_mesh_for_another_number_of_devices_is_refused():
    with pytest.raises(ValueError, match="--mesh fsdp=4 is for 4 devices, but there are 8"):
        make_mesh("fsdp=4")
