# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits: their error, their rounding, and what it does not touch."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import leniency

from galore_jax.weights import BLOCK, Int8Weight, apply_updates, dequantize, is_int8, quantize_weights


def normal(shape, seed=0, scale=0.02):
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), jnp.float32)


@pytest.mark.covering(1)
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


@pytest.mark.slow
def test_a_weight_without_an_update_keeps_its_code_and_a_block_keeps_its_scale():
    weight = quantize_weights({"kernel": normal((2, 512))})
    update = jnp.zeros((2, 512)).at[0, 0].set(1e-3)
    for seed in range(5):
        new = apply_updates(weight, {"kernel": update}, jax.random.key(seed))["kernel"]
        changed = np.argwhere(np.asarray(new.codes != weight["kernel"].codes)).tolist()
        assert changed in ([], [[0, 0]])
        np.testing.assert_array_equal(new.scales, weight["kernel"].scales)


@pytest.mark.covering(1)
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


@pytest.mark.slow
def test_slices_of_a_stack_are_rounded_as_the_stack_is():
    weight, update = quantize_weights({"kernel": normal((3, 2, 4, 300))}), {"kernel": normal((3, 2, 4, 300), 1, 1e-3)}
    whole = apply_updates(weight, update, jax.random.key(5))["kernel"]
    for layer in range(3):
        one = jax.tree.map(lambda x, layer=layer: x[layer], (weight, update))
        new = apply_updates(*one, jax.random.key(5), layer=layer)["kernel"]
        np.testing.assert_array_equal(new.codes, whole.codes[layer])
    # Matrices and parameters of one shape do not share their noise.
    assert np.any(whole.codes[0, 0] - weight["kernel"].codes[0, 0] != whole.codes[0, 1] - weight["kernel"].codes[0, 1])


@pytest.mark.slow
def test_rounding_is_the_same_sharded_and_unsharded():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    weight, update = quantize_weights({"kernel": normal((8, 1024))}), {"kernel": normal((8, 1024), 1, 1e-3)}
    step = jax.jit(lambda weight, update: apply_updates(weight, update, jax.random.key(7)))
    placed = jax.device_put((weight, update), NamedSharding(mesh, PartitionSpec("x", "y")))
    expected, found = step(weight, update)["kernel"], step(*placed)["kernel"]
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


NUMBERS = {"bfloat16": 1.0, "float16": 1.0, "float32": 1.0, "float64": 1.0, "complex64": 1 + 2j, "int32": 2**24 + 1}


@pytest.mark.covering(10)
# JAX is about to refuse a complex update of a real weight.
@pytest.mark.parametrize(
    ("weight", "update"),
    [pair for pair in itertools.product(NUMBERS, repeat=2) if pair[0] == "complex64" or pair[1] != "complex64"],
)
def test_arrays_get_the_result_of_optax_for_every_pair_of_dtypes(weight, update):
    with jax.enable_x64(True):
        params = {"w": jnp.full((2, 3), NUMBERS[weight], weight), "none": None}
        updates = {"w": jnp.full((2, 3), 2.0**-7 if update != "int32" else 1, update) * 3, "none": None}
        with leniency():
            expected = optax.apply_updates(params, updates)
        assert_trees_equal_to_the_bit(apply_updates(params, updates), expected)


def assert_trees_equal_to_the_bit(found, expected):
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_numbers_get_the_result_of_optax():
    with leniency():
        expected = optax.apply_updates({"t": 0.5}, {"t": jnp.asarray(0.25)})
    assert_trees_equal_to_the_bit(apply_updates({"t": 0.5}, {"t": jnp.asarray(0.25)}), expected)


def test_int8_weights_ask_for_a_key():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"'w' is an int8 weight, .* and key is None\. Pass key="):
        apply_updates(quantize_weights(params), params)


BAD = (np.nan, -np.nan, np.inf, -np.inf)
# Shapes and places in them: one block, a shorter last one, a stack.
BAD_PLACES = [((4, 200), (1, 7)), ((2, 300), (0, 10)), ((2, 300), (1, 299)), ((3, 2, 600), (2, 1, 511))]


def block_of(shape, place):
    """Which weights are in the block of one."""
    mask = np.zeros(shape, bool)
    start = place[-1] // BLOCK * BLOCK
    mask[(*place[:-1], slice(start, start + BLOCK))] = True
    return mask


@pytest.mark.parametrize(("shape", "place"), BAD_PLACES)
def test_a_weight_that_is_not_finite_makes_its_block_nan_and_no_other(shape, place):
    weight, make = normal(shape), jax.jit(lambda w: dequantize(quantize_weights({"w": w}))["w"])
    expected = np.where(block_of(shape, place), np.nan, make(weight))
    for bad in BAD:
        np.testing.assert_array_equal(make(weight.at[place].set(bad)), expected)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "place"), BAD_PLACES)
def test_an_update_that_is_not_finite_makes_its_block_nan_for_good_and_no_other(shape, place, dtype):
    weight, update = quantize_weights({"w": normal(shape)}), {"w": normal(shape, 1, 1e-3).astype(dtype)}
    key, step, dense = jax.random.key(0), jax.jit(apply_updates), jax.jit(dequantize)
    expected = np.where(block_of(shape, place), np.nan, dense(step(weight, update, key))["w"])
    for bad in BAD:
        spoilt = step(weight, {"w": update["w"].at[place].set(bad)}, key)
        np.testing.assert_array_equal(dense(spoilt)["w"], expected)
        later = dense(step(spoilt, update, key))["w"]
        np.testing.assert_array_equal(np.isnan(later), np.isnan(expected))


@pytest.mark.covering(1)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_overflows_makes_its_block_not_finite_and_no_other(sign):
    largest = float(jnp.finfo(jnp.float32).max)
    stored = quantize_weights({"w": jnp.ones((2, 600)).at[1, 300].set(sign * 3e38)})
    update = jnp.zeros((2, 600)).at[1, 300].set(sign * largest)
    found = np.asarray(dequantize(apply_updates(stored, {"w": update}, jax.random.key(0)))["w"])
    block = block_of((2, 600), (1, 300))
    assert not np.any(np.isfinite(found[block]))
    np.testing.assert_allclose(found[~block], 1, rtol=0.02)


def test_a_block_that_shrinks_by_any_factor_holds_its_sums():
    """The old scale over the new one overflows float32, and 0 times that is NaN."""
    stored = quantize_weights({"w": jnp.zeros((2, 256)).at[0, 0].set(1e30)})
    update = (-dequantize(stored)["w"]).at[0, 1].set(1e-20)
    found = dequantize(apply_updates(stored, {"w": update}, jax.random.key(0)))["w"]
    np.testing.assert_allclose(found, jnp.zeros((2, 256)).at[0, 1].set(1e-20), rtol=0.02)


def test_only_matrices_of_real_floating_point_numbers_are_quantized():
    params = {"int": jnp.ones((2, 3), jnp.int32), "complex": jnp.ones((2, 3), jnp.complex64), "number": 0.5}
    assert not any(map(is_int8, jax.tree.leaves(quantize_weights(params), is_leaf=is_int8)))
    for name, shape in (("int", r"\(2, 3\)"), ("complex", r"\(2, 3\)"), ("number", r"\(\)")):
        with pytest.raises(
            ValueError, match=rf"mask selects '{name}' with shape {shape} and dtype .*; expected a matrix"
        ):
            quantize_weights(params, {other: other == name for other in params})


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
