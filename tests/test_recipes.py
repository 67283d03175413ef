# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The paper's settings by name."""

import pytest

from galore_jax import cli
from galore_jax.training import config as settings, recipes
from galore_jax.training.config import PretrainConfig
from galore_jax.training.optimizers import check_optimizer

# arXiv 2403.03507, table 2 and table 5: hidden size, layers, rank, steps.
PAPER = {
    "galore-60m": (512, 8, 128, 10_000),
    "galore-130m": (768, 12, 256, 20_000),
    "galore-350m": (1024, 24, 256, 60_000),
    "galore-1b": (2048, 24, 512, 100_000),
    "galore-7b": (4096, 32, 1024, 150_000),
}


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_every_recipe_is_a_run(name):
    config = recipes.recipe(name)
    settings.check(config)
    settings.check_lengths(config, config.model_config(config.vocab_size))
    check_optimizer(config)
    assert config.batch * config.seq == 131_072
    assert config.warmup_steps is None  # a tenth of the steps
    assert name in PretrainConfig.__doc__


@pytest.mark.parametrize("size", ["130m", "1b", "350m", "60m"])
def test_the_other_rows_of_the_table_have_the_ranks_and_steps_of_galore(size):
    galore = recipes.recipe(f"galore-{size}")
    for row in ("lora", "low-rank", "relora"):
        config = recipes.recipe(f"{row}-{size}")
        assert (config.model, config.steps, config.rank) == (galore.model, galore.steps, galore.rank)
        assert config.optimizer == row.replace("-", "_")
        assert config.lora_alpha == 32.0
    assert recipes.recipe(f"relora-{size}").update_proj_gap == galore.steps // 10
    for row in ("adamw", "scale"):
        config = recipes.recipe(f"{row}-{size}")
        assert (config.model, config.steps, config.optimizer) == (galore.model, galore.steps, row)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_figures_are_the_papers(name):
    config = recipes.recipe(name)
    model = config.model_config(32_000)
    assert (model.hidden_size, model.num_hidden_layers, config.rank, config.steps) == PAPER[name]
    assert config.resolved.refresh == "together"
    assert config.resolved.scale == 0.25


def test_flags_change_a_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr("galore_jax.training.loop.prepare", seen.append)
    monkeypatch.setattr("galore_jax.training.loop.train", lambda run: {})
    assert cli.main(["pretrain", "--recipe=GaLore-130M", "--rank", "64"]) == 0
    assert (seen[0].model, seen[0].rank, seen[0].learning_rate) == ("130m", 64, 0.01)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--recipe", "galore-70m"],
            "--recipe galore-70m is not known (did you mean galore-60m?); choose one of galore-60m, galore-130m",
        ),
        (["--recipe"], "--recipe needs one name, and once"),
        (["--recipe", "galore-60m", "--resume", "--out", "x"], "--recipe starts a run, and --resume continues one"),
    ],
)
def test_mistakes_are_one_sentence(arguments, says, capsys):
    assert cli.main(["pretrain", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}")
    assert error.count("\n") == 1
