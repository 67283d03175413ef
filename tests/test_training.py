# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The parts of pre-training: optimizers, the step, checkpoints, metrics, and signals."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import leniency, quick_compilation  # noqa: F401

from galore_jax import galore_adamw
from galore_jax.models import Llama, LlamaConfig
from galore_jax.training import checkpoint, metrics, report
from galore_jax.training.checkpoint import Checkpoint, CheckpointWriter
from galore_jax.training.config import (
    PretrainConfig,
    check,
    check_lengths,
    check_same_run,
    choose_folder,
    load_config,
    new_folder,
    save_config,
)
from galore_jax.training.loop import run_pretrain
from galore_jax.training.optimizers import OPTIMIZERS, make_optimizer, make_schedule
from galore_jax.training.step import galore_counts, make_eval_step, make_train_step, subspace_metrics, token_losses
from galore_jax.training.subspace_plot import plot_subspace

TINY = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=50)


def tiny_model(**overrides):
    model = Llama(dataclasses.replace(TINY, **overrides), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def tokens(batch=8, length=9, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length)).astype(np.int32)


def small_tree(dtype=jnp.float32):
    def normal(seed, shape):
        return jax.random.normal(jax.random.key(seed), shape).astype(dtype)

    return {
        "embed_tokens": {"embedding": normal(0, (20, 16))},
        "layers": {"mlp": {"up_proj": {"kernel": normal(1, (2, 16, 24))}}, "input_norm": {"scale": normal(2, (2, 16))}},
        "lm_head": {"kernel": normal(3, (16, 20))},
    }


# Optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_float32_state_for_bfloat16_parameters(name):
    config = PretrainConfig(optimizer=name, rank=4)
    params = small_tree(jnp.bfloat16)
    tx = make_optimizer(config, optax.constant_schedule(1e-3))
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float32"}
    assert all(bool(jnp.all(jnp.isfinite(leaf))) and bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_weights_by_learning_rate_times_weight_decay(name):
    params = small_tree()
    config = PretrainConfig(optimizer=name, rank=4, weight_decay=0.1)
    tx = make_optimizer(config, optax.constant_schedule(0.5))
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.05 * p, rtol=1e-6), updates, params)


def test_gradients_are_clipped_before_the_optimizer_sees_them():
    params = small_tree()
    for clip, expected in ((1.0, 1.0), (0.0, float(optax.tree.norm(params)))):
        tx = make_optimizer(PretrainConfig(optimizer="adamw", clip=clip), optax.constant_schedule(1e-3))
        _, state = tx.update(params, tx.init(params), params)
        assert float(optax.tree.norm(optax.tree.get(state, "mu"))) == pytest.approx(0.1 * expected, rel=1e-5)


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam():
    params = small_tree()
    tx = make_optimizer(PretrainConfig(optimizer="muon"), optax.constant_schedule(1.0))
    updates, _ = tx.update(params, tx.init(params), params)
    values = jnp.linalg.svd(updates["layers"]["mlp"]["up_proj"]["kernel"], compute_uv=False)
    assert float(jnp.max(values) / jnp.min(values)) < 2  # Newton-Schulz brings them near one value
    values = jnp.linalg.svd(updates["lm_head"]["kernel"], compute_uv=False)
    assert float(jnp.max(values) / jnp.min(values)) > 2


def test_galore_state_is_smaller_than_that_of_adamw():
    _, params = jax.eval_shape(lambda: tiny_model()[1]), tiny_model()[1]
    sizes = report.memory(PretrainConfig(rank=4), params)
    assert sizes["optimizer_state_bytes"] < sizes["adamw_state_bytes"]
    assert sizes["adamw_state_bytes"] == 2 * sizes["params_bytes"] + 2 * 4  # two moments, two counts


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'sgdd' is not known; choose one of galore_adamw, .*muon\."):
        make_optimizer(PretrainConfig(optimizer="sgdd"), optax.constant_schedule(1.0))


# The step


