# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The layer-wise step equals the plain step on the stack, and Optax's step on a list of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import galore_states

from galore_jax import GaLoreDimensionNumbers, galore_adamw, galore_muon
from galore_jax.layerwise import BlockStack, layerwise
from galore_jax.models import Llama, LlamaConfig
from galore_jax.models.llama import block_stack
from galore_jax.refresh import lazy
from galore_jax.training.step import token_losses
from galore_jax.weights import dequantize, is_int8, quantize_weights

LAYERS, STEPS = 3, 50


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), jnp.float32)


def params():
    return {
        "blocks": {
            "up": normal(LAYERS, 8, 16, scale=0.2),
            "down": normal(LAYERS, 16, 8, seed=1, scale=0.2),
            "bias": jnp.zeros((LAYERS, 8)),
        },
        "embed": normal(6, 8, seed=2, scale=0.5),
        "head": normal(8, 6, seed=3, scale=0.5),
    }


def block(layer, x):
    return x + jax.nn.relu(x @ layer["blocks"]["up"]) @ layer["blocks"]["down"] + layer["blocks"]["bias"][None]


def loss(rest, x, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ rest["head"], batch["y"]))


STACK = BlockStack(
    split=lambda p: ({"blocks": p["blocks"]}, {"embed": p["embed"], "head": p["head"]}),
    join=lambda layers, rest: layers | rest,
    embed=lambda rest, batch: rest["embed"][batch["x"]],
    block=block,
    loss=loss,
)


