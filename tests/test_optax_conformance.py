# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What Optax asks of every contributed optimizer, asked of every preset, on parameters that are projected."""

import contextlib
import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    RANK,
    SHAPES,
    assert_projected as assert_galore,
    assert_trees_close,
    assert_trees_equal,
    leniency,
    strictly,
    tree,
)

import galore_jax

# One line for each way to make an update, which presets that differ in numbers share; a small smallest factored side, so that
# Adafactor factors these small matrices.
PRESETS = [
    (galore_jax.galore_adamw, {"weight_decay": 0.1}),
    (galore_jax.galore_adafactor, {"min_dim_size_to_factor": 2, "momentum": 0.9, "multiply_by_parameter_scale": True}),
    (galore_jax.fira_adamw, {"weight_decay": 0.1}),
    (galore_jax.golore_adamw, {"random_from": 1}),
    (galore_jax.ldadam, {"weight_decay": 0.1}),
    (galore_jax.galore_muon, {"weight_decay": 0.1}),
    (galore_jax.muon, {"weight_decay": 0.1}),
]
# Arguments that fix shapes or the program, which Optax can inject no arrays for.
STATIC = ("rank", "update_proj_gap", "min_dim_size_to_factor", "random_from")

presets = pytest.mark.parametrize(("preset", "kwargs"), PRESETS, ids=[preset.__name__ for preset, _ in PRESETS])


def build(preset, kwargs, **overrides):
    """The preset with a small rank; the SVD compiles three times as fast as the default projector."""
    chosen = {"learning_rate": 0.01, "rank": RANK, "update_proj_gap": 2, "projector": "svd"} | kwargs | overrides
    if preset_of(preset) in (
        galore_jax.ldadam,
        galore_jax.muon,
    ):  # its subspaces move at every update, or there are none
        del chosen["update_proj_gap"], chosen["projector"]
    if preset_of(preset) is galore_jax.muon:
        del chosen["rank"]
    return preset(**chosen)


@functools.cache
def program(preset):
    """The preset as built from its line of the table, and its jitted update, which the tests share."""
    tx = build(preset, dict(PRESETS)[preset])
    return tx, jax.jit(tx.update)


def preset_of(preset):
    """Behind ``optax.inject_hyperparams``."""
    return inspect.unwrap(preset)


def assert_projected(state):
    """The one node of the matrices inside ``state``, with its fields by their names in a GaLoreState."""
    for _, node in optax.tree.get_all_with_path(state, "ScaleByMuonState"):
        assert {name: node.momentum[name].shape for name in ("kernel", "stack")} == {
            name: SHAPES[name] for name in ("kernel", "stack")
        }
        return types.SimpleNamespace(left=node.momentum, right=node.momentum, count=node.count)
    ldadam = [node for _, node in optax.tree.get_all_with_path(state, "LDAdamState")]
    if not ldadam:
        return assert_galore(state)
    (node,) = ldadam
    assert {name: node.basis[name].shape for name in ("kernel", "stack")} == {
        "kernel": (6, RANK),
        "stack": (2, 8, RANK),
    }
    return types.SimpleNamespace(left=node.basis, right=node.basis, count=node.count)


@pytest.mark.covering(1)
@presets
def test_accepts_unknown_extra_arguments_and_compiles_once(preset, kwargs):
    tx = build(preset, kwargs, projector="randomized")
    params = tree(0)
    state = tx.init(params)
    assert_projected(state)
    traces = []

    @jax.jit
    def step(gradient, state, params):
        traces.append(1)
        updates, state = tx.update(gradient, state, params, value=jnp.float32(1), an_argument_nobody_knows=1)
        return optax.apply_updates(params, updates), state

    for seed in range(3):
        params, state = step(tree(seed + 1), state, params)
    assert len(traces) == 1


@pytest.mark.covering(1)
@presets
def test_converges_on_a_parabola(preset, kwargs):
    """A target of full rank is reached: after every refresh the basis points at what is left of it."""
    steps = 2000
    tx = build(
        preset,
        kwargs,
        weight_decay=0.0,  # pulls away from the target
        learning_rate=optax.cosine_decay_schedule(0.1, steps),
        update_proj_gap=20,
        projector="randomized",
    )
    params, target = tree(2), tree(1)
    state = tx.init(params)
    assert_projected(state)

    def step(carry, _):
        params, state = carry
        gradient = jax.tree.map(lambda x, y: 2 * (x - y), params, target)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((params, state))
    assert_trees_close(params, target, rtol=3e-2, atol=3e-2)


