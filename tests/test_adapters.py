# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs with low-rank weights: what is trained, ReLoRA's restart, exact resumption, text from a run, and what is refused."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import leniency, normal, shared_programs  # noqa: F401
from reference import Adam
from runs import TINY, tokens

from galore_jax.cli import main
from galore_jax.models import LlamaConfig, merge_lora
from galore_jax.training import checkpoint, loop
from galore_jax.training.adapters import join, make_restart, part
from galore_jax.training.config import LOW_RANK_WEIGHTS, PretrainConfig, check
from galore_jax.training.metrics import read_metrics
from galore_jax.training.optimizers import make_schedule
from galore_jax.training.plan import PlanConfig, prepare as prepare_plan
from galore_jax.training.program import program
from galore_jax.training.step import token_losses

# They train.
pytestmark = pytest.mark.slow

MODEL = dataclasses.replace(TINY, vocab_size=257, max_position_embeddings=64)
QUICK = {
    "steps": 6, "save_every": 2, "keep": 9, "eval_every": 6, "eval_tokens": 500, "log_every": 1, "batch": 4, "seq": 16, "rank": 4,
    "lora_alpha": 8.0, "update_proj_gap": 3, "sample_tokens": 0, "warmup_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"{i} and {i + 1} make {2 * i + 1}, which is odd. " * 10 for i in range(50)))
    return str(path)


def finished(config, **changes):
    config = dataclasses.replace(config, **changes)
    with leniency():  # Optax's schedules mix dtypes
        run = loop.prepare(config, None if config.resume else MODEL)
        loop.train(run)
    return run


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """A finished run of each optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: PretrainConfig(optimizer=name, data=text, out=folder / name, **QUICK) for name in LOW_RANK_WEIGHTS}
    return {name: finished(config) for name, config in configs.items()}


def at_step(run, step):
    return checkpoint.restore(run.folder / "checkpoints", step, *run.program.state)


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def moments(opt_state):
    adam = optax.tree.get(opt_state, "ScaleByAdamState")
    return flat((adam.mu, adam.nu))


@pytest.mark.parametrize("name", LOW_RANK_WEIGHTS)
def test_a_run_trains_all_but_the_kernels_of_the_blocks_and_has_state_for_that(name, runs):
    run = runs[name]
    before, after = flat(at_step(run, 0).params), flat(run.params)
    assert before.keys() == after.keys()
    for path in before:
        restarted = name == "relora" and path.endswith("base/kernel")
        assert np.array_equal(before[path], after[path]) == ("base" in path and not restarted), path
    factors = {"left", "right"} if name == "low_rank" else {"lora_a", "lora_b", "kernel"}
    assert {path.split("/")[-1] for path in after if "proj" in path} == factors
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(part(run.params)[0]))
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["params_bytes"] == sum(leaf.nbytes for leaf in after.values())
    assert summary["optimizer_state_bytes"] == 2 * trained + 2 * 4  # two moments, two counts
    assert summary["adamw_params_bytes"] == 4 * MODEL.num_params
    assert summary["adamw_state_bytes"] == 2 * 4 * MODEL.num_params + 2 * 4
    losses = [record["loss"] for record in read_metrics(run.folder) if "loss" in record]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_a_step_of_lora_is_adamw_on_a_and_b_with_the_gradient_of_the_sum():
    """dL/dA = s (dL/dW) B^T and dL/dB = s A^T (dL/dW), of the kernel W + s A B; s = 8 / 4."""
    config = PretrainConfig(optimizer="lora", **QUICK | {"clip": 0.0, "learning_rate": 0.1, "warmup_steps": 0})
    made = program(config, TINY)
    params, opt_state = made.init(jax.random.key(3))
    place = params["layers"]["mlp"]["up_proj"]
    place["lora_b"] = 0.1 * normal(4, place["lora_b"].shape)
    w, a, b = (np.asarray(x, np.float64) for x in (place["base"]["kernel"], place["lora_a"], place["lora_b"]))
    batch = tokens(4, 17)

    def loss(kernel):
        inner = params["layers"]["mlp"] | {
            "up_proj": place | {"base": {"kernel": kernel}, "lora_b": 0 * place["lora_b"]}
        }
        whole = params | {"layers": params["layers"] | {"mlp": inner}}
        return jnp.mean(token_losses(made.graphdef, whole, batch))

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(w + 2.0 * a @ b, jnp.float32)), np.float64)
    expected_a = a - 0.1 * Adam()(2.0 * gradient @ b.swapaxes(1, 2))
    expected_b = b - 0.1 * Adam()(2.0 * a.swapaxes(1, 2) @ gradient)
    with leniency():
        params, _, _ = made.step(params, opt_state, batch)
    found = params["layers"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(found["base"]["kernel"], w.astype(np.float32))
    np.testing.assert_allclose(found["lora_a"], expected_a, atol=1e-3)
    np.testing.assert_allclose(found["lora_b"], expected_b, atol=1e-3)


def test_micro_batches_give_the_step_of_the_whole_batch():
    results = []
    for accumulate in (1, 2):
        config = PretrainConfig(optimizer="lora", **QUICK | {"accumulate": accumulate})
        made = program(config, TINY)
        params, opt_state = made.init(jax.random.key(0))
        with leniency():
            _, opt_state, metrics = made.step(params, opt_state, tokens(4, 17))
        results.append((flat(optax.tree.get(opt_state, "mu")), float(metrics["grad_norm"])))
    (whole, norm), (cut, cut_norm) = results
    assert cut_norm == pytest.approx(norm, rel=1e-5)
    for path, leaf in whole.items():  # a tenth of the gradient
        np.testing.assert_allclose(cut[path], leaf, rtol=1e-4, atol=1e-7)


def test_the_buffers_of_frozen_kernels_are_donated_too():
    made = program(PretrainConfig(optimizer="relora", **QUICK), TINY)
    params, opt_state = made.init(jax.random.key(0))
    with leniency():
        made.step(params, opt_state, tokens(4, 17))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, opt_state)))


# ReLoRA


def test_a_restart_keeps_the_function_and_resets_the_moments_of_the_adapters_alone(runs):
    run = runs["relora"]
    state = at_step(run, 2)
    restart = jax.jit(make_restart(run.program.graphdef, run.config))
    not_yet = restart(state.params, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, not_yet, (state.params, state.opt_state))

    counted = optax.tree.set(state.opt_state, count=jnp.int32(3))
    params, opt_state = restart(state.params, counted)
    logits = [nnx.merge(run.program.graphdef, tree)(tokens(2)) for tree in (state.params, params)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    before, after = flat(state.params), flat(params)
    for path, leaf in after.items():
        assert np.any(leaf) == (not path.endswith("lora_b"))
        kept = not path.endswith(("lora_a", "lora_b", "base/kernel"))
        assert np.array_equal(leaf, before[path]) == kept, path
    for path, moment in moments(opt_state).items():
        if path.endswith(("lora_a", "lora_b")):
            assert not np.any(moment)
        else:
            np.testing.assert_array_equal(moment, moments(counted)[path])
    assert {int(count) for _, count in optax.tree.get_all_with_path(opt_state, "count")} == {3}

    up_proj = state.params["layers"]["mlp"]["up_proj"]
    w, a, b = (np.asarray(x, np.float64) for x in (up_proj["base"]["kernel"], up_proj["lora_a"], up_proj["lora_b"]))
    np.testing.assert_allclose(
        params["layers"]["mlp"]["up_proj"]["base"]["kernel"], w + 2.0 * a @ b, rtol=1e-5, atol=1e-6
    )


def test_a_run_merges_before_steps_that_are_multiples_of_the_period_and_no_others(runs):
    kernels = [
        at_step(runs["relora"], step).params["layers"]["mlp"]["up_proj"]["base"]["kernel"] for step in (0, 2, 4, 6)
    ]
    same = [np.array_equal(one, other) for one, other in itertools.pairwise(kernels)]
    assert same == [True, False, True]  # of updates 0 .. 5, number 3 begins with a merge


def test_the_learning_rate_rises_again_after_each_merge():
    config = PretrainConfig(optimizer="relora", learning_rate=0.5, steps=200, warmup_steps=10, update_proj_gap=40)
    with leniency():
        found = loop.learning_rates(config)
    step = np.arange(200)
    cosine = np.where(
        step < 10, 0.5 * step / 10, 0.05 + 0.45 * (1 + np.cos(np.pi * (step - 10) / 190)) / 2
    )  # to a tenth of the peak
    risen = np.where(step < 40, 1.0, np.minimum(step % 40 / 4, 1.0))
    np.testing.assert_allclose(found, cosine * risen, rtol=1e-5, atol=1e-8)
    assert list(step[1:][found[1:] == 0]) == [40, 80, 120, 160]
    longer = make_schedule(dataclasses.replace(config, update_proj_gap=5000, steps=20_000))
    assert float(longer(5050)) == pytest.approx(float(longer(5100)) / 2, rel=1e-2)  # 100 steps, at most


@pytest.mark.parametrize("name", LOW_RANK_WEIGHTS)
def test_a_run_that_was_cut_goes_on_bit_for_bit_over_a_merge(name, runs, tmp_path):
    whole = runs[name]
    shutil.copytree(whole.folder, tmp_path / "cut")
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / step)
    resumed = finished(whole.config, out=tmp_path / "cut", resume=True)
    assert resumed.resumed_from == 2
    jax.tree.map(np.testing.assert_array_equal, (resumed.params, resumed.opt_state), (whole.params, whole.opt_state))
    losses = [[r["loss"] for r in read_metrics(run.folder) if "loss" in r] for run in (whole, resumed)]
    assert losses[0] == losses[1]


# What comes of a run


@pytest.mark.parametrize("name", LOW_RANK_WEIGHTS)
def test_merged_weights_have_the_logits_of_the_run(name, runs):
    run = runs[name]
    model = nnx.merge(run.program.graphdef, run.params)
    logits = model(tokens(2))
    merge_lora(model)
    plain = program(dataclasses.replace(run.config, optimizer="adamw"), MODEL)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(params) == jax.tree.structure(plain.state[0])
    np.testing.assert_allclose(nnx.merge(plain.graphdef, params)(tokens(2)), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOW_RANK_WEIGHTS)
def test_a_run_generates(name, runs, capsys):
    with leniency():
        assert main(["generate", "--model", str(runs[name].folder), "--prompt", "1 and", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("1 and")


@pytest.mark.parametrize("name", LOW_RANK_WEIGHTS)
def test_a_plan_has_the_bytes_of_the_run(name, runs, tmp_path):
    fields = {"model_type": "llama", "rms_norm_eps": 1e-6, "num_key_value_heads": None} | {
        field: getattr(MODEL, field)
        for field in (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
            "max_position_embeddings",
        )
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    config = PlanConfig(
        model=str(tmp_path / "config.json"), optimizer=name, rank=4, seq=16, batch=4, dtype="f32", target="here"
    )
    row = prepare_plan(config).exact_bytes()
    summary = json.loads((runs[name].folder / "summary.json").read_text())
    assert [row[size] for size in ("params_bytes", "optimizer_state_bytes")] == [
        summary[size] for size in ("params_bytes", "optimizer_state_bytes")
    ]
    assert row["gradient_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(part(runs[name].params)[0]))


def test_parts_are_joined_to_what_they_were():
    tree = {"a": {"base": {"kernel": 1}, "lora_a": 2}, "norm": {"scale": 3}}
    assert join(*part(tree)) == tree
    assert part({"norm": {"scale": 3}}) == ({"norm": {"scale": 3}}, {})


def test_bfloat16_weights_have_float32_adapters_and_moments():
    config = PretrainConfig(optimizer="relora", dtype="bf16", **QUICK | {"update_proj_gap": 2})
    model = LlamaConfig(**dataclasses.asdict(TINY) | config.numerics)
    made = program(config, model)
    params, opt_state = made.init(jax.random.key(0))
    with leniency(), jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention mixes dtypes inside
        for number in range(3):
            params, opt_state, metrics = made.step(params, opt_state, tokens(4, 17, number))
    assert np.isfinite(float(metrics["loss"]))
    for path, leaf in flat(params).items():
        assert leaf.dtype == ("float32" if "lora" in path else "bfloat16")
    assert {leaf.dtype.name for leaf in moments(opt_state).values()} == {"float32"}


@pytest.mark.parametrize("name", LOW_RANK_WEIGHTS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"layerwise": True},
            "--layerwise does not go with --optimizer {name}: low-rank weights are for one device and",
        ),
        ({"weights": "int8"}, "--weights int8 does not go with --optimizer {name}"),
        ({"mesh": "data=8"}, "--mesh data=8 does not go with --optimizer {name}"),
        ({"accumulate_low_rank": True}, "--accumulate-low-rank needs an optimizer with subspaces"),
        ({"lora_alpha": 0.0}, "--lora-alpha 0.0 must be a positive finite number."),
    ],
)
def test_what_does_not_go_together_is_one_sentence(name, changes, says):
    with pytest.raises(ValueError, match="--") as caught:
        check(PretrainConfig(optimizer=name, **changes))
    assert str(caught.value).startswith(says.format(name=name))


def test_a_merge_at_every_step_is_refused():
    with pytest.raises(ValueError, match=r"^--update-proj-gap 1 must be at least 2 with --optimizer relora"):
        check(PretrainConfig(optimizer="relora", update_proj_gap=1))
    check(PretrainConfig(optimizer="lora", update_proj_gap=1))


def test_a_rank_that_no_matrix_has_is_refused_and_nothing_is_written(text, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--data", text, "--optimizer", "lora", "--rank", "129", "--out", str(out)]
    assert main(["pretrain", *flags]) == 2
    assert "rank=129 is more than the smaller side of layers/attention/k_proj, 128" in capsys.readouterr().err
    assert not out.exists()
