# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``galore-jax plan``: what it counts is what a run holds, what it compiles is what a run compiles, and every answer it has."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import optimized_compilation, quickly  # noqa: F401
from test_targets import needs_extra

from galore_jax import GaLoreMemoryWarning, q_galore_adamw_8bit
from galore_jax.cli import main
from galore_jax.layerwise import layerwise
from galore_jax.memory import state_bytes_by_kind, tree_bytes
from galore_jax.models import LlamaConfig
from galore_jax.models.huggingface_config import config_from_huggingface
from galore_jax.models.llama import block_stack
from galore_jax.offload import offload_state
from galore_jax.planning.targets import TARGETS, compile_for, target
from galore_jax.training import loop, plan_report
from galore_jax.training.config import PretrainConfig
from galore_jax.training.plan import PlanConfig, plan, prepare
from galore_jax.training.program import _weights, check_host_memory

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "vocab_size": 257, "max_position_embeddings": 64,
}  # fmt: skip
SMALL = {"seq": 16, "rank": 4}
PROMISED = [
    "model", "optimizer", "target", "params_bytes", "optimizer_state_bytes", "argument_bytes", "temporary_bytes",
    "peak_bytes", "fits", "compile_seconds",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _as_for_users():
    """A plan is in bfloat16, and jax.nn.dot_product_attention promotes its scores to float32 by itself."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a config.json as Hugging Face's repositories hold it."""
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(SHAPE | {"model_type": "llama", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}))
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n\n".join(f"The {n}th paragraph of a text that is long enough for a few batches." for n in range(200))
    )
    return str(path)


def flags(tiny, *others):
    return ["plan", "--model", tiny, "--seq", "16", "--rank", "4", "--target", "here", *others]


def live_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


KINDS_OF_STATE = (
    "adamw", "adamw_8bit", "adafactor", "muon", "galore_adamw", "galore_adafactor", "q_galore_adamw_8bit", "apollo_mini",
    "ldadam", "galore_muon", "muon_4bit",
)  # fmt: skip
LAYERWISE = [
    ("adamw", {"layerwise": True}),
    ("adafactor", {"layerwise": True, "weights": "int8"}),
    pytest.param("galore_adamw", {"layerwise": True, "weights": "int8"}, marks=pytest.mark.slow),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("optimizer", "options"), [*((name, {}) for name in KINDS_OF_STATE), *LAYERWISE])
def test_the_exact_bytes_are_those_of_the_live_arrays_of_a_run(tiny, text, tmp_path, optimizer, options):
    config = PlanConfig(model=tiny, optimizer=optimizer, target="here", **SMALL, **options)
    row = prepare(config).exact_bytes()
    with quickly():
        run = loop.prepare(
            dataclasses.replace(config.pretrain_config(), data=text, out=tmp_path / "run", sample_tokens=0),
            config.model_config(),
        )
    assert row["params_bytes"] == live_bytes(run.params)
    assert row["optimizer_state_bytes"] == live_bytes(run.opt_state)
    assert row["optimizer_state"] == state_bytes_by_kind(run.opt_state)
    assert sum(row["optimizer_state"].values()) == row["optimizer_state_bytes"]


@pytest.mark.slow
def test_a_plan_of_the_demo_has_the_bytes_that_its_run_sums_up(text, tmp_path, capsys):
    run_flags = ["--model", "demo", "--batch", "2", "--seq", "16", "--rank", "8"]
    out = tmp_path / "run"
    steps = ["--data", text, "--steps", "2", "--eval-tokens", "100", "--sample-tokens", "0", "--out", str(out)]
    with quickly():
        assert main(["pretrain", *run_flags, *steps]) == 0
    capsys.readouterr()
    assert main(["plan", *run_flags, "--vocab-size", "257", "--dtype", "f32", "--target", "here", "--json"]) == 0
    row, summary = json.loads(capsys.readouterr().out), json.loads((out / "summary.json").read_text())
    sizes = ("params_bytes", "optimizer_state_bytes")
    assert [row[size] for size in sizes] == [summary[size] for size in sizes]
    assert row["fits"]


@pytest.mark.slow
def test_the_arguments_of_the_compiled_step_are_parameters_state_and_batch(tiny):
    row = plan(PlanConfig(model=tiny, optimizer="adamw", batch=2, accumulate=2, target="here", **SMALL))
    batch = 2 * 17 * 4
    assert row["argument_bytes"] == row["params_bytes"] + row["optimizer_state_bytes"] + batch
    assert row["alias_bytes"] == row["params_bytes"] + row["optimizer_state_bytes"]
    assert row["peak_bytes"] == (
        row["argument_bytes"] + row["output_bytes"] - row["alias_bytes"] + row["temporary_bytes"]
    )
    assert row.keys() >= set(PROMISED)


