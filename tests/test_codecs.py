# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The 8-bit codecs against the published table and brute force; stochastic rounding against its mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import normal, optimized_compilation  # noqa: F401

from galore_jax import codecs, sharding
from galore_jax.codecs import BLOCK, Bfloat16, SignedBlocks, UnsignedBlocks, decoded, encoded_like, flatten, is_coded

EIGHT_BITS = (SignedBlocks, UnsignedBlocks)
FORMATS = (*EIGHT_BITS, Bfloat16)
F32_MAX = float(np.finfo(np.float32).max)
eight_bits = pytest.mark.parametrize("codec", EIGHT_BITS)
formats = pytest.mark.parametrize("codec", FORMATS)


@functools.cache
def table(codec):
    """The 256 values of the dynamic map, as published: decade by decade, means of neighbouring borders; in float64."""
    values = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, 2 ** (exponent + (codec is UnsignedBlocks)) + 1)
        decade = 10.0 ** (exponent - 6) * (borders[:-1] + borders[1:]) / 2
        values += [*decade, *(-decade if codec is SignedBlocks else ())]
    assert len(values) == len(set(values)) == 256
    return np.sort(values)


@functools.cache
def jitted(codec):
    return jax.jit(codec.encode), jax.jit(codec.decode)


def round_trip(codec, array):
    """(stored, decoded) by the compiled functions."""
    encode, decode = jitted(codec)
    stored = encode(jnp.asarray(array, jnp.float32))
    return stored, np.asarray(decode(stored))


def positive(codec, array):
    return np.abs(array) if codec is UnsignedBlocks else array


def dense(codec, points=200_000):
    """Numbers between 0 and 1 all over the map: evenly, evenly in the logarithm, and around every border."""
    values = table(codec)
    borders = (values[1:] + values[:-1]) / 2
    near = np.concatenate([borders * (1 + sign * 2e-6) for sign in (-1, 1)])
    even = np.linspace(0, 1, points)
    return np.unique(np.concatenate([even, 10.0 ** (-9 * even), np.abs(near), np.abs(values)]).clip(0, 1))


@eight_bits
def test_every_code_decodes_to_its_value_of_the_table(codec):
    codes, scale = jnp.arange(256, dtype=jnp.uint8), jnp.ones((1,), jnp.float32)
    values = np.asarray(codec(codes, scale).decode(), np.float64)
    np.testing.assert_allclose(values, table(codec), rtol=3e-7, atol=0)
    assert values[255] == 1
    assert values[127 if codec is SignedBlocks else 0] == 0


@pytest.mark.covering(1)
@eight_bits
def test_tables_and_arithmetic_give_the_same_codes_and_values(codec):
    """A TPU computes what other devices look up.  Beside a border, both neighbors are nearest."""
    signed, values = codec is SignedBlocks, table(codec)
    top = codecs._top(signed)
    codes = jnp.arange(256, dtype=jnp.uint8)
    looked_up, computed = (np.asarray(f(codes, signed)) for f in (codecs._values_by_table, codecs._values))
    np.testing.assert_allclose(computed, looked_up, rtol=3e-7)
    x = dense(codec)
    borders = (values[1:] + values[:-1])[values[1:] > 0] / 2
    right = np.searchsorted(borders, x).clip(1, len(borders) - 1)
    # The arithmetic multiplies rounding errors by up to nine.
    clear = np.minimum(np.abs(x - borders[right]), np.abs(x - borders[right - 1])) > 5e-6 * x
    x = np.concatenate([x[clear], [2.0, 1e30, np.inf, np.nan]]).astype(np.float32)
    found = codecs._nearest_by_table(jnp.asarray(x), top)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, codecs._nearest(jnp.asarray(x), top))


@eight_bits
def test_no_two_borders_have_the_same_upper_bits(codec):
    """The table holds one for each."""
    borders = ((table(codec)[1:] + table(codec)[:-1]) / 2).astype(np.float32)
    words = borders[borders > 0].view(np.uint32) >> 16
    assert len(set(words)) == len(words)
    assert codecs._LOWEST_WORD < words.min() < words.max() < codecs._HIGHEST_WORD


