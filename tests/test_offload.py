# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""State in the memory of the host: the same numbers, in another place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import galore_adamw, galore_adamw_8bit, offload_state
from galore_jax.layerwise import BlockStack, layerwise

DRAW = np.random.default_rng(0)
PARAMS = {"blocks": {"w": jnp.asarray(DRAW.normal(0, 0.1, (3, 16, 256)), jnp.float32)}, "head": jnp.ones((256,))}
BATCH = {"x": jnp.asarray(DRAW.normal(0, 1, (8, 256)), jnp.float32)}
MODEL = BlockStack(
    split=lambda p: ({"blocks": p["blocks"]}, {"head": p["head"]}),
    join=lambda layers, rest: layers | rest,
    embed=lambda rest, batch: batch["x"],
    block=lambda layer, x: x + jnp.tanh((x @ layer["blocks"]["w"].T) @ layer["blocks"]["w"]),
    loss=lambda rest, x, batch: jnp.mean((x @ rest["head"]) ** 2),
)


def whole(tx):
    """A step on the whole tree."""

    def loss(params):
        x, _ = jax.lax.scan(
            lambda x, w: (MODEL.block({"blocks": {"w": w}}, x), None), BATCH["x"], params["blocks"]["w"]
        )
        return MODEL.loss(params, x, BATCH)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def by_layers(tx):
    init, step = layerwise(MODEL, tx)
    return init, lambda params, state: step(params, state, BATCH)[:2]


@pytest.mark.covering(2)
@pytest.mark.parametrize("build", [whole, by_layers])
@pytest.mark.parametrize("preset", [galore_adamw, galore_adamw_8bit])
def test_a_step_with_its_state_on_the_host_is_the_same_and_leaves_it_there(build, preset):
    results = []
    for wrap in (lambda tx: tx, offload_state):
        init, step = build(wrap(preset(0.01, rank=8, projector="random")))
        params, state = jax.tree.map(jnp.copy, PARAMS), jax.jit(init)(PARAMS)
        step = jax.jit(step, donate_argnums=(0, 1))
        for _ in range(3):
            params, state = step(params, state)
        results.append((params, state))
    jax.tree.map(np.testing.assert_array_equal, *results)
    kinds = {(leaf.ndim > 1, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(results[1][1])}
    assert (True, "pinned_host") in kinds
    assert (True, "device") not in kinds
    assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(results[1][0]))