@pytest.mark.slow
@needs_extra
@pytest.mark.parametrize("target", ["rtx4090", "tpu-v5e"])
@pytest.mark.parametrize("options", [{}, {"layerwise": True, "weights": "int8"}], ids=["plain", "layer-wise int8"])
def test_the_step_of_a_run_is_compiled_for_hardware_that_is_not_there(tiny, target, options):
    row = plan(PlanConfig(model=tiny, target=target, **SMALL, **options))
    state = row["params_bytes"] + row["optimizer_state_bytes"]
    assert row["fits"]
    assert row["alias_bytes"] > 0.99 * state  # all but counters and diagnostics, which are metrics as well
    assert row["peak_bytes"] >= row["argument_bytes"] > 0.99 * state  # jit drops those that are not read
    assert row["compile_seconds"] > 0
    assert row["missing"] is None is row["refusal"]


@pytest.mark.slow
@needs_extra
def test_int8_weights_are_drawn_one_after_the_other():
    """The program that draws them has temporaries for one matrix in bfloat16, where two of a shape are drawn at once if let."""
    config = PretrainConfig(dtype="bf16", weights="int8", layerwise=True)
    model = config.model_config(256)
    draw = functools.partial(_weights, config, model)
    largest = 2 * model.num_hidden_layers * model.hidden_size * model.intermediate_size
    assert compile_for(TARGETS["h100"], draw, jax.random.key(0)).temporary_bytes < 1.5 * largest


@pytest.mark.slow
@needs_extra
@pytest.mark.parametrize("target", ["rtx3060-12gb", "rtx4090"])
def test_the_update_of_an_embedding_is_never_written_in_float32(target):
    """A layer-wise step updates the embedding apart.  XLA writes what two kernels need if the card's cache is small."""
    rest = {"embedding": jax.ShapeDtypeStruct((262_208, 2560), "bfloat16")}
    tx = q_galore_adamw_8bit(1e-3, rank=512)
    with pytest.warns(GaLoreMemoryWarning):
        state = jax.eval_shape(tx.init, rest)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # As in a step, the memory of the gradient is free once it has been read.
    with pytest.warns(match="donated buffers were not usable"):
        found = compile_for(TARGETS[target], update, rest, state, rest, donate_argnums=(0, 1, 2))
    # Two bytes are the new codes of two moments, and two the new embedding.
    assert found.temporary_bytes / (262_208 * 2560) < 4.2


@pytest.mark.slow
@needs_extra
def test_a_model_that_the_compiler_refuses_has_a_plan(capsys):
    assert main(["plan", "--model", "13b", "--optimizer", "adamw", "--target", "tpu-v5e"]) == 0
    printed = capsys.readouterr().out
    assert "no, " in printed
    assert "adamw: Ran out of memory" in printed


@pytest.mark.slow
def test_one_gradient_of_everything_or_of_a_layer(tiny):
    count = LlamaConfig(**SHAPE).num_params
    rest = 2 * 257 * 32 + 32

    def size(**options):
        config = PlanConfig(model=tiny, optimizer="adamw", target="here", **SMALL, **options)
        return prepare(config).exact_bytes()

    assert size()["gradient_bytes"] == 2 * count
    assert size(dtype="f32")["gradient_bytes"] == 4 * count
    assert size(batch=4, accumulate=2)["gradient_bytes"] == 4 * count  # micro-batches are summed in float32
    assert size(layerwise=True)["gradient_bytes"] == 2 * rest
    assert size(layerwise=True, vocab_size=4)["gradient_bytes"] == 2 * (count - rest) // 3
    # A large embedding is updated before the gradient of the head is computed.
    assert size(layerwise=True, vocab_size=2**19)["gradient_bytes"] == 2 * (2**19 * 32 + 32)


@needs_extra
@pytest.mark.slow
def test_gradients_of_embedding_and_head_are_never_there_together():
    """Sums over micro-batches are float32; new weights and moments take as much as another sum, and casts a third."""
    row = plan(
        PlanConfig(
            model="demo",
            vocab_size=200_000,
            optimizer="galore_adamw_8bit",
            target="rtx4090",
            layerwise=True,
            batch=2,
            accumulate=2,
            seq=64,
        )
    )
    one = 4 * 200_000 * 128
    assert row["gradient_bytes"] == one + 4 * 128
    assert row["temporary_bytes"] < 3.1 * one


