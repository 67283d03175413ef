# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The programs that LDAdam compiles to: on meshes, inside ``shard_map``, in reverse mode, and their size and memory."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from problems import normal

import galore_jax

MESH_PROGRAM = """
    import math, sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    sizes = tuple(map(int, sys.argv[1].split("x")))
    jax.config.update("jax_num_cpu_devices", math.prod(sizes))

    import galore_jax

    names = ("a", "b")[: len(sizes)]
    mesh = jax.make_mesh(sizes, names, axis_types=(getattr(AxisType, sys.argv[2]),) * len(sizes))
    first, last = names[0], names[-1]
    specs = {
        "stack": P(first, None, None), "rows": P(None, first, None), "columns": P(None, None, last), "both": P(first, last)
    }
    if len(sizes) == 1:
        specs["both"] = P(None, first)
    shapes = {"stack": (8, 32, 48), "rows": (4, 64, 80), "columns": (4, 96, 64), "both": (32, 48)}
    # LAPACK would divide a large batch among the threads that the devices wait on.
    if sizes == (2,):
        shapes["columns"] = (4, 256, 256)
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tx = galore_jax.ldadam(1e-2, rank=0.125)

    def train(place):
        params = jax.device_put(weights, place)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
        state = jax.jit(tx.init, out_shardings=place and galore_jax.state_sharding(tx, abstract, place))(params)
        update = jax.jit(tx.update)
        for step in range(20):
            rng = np.random.default_rng(step)
            gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
            updates, state = update(jax.device_put(gradients, place), state, params)
            params = jax.block_until_ready(jax.tree.map(jnp.add, params, updates))
        return params

    expected = jax.device_get(train(None))
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    found = train(places)
    for name in shapes:
        # On automatic axes the compiler chooses.
        assert sys.argv[2] == "Auto" or found[name].sharding.is_equivalent_to(places[name], len(shapes[name])), name
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "axes"), [("2", "Auto"), ("8", "Auto"), ("2x4", "Auto"), ("2x4", "Explicit")])
def test_on_a_mesh_it_returns_and_equals_one_device(mesh, axes):
    """In a process of its own, so that a deadlock fails the test, and with one thread per device, so that one shows."""
    environment = os.environ | {"NPROC": "2" if mesh == "2" else "8"}
    program = [sys.executable, "-c", textwrap.dedent(MESH_PROGRAM), mesh, axes]
    done = subprocess.run(program, env=environment, timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@functools.partial(jax.jit, static_argnums=0)
def one_update(tx, params):
    return tx.update(params, tx.init(params), params)[0]


@pytest.mark.slow
def test_each_device_has_a_model_of_its_own():
    """Two models with a parameter of their own, and one, of the same shape, that they share and that stays shared."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    own, shared = normal(0, (2, 12, 20)), normal(1, (12, 20))
    tx = galore_jax.ldadam(0.01, rank=4)

    def body(own, shared):
        updates = one_update(tx, {"own": own[0], "shared": shared})
        return updates["own"][None], updates["shared"]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("model"), P()), out_specs=(P("model"), P()), check_vma=True)
    found, found_shared = jax.jit(mapped)(own, shared)
    for kernel, update in zip(own, found, strict=True):
        np.testing.assert_allclose(update, one_update(tx, {"w": kernel})["w"], atol=1e-6)
    np.testing.assert_allclose(found_shared, one_update(tx, {"w": shared})["w"], atol=1e-6)


@pytest.mark.slow
def test_several_updates_inside_shard_map():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    kernels = normal(0, (2, 3, 12, 20))
    tx = galore_jax.ldadam(0.01, rank=4)

    def train(kernel):
        params = {"w": kernel}
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    mapped = jax.shard_map(
        lambda kernel: train(kernel[0])[None], mesh=mesh, in_specs=P("model"), out_specs=P("model"), check_vma=True
    )
    expected = [jax.jit(train)(kernel) for kernel in kernels]
    np.testing.assert_allclose(jax.jit(mapped)(kernels), jnp.stack(expected), atol=1e-6)


