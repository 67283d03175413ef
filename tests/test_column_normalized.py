# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""SCALE: its formula in NumPy, the state it keeps, and the ways of taking a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import leniency
from reference import Adam
from runs import TINY, small_tree, tokens

from galore_jax.training import column_normalized
from galore_jax.training.config import PretrainConfig
from galore_jax.training.mesh import make_mesh
from galore_jax.training.optimizers import make_optimizer
from galore_jax.training.program import program


def test_steps_are_those_of_the_formula():
    params = small_tree()
    tx = column_normalized.scale(0.1, momentum=0.8)
    update, state = jax.jit(tx.update), tx.init(params)
    momentum, adam = 0.0, Adam()
    for step in range(3):
        grads = optax.tree.random_like(jax.random.key(step), params)
        updates, state = update(grads, state, params)
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), grads)

        def columns(g):
            return -0.1 * g / np.sqrt(np.mean(g**2, axis=-2, keepdims=True))

        momentum = 0.8 * momentum + 0.2 * exact["lm_head"]["kernel"]
        expected = {
            "embed_tokens": {"embedding": columns(exact["embed_tokens"]["embedding"])},
            "layers": {
                "mlp": {"up_proj": {"kernel": columns(exact["layers"]["mlp"]["up_proj"]["kernel"])}},
                "input_norm": {"scale": -0.1 * adam(exact["layers"]["input_norm"]["scale"])},
            },
            "lm_head": {"kernel": columns(momentum)},
        }
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected)


def test_the_state_is_a_momentum_of_the_head_and_the_moments_of_the_vectors():
    params = small_tree()
    state = make_optimizer(PretrainConfig(optimizer="scale"), optax.constant_schedule(1.0)).init(params)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert shapes == [(2, 16), (2, 16), (16, 20)]


def test_a_column_without_a_gradient_stays():
    params = {"up_proj": {"kernel": jnp.ones((4, 3))}}
    tx = column_normalized.scale(1.0)
    grads = {"up_proj": {"kernel": jnp.array([[0.0, 2.0, 0.0]] * 4)}}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["up_proj"]["kernel"], [[0.0, -1.0, 0.0]] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"layerwise": True}, {"mesh": "data=2,fsdp=2,model=2"}], ids=["layer-wise", "mesh"])
def test_steps_layer_by_layer_and_on_a_mesh_are_those_of_a_plain_run(other):
    model = dataclasses.replace(TINY, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=56)
    config = PretrainConfig(optimizer="scale", batch=8, seq=8, clip=0.0, learning_rate=1e-3, warmup_steps=0)
    results = []
    for settings in ({}, other):
        chosen = dataclasses.replace(config, **settings)
        made = program(chosen, model, make_mesh(chosen.mesh) if chosen.mesh else None)
        with leniency(), made.on_mesh():  # Optax's schedules mix dtypes
            params, state = made.init(jax.random.key(0))
            for number in range(3):
                batch = jax.device_put(tokens(8, 9, number), made.batch.sharding)
                params, state, _ = made.step(params, state, batch)
        results.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *results)