def test_kinds_of_state():

    from galore_jax import galore_adamw

    params = {"kernel": jnp.ones((3, 64, 256)), "norm": {"scale": jnp.ones((3, 64))}}
    tx = galore_adamw(0.01, rank=8, diagnostics=True)
    stacked = state_bytes_by_kind(jax.vmap(tx.init)(params))  # as a layer-wise step holds it: counters are arrays too
    assert stacked["bases"] == 4 * 3 * 64 * 8
    assert stacked["moments"] == 2 * 4 * (3 * 8 * 256 + 3 * 64)
    assert stacked["scales"] == 0
    assert sum(stacked.values()) == tree_bytes(jax.vmap(tx.init)(params))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "9b"], "Unknown model preset '9b'; choose one of demo, "),
        (["--model", "9b.json"], "9b.json does not exist; name the config.json of a Hugging Face model."),
        (["--optimizer", "sgd"], "--optimizer 'sgd' is not known; choose one of galore_adamw, "),
        (["--compare", "adamw,sgd"], "--optimizer 'sgd' is not known; choose one of galore_adamw, "),
        (["--target", "rtx9"], "Target 'rtx9' is not known (did you mean "),
        (["--seq", "5000"], "--seq 5000 is longer than the 2048 positions of --model 7b."),
        (["--batch", "3", "--accumulate", "2"], "--batch 3 is not a multiple of --accumulate 2; "),
        (["--weights", "int8"], "--weights int8 needs --layerwise: "),
        (["--weights", "int4"], "invalid choice 'int4' for argument '--weights'. "),
        (["--plot", "chart.pdf"], "--plot chart.pdf must be a .png in a folder that exists."),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: " + message)
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "has model_type 'gpt2'; only 'llama', 'mistral', "),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'; only 'silu'"),
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
    ],
)
def test_a_config_json_of_another_model_is_refused(change, message, tiny, tmp_path):
    path = tmp_path / "config.json"
    fields = json.loads(Path(tiny).read_text()) | change
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        config_from_huggingface(path)


def test_a_config_json_has_the_shape_of_the_model(tiny):
    assert config_from_huggingface(Path(tiny), dtype="bfloat16") == LlamaConfig(
        **SHAPE, rms_norm_eps=1e-5, dtype="bfloat16"
    )


