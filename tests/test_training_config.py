# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: their checks, their defaults, and ``config.json``."""

import dataclasses
import inspect
import json

import jax
import numpy as np
import optax
import pytest
from runs import TINY, small_tree

import galore_jax
from galore_jax.presets import PRESETS, RANK_ONE, WHOLE_GRADIENT
from galore_jax.training.config import PretrainConfig, check, check_lengths
from galore_jax.training.optimizers import make_optimizer
from galore_jax.training.run_folder import (
    check_same_run,
    check_same_text,
    check_same_tokenizer,
    choose_folder,
    load_config,
    new_folder,
    save_config,
)


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
            "--projector 'magic' is not known; choose one of power, randomized, svd, eigh, random, gaussian, rows, sampled.",
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
        (
            {"accumulate_low_rank": True, "optimizer": "adamw"},
            "--accumulate-low-rank needs an optimizer with subspaces, which --optimizer adamw is not.",
        ),
        *(
            (
                {"accumulate_low_rank": True, "clip": 0, "optimizer": optimizer},
                "--accumulate-low-rank needs an optimizer that does without the gradient outside the subspaces, and "
                f"--optimizer {optimizer} uses the whole gradient.",
            )
            for optimizer in WHOLE_GRADIENT
        ),
        ({"accumulate_low_rank": True}, "--accumulate-low-rank needs --clip 0 instead of 1.0: the norm of the whole"),
        (
            {"accumulate_low_rank": True, "clip": 0, "layerwise": True},
            "--accumulate-low-rank needs a step without --lay",
        ),
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
        ("projector", ["svd", "eigh", "randomized", "power", "random", "gaussian", "rows", "sampled"]),
    ],
)
@pytest.mark.parametrize("optimizer", ["galore_adamw", "galore_adafactor"])
def test_every_value_of_a_setting_makes_an_optimizer(setting, values, optimizer):
    for value in values:
        config = PretrainConfig(rank=4, optimizer=optimizer, **{setting: value})
        check(config)
        params = jax.eval_shape(small_tree)
        jax.eval_shape(make_optimizer(config, optax.constant_schedule(1e-3)).init, params)


@pytest.mark.parametrize("optimizer", PRESETS)
def test_the_settings_of_galore_default_to_those_of_the_preset(optimizer):
    """But for the rank, which 128 or 256 would not be one for a small model, and what None resolves to in the library."""
    library = inspect.signature(PRESETS[optimizer]).parameters
    resolved = PretrainConfig(optimizer=optimizer).resolved
    assert resolved.rank == (1 if optimizer in RANK_ONE else 0.25)
    for name in library.keys() & {"update_proj_gap", "scale", "proj_type", "projector"}:
        assert getattr(resolved, name) == library[name].default
    for name, otherwise in {"refresh": "staggered", "transport": "keep"}.items():
        if name in library:
            assert getattr(resolved, name) == (library[name].default or otherwise)


def test_what_is_given_wins_over_the_default_of_the_preset():
    given = {
        "rank": 8,
        "update_proj_gap": 7,
        "scale": "rms",
        "proj_type": "left",
        "projector": "rows",
        "refresh": "lazy",
    }
    given["transport"] = "reset"
    resolved = PretrainConfig(optimizer="apollo_mini", **given).resolved
    assert {name: getattr(resolved, name) for name in given} == given


@pytest.mark.parametrize("optimizer", sorted(PRESETS.keys() - WHOLE_GRADIENT.keys()))
def test_presets_that_drop_the_gradient_outside_can_sum_micro_batches_in_the_subspaces(optimizer):
    check(PretrainConfig(optimizer=optimizer, accumulate_low_rank=True, accumulate=2, clip=0))


def test_sequences_and_samples_must_fit_the_positions_of_the_model():
    model = dataclasses.replace(TINY, max_position_embeddings=64)
    check_lengths(PretrainConfig(seq=64, sample_tokens=32), model)
    with pytest.raises(ValueError, match=r"--seq 65 is longer than the 64 positions"):
        check_lengths(PretrainConfig(seq=65), model)
    with pytest.raises(ValueError, match=r"--sample-tokens 33 .* ask for at most 32\."):
        check_lengths(PretrainConfig(seq=64, sample_tokens=33), model)