def batches(steps=STEPS):
    """Batches in which y is a function of x, except for 10% noise, so that a model can learn it."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (STEPS, 24)).astype(np.int32)
    y = np.where(rng.random(x.shape) < 0.1, 0, (x * x + 1) % 6).astype(np.int32)
    return [{"x": jnp.asarray(a), "y": jnp.asarray(b)} for a, b in zip(x[:steps], y, strict=False)]


def whole_loss(params, batch, layer_of=lambda blocks, i: jax.tree.map(lambda x: x[i], blocks)):
    layers, rest = STACK.split(params)
    x = STACK.embed(rest, batch)
    for i in range(LAYERS):
        x = block({"blocks": layer_of(layers["blocks"], i)}, x)
    return loss(rest, x, batch)


def run_layerwise(tx, params, steps=STEPS, see=lambda state: None, **settings):
    """The losses, gradient norms, parameters and ``see(state)`` of every step of a layer-wise run."""
    init, step = layerwise(STACK, tx, **settings)
    step, state, found, seen = jax.jit(step), init(params), [], []
    for batch in batches(steps):
        params, state, metrics = step(params, state, batch)
        found.append([float(metrics.loss), float(metrics.grad_norm)])
        seen.append(see(state))
    return *np.array(found).T, params, seen


def run_plain(tx, params, loss_of=whole_loss, steps=STEPS, see=lambda state: None):
    """The same results from a plain Optax loop."""

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, optax.tree.norm(grads)

    state, found, seen = tx.init(params), [], []
    for batch in batches(steps):
        params, state, value, norm = step(params, state, batch)
        found.append([float(value), float(norm)])
        seen.append(see(state))
    return *np.array(found).T, params, seen


def assert_same_run(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
    assert found[0][-1] < found[0][0] - 0.1


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, STEPS)
GALORE = {
    "staggered": galore_adamw(SCHEDULE, rank=4, update_proj_gap=7, weight_decay=0.1, transport="rotate"),
    "together": galore_adamw(SCHEDULE, rank=4, update_proj_gap=7, refresh="together", transport="keep"),
    "lazy": galore_adamw(SCHEDULE, rank=4, refresh=lazy(3, threshold=0.1, window=2), transport="rotate"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accumulate"), [("staggered", 1), ("staggered", 2), ("together", 1), ("lazy", 1)])
def test_galore_layer_by_layer_is_galore_on_the_stack(name, accumulate):
    def bases(state):
        (node,) = galore_states(state.layers if hasattr(state, "layers") else state)
        return {"up": np.asarray(node.left["blocks"]["up"]), "down": np.asarray(node.right["blocks"]["down"])}

    found = run_layerwise(GALORE[name], params(), see=bases, accumulate=accumulate)
    expected = run_plain(GALORE[name], params(), see=bases)
    assert_same_run(found, expected)
    for side in ("up", "down"):
        # The same matrices are refreshed at the same steps.
        changes = [
            np.any(np.diff(np.stack([s[side] for s in run[3]]), axis=0), axis=(2, 3)) for run in (found, expected)
        ]
        np.testing.assert_array_equal(*changes)
        assert 0 < changes[0].mean() < 0.6


# Projected matrices outside the blocks stand on both sides of them in the order of the paths.
WIDE = {"aaa": (8, 12), "blocks": {"down": (LAYERS, 2, 8, 12), "up": (LAYERS, 12, 2, 8)}, "zzz": (12, 8)}
WIDE_STACK = BlockStack(
    split=lambda p: ({"blocks": p["blocks"]}, {"aaa": p["aaa"], "zzz": p["zzz"]}),
    join=lambda layers, rest: layers | rest,
    embed=lambda rest, batch: batch["x"] @ rest["aaa"],
    block=lambda layer, x: (
        x + jnp.tanh(jnp.einsum("bd,dhk,hke->be", x, layer["blocks"]["up"], layer["blocks"]["down"]))
    ),
    loss=lambda rest, x, batch: jnp.mean((x @ rest["zzz"] - batch["y"]) ** 2),
)
N = GaLoreDimensionNumbers
TREE = {"aaa": N(), "blocks": {"down": N((1, 2), 3), "up": N(1, (2, 3))}, "zzz": N()}
WIDE_RUNS = {
    "staggered": (galore_adamw, {"refresh": "staggered", "weight_dimension_numbers": TREE}),
    "mask, prefix": (
        galore_adamw,
        {"mask": {"aaa": False, "blocks": True, "zzz": True}, "weight_dimension_numbers": TREE},
    ),
    "lazy, numbers, prefix": (
        galore_adamw,
        {"refresh": lazy(4, threshold=0.1, window=1), "weight_dimension_numbers": TREE | {"blocks": N((1, 2), 3)}},
    ),
    "together, functions": (
        galore_adamw,
        {
            "refresh": "together",
            "mask": lambda params: jax.tree.map(lambda leaf: leaf.shape[0] in (LAYERS, 12), params),
            "weight_dimension_numbers": lambda params: TREE,
        },
    ),
    "muon, numbers, tree": (galore_muon, {"projector": "power", "weight_dimension_numbers": TREE}),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", WIDE_RUNS)
def test_three_refresh_periods_are_those_of_the_plain_step(name):
    build, settings = WIDE_RUNS[name]
    tx = build(0.01, rank=3, update_proj_gap=4, **settings)
    rng = np.random.default_rng(0)
    shapes, treedef = jax.tree.flatten(WIDE, is_leaf=lambda x: isinstance(x, tuple))
    start = treedef.unflatten(jnp.asarray(rng.normal(scale=0.3, size=shape), jnp.float32) for shape in shapes)

    def whole_loss(params, batch):
        layers, rest = WIDE_STACK.split(params)
        x = WIDE_STACK.embed(rest, batch)
        for i in range(LAYERS):
            x = WIDE_STACK.block(jax.tree.map(lambda leaf, i=i: leaf[i], layers), x)
        return WIDE_STACK.loss(rest, x, batch)

    @jax.jit
    def plain_step(params, state, batch):
        updates, state = tx.update(jax.grad(whole_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    init, step = layerwise(WIDE_STACK, tx)
    step, ours, our_state, plain, state = jax.jit(step), start, init(start), start, tx.init(start)
    for _ in range(12):
        batch = {name: jnp.asarray(rng.normal(size=(32, 8)), jnp.float32) for name in "xy"}
        ours, our_state, _ = step(ours, our_state, batch)
        plain, state = plain_step(plain, state, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), ours, plain)
    shapes = [x.shape for part in (our_state.layers, our_state.rest) for x in jax.tree.leaves(part)]
    # Projected matrices in the blocks and in the rest.
    assert any(shape[0] == LAYERS and 3 in shape[1:] for shape in shapes if shape)
    assert any(len(shape) == 2 and 3 in shape for shape in shapes)


def unstacked_loss(params, batch):
    return whole_loss(params, batch, layer_of=lambda blocks, i: blocks[i])


def unstacked(params):
    """The parameters with a list of layers instead of a stack."""
    return params | {"blocks": [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(LAYERS)]}


OPTAX = {
    "adamw": optax.adamw(SCHEDULE, weight_decay=0.1),
    "adafactor": optax.adafactor(SCHEDULE, min_dim_size_to_factor=8),
    "lion": optax.lion(optax.constant_schedule(1e-2)),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", OPTAX)
def test_optax_layer_by_layer_is_optax_on_a_list_of_layers(name):
    found = run_layerwise(OPTAX[name], params())
    expected = run_plain(OPTAX[name], unstacked(params()), unstacked_loss)
    assert_same_run(found, expected)
    again = unstacked(found[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), again, expected[2])


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_accumulating_four_micro_batches_is_one_step_on_the_batch(name):
    whole, cut = run_layerwise(OPTAX[name], params()), run_layerwise(OPTAX[name], params(), accumulate=4)
    assert_same_run(cut, whole)


@pytest.mark.slow
def test_the_blocks_of_a_llama_are_the_llama():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=50
    )
    graphdef, weights = nnx.split(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)
    weights = nnx.to_pure_dict(weights)
    batch = np.random.default_rng(0).integers(0, 50, (8, 13)).astype(np.int32)
    init, step = layerwise(block_stack(config), optax.sgd(1.0))
    new, _, metrics = jax.jit(step)(weights, init(weights), batch)
    value, grads = jax.jit(jax.value_and_grad(lambda w: jnp.mean(token_losses(graphdef, w, batch))))(weights)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    jax.tree.map(lambda a, w, g: np.testing.assert_allclose(a, w - g, rtol=1e-5, atol=1e-6), new, weights, grads)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2**30, 4 * 2 * 12 * 40 // 3, 1])
def test_a_loss_taken_in_pieces_is_the_loss_and_has_its_gradient(limit, monkeypatch):
    monkeypatch.setattr("galore_jax.models.llama._LOGITS_BYTES", limit)
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=40)
    graphdef, weights = nnx.split(Llama(config, rngs=nnx.Rngs(0)))
    hidden, targets = normal(2, 12, 8), np.random.default_rng(1).integers(0, 40, (2, 12)).astype(np.int32)

    def losses(hidden, weights):
        return jnp.mean(nnx.merge(graphdef, weights).losses(hidden, targets))

    def plain(hidden, weights):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, weights).head(hidden))
        return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], axis=-1))

    found = jax.value_and_grad(losses, (0, 1))(hidden, weights)
    expected = jax.value_and_grad(plain, (0, 1))(hidden, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)
    shapes = str(jax.make_jaxpr(losses)(hidden, weights))
    assert ("f32[2,12,40]" in shapes) == (limit == 2**30)


@pytest.mark.parametrize(("kind", "whole"), [(AxisType.Auto, True), (AxisType.Manual, False)])
def test_a_loss_is_taken_in_no_more_pieces_than_what_one_device_has_of_it_needs(kind, whole, monkeypatch):
    monkeypatch.setattr("galore_jax.models.llama._LOGITS_BYTES", 4 * 2 * 12 * 40 // 2)
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=40)
    graphdef, weights = nnx.split(Llama(config, rngs=nnx.Rngs(0)))
    hidden, targets = normal(2, 12, 8), jnp.zeros((2, 12), jnp.int32)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("fsdp",), axis_types=(kind,))):
        traced = jax.make_jaxpr(lambda weights: nnx.merge(graphdef, weights).losses(hidden, targets))(weights)
    assert ("f32[2,12,40]" in str(traced)) == whole


def test_the_bound_on_the_global_norm_is_that_of_optax():
    bound = 0.3
    found = run_layerwise(optax.sgd(0.5), params(), max_norm=bound)
    expected = run_plain(optax.chain(optax.clip_by_global_norm(bound), optax.sgd(0.5)), params())
    assert np.mean(found[1] > bound) > 0.2
    assert_same_run(found, expected)


def test_the_bound_of_each_layer_is_one_on_its_own_norm():
    bound, weights = 0.02, params()
    init, step = layerwise(STACK, optax.sgd(1.0), max_layer_norm=bound)
    new, _, metrics = jax.jit(step)(weights, init(weights), batches(1)[0])
    layers, rest = STACK.split(optax.tree.sub(new, weights))

    def norms(tree, count):
        return jnp.sqrt(sum(jnp.sum(jnp.square(x.reshape(count, -1)), axis=1) for x in jax.tree.leaves(tree)))

    assert float(metrics.grad_norm) > bound
    np.testing.assert_allclose(norms(layers, LAYERS), bound, rtol=1e-4)
    np.testing.assert_allclose(norms(rest, 1), bound, rtol=1e-4)


@pytest.mark.slow
def test_a_bad_gradient_in_one_layer_stops_that_layer_alone():
    weights = params()
    weights["blocks"]["bias"] = jnp.ones((LAYERS, 8)).at[1].set(0.0)
    # The bias of layer 1 has an infinite gradient, but the cotangent of its input is finite.
    stack = STACK._replace(
        block=lambda layer, x: block({"blocks": layer["blocks"] | {"bias": jnp.sqrt(layer["blocks"]["bias"])}}, x)
    )
    init, step = layerwise(stack, galore_adamw(0.1, rank=2))
    new, state, _ = jax.jit(step)(weights, init(weights), batches(1)[0])
    (node,) = galore_states(state.layers)
    assert node.skipped.tolist() == [0, 1, 0]
    changed = [bool(x) for x in jnp.any(new["blocks"]["bias"] != weights["blocks"]["bias"], axis=1)]
    assert changed == [True, False, True]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((new, state)))


@pytest.mark.slow
def test_int8_weights_learn_and_follow_full_precision():
    """In the mean of ten steps, because the rounding moves a single loss by up to 4%, by the seed."""
    tx = GALORE["staggered"]
    stored = quantize_weights(params())
    full = run_layerwise(tx, params())
    found, again = run_layerwise(tx, stored), run_layerwise(tx, stored, steps=5)
    assert is_int8(found[2]["blocks"]["up"])
    means = [np.mean(losses.reshape(-1, 10), axis=1) for losses in (found[0], full[0])]
    np.testing.assert_allclose(*means, rtol=0.02)
    np.testing.assert_array_equal(again[0], found[0][:5])
    assert np.any(run_layerwise(tx, stored, steps=5, seed=1)[0] != again[0])
    assert jax.tree.map(jnp.shape, dequantize(found[2])) == jax.tree.map(jnp.shape, params())


def test_a_model_that_is_no_stack_is_told_what_is_missing():
    init, _ = layerwise(STACK._replace(split=lambda p: (p, {})), optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"stack of identical blocks, .* embed \[6\], head \[8\]: let split\(\) return"
    ):
        init(params())
    init, _ = layerwise(STACK._replace(split=lambda p: ({}, p)), optax.sgd(0.1))
    with pytest.raises(ValueError, match="the first axes are no parameters"):
        init(params())


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.chain(optax.adam(0.1), optax.clip_by_global_norm(1e-3)),
        optax.apply_if_finite(optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)), 3),
    ],
)
def test_an_optimizer_that_couples_parameters_is_refused(tx):
    init, _ = layerwise(STACK, tx)
    with pytest.raises(ValueError, match=r"The update of '.*' depends on the gradient of '.*'.*max_norm="):
        jax.eval_shape(init, params())


ONE_EACH = BlockStack(
    split=lambda p: ({"w": p["w"]}, {"head": p["head"], "scale": p["scale"]}),
    join=lambda layers, rest: layers | rest,
    embed=lambda rest, batch: batch["x"],
    block=lambda layer, x: x + jnp.tanh(x @ layer["w"]),
    loss=lambda rest, x, batch: jnp.mean(jnp.square(x @ rest["head"] * rest["scale"] - batch["y"])),
)


def one_each():
    """A layer of one parameter, and a number in the rest."""
    return {"w": normal(LAYERS, 4, 4), "head": normal(4), "scale": 0.5}, {"x": normal(8, 4), "y": normal(8)}


def test_an_optimizer_that_couples_layers_of_one_parameter_is_refused():
    init, _ = layerwise(ONE_EACH, optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"The update of 'scale' depends on the gradient of 'head'.*max_norm="):
        jax.eval_shape(init, one_each()[0])


def test_a_number_in_the_rest_is_a_scalar_parameter():
    """Also where the step is not jitted, which would make it an array."""
    (weights, batch), (init, step) = one_each(), layerwise(ONE_EACH, optax.sgd(0.1), max_layer_norm=1e3)
    new, _, _ = step(weights, init(weights), batch)

    def loss(scale):
        x = batch["x"]
        for w in weights["w"]:
            x = x + jnp.tanh(x @ w)
        return ONE_EACH.loss(weights | {"scale": scale}, x, batch)

    np.testing.assert_allclose(new["scale"], 0.5 - 0.1 * jax.grad(loss)(0.5), rtol=1e-5)


@pytest.mark.parametrize("bound", [{}, {"max_norm": 1.0}, {"max_layer_norm": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_metrics_are_in_float32(dtype, bound):
    """Also where JAX's own default is float64."""
    with jax.enable_x64(True):
        weights, batch = jax.tree.map(lambda x: jnp.asarray(x, dtype), one_each())
        init, step = layerwise(ONE_EACH, optax.sgd(0.1), **bound)
        new, _, metrics = jax.eval_shape(step, weights, jax.eval_shape(init, weights), batch)
    assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(new))