def test_loss_is_the_mean_negative_log_likelihood_of_the_next_token():
    graphdef, params = tiny_model()
    batch = tokens(2)
    log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(batch[:, :-1]).astype(jnp.float32))
    expected = [-log_p[b, t, batch[b, t + 1]] for b in range(2) for t in range(8)]
    np.testing.assert_allclose(token_losses(graphdef, params, batch).ravel(), jnp.stack(expected), rtol=1e-5)
    total, count = make_eval_step(graphdef)(params, batch)
    assert int(count) == 16
    assert float(total) == pytest.approx(float(sum(expected)), rel=1e-5)


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch():
    graphdef, params = tiny_model()
    results = []
    for accumulate in (1, 4):
        tx = optax.sgd(1.0)
        step = make_train_step(graphdef, tx, accumulate)
        copy = jax.tree.map(jnp.copy, params)
        results.append(step(copy, tx.init(copy), tokens()))
    (whole, _, whole_metrics), (cut, _, cut_metrics) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, cut)
    for name in ("loss", "grad_norm"):
        assert float(cut_metrics[name]) == pytest.approx(float(whole_metrics[name]), rel=1e-5)


def test_the_step_donates_its_state_learns_counts_what_it_left_out_and_compiles_once():
    graphdef, params = tiny_model()
    config = PretrainConfig(rank=4, update_proj_gap=2, refresh="staggered", steps=20, learning_rate=0.05, clip=0)
    tx = make_optimizer(config, make_schedule(config))
    step = make_train_step(graphdef, tx)
    state = tx.init(params)
    first = params["norm"]["scale"]
    losses = []
    for _ in range(10):
        params, state, scalars = step(params, state, tokens())
        losses.append(float(scalars["loss"]))
    assert first.is_deleted()
    assert losses[-1] < losses[0] - 0.5
    assert [int(scalars[name]) for name in ("skipped", "kept_bases", "rejected_bases")] == [0, 0, 0]
    params["norm"]["scale"] = params["norm"]["scale"] * jnp.nan
    _, _, scalars = step(params, state, tokens())
    # Of the 7 kernels of 2 layers one half is due at an update with an even number.
    assert [int(scalars[name]) for name in ("skipped", "kept_bases", "rejected_bases")] == [1, 7, 0]
    assert step._cache_size() == 1


def test_the_counts_of_all_galore_states_are_added_up():
    _, _, first = state_of(0)
    first = optax.tree.set(first, skipped=jnp.int32(2), kept=jnp.int32(3), rejected=jnp.int32(5))
    second = optax.tree.set(first, skipped=jnp.int32(10), rejected=jnp.int32(0))
    counts = {name: int(count) for name, count in galore_counts({"a": first, "b": second}).items()}
    assert counts == {"skipped": 12, "kept_bases": 6, "rejected_bases": 5}


def test_the_diagnostics_of_a_step_are_those_of_its_gradient_bases_and_update():
    graphdef, params = tiny_model()
    config = PretrainConfig(rank=4, refresh="every_step", clip=0)
    tx = make_optimizer(config, optax.constant_schedule(0.5))
    step, state = make_train_step(graphdef, tx), tx.init(params)
    loss = jax.jit(jax.grad(lambda params: jnp.mean(token_losses(graphdef, params, tokens()))))

    def up_proj(tree):  # [2, 16, 32], with its basis on the left
        return np.array(tree["layers"]["mlp"]["up_proj"]["kernel"], np.float64)

    gradients, weights, bases, found = [], [up_proj(params)], [], []
    for _ in range(2):
        gradients.append(up_proj(loss(params)))
        params, state, scalars = step(params, state, tokens())
        found.append(scalars["subspace"])
        weights.append(up_proj(params))
        bases.append(up_proj(optax.tree.get(state, "left")))
    # Read when the next step has taken the buffers of the state, as in a run.
    assert found[0].keys() == {
        *(f"layers/attention/{name}_proj" for name in "qkvo"),
        *(f"layers/mlp/{name}_proj" for name in ("gate", "up", "down")),
    }
    for number, leaves in enumerate(found):
        inside = np.sum(np.square(bases[number].swapaxes(1, 2) @ gradients[number]), axis=(1, 2))
        share = inside / np.sum(np.square(gradients[number]), axis=(1, 2))
        np.testing.assert_allclose(leaves["layers/mlp/up_proj"]["captured_energy"], share, rtol=1e-4)
        change = (weights[number + 1] - weights[number]) / 0.5
        rms = np.sqrt(np.mean(np.square(change), axis=(1, 2)))
        np.testing.assert_allclose(leaves["layers/mlp/up_proj"]["update_rms"], rms, rtol=1e-4)
    assert all(np.all(np.isnan(leaf["overlap"])) for leaf in found[0].values())
    overlap = np.sum(np.square(bases[1].swapaxes(1, 2) @ bases[0]), axis=(1, 2)) / 4
    np.testing.assert_allclose(found[1]["layers/mlp/up_proj"]["overlap"], overlap, rtol=1e-4)