def test_config_json_round_trips(tmp_path):
    config = PretrainConfig(rank=1.0, scale="rms", steps=40, weights="bf16", refresh="lazy", diagnostics=False)
    (tmp_path / "tokenizer.json").write_text("abc")
    save_config(config, TINY, tmp_path, "3:00000000")
    loaded, model, fingerprints = load_config(tmp_path)
    assert fingerprints == {
        "data_fingerprint": "3:00000000",
        "tokenizer_fingerprint": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2, B.1
    }
    assert model == TINY
    assert loaded == dataclasses.replace(
        config,
        out=tmp_path,
        resume=True,
        warmup_steps=4,
        update_proj_gap=200,
        proj_type="std",
        projector="power",
        transport="keep",
    )
    assert isinstance(loaded.rank, float)
    versions = json.loads((tmp_path / "config.json").read_text())["versions"]
    assert versions.keys() == {"jax", "optax", "flax", "orbax-checkpoint", "galore_jax"}


def test_a_config_that_calls_the_weights_param_dtype_still_means_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text("abc")
    save_config(PretrainConfig(weights="bf16"), TINY, tmp_path, "3:00000000")
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["param_dtype"] = fields.pop("weights")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_config(tmp_path)[0].weights == "bf16"


def test_a_config_from_before_the_fingerprints_is_read_and_what_it_names_is_not_compared(tmp_path):
    (tmp_path / "tokenizer.json").write_text("abc")
    save_config(PretrainConfig(), TINY, tmp_path, "3:00000000")
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["data_fingerprint"], fields["tokenizer_fingerprint"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    fingerprints = load_config(tmp_path)[2]
    check_same_tokenizer(tmp_path, fingerprints)
    check_same_text("python", tmp_path, "4:00000001", fingerprints)


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
    ("projector", "refresh", "transport"),
    [("power", "staggered", "rotate"), ("rows", "staggered", "rotate"), ("svd", "together", "keep")],
)
def test_config_json_names_what_none_stands_for_and_null_in_an_older_one_means_what_it_did(
    tmp_path, projector, refresh, transport
):
    """Null is what such a run did, although the default is another now; a name in the file wins."""
    (tmp_path / "tokenizer.json").write_text("abc")
    save_config(PretrainConfig(projector=projector), TINY, tmp_path, "3:00000000")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["refresh"], fields["transport"]) == (refresh, "keep")
    for nulls, expected in (
        ({"refresh": None, "transport": None}, (refresh, transport)),
        ({"refresh": "lazy", "transport": None}, ("lazy", transport)),
        ({"refresh": None, "transport": "reset"}, (refresh, "reset")),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | nulls))
        config = load_config(tmp_path)[0]
        assert (config.refresh, config.transport) == expected


@pytest.mark.covering(1)
@pytest.mark.parametrize("projector", ["power", "svd"])
@pytest.mark.parametrize("optimizer", ["galore_adamw", "galore_adafactor"])
def test_what_none_stands_for_is_what_the_library_does_on_its_own(optimizer, projector):
    """The trainer resolves the defaults itself, for config.json: two copies of one rule."""
    params = {"layers": small_tree()["layers"]}
    ours = make_optimizer(
        PretrainConfig(optimizer=optimizer, rank=4, projector=projector, update_proj_gap=2, clip=0, diagnostics=False),
        optax.constant_schedule(0.1),
    )
    library = getattr(galore_jax, optimizer)(0.1, rank=4, projector=projector, update_proj_gap=2)

    def run(tx):
        update, state, updates = jax.jit(tx.update), tx.init(params), []
        for step in range(4):
            updates.append(update(optax.tree.random_like(jax.random.key(step), params), state, params))
            state = updates[-1][1]
        return jax.tree.leaves([update for update, _ in updates])

    for a, b in zip(run(ours), run(library), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["steps"], "abc"),
        (["refresh"], 3),
        (["diagnostics"], None),
        (["rank"], "abc"),
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