@eight_bits
@pytest.mark.parametrize("scale", [1.0, 3.7e-5, -250.0])
def test_the_nearest_value_is_chosen(codec, scale):
    """Each number alone in a block with the extreme, compared with all 256 values; ties within float32 rounding go anywhere."""
    x = dense(codec)
    x = np.concatenate([x, -x[x < 1]]) if codec is SignedBlocks else x
    scale = abs(scale) if codec is UnsignedBlocks else scale
    arrays = np.stack([np.full_like(x, scale), x * scale], axis=1).astype(np.float32)
    _, got = round_trip(codec, arrays)
    np.testing.assert_array_equal(got[:, 0], arrays[:, 0])
    ratio = arrays[:, 1].astype(np.float64) / arrays[:, 0]
    values = table(codec)
    right = np.clip(np.searchsorted(values, ratio), 1, 255)
    best = np.minimum(np.abs(values[right] - ratio), np.abs(values[right - 1] - ratio))
    error = np.abs(got[:, 1].astype(np.float64) / arrays[:, 0] - ratio)
    floored = (ratio > 0) & (ratio < values[1] / 2) if codec is UnsignedBlocks else np.zeros(len(ratio), bool)
    assert np.all(error[~floored] <= best[~floored] + 1e-6 * np.abs(ratio[~floored]) + 1e-12)
    np.testing.assert_allclose(got[floored, 1], values[1] * scale, rtol=1e-6)


shapes = st.sampled_from([(1,), (16,), (255,), (256,), (257,), (300,), (3, 513), (2, 3, 40), (2, 512)])


@pytest.mark.covering(1)
@eight_bits
@settings(deadline=None, max_examples=40)
@given(shape=shapes, exponent=st.floats(-36, 36), spread=st.floats(0, 12), seed=st.integers(0, 10**6))
def test_a_round_trip_keeps_the_extremes_and_a_second_one_changes_nothing(codec, shape, exponent, spread, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** (exponent - spread * rng.uniform(size=shape))
    x = positive(codec, x).astype(np.float32)
    stored, once = round_trip(codec, x)
    assert stored.codes.shape == shape
    assert stored.codes.dtype == jnp.uint8
    assert stored.scales.shape == (*shape[:-1], -(-shape[-1] // BLOCK))
    assert stored.scales.dtype == jnp.float32
    again, twice = round_trip(codec, once)
    np.testing.assert_array_equal(twice, once)
    np.testing.assert_array_equal(stored.scales, again.scales)
    # Where the smallest values of a map are below the smallest normal number, they may be flushed, which is another code.
    normal = np.repeat(np.abs(stored.scales) >= 2.0**-104, BLOCK, axis=-1)[..., : shape[-1]]
    np.testing.assert_array_equal(np.where(normal, stored.codes, 0), np.where(normal, again.codes, 0))
    if codec is UnsignedBlocks:
        np.testing.assert_array_equal(once > 0, x > 0)
    for start in range(0, shape[-1], BLOCK):
        block, got = x[..., start : start + BLOCK], once[..., start : start + BLOCK]
        extreme = np.max(np.abs(block), axis=-1, keepdims=True)
        if np.all(extreme >= (2.0**-126 if codec is SignedBlocks else 2.0**-104)):
            largest = np.abs(block) == extreme
            np.testing.assert_array_equal(got[largest & (block > 0)], block[largest & (block > 0)])
            # Half of the widest cell of each map; and whether numbers below the smallest normal one are flushed is up to XLA.
            cell = extreme * (0.0072 if codec is SignedBlocks else 0.0036)
            assert np.all(np.abs(got - block) <= cell + np.finfo(np.float32).tiny)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_extreme_of_a_block_is_exact_whatever_its_sign(signs):
    first, second = signs
    x = np.array([0.1, 3.0 * first, -0.2, 2.9 * second], np.float32)
    stored, got = round_trip(SignedBlocks, x)
    assert got[1] == x[1]
    assert stored.scales[0] == x[1]
    np.testing.assert_allclose(got, x, atol=0.0072 * 3)


@eight_bits
def test_blocks_do_not_see_one_another(codec):
    """One outlier in its own block of a long row; the other blocks, the other rows and the short last block keep theirs."""
    x = positive(codec, np.random.default_rng(0).normal(size=(3, 700))).astype(np.float32)
    _, expected = round_trip(codec, x)
    x[1, 300] = 1e6
    stored, got = round_trip(codec, x)
    changed = np.any(got != expected, axis=0)
    assert not changed[:256].any()
    assert not changed[512:].any()
    np.testing.assert_array_equal(got[[0, 2]], expected[[0, 2]])
    # Slicing the leading axis slices the codec.
    alone, one = round_trip(codec, x[1])
    np.testing.assert_array_equal(got[1], one)
    for whole, part in zip(stored, alone, strict=True):
        np.testing.assert_array_equal(whole[1], part)


def test_a_second_moment_beside_an_outlier_stays_positive():
    v = np.full((256,), 1e-20, np.float32)
    v[7], v[9] = 1e12, 0
    _, got = round_trip(UnsignedBlocks, v)
    assert got[7] == v[7]
    assert got[9] == 0
    assert np.all(np.delete(got, [7, 9]) > 0)


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1.2e-38, 1e-37, 1e-33, 1e-31, 1e-25, F32_MAX])
def test_positive_numbers_stay_positive_down_to_the_last_denormal(value):
    """Also where the device takes denormals for zero, which it may then do with the sign bit of the answer too."""
    v = np.array([value, 0, value / 2], np.float32)
    stored, got = round_trip(UnsignedBlocks, v)
    np.testing.assert_array_equal(got > 0, v > 0)
    assert np.all(got[got > 0] >= np.finfo(np.float32).tiny)
    assert np.all(np.isfinite(got))
    assert stored.codes[1] == 0


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, 1.2e-38, -1e-37, 1e-30, F32_MAX, -F32_MAX])
def test_signed_numbers_of_any_size_stay_finite(value):
    _, got = round_trip(SignedBlocks, np.array([value, 0.0, -value / 2], np.float32))
    assert np.all(np.isfinite(got))
    expected = value if abs(value) >= np.finfo(np.float32).tiny else 0
    assert got[0] == np.float32(expected)
    assert got[1] == 0