def test_without_diagnostics_or_without_galore_there_is_no_subspace_to_report():
    params = small_tree()
    for config in (PretrainConfig(rank=4, diagnostics=False), PretrainConfig(optimizer="adamw")):
        state = make_optimizer(config, optax.constant_schedule(1e-3)).init(params)
        assert subspace_metrics(state) == {}
        assert {int(count) for count in galore_counts(state).values()} == {0}


def test_bfloat16_parameters_stay_bfloat16():
    graphdef, params = tiny_model(dtype="bfloat16", param_dtype="bfloat16")
    tx = make_optimizer(PretrainConfig(optimizer="adamw"), optax.constant_schedule(1e-2))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention mixes dtypes inside
        params, _, scalars = make_train_step(graphdef, tx)(params, tx.init(params), tokens())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert {value.dtype.name for value in jax.tree.leaves(scalars)} == {"float32", "int32"}


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0 must be at least 1."),
        ({"batch": 0}, "--batch 0 must be at least 1."),
        ({"accumulate": -1}, "--accumulate -1 must be at least 1."),
        ({"eval_tokens": 0}, "--eval-tokens 0 must be at least 1."),
        ({"clip": -0.5}, "--clip -0.5 must be a finite number of at least 0."),
        ({"clip": float("inf")}, "--clip inf must be a finite number of at least 0."),
        ({"weight_decay": float("nan")}, "--weight-decay nan must be a finite number of at least 0."),
        ({"rank": 1.5}, "--rank 1.5 must be a positive whole number, or a fraction of the smaller side in (0, 1]."),
        ({"rank": 0}, "--rank 0 must be a positive whole number"),
        ({"update_proj_gap": 0}, "--update-proj-gap 0 must be at least 1."),
        ({"proj_type": "up"}, "--proj-type 'up' is not known; choose one of std, reverse_std, left, right, full."),
        (
            {"projector": "magic"},
            "--projector 'magic' is not known; choose one of power, randomized, svd, eigh, random, rows, sampled.",
        ),
        ({"refresh": "now"}, "--refresh 'now' is not known; choose one of together, staggered, lazy, every_step."),
        (
            {"refresh": "manual"},
            "--refresh 'manual' is not known; choose one of together, staggered, lazy, every_step.",
        ),
        ({"transport": "fly"}, "--transport 'fly' is not known; choose one of keep, rotate, reset."),
        ({"learning_rate": float("inf")}, "--learning-rate inf must be a positive finite number."),
        ({"scale": 0.0}, "--scale 0.0 must be a positive finite number or rms."),
        ({"seed": 2**31}, "--seed 2147483648 must be less than 2**31."),
        ({"warmup_steps": 500}, "--warmup-steps 500 must be at least 0 and less than --steps 500."),
        ({"batch": 6, "accumulate": 4}, "--batch 6 is not a multiple of --accumulate 4; "),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match="--") as caught:
        check(dataclasses.replace(PretrainConfig(), **changes))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("refresh", ["together", "staggered", "lazy", "every_step"]),
        ("transport", ["keep", "rotate", "reset"]),
        ("projector", ["svd", "eigh", "randomized", "power", "random", "rows", "sampled"]),
    ],
)
@pytest.mark.parametrize("optimizer", ["galore_adamw", "galore_adafactor"])
def test_every_value_of_a_setting_makes_an_optimizer(setting, values, optimizer):
    for value in values:
        config = PretrainConfig(rank=4, optimizer=optimizer, **{setting: value})
        check(config)
        params = jax.eval_shape(small_tree)
        jax.eval_shape(make_optimizer(config, optax.constant_schedule(1e-3)).init, params)