@pytest.mark.covering(1)
@presets
def test_injected_hyperparameters_equal_constants(preset, kwargs):
    plain, update = program(preset)
    static = [name for name in STATIC if name in inspect.signature(preset).parameters]
    injected = build(optax.inject_hyperparams(preset, static_args=static), kwargs)
    params = tree(0)
    state, injected_state = plain.init(params), jax.jit(injected.init)(params)
    assert_projected(state)
    assert_projected(injected_state)
    assert "weight_decay" in injected_state.hyperparams
    assert "rank" not in injected_state.hyperparams
    for seed in range(3):
        updates, state = update(tree(seed + 1), state, params)
        injected_updates, injected_state = jax.jit(injected.update)(tree(seed + 1), injected_state, params)
        assert_trees_close(injected_updates, updates, rtol=1e-5, atol=1e-7)
    # LDAdam's error is what is left of numbers of size 1, which the two programs round differently, at 1.2e-7 each time.
    assert_trees_close(injected_state.inner_state, state, rtol=1e-5, atol=1e-6)


@pytest.mark.covering(8)
@presets
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_updates_have_the_dtype_of_the_parameters(preset, kwargs, dtype):
    tx = build(preset, kwargs)
    params = tree(0, dtype)
    state = tx.init(params)
    node = assert_projected(state)
    assert node.left["kernel"].dtype == node.right["stack"].dtype == jnp.float32
    updates, _ = jax.eval_shape(tx.update, tree(1, dtype), state, params)
    assert jax.tree.map(lambda x: x.dtype, updates) == dict.fromkeys(SHAPES, jnp.dtype(dtype))


@pytest.mark.covering(1)
@presets
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_accumulation_equals_one_update_with_the_mean(preset, kwargs, dtype):
    tx, plain_update = program(preset)
    accumulating = optax.MultiSteps(strictly(tx), every_k_schedule=4)
    params = tree(0, dtype)
    state = accumulating.init(params)
    assert_projected(state)

    @jax.jit
    def update(*args):
        with leniency():
            return accumulating.update(*args)

    # Multiples of 1/8: every sum and running mean below is exact, in bfloat16 too.
    gradients = [jax.tree.map(lambda g: jnp.round(8 * g) / 8, tree(1, dtype))] * 4
    signs = [3, -1, 3, 3]  # running means 3, 1, 5/3, 2
    gradients = [jax.tree.map(lambda g, s=s: g * s, g) for g, s in zip(gradients, signs, strict=True)]
    for gradient in gradients[:3]:
        updates, state = update(gradient, state, params)
        assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(gradients[3], state, params)
    mean = jax.tree.map(lambda *g: sum(x.astype(jnp.float32) for x in g) / 4, *gradients)
    mean = jax.tree.map(lambda g, p: g.astype(p.dtype), mean, params)
    expected, expected_state = plain_update(mean, tx.init(params), params)
    tolerance = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]  # of the running mean
    assert_trees_close(updates, expected, rtol=tolerance, atol=tolerance * 0.01)
    assert int(assert_projected(state).count) == int(assert_projected(expected_state).count) == 1


@pytest.mark.covering(2)
@presets
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_state_keeps_its_shapes_and_dtypes(preset, kwargs, dtype):
    """``lax.cond`` refuses branches whose types differ, weak types included."""
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        tx = build(preset, kwargs)
        params, gradient = tree(0, dtype), tree(1, dtype)
        state = tx.init(params)
        node = assert_projected(state)
        assert node.left["kernel"].dtype == (jnp.float64 if dtype == "float64" else jnp.float32)

        @jax.jit
        def step(take, params, state):
            updates, state = jax.lax.cond(take, lambda: tx.update(gradient, state, params), lambda: (params, state))
            return optax.apply_updates(params, updates), state

        types = jax.tree.map(jax.typeof, (params, state))
        for take in (True, False, True):
            params, state = step(take, params, state)
            assert jax.tree.map(jax.typeof, (params, state)) == types
        assert int(assert_projected(state).count) == 2


@pytest.mark.covering(1)
@presets
def test_a_constant_schedule_equals_a_constant(preset, kwargs):
    constant, update = program(preset)
    schedule = build(preset, kwargs, learning_rate=optax.constant_schedule(0.01))
    params = scheduled_params = tree(0)
    state, scheduled_state = constant.init(params), schedule.init(params)
    assert_projected(state)
    assert_projected(scheduled_state)
    for _ in range(5):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        updates, scheduled_state = jax.jit(schedule.update)(scheduled_params, scheduled_state, scheduled_params)
        scheduled_params = optax.apply_updates(scheduled_params, updates)
    assert_trees_close(scheduled_params, params)
    assert not np.allclose(params["kernel"], tree(0)["kernel"], atol=1e-5)
