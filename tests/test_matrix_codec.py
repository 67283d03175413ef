# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Momentum of matrices in few bits, against a version in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from galore_jax.matrix_codec import CodedMatrix, Grid, MatrixCodec

all_bits = pytest.mark.parametrize("bits", [8, 4, 3, 2])


def outliers(seed, shape):
    """Normal numbers with rows and columns of very different sizes, as momenta have."""
    rng = np.random.default_rng(seed)
    sides = [np.exp(2 * rng.normal(size=(*shape[:-2], side))) for side in shape[-2:]]
    return (rng.normal(size=shape) * sides[0][..., :, None] * sides[1][..., None, :]).astype(np.float32)


def rounded_up(x):
    """To bfloat16, as float32."""
    bits = x.astype(np.float32).view(np.uint32)
    return (((bits + 0xFFFF) >> 16) << 16).view(np.float32)


def dither(seed, shape):
    """In [-1/2, 1/2): the hash of the seed and the place, in Python's own integers."""
    place = np.arange(shape[0] * shape[1], dtype=object).reshape(shape)
    x = (1 + place + int(seed) * 0x9E3779B9) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor % 2**32
    x = x ^ (x >> 16)
    return (np.where(x < 2**31, x, x - 2**32) / 2**32).astype(np.float64)


