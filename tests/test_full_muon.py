# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Muon with a momentum of full size, in float32 and in few bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import leniency

import galore_jax
from galore_jax import codecs
from galore_jax.layerwise import BlockStack, layerwise
from galore_jax.matrix_codec import CodedMatrix, MatrixCodec
from galore_jax.matrix_view import select
from galore_jax.presets.full_muon import scale_by_muon

SHAPES = {
    "wide": (12, 20),
    "tall": (20, 12),
    "stack": (2, 8, 16),
    "query": {"kernel": (16, 2, 4)},
    "embed": (9, 12),
    "norm": (20,),
}


def normal(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def matrix_numbers(params):
    """The matrices for Optax."""
    numbers = dict.fromkeys(params, optax.contrib.MuonDimensionNumbers(-2, -1)) | {"embed": None, "norm": None}
    return numbers | {"query": {"kernel": optax.contrib.MuonDimensionNumbers(0, (1, 2))}}


@pytest.mark.covering(1)
@pytest.mark.parametrize("nesterov", [False, True])
def test_on_matrices_it_is_that_of_optax_and_adamw_elsewhere(nesterov):
    """Optax corrects the bias of the two parts of Nesterov's sum by one step apart, which no longer shows after a few steps."""
    shared = {"weight_decay": 0.1, "nesterov": nesterov}
    theirs = optax.contrib.muon(
        0.1, beta=0.5, consistent_rms=0.2, muon_weight_dimension_numbers=matrix_numbers, **shared
    )
    tx, adamw = galore_jax.muon(0.1, momentum=0.5, neuron_decay=None, **shared), optax.adamw(0.1, weight_decay=0.1)
    params = normal(0)
    rest = {name: params[name] for name in ("embed", "norm")}
    states = [t.init(p) for t, p in ((tx, params), (theirs, params), (adamw, rest))]
    updates = [jax.jit(t.update) for t in (tx, theirs, adamw)]
    with leniency():
        for step in range(20):
            gradient = normal(step + 1)
            parts = (gradient, gradient, {name: gradient[name] for name in rest})
            found, states = zip(
                *(u(g, s, p) for u, g, s, p in zip(updates, parts, states, (params, params, rest), strict=True)),
                strict=True,
            )
            matrices = {name: found[0][name] for name in params.keys() - rest.keys()}
            if step > 16 or not nesterov:
                for name, update in matrices.items():
                    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), update, found[1][name])
            for name in rest:
                np.testing.assert_allclose(found[0][name], found[2][name], rtol=1e-5, atol=1e-7)