@pytest.mark.slow
def test_several_optimizers_make_a_list_a_table_and_a_chart(tiny, tmp_path, capsys):
    chart = tmp_path / "chart.png"
    compare = flags(tiny, "--compare", "adamw,adafactor")
    assert main([*compare, "--json", "--plot", str(chart)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["optimizer"] for row in rows] == ["adamw", "adafactor"]
    assert rows[0]["optimizer_state_bytes"] > rows[1]["optimizer_state_bytes"]
    assert chart.read_bytes().startswith(b"\x89PNG")
    table = plan_report.table(PlanConfig(model=tiny, compare="adamw,adafactor"), rows).splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["parameters", "adamw", "adafactor"]
    assert [line.split()[-3] for line in table[3:5]] == ["yes", "yes"]


@pytest.mark.slow
def test_a_plan_says_what_it_leaves_out_and_how_to_let_a_gpu_be_filled(tiny):
    row = plan(PlanConfig(model=tiny, optimizer="adamw", target="here", **SMALL))
    roomy = plan_report.table(PlanConfig(), [row | {"platform": "cuda"}])
    assert plan_report.LEFT_OUT in roomy
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in roomy
    almost_full = row | {"platform": "cuda", "target_bytes": row["peak_bytes"] + 1}
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in plan_report.table(PlanConfig(), [almost_full])
    assert "no, 1 B too much" in plan_report.table(
        PlanConfig(), [row | {"target_bytes": row["peak_bytes"] - 1, "fits": False}]
    )


@pytest.mark.slow
def test_without_the_extra_the_exact_bytes_remain(tiny):
    script = """
import sys
sys.modules["jax_plugins.xla_cuda13"] = sys.modules["libtpu"] = None  # as if the extra were not installed
from galore_jax import GaLoreMemoryWarning, q_galore_adamw_8bit
from galore_jax.cli import main
sys.exit(main())
"""

    def said(*arguments):
        command = [sys.executable, "-W", "error", "-c", script, "plan", "--model", tiny, "--seq", "16", *arguments]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    row = json.loads(said("--target", "rtx4090", "--json"))
    exact = prepare(PlanConfig(model=tiny, seq=16)).exact_bytes()
    assert {name: row[name] for name in exact} == exact
    assert all(
        row[name] is None for name in ("argument_bytes", "temporary_bytes", "peak_bytes", "fits", "compile_seconds")
    )
    table = said("--target", "tpu-v5e").splitlines()
    remedy = "pip install '.[plan]' in the folder of galore_jax's source"
    assert table[-1] == f"To compile for a TPU, install libtpu: {remedy}."
    assert not any(line.startswith(("peak", "fits", "temporaries")) for line in table)


def test_the_help_names_every_target(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    words = capsys.readouterr().out.replace("│", " ").replace(",", " ").split()
    assert {*TARGETS, "here:"} <= set(words)


@pytest.mark.slow
def test_a_plan_on_a_mesh_has_the_bytes_of_one_device_and_what_it_sends(tiny, capsys):
    config = PlanConfig(
        model=tiny, optimizer="adamw", batch=8, target="here", mesh="fsdp=4,model=2", vocab_size=256, **SMALL
    )
    row = plan(config)
    assert row["devices"] == 8
    whole = row["params_bytes"] + row["optimizer_state_bytes"]
    parts = row["params_bytes_a_device"] + row["optimizer_state_bytes_a_device"]
    batch = 8 // 4 * 17 * 4
    assert row["argument_bytes"] == parts + batch
    assert whole / 8 <= parts < 1.05 * whole / 8  # norms are whole on each device
    assert sum(row["traffic"]["always"].values()) > 0
    text = plan_report.table(config, [row])
    assert "parameters a device" in text
    assert "sent by a device, a step" in text


def test_a_mesh_larger_than_the_machine_is_refused(tiny):
    with pytest.raises(ValueError, match="This machine has 8 devices, and 16 are asked for; name another target"):
        prepare(PlanConfig(model=tiny, batch=16, target="here", mesh="fsdp=16", **SMALL))


@needs_extra
def test_a_slice_that_does_not_exist_is_refused(tiny):
    with pytest.raises(ValueError, match="There is no slice of 24 such TPUs; choose one of 4, 8, 16, "):
        prepare(PlanConfig(model=tiny, batch=24, target="tpu-v5e", mesh="fsdp=24", **SMALL))


ON_HOST = {"optimizer": "adamw", "layerwise": True, "clip": 0.0, "state_memory": "host"}


@pytest.mark.slow
@needs_extra
def test_a_plan_with_the_state_on_the_host_has_it_there_and_moves_each_byte_once_in_each_direction(tiny):
    row = plan(PlanConfig(model=tiny, target="rtx4090", **SMALL, **ON_HOST))
    on_host = row["optimizer_state_bytes_on_host"]
    assert 0.9 * row["optimizer_state_bytes"] < on_host == row["host_bytes"] < row["optimizer_state_bytes"]
    assert row["host_traffic"] == {"to_device": on_host, "to_host": on_host}
    # 16 lanes of PCI Express 4.0: 31.5 GB/s.
    assert row["host_seconds"] == pytest.approx(on_host / 31.5e9, rel=1e-3)
    on_device = plan(PlanConfig(model=tiny, target="rtx4090", **SMALL, **ON_HOST | {"state_memory": "device"}))
    assert on_device["argument_bytes"] - row["argument_bytes"] == on_host
    assert on_device["host_bytes"] == on_device["optimizer_state_bytes_on_host"] == 0
    assert on_device["host_traffic"] is None
    lines = plan_report.table(PlanConfig(model=tiny, target="rtx4090", **ON_HOST), [row]).splitlines()
    assert any(line.startswith("in the host's memory") and line.endswith("not part of the peak") for line in lines)
    assert any(line.startswith("seconds for it") for line in lines)


@pytest.mark.slow
@needs_extra
def test_starting_with_the_state_on_the_host_takes_little_more_than_the_largest_array_outside_the_layers(tiny):
    """XLA makes the state of one layer at a time, and copies nothing from host to host."""
    config = PlanConfig(model=tiny, target="rtx4090", **SMALL, **ON_HOST)
    planned = prepare(config)
    optimizer = layerwise(block_stack(planned.model), offload_state(optax.adam(0.1)))
    init = jax.jit(optimizer.init, keep_unused=True)
    found = compile_for(target("rtx4090"), init, planned.params)
    assert found.output_bytes < 0.1 * tree_bytes(planned.opt_state)
    rest = block_stack(planned.model).split(planned.params)[1]
    assert found.temporary_bytes < 2 * 4 * sum(leaf.size for leaf in jax.tree.leaves(rest)) + 2**16


def test_a_device_without_memory_of_the_host_is_refused_in_one_sentence():
    class Memory:
        kind = "device"

    class Device:
        platform = "metal"

        def addressable_memories(self):
            return [Memory()]

    with pytest.raises(
        ValueError, match=r"^--state-memory host needs the memory that JAX calls pinned_host, which metal has"
    ):
        check_host_memory(Device())
    check_host_memory(jax.devices()[0])