def test_the_settings_of_galore_default_to_those_of_the_library():
    library = inspect.signature(galore_adamw).parameters
    for name in ("update_proj_gap", "scale", "proj_type", "projector", "refresh", "transport"):
        assert getattr(PretrainConfig(), name) == library[name].default


def test_sequences_and_samples_must_fit_the_positions_of_the_model():
    model = dataclasses.replace(TINY, max_position_embeddings=64)
    check_lengths(PretrainConfig(seq=64, sample_tokens=32), model)
    with pytest.raises(ValueError, match=r"--seq 65 is longer than the 64 positions"):
        check_lengths(PretrainConfig(seq=65), model)
    with pytest.raises(ValueError, match=r"--sample-tokens 33 .* ask for at most 32\."):
        check_lengths(PretrainConfig(seq=64, sample_tokens=33), model)


def test_config_json_round_trips(tmp_path):
    config = PretrainConfig(rank=1.0, scale="rms", steps=40, param_dtype="bf16", refresh="lazy", diagnostics=False)
    (tmp_path / "tokenizer.json").write_text("abc")
    save_config(config, TINY, tmp_path, "3:00000000")
    loaded, model, fingerprints = load_config(tmp_path)
    assert fingerprints == {
        "data_fingerprint": "3:00000000",
        "tokenizer_fingerprint": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2, B.1
    }
    assert model == TINY
    assert loaded == dataclasses.replace(config, out=tmp_path, resume=True, warmup_steps=4)
    assert isinstance(loaded.rank, float)
    versions = json.loads((tmp_path / "config.json").read_text())["versions"]
    assert versions.keys() == {"jax", "optax", "flax", "orbax-checkpoint", "galore_jax"}


def test_a_config_from_before_a_field_says_what_such_a_run_did(tmp_path):
    (tmp_path / "tokenizer.json").write_text("abc")
    save_config(PretrainConfig(projector="randomized"), TINY, tmp_path, "3:00000000")
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("refresh", "transport", "diagnostics"):
        del fields[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = load_config(tmp_path)[0]
    assert (config.projector, config.refresh, config.transport, config.diagnostics) == (
        "randomized", "together", "keep", False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["steps"], "abc"),
        (["refresh"], 3),
        (["diagnostics"], None),
        (["rank"], None),
        (["remat"], 1),
        (["seed"], True),
        (["dtype"], "f16"),
        (["model_config", "rope_theta"], "abc"),
        (["model_config", "vocab_size"], 257.0),
    ],
)
def test_a_field_of_the_wrong_type_makes_a_config_damaged(tmp_path, path, value):
    (tmp_path / "tokenizer.json").write_text("abc")
    save_config(PretrainConfig(), TINY, tmp_path, "3:00000000")
    fields = json.loads((tmp_path / "config.json").read_text())
    (fields if len(path) == 1 else fields[path[0]])[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"config\.json is damaged \(.*{path[-1]} is .*{value!r}"):
        load_config(tmp_path)


def test_a_folder_made_for_a_run_that_cannot_be_prepared_is_removed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config in (PretrainConfig(), PretrainConfig(out=tmp_path / "a" / "b")):
        with pytest.raises(ValueError, match="no text"), new_folder(config):
            raise ValueError("no text")
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()  # what was there before stays
    with pytest.raises(ValueError, match="no text"), new_folder(PretrainConfig(out=tmp_path / "a" / "b")):
        raise ValueError("no text")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    for name in ("runs/demo-galore_adamw", "runs/demo-galore_adamw-2"):
        with new_folder(PretrainConfig()) as folder:
            assert folder.is_dir()
        assert str(folder) == name