def newton_schulz(x):
    """In float64; of a matrix (m, n)."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("low_rank", [False, True])
def test_normuon_divides_the_step_of_each_output_neuron(low_rank):
    """In NumPy: the columns of a kernel (inputs, outputs); also as an option of the rule on low-rank momenta."""
    if low_rank:
        rule = galore_jax.residual.orthogonal(1.0, neuron_decay=0.8)
        tx = galore_jax.galore(optax.identity(), rank=4, scale=1.0, residual=rule)
    else:
        tx = galore_jax.muon(-1.0, momentum=0.0, neuron_decay=0.8)
    params = {"w": jnp.zeros((2, 12, 20))}
    state, update = tx.init(params), jax.jit(tx.update)
    squares = np.zeros((2, 20))
    for step in range(3):
        gradient = normal(step, {"w": (2, 12, 20)})
        gradient = {"w": gradient["w"] * jnp.linspace(0.1, 3, 20)[None, None, :]}
        found, state = update(gradient, state, params)
        for i in range(2):
            x = newton_schulz(np.asarray(gradient["w"][i], np.float64))
            squares[i] = 0.8 * squares[i] + 0.2 * np.mean(x * x, axis=0)
            divided = x / np.sqrt(squares[i])
            expected = 0.2 * 20**0.5 * divided * np.linalg.norm(x) / np.linalg.norm(divided)
            np.testing.assert_allclose(found["w"][i], expected, atol=1e-4)
    [kept] = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 20)]
    np.testing.assert_allclose(kept, squares, rtol=1e-4)


def bytes_of(params, preset, **arguments):
    tx = preset(0.1, neuron_decay=None, **arguments)
    nothing = {"w": jnp.zeros((1, 1))}
    with pytest.warns(galore_jax.GaLoreMemoryWarning):
        empty = galore_jax.state_bytes(tx, nothing)
    return galore_jax.state_bytes(tx, params) - (empty - 8)


def test_the_bytes_of_a_number_of_a_square_matrix():
    side, k = 512, 32
    params = {"w": jax.ShapeDtypeStruct((3, side, side), jnp.float32)}
    scales, seeds = 2 * 2 * side, 4
    expected = 3 * (side * side + scales + seeds)
    assert bytes_of(params, galore_jax.muon_8bit) == expected
    leading = 2 * (k * side + 2 * k + 2 * side)
    expected = 3 * (side * side // 2 + scales + seeds + leading)
    assert bytes_of(params, galore_jax.muon_4bit) == expected
    assert expected / (3 * side * side) < 0.66
    assert bytes_of(params, galore_jax.muon_2bit) == expected - 3 * side * side // 4
    narrow = 3 * (side * side * 3 // 8 + scales + seeds + leading - k * side)
    assert bytes_of(params, galore_jax.muon_4bit, codec=MatrixCodec(bits=3, leading_bits=4)) == narrow
    assert bytes_of(params, galore_jax.muon) == 12 * side * side


LARGE = {"w": (3, 64, 80), "v": (80, 64), "head": (64, 4)}
coded_presets = pytest.mark.parametrize("name", ["muon_8bit", "muon_4bit", "muon_2bit"])


@functools.cache
def after(name, steps):
    """The last updates and the state after some steps, and the jitted update."""
    tx = getattr(galore_jax, name)(0.1, momentum=0.9)
    params = normal(0, LARGE)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(normal(step + 1, LARGE), state, params)
    return updates, state, update


@pytest.mark.covering(1)
@coded_presets
def test_in_few_bits_the_momentum_is_near_that_in_float32(name):
    """The first step is read from a momentum that is not stored yet."""
    first, _, _ = after(name, 1)
    expected, _, _ = after("muon", 1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), first, expected)
    _, state, _ = after(name, 6)
    _, plain, _ = after("muon", 6)
    # The standard deviation of the rounding errors, of the noise of six steps: see galore_jax.matrix_codec.
    for path in ("w", "v"):
        coded, exact = (optax.tree.get(s, "momentum")[path] for s in (state, plain))
        assert isinstance(coded, CodedMatrix)
        error = np.linalg.norm(coded.decode() - exact) / np.linalg.norm(exact)
        assert error < {"muon_8bit": 0.01, "muon_4bit": 0.2, "muon_2bit": 0.7}[name]


@pytest.mark.covering(1)
@coded_presets
def test_a_gradient_that_is_not_finite_leaves_a_matrix_and_its_momentum_as_they_are(name):
    _, state, update = after(name, 2)
    params, gradient = normal(0, LARGE), normal(9, LARGE)
    expected, good = update(gradient, state, params)
    bad = gradient | {"w": gradient["w"].at[1, 2, 3].set(jnp.nan), "v": gradient["v"].at[0, 0].set(jnp.inf)}
    updates, new = update(bad, state, params)
    assert not np.any(updates["w"][1])
    assert not np.any(updates["v"])
    old, new, good = (optax.tree.get(s, "momentum") for s in (state, new, good))
    jax.tree.map(np.testing.assert_array_equal, new["v"], old["v"])
    for i, same in enumerate((good, old, good)):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]), new["w"], same["w"])
        if i != 1:
            np.testing.assert_array_equal(updates["w"][i], expected["w"][i])


STACK = BlockStack(
    split=lambda p: ({"w": p["w"]}, {"head": p["head"]}),
    join=lambda layers, rest: layers | rest,
    embed=lambda rest, batch: batch,
    block=lambda layer, x: x + jnp.tanh(x @ layer["w"]),
    loss=lambda rest, x, batch: jnp.mean((x @ rest["head"]) ** 2),
)


def layer_by_layer_and_at_once(tx):
    """Parameters and states after two steps of each."""
    params = {"w": normal(0, {"w": (3, 64, 64)})["w"] / 16, "head": normal(1, {"h": (64, 4)})["h"] / 8}
    batch = normal(2, {"x": (8, 64)})["x"]

    def loss(params):
        x = batch
        for i in range(3):
            x = STACK.block({"w": params["w"][i]}, x)
        return STACK.loss(params, x, batch)

    init, step = layerwise(STACK, tx)
    found, state, step = params, init(params), jax.jit(step)
    plain, plain_state, update = params, tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        found, state, _ = step(found, state, batch)
        updates, plain_state = update(jax.grad(loss)(plain), plain_state, plain)
        plain = optax.apply_updates(plain, updates)
    return (found, state), (plain, plain_state)


@pytest.mark.slow
def test_in_4_bits_layer_by_layer_it_has_the_same_dither():
    tx = galore_jax.muon_4bit(0.01, codec=MatrixCodec(leading=0))
    (found, state), (plain, plain_state) = layer_by_layer_and_at_once(tx)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), found, plain)
    layers, whole = (optax.tree.get(s, "momentum")["w"].rest for s in (state.layers, plain_state))
    np.testing.assert_array_equal(layers.seed, whole.seed)
    assert np.mean(np.asarray(layers.codes) != np.asarray(whole.codes)) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec"),
    [("muon_4bit", P(None, "a", "b")), ("muon_4bit", P("a", None, None)), ("muon_2bit", P(None, "a", "b"))],
    ids=str,
)
def test_in_few_bits_it_is_the_same_sharded_and_types_are_stable(name, spec):
    """Whether the matrices are cut or their stack."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    host, gradient = ({"w": normal(i, {"w": (2, 48, 64)})["w"]} for i in range(2))
    tx = getattr(galore_jax, name)(0.1)
    expected, expected_state = jax.jit(tx.update)(gradient, tx.init(host), host)
    with jax.set_mesh(mesh):
        params, placed = (jax.device_put(tree, {"w": NamedSharding(mesh, spec)}) for tree in (host, gradient))
        state = tx.init(params)
        updates, new = jax.jit(tx.update)(placed, state, params)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
        decoded = jax.jit(codecs.decoded)(optax.tree.get(new, "momentum")["w"])
    np.testing.assert_allclose(updates["w"], expected["w"], atol=1e-5)
    found, exact = np.asarray(decoded), np.asarray(optax.tree.get(expected_state, "momentum")["w"].decode())
    # Sums in another order turn the subspace by a rounding, and codes at a border to the next one.
    assert np.mean(np.abs(found - exact) > 1e-3) < 0.01


