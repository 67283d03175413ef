# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits: their error, their rounding, and what it does not touch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import quick_compilation  # noqa: F401

from galore_jax.weights import BLOCK, Int8Weight, apply_updates, dequantize, is_int8, quantize_weights


def normal(shape, seed=0, scale=0.02):
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), jnp.float32)


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("rows", [(3,), (2, 3)])
def test_the_nearest_code_is_within_half_a_step_whatever_the_length_of_a_row(rows, columns):
    weight = normal((*rows, columns))
    stored = quantize_weights({"kernel": weight})["kernel"]
    assert stored.codes.shape == weight.shape
    assert stored.codes.dtype == jnp.int8
    assert stored.scales.shape == (*rows, math.ceil(columns / BLOCK))
    error = np.abs(np.asarray(dequantize(stored)) - np.asarray(weight)).reshape(-1, columns)
    peaks = np.abs(np.asarray(weight)).reshape(-1, columns)
    for number, start in enumerate(range(0, columns, BLOCK)):
        block = slice(start, start + BLOCK)
        step = np.asarray(stored.scales, np.float32)[..., number].reshape(-1, 1)
        np.testing.assert_allclose(step, 1.05 * peaks[:, block].max(axis=1, keepdims=True) / 127, rtol=2**-8)
        assert np.all(error[:, block] <= step / 2 * (1 + 1e-5))


def test_embeddings_heads_norms_and_vectors_stay_as_they_are_and_a_mask_says_otherwise():
    params = {name: normal((4, 8)) for name in ("embed_tokens", "lm_head", "kernel", "scale")} | {"bias": normal((8,))}
    chosen = jax.tree.map(is_int8, quantize_weights(params), is_leaf=is_int8)
    assert [name for name, yes in chosen.items() if yes] == ["kernel"]
    masked = quantize_weights(params, {name: name == "lm_head" for name in params})
    assert [name for name, leaf in masked.items() if is_int8(leaf)] == ["lm_head"]


def test_stochastic_rounding_is_unbiased():
    # The mean of 4000 draws, for each of 900 elements within 6 standard deviations: 900 x 2e-9, so two false alarms in a
    # million choices of the seed.
    draws = 4000
    weight = quantize_weights({"kernel": normal((3, 300))})
    update = {"kernel": normal((3, 300), seed=1, scale=1e-4)}
    step = jax.jit(jax.vmap(lambda key: dequantize(apply_updates(weight, update, key))["kernel"]))
    found = np.asarray(step(jax.random.split(jax.random.key(3), draws)), np.float64)
    wanted = np.asarray(dequantize(weight)["kernel"], np.float64) + np.asarray(update["kernel"], np.float64)
    size = np.asarray(weight["kernel"].scales, np.float64).repeat(BLOCK, axis=1)[:, :300]
    fraction = np.abs(np.asarray(update["kernel"], np.float64)) / size
    fraction -= np.floor(fraction)
    deviation = size * np.sqrt(fraction * (1 - fraction) / draws)
    assert np.all(np.abs(found.mean(axis=0) - wanted) <= 6 * deviation + 1e-7)
    assert np.all(np.abs(found - wanted) < size * (1 + 1e-5))


def test_a_weight_without_an_update_keeps_its_code_and_a_block_keeps_its_scale():
    weight = quantize_weights({"kernel": normal((2, 512))})
    update = jnp.zeros((2, 512)).at[0, 0].set(1e-3)
    for seed in range(5):
        new = apply_updates(weight, {"kernel": update}, jax.random.key(seed))["kernel"]
        changed = np.argwhere(np.asarray(new.codes != weight["kernel"].codes)).tolist()
        assert changed in ([], [[0, 0]])
        np.testing.assert_array_equal(new.scales, weight["kernel"].scales)


@pytest.mark.parametrize("factor", [3.0, -0.9])
def test_a_block_that_outgrows_or_leaves_its_scale_gets_a_new_one(factor):
    weight = quantize_weights({"kernel": normal((2, 256))})
    dense = dequantize(weight)["kernel"]
    new = apply_updates(weight, {"kernel": factor * dense}, jax.random.key(0))["kernel"]
    peaks = np.abs((1 + factor) * np.asarray(dense)).max(axis=1, keepdims=True)
    scales = np.asarray(new.scales, np.float32)
    np.testing.assert_allclose(scales, 1.05 * peaks / 127, rtol=2**-8)
    assert np.abs(np.asarray(dequantize(new)) - (1 + factor) * np.asarray(dense)).max() <= np.max(scales) * 1.0001


def test_a_block_of_zeros_stays_zero_and_can_be_left():
    weight = quantize_weights({"kernel": jnp.zeros((2, 300))})
    still = apply_updates(weight, {"kernel": jnp.zeros((2, 300))}, jax.random.key(0))
    np.testing.assert_array_equal(dequantize(still)["kernel"], jnp.zeros((2, 300)))
    moved = apply_updates(weight, {"kernel": jnp.full((2, 300), 1e-6)}, jax.random.key(0))
    np.testing.assert_allclose(dequantize(moved)["kernel"], 1e-6, rtol=0.01)


def test_slices_of_a_stack_are_rounded_as_the_stack_is():
    weight, update = quantize_weights({"kernel": normal((3, 2, 4, 300))}), {"kernel": normal((3, 2, 4, 300), 1, 1e-3)}
    whole = apply_updates(weight, update, jax.random.key(5))["kernel"]
    for layer in range(3):
        one = jax.tree.map(lambda x, layer=layer: x[layer], (weight, update))
        new = apply_updates(*one, jax.random.key(5), layer=layer)["kernel"]
        np.testing.assert_array_equal(new.codes, whole.codes[layer])
    # Matrices and parameters of one shape do not share their noise.
    assert np.any(whole.codes[0, 0] - weight["kernel"].codes[0, 0] != whole.codes[0, 1] - weight["kernel"].codes[0, 1])


def test_rounding_is_the_same_sharded_and_unsharded():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    weight, update = quantize_weights({"kernel": normal((8, 1024))}), {"kernel": normal((8, 1024), 1, 1e-3)}
    step = jax.jit(lambda weight, update: apply_updates(weight, update, jax.random.key(7)))
    placed = jax.device_put((weight, update), NamedSharding(mesh, PartitionSpec("x", "y")))
    expected, found = step(weight, update)["kernel"], step(*placed)["kernel"]
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


def test_bfloat16_weights_are_added_to_in_float32_and_int8_ones_ask_for_a_key():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    new = apply_updates(params, {"w": jnp.full((2, 2), 2.0**-7)})
    assert new["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["w"].astype(jnp.float32), 1 + 2.0**-7)
    with pytest.raises(
        ValueError, match="'w' is an int8 weight, which is rounded stochastically: give apply_updates a key"
    ):
        apply_updates(quantize_weights(params), params)


def test_orbax_saves_and_restores_them_exactly(tmp_path):
    params = {"kernel": normal((2, 8, 300)), "norm": jnp.ones((8,))}
    stored = quantize_weights(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "it", stored)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "it", jax.eval_shape(lambda: stored))
    assert isinstance(back["kernel"], Int8Weight)
    assert jax.tree.structure(back) == jax.tree.structure(stored)
    jax.tree.map(np.testing.assert_array_equal, back, stored)