def test_only_settings_that_leave_the_run_what_it_is_may_change(tmp_path):
    saved = PretrainConfig(out=tmp_path)
    check_same_run(dataclasses.replace(saved, steps=9, save_every=1, keep=9, eval_tokens=None, log_every=3), saved)
    for change in (
        {"rank": 8},
        {"seed": 1},
        {"batch": 4},
        {"optimizer": "adamw"},
        {"dtype": "bf16"},
        {"clip": 2.0},
        {"refresh": "lazy"},
        {"transport": "keep"},
        {"diagnostics": False},
    ):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"--{name} is {value!r}, but the run .* {getattr(saved, name)!r}"):
            check_same_run(dataclasses.replace(saved, **change), saved)
    with pytest.raises(ValueError, match=r"--rank is 1, but .* with 1\.0"):
        check_same_run(dataclasses.replace(saved, rank=1), dataclasses.replace(saved, rank=1.0))


def test_a_new_run_takes_the_first_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        folders.append(choose_folder(PretrainConfig(model="9m")))
        folders[-1].mkdir(parents=True)
    assert [str(folder) for folder in folders] == [f"runs/9m-galore_adamw{n}" for n in ("", "-2", "-3")]


# Checkpoints


def state_of(value):
    params = {"layers": {"kernel": jnp.full((64, 64), value, jnp.bfloat16)}, "norm": jnp.full((8,), value, jnp.float32)}
    tx = make_optimizer(PretrainConfig(rank=4), optax.constant_schedule(1e-3))
    return tx, params, tx.init(params)


def write_checkpoints(folder, steps, keep=2):
    with CheckpointWriter(folder, keep) as writer:
        for step in steps:
            _, params, opt_state = state_of(step)
            writer.save(Checkpoint(step, params, opt_state, {"next": step}, [0.1 * step]))


def test_checkpoints_come_back_exactly_and_only_the_newest_are_kept(tmp_path):
    write_checkpoints(tmp_path / "checkpoints", [0, 3, 7])
    assert checkpoint.saved_steps(tmp_path / "checkpoints") == [3, 7]
    _, params, opt_state = state_of(7)
    restored = checkpoint.restore(tmp_path / "checkpoints", 7, params, opt_state)
    assert (restored.step, restored.data, restored.losses) == (7, {"next": 7}, [0.1 * 7])
    for found, saved in ((restored.params, params), (restored.opt_state, opt_state)):
        assert jax.tree.structure(found) == jax.tree.structure(saved)
        assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(saved)]
        jax.tree.map(np.testing.assert_array_equal, found, saved)


def test_a_checkpoint_is_what_was_saved_though_the_next_step_overwrites_its_buffers(tmp_path):
    graphdef, params = tiny_model()
    tx = make_optimizer(PretrainConfig(optimizer="adamw"), optax.constant_schedule(1e-2))
    step = make_train_step(graphdef, tx)
    state = tx.init(params)
    saved = jax.tree.map(lambda leaf: np.array(leaf, copy=True), params)
    with CheckpointWriter(tmp_path / "checkpoints", 1) as writer:
        writer.save(Checkpoint(0, params, state, {}, []))
        for _ in range(5):
            params, state, _ = step(params, state, tokens())
    restored = checkpoint.restore(tmp_path / "checkpoints", 0, params, state)
    jax.tree.map(np.testing.assert_array_equal, restored.params, saved)