def test_a_loss_may_rely_on_the_sharding_in_the_types_of_its_arguments():
    def loss(rest, x, batch):
        def mean(head, x, y):
            return jax.lax.pmean(jnp.mean(jnp.square(x @ head - y)), "data")

        data = PartitionSpec("data")
        parts = jax.shard_map(mean, in_specs=(PartitionSpec(), data, data), out_specs=PartitionSpec())
        return parts(rest["head"], x, batch["y"])

    weights, batch = one_each()
    init, step = layerwise(ONE_EACH._replace(loss=loss), optax.sgd(0.1))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    whole, data = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put((weights, batch), (whole, data))
        new, _, metrics = jax.jit(step)(on_mesh[0], jax.jit(init)(on_mesh[0]), on_mesh[1])
    init, step = layerwise(ONE_EACH, optax.sgd(0.1))
    expected, _, found = jax.jit(step)(weights | {"scale": 1.0}, init(weights), batch)
    np.testing.assert_allclose(metrics.loss, found.loss, rtol=1e-6)
    np.testing.assert_allclose(new["w"], expected["w"], rtol=1e-5, atol=1e-7)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="accumulate is 0"):
        layerwise(STACK, optax.sgd(0.1), accumulate=0)
    with pytest.raises(ValueError, match=r"max_norm is -1.0"):
        layerwise(STACK, optax.sgd(0.1), max_norm=-1.0)
    init, step = layerwise(STACK, optax.sgd(0.1), accumulate=5)
    with pytest.raises(ValueError, match="A batch of 24 cannot be cut into accumulate=5"):
        step(params(), init(params()), batches(1)[0])
