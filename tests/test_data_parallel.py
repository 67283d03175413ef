# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Devices that average their gradients in the subspaces: the numbers of one device, for a share of the bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_mesh import CONFIG, MODEL, built, run

from galore_jax import tree_bytes
from galore_jax.accumulate import low_rank_mean, update_from_low_rank
from galore_jax.planning.traffic import traffic
from galore_jax.presets import LOW_RANK
from galore_jax.training import config as settings

DEVICES = 8
PARAMS = {
    "stack": {"kernel": jnp.zeros((2, 12, 16))},
    "wide": {"kernel": jnp.zeros((16, 40))},
    "bias": jnp.zeros((16,)),
}
RANDOM = np.random.default_rng(0)
TARGETS = jax.tree.map(
    lambda p: jnp.asarray(RANDOM.normal(size=(DEVICES, *p.shape)) + RANDOM.normal(size=(1, *p.shape)), jnp.float32),
    PARAMS,
)


def gradient(params, targets):
    """Of half the mean squared distance to the targets of some devices; the mean over all is that of all targets."""
    return (), jax.tree.map(lambda p, t: p - jnp.mean(t, axis=0), params, targets)


def step_on(tx, axis_name):
    def step(params, state, targets):
        _, low_rank, state = low_rank_mean(
            tx, lambda one: gradient(params, one), jax.tree.map(lambda t: t[None], targets), state, params, axis_name
        )
        updates, state = update_from_low_rank(tx, low_rank, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    if axis_name is None:
        return jax.jit(step)
    mesh = jax.make_mesh((DEVICES,), (axis_name,), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P(), P(), P(axis_name)), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOW_RANK))
def test_twenty_steps_of_every_preset_equal_those_of_one_device(name):
    extra = {"random_from": 10} if name == "golore_adamw" else {}
    tx = LOW_RANK[name](0.05, rank=4, update_proj_gap=5, **extra)
    alone, together = step_on(tx, None), step_on(tx, "data")
    expected = found = PARAMS, tx.init(PARAMS)
    for _ in range(20):
        expected, found = alone(*expected, TARGETS), together(*found, TARGETS)
    for leaf, wanted in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-5)
    assert all(float(jnp.max(jnp.abs(leaf))) > 0.05 for leaf in jax.tree.leaves(found[0]))


@pytest.mark.slow
def test_one_bad_device_leaves_the_matrix_alone_on_all_and_is_counted_once():
    tx = LOW_RANK["galore_adamw"](0.05, rank=4, update_proj_gap=1)
    step, state = step_on(tx, "data"), tx.init(PARAMS)
    params, state = step(PARAMS, state, TARGETS)
    bad = TARGETS | {"wide": {"kernel": TARGETS["wide"]["kernel"].at[3, 2, 2].set(jnp.nan)}}
    new, after = step(params, state, bad)
    np.testing.assert_array_equal(new["wide"]["kernel"], params["wide"]["kernel"])
    assert not np.array_equal(new["stack"]["kernel"], params["stack"]["kernel"])
    assert (int(after[0].skipped), int(after[0].kept)) == (1, 1)
    new, _ = step(new, after, TARGETS)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"accumulate": 2, "optimizer": "galore_adafactor"},
        {"layerwise": True, "weights": "int8", "optimizer": "q_galore_adamw_8bit"},
    ],
    ids=["plain", "layerwise"],
)
def test_the_trainers_steps_equal_those_on_one_device(overrides):
    overrides = {"clip": 0, "batch": 16, **overrides}
    # There too bases come from the first micro-batch.
    alone = {"accumulate_low_rank": not overrides.get("layerwise")}
    expected, losses = run(built(None, **overrides, **alone), 6)
    params, sharded_losses = run(built("data=8", reduce_low_rank=True, **overrides), 6)
    np.testing.assert_allclose(sharded_losses, losses, rtol=0, atol=1e-5)
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(*np.float64([found, wanted]), rtol=0, atol=1e-5)
    assert losses[-1] != losses[0]


@functools.cache
def sent(**overrides):
    made = built("data=8", clip=0, batch=16, **overrides)
    with made.on_mesh():
        compiled = made.step.lower(*made.state, made.batch).compile()
    found = traffic(compiled.as_text(), DEVICES)
    return sum(found.always.values()), sum(found.in_branches.values())


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_projected_leaves_send_no_more_than_their_low_rank_gradients_between_refreshes(layerwise):
    params = built(None).state[0]
    of_matrices = tree_bytes([leaf for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3])  # stacks of them
    of_rest = (tree_bytes(params) - of_matrices) * 2 * (DEVICES - 1) / DEVICES  # an all-reduce, by rings
    plain, _ = sent(layerwise=layerwise)
    compressed, refreshes = sent(layerwise=layerwise, reduce_low_rank=True)
    share = (compressed - of_rest) / (plain - of_rest)
    assert 0.2 < share <= CONFIG.rank / MODEL.hidden_size + 0.05
    assert compressed < 0.5 * plain  # of the whole model, embeddings and head included
    assert refreshes > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "--reduce-low-rank needs --mesh data=N, N more than 1, and no other axis"),
        ({"mesh": "data=2,fsdp=4"}, "--reduce-low-rank needs --mesh data=N, N more than 1, and no other axis"),
        ({"mesh": "data=8", "clip": 1.0}, "--reduce-low-rank needs --clip 0 instead of 1.0"),
        ({"mesh": "data=8", "optimizer": "fira_adamw"}, "fira_adamw uses the whole gradient"),
        ({"mesh": "data=8", "optimizer": "adamw"}, "an optimizer with subspaces, which --optimizer adamw is not"),
    ],
)
def test_what_cannot_be_sent_in_subspaces_is_one_sentence(overrides, message):
    config = dataclasses.replace(CONFIG, **({"clip": 0, "reduce_low_rank": True} | overrides))
    with pytest.raises(ValueError, match=message):
        settings.check(config)