def test_another_model_or_optimizer_is_refused_by_the_first_parameter_that_differs(tmp_path):
    folder = tmp_path / "checkpoints"
    write_checkpoints(folder, [3])
    _, params, opt_state = state_of(3)
    wide = {**params, "layers": {"kernel": jnp.zeros((64, 65), jnp.bfloat16)}}
    with pytest.raises(ValueError, match=r"parameter layers/kernel is bfloat16\[64, 64\] .* bfloat16\[64, 65\]"):
        checkpoint.restore(folder, 3, wide, opt_state)
    with pytest.raises(ValueError, match=r"parameter norm is float32\[8\] there, and absent in this run"):
        checkpoint.restore(folder, 3, {"layers": params["layers"]}, opt_state)
    with pytest.raises(ValueError, match=r"parameter norm is float32\[8\] there, and bfloat16\[8\] in this run"):
        checkpoint.restore(folder, 3, optax.tree.cast(params, jnp.bfloat16), opt_state)
    with pytest.raises(ValueError, match=r"optimizer state \S+ is .* there, and .* in this run"):
        checkpoint.restore(folder, 3, params, optax.adamw(1e-3).init(params))


@pytest.mark.parametrize(
    "settings",
    [
        {"refresh": "staggered", "transport": "rotate"},
        {"refresh": "lazy", "transport": "reset", "projector": "rows"},
    ],
)
def test_an_optimizer_that_comes_back_from_a_checkpoint_goes_on_bit_for_bit(tmp_path, settings):
    params = small_tree()
    tx = make_optimizer(PretrainConfig(rank=4, update_proj_gap=3, **settings), optax.constant_schedule(1e-2))

    @jax.jit
    def step(params, state, number):
        gradient = optax.tree.random_like(jax.random.fold_in(jax.random.key(7), number), params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for number in range(8):
        if number == 4:
            with CheckpointWriter(tmp_path, 1) as writer:
                writer.save(Checkpoint(4, params, state, {}, []))
        params, state = step(params, state, number)
    restored = checkpoint.restore(tmp_path, 4, params, state)
    other, other_state = restored.params, restored.opt_state
    for number in range(4, 8):
        other, other_state = step(other, other_state, number)
    jax.tree.map(np.testing.assert_array_equal, (other, other_state), (params, state))


def damage_flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("item", ["params", "opt_state", "data", "meta"])
@pytest.mark.parametrize("damage", [damage_flip, lambda file: file.write_bytes(b""), lambda file: file.unlink()])
def test_damage_is_named_with_the_checkpoint_to_go_back_to(tmp_path, item, damage):
    folder = tmp_path / "checkpoints"
    write_checkpoints(folder, [3, 7])
    _, params, opt_state = state_of(7)
    damage(folder / "7" / item / ("metadata" if item in ("data", "meta") else "manifest.ocdbt"))
    with pytest.raises(ValueError, match=r"Checkpoint \S+7 is damaged \(.*\); move it away to resume from step 3\."):
        checkpoint.restore(folder, 7, params, opt_state)
    _, params, opt_state = state_of(3)
    assert checkpoint.restore(folder, 3, params, opt_state).step == 3


def test_one_flipped_bit_in_a_weight_is_noticed():
    leaf = jax.random.normal(jax.random.key(0), (40, 30))
    before = checkpoint.checksums({"w": leaf})
    for index in (0, 617, 1199):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        flipped = jax.lax.bitcast_convert_type(bits.at[index].set(bits[index] ^ 1), jnp.float32).reshape(40, 30)
        assert checkpoint.checksums({"w": flipped}) != before


def test_no_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint in .*checkpoints; start a new run"):
        checkpoint.last_step(tmp_path / "checkpoints")


# Metrics


def test_the_meter_averages_an_interval_and_goes_on_where_a_checkpoint_left_it():
    def run(meter, steps):
        meter.start()
        records = [
            meter.add(s, {"loss": jnp.float32(s), "grad_norm": jnp.float32(2), **galore_counts(()), "subspace": {}})
            for s in steps
        ]
        return [record for record in [*records, meter.finish()] if record is not None]

    rates = np.linspace(0.0, 0.9, 10)
    whole = run(metrics.Meter(rates, 100, 4, []), range(1, 11))
    assert [(r["step"], r["loss"], r["tokens"]) for r in whole] == [(4, 2.5, 400), (8, 6.5, 800), (10, 9.5, 1000)]
    assert [r["learning_rate"] for r in whole] == pytest.approx([0.3, 0.7, 0.9])
    first = metrics.Meter(rates, 100, 4, [])
    run(first, range(1, 7))
    resumed = run(metrics.Meter(rates, 100, 4, first.losses), range(7, 11))
    assert [r["loss"] for r in resumed] == [6.5, 9.5]
    assert [r["kept_bases"] for r in resumed] == [0, 0]
    assert "subspace" not in resumed[0]


def test_a_record_has_the_diagnostics_of_each_matrix_and_their_means():
    leaves = {
        "a": {"captured_energy": [0.5, 0.25], "overlap": [np.nan, 0.875], "update_rms": [0.1, np.inf]},
        "b": {"captured_energy": [0.75], "overlap": [np.nan], "update_rms": [0.3]},
    }
    subspace = {leaf: {name: jnp.float32(x) for name, x in numbers.items()} for leaf, numbers in leaves.items()}
    meter = metrics.Meter(np.ones(1), 100, 1, [])
    meter.start()
    meter.add(1, {"loss": jnp.float32(1), "grad_norm": jnp.float32(2), **galore_counts(()), "subspace": subspace})
    record = meter.finish()
    assert (record["captured_energy"], record["basis_overlap"], record["update_rms"]) == (0.5, 0.875, 0.2)
    np.testing.assert_equal(record["subspace"], leaves)  # the decimals of float32, not those of its float64
    undefined = metrics.subspace_fields({"b": {name: np.float32([np.nan]) for name in leaves["b"]}})
    assert undefined["basis_overlap"] is None


def test_metrics_after_the_checkpoint_and_a_line_cut_short_are_dropped_on_resume(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 8, "lo')
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [2, 4, 6]
    with metrics.MetricsLog(tmp_path, 4) as log:
        log.write({"step": 6, "loss": float("nan")})
    assert metrics.read_metrics(tmp_path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 1.0},
        {"step": 6, "loss": None},
    ]


@pytest.mark.parametrize("line", [b'{"step": 4, "lo', b"", b"\xff\x00", b"{}", b'{"step": "4"}', b"4"])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 2, "loss": 1.0}\n' + line + b'\n{"step": 6, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged at line 2; delete that line"):
        metrics.read_metrics(tmp_path)


def test_tensorboard_itself_writes_the_scalars_where_tensorboardx_is_absent(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder):
            self.folder, self.scalars, self.closed = folder, [], False

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", types.SimpleNamespace(Writer=Writer))
    with metrics.MetricsLog(tmp_path, 0) as log:
        overlaps = {"mlp/up_proj": {"overlap": [math.nan, 0.5, 1.0]}, "mlp/down_proj": {"overlap": [math.nan]}}
        log.write({"step": 3, "loss": 1.5, "skipped": 0, "basis_overlap": None, "subspace": overlaps})
        board = log._board
    assert board.scalars == [("loss", 1.5, 3), ("skipped", 0, 3), ("subspace/overlap/mlp/up_proj", 0.75, 3)]
    (record,) = metrics.read_metrics(tmp_path)
    assert record["subspace"] == {"mlp/up_proj": {"overlap": [None, 0.5, 1.0]}, "mlp/down_proj": {"overlap": [None]}}
    assert record["basis_overlap"] is None
    assert (board.folder, board.closed) == (str(tmp_path / "tensorboard"), True)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with metrics.MetricsLog(tmp_path, 3) as log:
        log.write({"step": 4, "loss": 1.0})
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [3, 4]


@pytest.mark.parametrize("text", ["", '{"steps": 12, "fin', "[]", '{"steps": 12}', None])
def test_a_damaged_summary_counts_as_none(tmp_path, text):
    path = tmp_path / "summary.json"
    whole = {"steps": 12, "final_val_loss": 2.0, "final_val_perplexity": 7.4}
    path.write_text(json.dumps(whole))
    assert report.read_summary(path) == whole
    if text is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(text)
    assert report.read_summary(path) is None


def test_the_plot_is_drawn_from_any_metrics(tmp_path):
    report.plot_loss(tmp_path, "no records")
    with metrics.MetricsLog(tmp_path, 0) as log:
        for step in range(1, 30):
            log.write({"step": step, "loss": 5 / step})
        log.write({"step": 29, "val_loss": 1.0})
    empty = (tmp_path / "loss.png").read_bytes()
    report.plot_loss(tmp_path, "a run")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "loss.png").read_bytes() != empty