@pytest.mark.slow
def test_an_update_in_4_bits_needs_the_workspace_of_a_few_matrices_of_a_stack():
    """Beside the gradients, which become the updates, and the state, which is overwritten; with all of XLA's optimizations."""
    params, matrix = {"w": jax.ShapeDtypeStruct((16, 256, 256), jnp.float32)}, 4 * 256 * 256
    tx = scale_by_muon(functools.partial(select, rank=1), codec=MatrixCodec())
    lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params))
    jax.config.update("jax_disable_most_optimizations", False)
    memory = lowered.compile().memory_analysis()
    jax.config.update("jax_disable_most_optimizations", True)
    assert memory.alias_size_in_bytes > 16 * matrix * 1.1
    assert memory.temp_size_in_bytes < 8 * matrix


def test_describe_shows_the_matrices():
    shown = {record.path: record for record in galore_jax.describe(galore_jax.muon(0.1), normal(0)).parameters}
    assert shown["query/kernel"].matrix == (16, 8)
    assert (shown["stack"].matrix, shown["stack"].batch) == ((8, 16), (2,))
    assert {record.rank for record in shown.values()} == {None}
    assert {path for path, record in shown.items() if record.matrix is None} == {"embed", "norm"}


def test_the_warning_that_nothing_is_a_matrix_advises_what_helps():
    params = {"embed": jnp.zeros((9, 12)), "norm": jnp.zeros((20,))}
    with pytest.warns(
        galore_jax.GaLoreMemoryWarning, match="none of the 2 parameters is updated as a matrix"
    ) as caught:
        galore_jax.muon(0.1).init(params)
    assert "select parameters by mask or weight_dimension_numbers" in str(caught[0].message)
    assert "rank" not in str(caught[0].message).split(": ")[-1]
    with pytest.warns(galore_jax.GaLoreMemoryWarning, match="Adam updates 1 of the 2 parameters whole because"):
        galore_jax.muon(0.1).init({"query": {"strange": jnp.zeros((4, 8, 2, 4))}, "w": jnp.zeros((12, 20))})


@pytest.mark.parametrize("ns_coeffs", ["standard", "polar_express"])
def test_the_steps_of_the_orthogonalization_are_those_of_their_coefficients(ns_coeffs):
    """Each step applied to the singular values alone; those of Polar Express end nearer to 1."""
    x = np.asarray(normal(3, {"x": (12, 20)})["x"], np.float64) * np.geomspace(1, 0.05, 12)[:, None]
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    coefficients, start = galore_jax.residual._NS_COEFFS[ns_coeffs]
    values = values / (start * np.linalg.norm(values))
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    found = galore_jax.residual.newton_schulz(jnp.asarray(x, jnp.float32), ns_coeffs)
    np.testing.assert_allclose(found, u * values @ vt, atol=2e-4)
    assert np.abs(values - 1).max() < {"standard": 0.35, "polar_express": 0.15}[ns_coeffs]


def test_a_codec_by_name_is_refused_at_construction():
    with pytest.raises(
        TypeError, match=r"codec is 'int8'; expected a galore_jax.MatrixCodec. Write, .*MatrixCodec\(bits=4\)"
    ):
        galore_jax.muon_2bit(0.01, codec="int8")


def test_an_unknown_name_of_coefficients_is_refused_at_construction():
    for make in (galore_jax.galore_muon, galore_jax.residual.orthogonal, galore_jax.muon, galore_jax.muon_4bit):
        with pytest.raises(ValueError, match="ns_coeffs is 'newton'; expected one of standard, polar_express"):
            make(0.1, ns_coeffs="newton")