def grid(x, bits, u):
    """q, what it decodes to, the step, and whether q is inside the grid, of one matrix in float64."""
    x = x.astype(np.float64)
    if bits > 3:
        rows, columns = (rounded_up(np.abs(x).max(axis=axis)).astype(np.float64) for axis in (1, 0))
        step = np.minimum(rows[:, None], columns[None, :]) / (2 ** (bits - 1) - 1)
        q = np.round(x / step + u)
        return q, step * (q - u), step, np.full(x.shape, True)
    rows = np.sqrt(np.mean(x**2, axis=1)).astype(jnp.bfloat16).astype(np.float64)
    columns = np.sqrt(np.mean((x / rows[:, None]) ** 2, axis=0)).astype(jnp.bfloat16).astype(np.float64)
    step = rows[:, None] * columns[None, :] * {3: 0.73, 2: 1.25}[bits]
    wanted = np.round(x / step - 0.5 + u)
    q = np.clip(wanted, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q, step * (q + 0.5 - u), step, q == wanted


def unpacked(codes, n, bits):
    """The codes of each row, read as one string of bits, lowest first."""
    strings = np.unpackbits(codes, axis=-1, bitorder="little")[..., : n * bits].reshape(*codes.shape[:-1], n, bits)
    return np.sum(strings * 2 ** np.arange(bits), axis=-1)


@pytest.mark.covering(6)
@all_bits
@pytest.mark.parametrize("seed", [None, 5, 2**32 - 1])
@pytest.mark.parametrize("shape", [(17, 33), (24, 16)])
def test_a_grid_is_that_of_numpy(bits, seed, shape):
    x = outliers(0, shape)
    coded = jax.jit(functools.partial(Grid.encode, bits=bits))(x, None if seed is None else jnp.uint32(seed))
    u = 0 if seed is None else dither(seed, shape)
    q, expected, step, inside = grid(x, bits, u)
    found = unpacked(np.asarray(coded.codes), shape[1], bits) - 2 ** (bits - 1)
    # A number at the border of two codes may get either.
    place = x / step + u - (0.5 if bits < 4 else 0)
    border = np.abs(np.abs(place - np.floor(place)) - 0.5) < 1e-4
    np.testing.assert_array_equal(found[~border], q[~border])
    assert np.mean(border) < 0.02
    decoded = np.asarray(jax.jit(Grid.decode)(coded))
    np.testing.assert_allclose(decoded[~border], expected[~border], rtol=1e-5, atol=1e-6 * step.max())
    assert np.all(np.abs(decoded - x)[inside] <= step[inside] * 0.501)
    assert np.mean(inside) == 1 if bits > 3 else np.mean(inside) > 0.8
    assert coded.shape == x.shape
    assert coded.codes.nbytes == shape[0] * (-(-shape[1] // 8) * 3 if bits == 3 else -(-shape[1] * bits // 8))


@pytest.mark.parametrize(("bits", "most"), [(3, 0.05), (2, 0.16)])
def test_the_error_of_a_few_bits_does_not_grow_with_the_size_of_the_matrix(bits, most):
    """A step that reached to the largest of more and more entries would grow."""
    rng = np.random.default_rng(0)
    for shape in ((64, 64), (512, 1024)):
        sides = np.exp(0.5 * rng.normal(size=(shape[0], 1))) * np.exp(0.5 * rng.normal(size=(1, shape[1])))
        x = rng.normal(size=shape).astype(np.float32)
        decoded = Grid.encode(jnp.asarray(sides * x, jnp.float32), jnp.uint32(3), bits=bits).decode()
        assert np.mean(np.square(np.asarray(decoded) / sides - x)) < most


def test_dither_has_no_bias_and_the_variance_of_nearest():
    x = outliers(1, (64, 64))
    _, _, step, _ = grid(x, 4, 0)
    decode = jax.jit(jax.vmap(lambda seed: Grid.encode(jnp.asarray(x), seed, bits=4).decode()))
    errors = (np.asarray(decode(jnp.arange(1000, 1400, dtype=jnp.uint32))) - x) / step
    assert np.abs(errors.mean(axis=0)).max() < 5 * (12 * 400) ** -0.5
    np.testing.assert_allclose(errors.var(), 1 / 12, rtol=0.01)
    # Nor do the errors of neighbors, or of one entry in successive updates, go together.
    for a, b in ((errors[:, 1:], errors[:, :-1]), (errors[:, :, 1:], errors[:, :, :-1]), (errors[1:], errors[:-1])):
        assert abs(np.mean(a * b)) < 12**-1 * 0.01


def test_stochastic_rounding_has_no_bias_and_the_variance_of_its_two_outcomes():
    """A number between q and q + 1 becomes q + 1 with the probability f of its fraction, so the variance is f (1 - f)."""
    x = outliers(1, (64, 64))
    _, _, step, _ = grid(x, 4, 0)
    coded = MatrixCodec(bits=4, leading=0, rounding="stochastic").encode(jnp.asarray(x))
    decode = jax.jit(jax.vmap(lambda seed: coded.renewed(jnp.asarray(x), seed).decode()))
    errors = (np.asarray(decode(jnp.arange(1000, 1400, dtype=jnp.uint32))) - x) / step
    assert np.abs(errors.mean(axis=0)).max() < 5 * (4 * 400) ** -0.5
    fraction = x / step - np.floor(x / step)
    np.testing.assert_allclose(np.mean(errors**2), np.mean(fraction * (1 - fraction)), rtol=0.01)


def test_with_0_bits_the_leading_directions_are_all_that_is_stored():
    x = low_rank_and_noise()
    coded = MatrixCodec(bits=0, leading=1 / 16).encode(jnp.zeros(x.shape))
    assert (coded.rest, coded.shape) == (None, x.shape)
    renew = jax.jit(CodedMatrix.renewed)
    for i in range(3):
        coded = renew(coded, x, jnp.uint32(i))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(coded.decode(), u[:, :4] * s[:4] @ vt[:4], atol=0.02 * np.abs(x).max())


@pytest.mark.parametrize("dithered", [False, True])
def test_a_momentum_of_4_bits_decays_with_dither_and_not_with_nearest(dithered):
    """Entries without gradient, in rows and columns whose largest entry stays: here a diagonal with a constant gradient."""
    beta, eye = 0.95, jnp.eye(32)
    start = jnp.where(eye > 0, 20.0, 10.0)
    coded = MatrixCodec(leading=0, rounding="dither" if dithered else "nearest").encode(start)

    def update(i, coded):
        return coded.renewed(beta * coded.decode() + eye, (1000 + i).astype(jnp.uint32))

    after = np.asarray(jax.jit(lambda coded: jax.lax.fori_loop(0, 200, update, coded))(coded).decode())
    np.testing.assert_allclose(np.diagonal(after).mean(), 20, rtol=0.1)
    off = after[~np.eye(32, dtype=bool)]
    if dithered:
        assert abs(off.mean()) < 0.5
        assert off.std() < 20 / 7 * (0.95**2 / (1 - 0.95**2) / 12) ** 0.5 * 1.1
    else:
        assert off.min() > 9


def low_rank_and_noise(shape=(64, 96), k=4):
    rng = np.random.default_rng(2)
    leading = rng.normal(size=(shape[0], k)) @ rng.normal(size=(k, shape[1])) * 5
    return (leading + 0.1 * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("tall", "leading_bits"), [(False, 4), (True, 8)])
def test_the_split_takes_the_leading_directions_out_of_the_grid(tall, leading_bits):
    x = low_rank_and_noise()
    x = x.T if tall else x
    codec = MatrixCodec(bits=4, leading_bits=leading_bits)
    coded, renew = codec.encode(jnp.zeros(x.shape)), jax.jit(CodedMatrix.renewed)
    for i in range(4):
        coded = renew(coded, x, jnp.uint32(i))
    assert coded.left.shape == (4, x.shape[0])
    # The power step has found the leading singular vectors.
    p = np.asarray(coded.left.decode())
    u = np.linalg.svd(x)[0][:, :4]
    assert np.sum((p @ u) ** 2) > (3.99 if leading_bits == 8 else 3.9)
    alone = MatrixCodec(bits=4, leading=0).encode(jnp.zeros(x.shape))
    error, without = (np.linalg.norm(np.asarray(c.decode()) - x) for c in (coded, renew(alone, x, jnp.uint32(0))))
    assert error < without / (8 if leading_bits == 8 else 3)
    # The rest is the difference to what is stored of P and R, so that what they are rounded to does not matter.
    product = p.T @ np.asarray(coded.right.decode())
    rest = np.asarray(coded.rest.decode())
    _, _, step, _ = grid(x - product, 4, 0)
    assert np.all(np.abs(rest - (x - product)) <= 0.51 * step)


@pytest.mark.slow
def test_a_stack_is_its_matrices_one_by_one_and_zeros_stay_zeros():
    codec = MatrixCodec(bits=3, leading=0.1, leading_bits=4)
    x = np.stack([outliers(3, (32, 48)), low_rank_and_noise((32, 48)), np.zeros((32, 48), np.float32)])
    renew = jax.jit(CodedMatrix.renewed)
    coded = renew(codec.encode(jnp.zeros(x.shape)), x, jnp.uint32(1))
    for i in range(3):
        alone = renew(codec.encode(jnp.zeros(x.shape[1:])), x[i], jnp.uint32(1))
        np.testing.assert_allclose(coded.decode()[i], alone.decode(), atol=1e-4 * np.abs(x[i]).max())
    assert not np.any(coded.decode()[2])
    assert not np.any(codec.encode(jnp.zeros((2, 16, 16))).decode())


@all_bits
def test_numbers_of_any_size_and_those_that_are_not_finite(bits):
    largest = float(np.finfo(np.float32).max)
    sizes = np.array([1e-45, 1e-38, 1e-35, 1.0, 1e38, largest], np.float32)
    x = np.eye(6, dtype=np.float32) * sizes
    decoded = np.diagonal(Grid.encode(jnp.asarray(x), bits=bits).decode())
    if bits > 3:
        np.testing.assert_allclose(decoded[2:], sizes[2:], rtol=2**-7)
    else:
        # The largest of six numbers is √6 root mean squares, and the grid ends at the middle of its last step.
        expected = min(6**0.5, {3: 3.5 * 0.73, 2: 1.5 * 1.25}[bits]) / 6**0.5
        np.testing.assert_allclose(decoded[2:4], expected * sizes[2:4], rtol=0.05)
        assert np.all(np.isnan(decoded[4:]))
    np.testing.assert_array_equal(decoded[:2], 0)
    x[4, 4] = 1e36
    for bad in (np.nan, np.inf, -np.inf):
        x[3, 3] = bad
        found = np.asarray(Grid.encode(jnp.asarray(x), bits=bits).decode())
        assert np.all(np.isnan(found[3]))
        np.testing.assert_allclose(found[4, 4], decoded[3] * 1e36, rtol=0.02)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("bits", "spec"),
    [(3, P(None, "a", "b")), (4, P("a", None, "b")), (8, P(None, "a", "b")), (4, P(("a", "b"), None, None))],
    ids=str,
)
def test_a_grid_is_the_same_sharded(bits, spec):
    """With explicit and with automatic axes."""
    x = outliers(4, (8, 16, 40))
    seeds = jnp.full((8,), 7, jnp.uint32)
    expected = Grid.encode(jnp.asarray(x), seeds, bits=bits)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            placed_seeds = jax.device_put(seeds, NamedSharding(mesh, P(spec[0])))
            found = jax.jit(functools.partial(Grid.encode, bits=bits))(placed, placed_seeds)
            decoded = jax.jit(Grid.decode)(found)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        np.testing.assert_allclose(decoded, expected.decode(), rtol=1e-6, atol=1e-6 * np.abs(x).max())


def test_bad_settings_are_named():
    for arguments, message in (
        ({"bits": 5}, "bits is 5; expected one of 8, 4, 3, 2, 0"),
        ({"leading_bits": 16}, "leading_bits is 16"),
        ({"leading": 0.7}, "leading is 0.7; expected a share of the smaller side"),
        ({"rounding": "up"}, "rounding is 'up'; expected one of dither, stochastic, nearest"),
        ({"bits": 0, "leading": 0}, "bits and leading are both 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MatrixCodec(**arguments)


def test_no_compiler_can_encode_the_first_state():
    """It would take minutes for a large one, so the zeros come from a value that the compiler is kept from knowing."""
    lowered = jax.jit(lambda: MatrixCodec().encode(jnp.zeros((64, 64)))).lower()
    assert "stablehlo.optimization_barrier" in lowered.as_text()
    assert not np.any(lowered.compile()().decode())


def test_the_leading_directions_of_large_momenta_are_those_of_small_ones():
    """Their product with those of the last update must not overflow."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 96)), jnp.float32)
    sizes = []
    for scale in (1.0, 2.0**66):
        coded = MatrixCodec(bits=4).encode(jnp.zeros_like(x))
        for _ in range(3):
            coded = jax.jit(CodedMatrix.renewed)(coded, scale * x, jnp.uint32(1))
        sizes.append(coded.decode() / scale)
    np.testing.assert_allclose(*sizes, rtol=1e-4, atol=1e-4)


def test_a_first_state_needs_no_float64_where_that_is_the_default():
    """Strict promotion would refuse to add a float64 zero."""
    with jax.enable_x64(True):
        coded = jax.eval_shape(lambda: MatrixCodec().encode(jnp.zeros((64, 64), jnp.float32)))
    assert coded == jax.eval_shape(MatrixCodec().encode, jnp.zeros((64, 64)))