def write_subspaces(folder, *numbers):
    """One record for each dict of numbers: {quantity: [of each layer]}, the same for two parameters."""
    folder.mkdir()
    with metrics.MetricsLog(folder, 0) as log:
        log.write({"step": 1, "loss": 3.0})  # as an older version wrote it
        for step, quantities in enumerate(numbers, start=2):
            log.write({"step": step, "subspace": dict.fromkeys(("mlp/up_proj", "mlp/down_proj"), quantities)})
    plot_subspace(folder, "a run")
    return (folder / "subspace.png").read_bytes() if (folder / "subspace.png").exists() else None


def test_the_subspaces_are_drawn_from_any_metrics_that_have_them(tmp_path):
    assert write_subspaces(tmp_path / "none") is None
    nan = {name: [math.nan, math.nan] for name in ("captured_energy", "overlap", "update_rms")}
    usual = {"captured_energy": [0.4, 0.6], "overlap": [math.nan, 0.5], "update_rms": [0.0, 0.01]}
    zeros = {name: [0.0, 0.0] for name in nan}
    large = {name: [3.0, 4.0] for name in nan}  # a Gaussian basis is not orthonormal
    cases = {"nan": [nan], "one": [usual], "zeros": [zeros] * 2, "many": [nan, usual, large, zeros] * 20}
    pictures = {name: write_subspaces(tmp_path / name, *numbers) for name, numbers in cases.items()}
    assert {picture[:4] for picture in pictures.values()} == {b"\x89PNG"}
    assert len(set(pictures.values())) == 4