@eight_bits
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_are_exactly_zeros(codec, zero):
    stored, got = round_trip(codec, np.full((3, 300), zero, np.float32))
    np.testing.assert_array_equal(got, 0)
    np.testing.assert_array_equal(stored.scales, 0)
    # So is a state that was made by zeros_like.
    np.testing.assert_array_equal(codec(*map(jnp.zeros_like, stored)).decode(), 0)


@eight_bits
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_seen_in_its_whole_block_and_nowhere_else(codec, bad):
    """A whole block in a row, the short last one, a row of one block, a stack, a vector."""
    for shape, place in [((2, 600), (0, 300)), ((2, 600), (1, 599)), ((3, 2, 40), (2, 1, 0)), ((300,), (7,))]:
        x = positive(codec, np.random.default_rng(0).normal(size=shape)).astype(np.float32)
        expected = round_trip(codec, x)[1].copy()
        x[place] = bad
        _, got = round_trip(codec, x)
        start = place[-1] // BLOCK * BLOCK
        expected[(*place[:-1], slice(start, start + BLOCK))] = np.nan
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bfloat16_shows_a_number_that_is_not_finite_and_no_other(bad):
    x = np.ones((2, 3, 40), np.float32)
    x[1, 2, 5] = bad
    for key in (None, jax.random.key(0)):
        np.testing.assert_array_equal(Bfloat16.encode(jnp.asarray(x), key).decode(), x)


def test_a_negative_number_has_no_place_among_second_moments():
    _, got = round_trip(UnsignedBlocks, np.array([1.0, -0.5, 0.25], np.float32))
    np.testing.assert_allclose(got, [1, 0, 0.25], atol=0.0036)


@formats
def test_a_coded_array_is_one_leaf_that_is_stored_alike_again(codec):
    x = jnp.abs(normal(0, (3, 40)))
    tree = {"coded": codec.encode(x), "plain": x}
    leaves, structure = flatten(tree)
    assert [is_coded(leaf) for leaf in leaves] == [True, False]
    assert leaves[0].shape == x.shape
    assert decoded(leaves[0]).dtype == jnp.float32
    assert decoded(leaves[1]) is x
    again = encoded_like(decoded(leaves[0]), leaves[0])
    assert type(again) is codec
    jax.tree.map(np.testing.assert_array_equal, again, leaves[0])
    assert encoded_like(x, leaves[1]) is x
    assert structure.flatten_up_to(tree)[0] is leaves[0]


@pytest.mark.slow
@formats
def test_vmap_over_layers_equals_the_stack(codec):
    x = jnp.abs(normal(0, (4, 5, 300)))
    key = jax.random.key(1)
    stack = codec.encode(x, key)
    each = jax.vmap(lambda layer: codec.encode(layer, key))(x)
    alone = [codec.encode(layer, key) for layer in x]
    for layer in range(4):
        jax.tree.map(
            lambda s, e, a, i=layer: (
                np.testing.assert_array_equal(s[i], a),
                np.testing.assert_array_equal(e[i], a),
            ),
            stack,
            each,
            alone[layer],
        )


