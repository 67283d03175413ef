# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Layer-wise training runs: int8 weights resume exactly, and the losses equal those of a plain run."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from problems import leniency, shared_programs  # noqa: F401

from galore_jax.models import LlamaConfig
from galore_jax.training import PretrainConfig
from galore_jax.training.loop import prepare, train
from galore_jax.training.metrics import read_metrics
from galore_jax.weights import is_int8

MODEL = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2, vocab_size=257)
QUICK = {
    "steps": 6, "save_every": 3, "eval_every": 6, "eval_tokens": 500, "log_every": 1, "batch": 4, "seq": 32, "rank": 16,
    "update_proj_gap": 2, "sample_tokens": 0, "layerwise": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"{i} and {i + 1} make {2 * i + 1}, which is odd. " * 10 for i in range(150)))
    return str(path)


def finished(config):
    run = prepare(config, None if config.resume else MODEL)
    # Optax's schedules and Flax mix dtypes.
    with leniency():
        train(run)
    return run


@pytest.mark.slow
def test_an_int8_run_resumes_bit_for_bit(text, tmp_path):
    config = PretrainConfig(
        optimizer="q_galore_adamw_8bit", weights="int8", accumulate=2, data=text, out=tmp_path / "whole", **QUICK
    )
    whole = finished(config)
    assert is_int8(whole.params["layers"]["mlp"]["up_proj"]["kernel"])
    shutil.copytree(config.out, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    resumed = finished(dataclasses.replace(config, out=tmp_path / "cut", resume=True))
    assert resumed.resumed_from == 3
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, whole.opt_state)
    losses = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def kinds(tree):
    """Number of axes of a layer's array -> kinds of memory; the arrays of a stack have one axis more."""
    return {(leaf.ndim, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw_8bit"])
def test_a_run_with_its_state_on_the_host_is_the_same_and_resumes_bit_for_bit_in_either_memory(
    text, tmp_path, optimizer
):
    """Against a run with its state on the device; and resumed from the middle, with the state there and with it on the host."""
    settings = QUICK | {"clip": 0.0}
    device = finished(PretrainConfig(optimizer=optimizer, data=text, out=tmp_path / "device", **settings))
    config = PretrainConfig(optimizer=optimizer, data=text, out=tmp_path / "host", state_memory="host", **settings)
    host = finished(config)
    assert {kind for ndim, kind in kinds(host.opt_state.layers) if ndim > 2} == {"pinned_host"}
    assert {kind for ndim, kind in kinds(host.opt_state.rest) if ndim > 1} == {"pinned_host"}
    assert {kind for _, kind in kinds(host.params)} == {kind for _, kind in kinds(device.opt_state)} == {"device"}
    ends = [host]
    for memory in ("host", "device"):
        out = tmp_path / f"resumed-{memory}"
        shutil.copytree(config.out, out)
        shutil.rmtree(out / "checkpoints" / "6")
        ends.append(finished(dataclasses.replace(config, out=out, resume=True, state_memory=memory)))
        assert ends[-1].resumed_from == 3
    for end in ends:
        jax.tree.map(np.testing.assert_array_equal, (end.params, end.opt_state), (device.params, device.opt_state))
    assert kinds(ends[1].opt_state) == kinds(host.opt_state)
    assert kinds(ends[2].opt_state) == kinds(device.opt_state)


@pytest.mark.slow
def test_a_layer_wise_run_with_8_bit_state_has_the_losses_of_a_plain_one(text, tmp_path):
    """The losses agree to rounding until the first 8-bit code differs, and then to a fraction of the 8-bit error.

    The two steps sum in a different order, so a value halfway between two codes may be rounded either way.  The moments are
    rotated, because kept moments would jump where two columns of nearly equal energy change places.
    """
    losses = []
    for layerwise in (True, False):
        out = tmp_path / str(layerwise)
        settings = QUICK | {"layerwise": layerwise, "steps": 12, "transport": "rotate"}
        finished(PretrainConfig(optimizer="galore_adamw_8bit", data=text, out=out, **settings))
        losses.append([r["loss"] for r in read_metrics(out) if "loss" in r])
    np.testing.assert_allclose(losses[0][:4], losses[1][:4], rtol=1e-5)
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.2