# Runs


def test_a_run_of_adamw_has_no_subspaces_and_resumes_though_its_config_is_older_than_they_are(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the low rank gradient of a matrix\n\n" * 400)
    folder = tmp_path / "run"
    config = PretrainConfig(
        optimizer="adamw", data=str(tmp_path / "text.txt"), steps=4, batch=2, seq=16, log_every=1, warmup_steps=1,
        sample_tokens=0, out=folder,
    )  # fmt: skip
    with leniency():  # Optax's schedules mix dtypes
        run_pretrain(dataclasses.replace(config, steps=2), dataclasses.replace(TINY, vocab_size=257))
    assert (folder / "loss.png").exists()
    assert not (folder / "subspace.png").exists()
    assert "subspace" not in capsys.readouterr().out
    first = metrics.read_metrics(folder)[0]
    assert (first["skipped"], first["kept_bases"], first["rejected_bases"]) == (0, 0, 0)
    assert not {"captured_energy", "basis_overlap", "update_rms", "subspace"} & first.keys()

    fields = json.loads((folder / "config.json").read_text())
    older = {name: value for name, value in fields.items() if name not in ("refresh", "transport", "diagnostics")}
    (folder / "config.json").write_text(json.dumps(older))
    lines = [
        {k: v for k, v in r.items() if k not in ("kept_bases", "rejected_bases")} for r in metrics.read_metrics(folder)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with leniency():
        summary = run_pretrain(dataclasses.replace(load_config(folder)[0], steps=4))
    assert (summary["steps"], summary["resumed_from_step"]) == (4, 2)
    assert [record["step"] for record in metrics.read_metrics(folder) if "loss" in record] == [1, 2, 3, 4]


# Signals


def test_the_first_signal_is_noted_and_the_second_kills():
    script = (
        "import os, signal\n"
        "from galore_jax.training.loop import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    assert not signals.received\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert signals.received\n"
        "    print('stopping', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "stopping\n")
    assert "Stopping after this step" in result.stderr