def test_stochastic_rounding_is_unbiased():
    """The mean of n roundings of x is x up to z standard errors of a Bernoulli variable.

    65 numbers are tested at z = 5: a false alarm has probability 65 · 5.7e-7 = 4e-5, and the key is fixed.
    """
    n = 20_000
    x = np.concatenate([np.geomspace(1e-30, 1e30, 32), -np.geomspace(1e-3, 1e3, 32), [0.0]]).astype(np.float32)
    x[:32] *= np.linspace(1, 2, 32, dtype=np.float32)
    values = np.asarray(Bfloat16.encode(jnp.broadcast_to(x[:, None], (65, n)), jax.random.key(0)).decode(), np.float64)
    bits = x.view(np.uint32)
    below = (bits & 0xFFFF0000).view(np.float32).astype(np.float64)
    above = ((bits & 0xFFFF0000) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    above[-1] = 0
    assert np.all((values == below[:, None]) | (values == above[:, None]))
    share = (x - below) / np.where(above == below, 1, above - below)
    error = np.abs(np.mean(values, axis=1) - x)
    standard = np.abs(above - below) * np.sqrt(share * (1 - share) / n)
    assert np.all(error <= 5 * standard)
    assert error[-1] == 0


def test_stochastic_rounding_keeps_what_is_finite_finite_and_nan_nan():
    below_infinity = np.nextafter(np.float32(F32_MAX), np.float32(0))
    largest = float(jnp.finfo(jnp.bfloat16).max)
    x = np.array([F32_MAX, -F32_MAX, below_infinity, largest, np.inf, -np.inf], np.float32)
    nans = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    keys = [None, *map(jax.random.key, range(20))]
    for key in keys:
        got = np.asarray(Bfloat16.encode(jnp.asarray(x), key).decode())
        np.testing.assert_array_equal(got, [largest, -largest, largest, largest, np.inf, -np.inf])
        assert np.all(np.isnan(Bfloat16.encode(jnp.asarray(nans), key).decode()))


def test_stochastic_rounding_is_reproducible_and_its_noise_changes_with_the_key():
    x = normal(0, (40, 50))
    first, again, other = (Bfloat16.encode(x, jax.random.key(seed)).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert 0.1 < float(jnp.mean(first != other)) < 0.5
    # What bfloat16 holds already is never changed.
    np.testing.assert_array_equal(Bfloat16.encode(first.astype(jnp.float32), jax.random.key(3)).values, first)


SPECS = [P("a", None), P(None, "a"), P("a", "b"), P(None, ("a", "b")), P("b", "a"), P(None, None)]


@pytest.mark.slow
@formats
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("n", [2048, 320, 96])  # blocks whole on each device; not; one block a row
def test_the_same_sharded_and_unsharded_and_types_carry_over(codec, axis_type, n):
    x = jnp.abs(normal(0, (8, n)))
    key = jax.random.key(1)
    expected = codec.encode(x, key)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        for spec in SPECS:
            sharded = jax.device_put(x, NamedSharding(mesh, spec))
            stored = jax.jit(codec.encode)(sharded, key)
            jax.tree.map(np.testing.assert_array_equal, stored, expected)
            wide = jax.jit(codec.decode)(stored)
            np.testing.assert_array_equal(wide, expected.decode())
            if axis_type is AxisType.Explicit:
                assert jax.typeof(wide) == jax.typeof(sharded)
                assert jax.typeof(stored[0]).sharding == jax.typeof(sharded).sharding
                lead = [jax.typeof(leaf).sharding.spec[0] for leaf in stored]
                assert lead == [spec[0]] * len(lead)
    if n == 2048 and codec is not Bfloat16 and axis_type is AxisType.Explicit:
        with jax.set_mesh(mesh):
            scales = codec.encode(jax.device_put(x, NamedSharding(mesh, P(None, "a")))).scales
            assert jax.typeof(scales).sharding.spec == P(None, "a")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spreading_by_products_is_exact_for_any_bits(dtype):
    """As on a TPU, whatever the number: denormals, infinities, NaN with a payload."""
    random = np.random.default_rng(0).integers(0, 2**32, (64, 5), np.uint32)
    whole = random & 0xFFFF0000 if dtype == "bfloat16" else random
    values = jax.lax.bitcast_convert_type(jnp.asarray(whole), jnp.float32)
    if dtype == "bfloat16":
        values = jax.lax.bitcast_convert_type(jnp.asarray(whole >> 16, jnp.uint16), jnp.bfloat16)
    found = jax.jit(sharding.spread_by_products, static_argnums=(1, 2))(values, 19, 4)
    bits = np.asarray(jax.lax.bitcast_convert_type(found, jnp.uint32))
    np.testing.assert_array_equal(bits, np.repeat(whole, 4, axis=1)[:, :19])
