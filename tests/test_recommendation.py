# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The preset for a budget of bytes."""

import json

import jax
import jax.numpy as jnp
import pytest

import galore_jax
from galore_jax.presets import PRESETS, recommendation

PARAMS = {
    "kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32),
    "embed": jax.ShapeDtypeStruct((4, 256), jnp.float32),
}


def point(preset, loss, steps=1200, **arguments):
    return {"preset": preset, "arguments": arguments, "steps": steps, "loss": loss, "learning_rate": 0.01}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A file of measurements in the place of the package's."""
    codec = {"bits": 3, "leading": 0.0625, "leading_bits": 4}
    points = [
        point("galore_adamw", 1.7, steps=400, rank=8),
        point("muon_4bit", 1.52, codec=codec),
        point("muon", 1.5),
        point("muon_8bit", 1.51),
    ]
    (tmp_path / "frontier.json").write_text(json.dumps({"points": points}))
    monkeypatch.setattr(recommendation.importlib.resources, "files", lambda package: tmp_path)
    recommendation._points.cache_clear()
    yield points
    recommendation._points.cache_clear()


@pytest.mark.parametrize("name", ["muon", "muon_8bit", "muon_4bit", "galore_adamw"])
def test_it_is_the_lowest_loss_that_fits_and_of_the_longest_runs_first(measured, name):
    sizes = {}
    for found in measured:
        arguments = {key: galore_jax.MatrixCodec(**x) if key == "codec" else x for key, x in found["arguments"].items()}
        sizes[found["preset"]] = galore_jax.state_bytes(PRESETS[found["preset"]](0.1, **arguments), PARAMS)
    assert sizes["muon"] > sizes["muon_8bit"] > sizes["muon_4bit"] > sizes["galore_adamw"]
    found = galore_jax.recommend(PARAMS, state_bytes=sizes[name])
    assert (found.preset, found.state_bytes) == (name, sizes[name])
    assert galore_jax.state_bytes(found.build(0.1), PARAMS) == found.state_bytes
    least = min(sizes.values())
    with pytest.raises(ValueError, match=f"the smallest state is that of galore_adamw with .*, {least} bytes"):
        galore_jax.recommend(PARAMS, state_bytes=least - 1)


def test_arguments_for_every_preset_are_passed_on(measured):
    found = galore_jax.recommend(PARAMS, state_bytes=1e9, weight_decay=0.1)
    assert found.arguments == {"weight_decay": 0.1}


def test_what_the_package_has_measured_can_be_built_and_nothing_in_it_is_beaten_by_something_smaller():
    params = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    for steps in {found.steps for found in recommendation._points()}:
        found = [x for x in recommendation._points() if x.steps == steps]
        sizes = {x.loss: galore_jax.state_bytes(x.build(), params) for x in found}
        ordered = [sizes[loss] for loss in sorted(sizes)]
        assert ordered == sorted(ordered, reverse=True)
        assert len(ordered) == len(found)