SHAPES = {"stack": (3, 12, 20), "wide": (12, 20), "tall": (20, 12)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b1", "b2", "eps"])
def test_reverse_mode_through_its_own_arguments(name):
    """With the same gradients, neither of the two bases depends on them, so a finite difference has constant bases too."""
    gradients = [{leaf: normal(i, shape) for leaf, shape in SHAPES.items()} for i in range(2)]
    weights = {leaf: normal(9, shape) for leaf, shape in SHAPES.items()}
    at, width = {"b1": (0.9, 1e-2), "b2": (0.9, 1e-2), "eps": (0.1, 1e-2)}[name]

    @jax.jit
    def second_update(value):
        tx = galore_jax.ldadam(1.0, rank=4, **{"eps": 1e-2, name: value})
        _, state = tx.update(gradients[0], tx.init(weights), weights)
        updates, _ = tx.update(gradients[1], state, weights)
        return sum(jnp.vdot(weights[leaf], updates[leaf]) for leaf in SHAPES)

    difference = (second_update(at + width) - second_update(at - width)) / (2 * width)
    np.testing.assert_allclose(jax.grad(second_update)(at), difference, rtol=2e-2)


@pytest.mark.slow
def test_reverse_mode_through_the_learning_rate():
    target = {leaf: normal(i, shape) for i, (leaf, shape) in enumerate(SHAPES.items())}

    @jax.jit
    def loss(learning_rate):
        tx = galore_jax.ldadam(learning_rate, rank=4)
        params = jax.tree.map(jnp.ones_like, target)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.subtract, params, target), state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(jnp.square(params[leaf] - target[leaf])) for leaf in SHAPES)

    np.testing.assert_allclose(jax.grad(loss)(0.01), (loss(0.02) - loss(0.0)) / 0.02, rtol=2e-2)


def layers(number):
    shapes = {"query": (8, 12), "key": (8, 4), "output": (12, 8), "up": (8, 16), "down": (16, 8)}
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return {f"layers_{i}": layer for i in range(number)}


def program(tx, params):
    return jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)


@pytest.mark.slow
def test_a_model_compiles_one_step_per_shape():
    tx = galore_jax.ldadam(1e-3, rank=2)
    loops = [program(tx, layers(number)).as_text().count("stablehlo.while") for number in (1, 6)]
    assert loops[0] == loops[1]
    sizes = [program(tx, layers(6)).compile().as_text().count(" = ") for tx in (tx, optax.adamw(1e-3))]
    # 30 matrices share 3 steps, and the target of 6 is for 84 that share 5.
    assert sizes[0] < 6 * sizes[1]


@pytest.mark.parametrize("shape", [(16, 64, 128), (16, 128, 64)], ids=["wide", "tall"])
def test_a_stack_is_updated_in_place(shape):
    """The workspace is a few matrices and the new bases and moments of the stack."""
    tx, params = galore_jax.ldadam(1e-3, rank=4), {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params)
    memory = lowered.compile().memory_analysis()
    small = sum(leaf.size * 4 for leaf in jax.tree.leaves(state) if leaf.size < 16 * 64 * 128)
    assert memory.temp_size_in_bytes < 6 * (64 * 128 * 4) + 3 * small


@pytest.mark.slow
def test_a_parameter_does_not_depend_on_those_beside_it():
    """Beside others of its shape, turned or not, a parameter goes through a loop over all of them."""
    tx = galore_jax.ldadam(1.0, rank=4, seed=7)
    alone = {"w": normal(0, (12, 20))}
    beside = alone | {"a": normal(1, (12, 20)), "turned": normal(2, (20, 12)), "stack": normal(3, (2, 12, 20))}
    states, update = (tx.init(alone), tx.init(beside)), jax.jit(tx.update)
    for _ in range(3):
        one, first = update(alone, states[0], alone)
        many, second = update(beside, states[1], beside)
        states = first, second
        alone, beside = jax.tree.map(lambda x: jnp.roll(x, 1), (alone, beside))
        np.testing.assert_allclose(many["w"], one["w"], atol=1e-4)


@pytest.mark.slow
def test_one_count_for_the_whole_state():
    params = {"w": normal(0, (12, 20)), "bias": jnp.ones((20,))}
    tx = galore_jax.ldadam(0.01, rank=4)
    _, state = tx.update(params, tx.init(params), params)
    assert int(optax.tree.get(state, "count")) == 1
    assert int(state[0].matrices.count) == int(state[0].matrices.step) == 1


def test_the_seed_chooses_the_first_basis():
    params, found = {"w": normal(0, (12, 20))}, []
    for seed in (0, 1, 1):
        tx = galore_jax.ldadam(0.01, rank=4, seed=seed)
        found.append(jax.jit(tx.update)(params, tx.init(params), params)[1][0].matrices.basis["w"])
    assert np.abs(found[0] - found[1]).max() > 1e-3
    np.testing.assert_array_equal(found[1], found[2])
