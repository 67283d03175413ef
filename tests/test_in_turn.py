# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Parameters updated one after the other are those of one update, to rounding, and wait for one another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import normal

import galore_jax
from galore_jax.execution.in_turn import update_in_turn
from galore_jax.weights import apply_updates

PARAMS = {
    "embed_tokens": jnp.ones((64, 96)),
    "layers": {"q_proj": {"kernel": jnp.ones((2, 64, 48))}},
    "lm_head": {"kernel": jnp.ones((64, 96), jnp.bfloat16)},
    "norm": jnp.ones((64,)),
}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.1, 0.0, 9)),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=32),
    "galore_adamw_8bit": lambda: galore_jax.galore_adamw_8bit(0.1, rank=8),
    "galore_adamw, reset": lambda: galore_jax.galore_adamw(0.1, rank=8, transport="reset", update_proj_gap=1),
    "apollo_adamw": lambda: galore_jax.apollo_adamw(0.1, rank=8),
    "galore_muon": lambda: galore_jax.galore_muon(0.1, rank=8),
    "muon_4bit": lambda: galore_jax.muon_4bit(0.1),
}


def gradients(number):
    seeds = iter(range(8 * number, 8 * number + 8))
    return jax.tree.map(lambda p: normal(next(seeds), p.shape, p.dtype), PARAMS)


def halved(params, grads):
    """A gradient function."""
    return jax.tree.map(lambda g: g / 2, grads)


@pytest.mark.covering(1)
@pytest.mark.parametrize("apart", [(), (0,), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_in_turn_equals_at_once(name, apart):
    tx = OPTIMIZERS[name]()

    @jax.jit
    def at_once(params, state, grads):
        grads = halved(params, grads)
        updates, state = tx.update(grads, state, params)
        squares = optax.tree.norm(optax.tree.cast(grads, jnp.float32), squared=True)
        return apply_updates(params, updates), state, squares

    @jax.jit
    def in_turn(params, state, grads):
        return update_in_turn(
            tx, halved, params, grads, state, lambda updates: apply_updates(params, updates), apart, large=6000
        )

    expected = found = PARAMS, tx.init(PARAMS)
    for number in range(3):
        grads = gradients(number)
        expected, found = at_once(*expected[:2], grads), in_turn(*found[:2], grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(*np.float64([a, b]), rtol=2e-6, atol=1e-7), found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert not np.array_equal(found[0]["embed_tokens"], PARAMS["embed_tokens"])


def test_a_turn_waits_for_the_one_before():
    """Without the barrier nothing would keep the second parameter's work from starting first."""
    tx, params = optax.adam(0.1), {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((2,))}

    def update(grads, state, params):
        return update_in_turn(tx, halved, params, grads, state, lambda u: optax.apply_updates(params, u), large=16)

    jaxpr = jax.make_jaxpr(update)(params, tx.init(params), params)
    assert str(jaxpr).count("optimization_barrier") == 1  # two large parameters, the second with all others


@pytest.mark.parametrize("bad", ["embed_tokens", "norm"])
def test_a_gradient_that_is_not_finite_is_counted_once(bad):
    """Also where the embedding has a turn, and a gradient, of its own."""
    tx, grads = galore_jax.galore_adamw(0.1, rank=8), gradients(0)
    grads[bad] = grads[bad].at[0].set(jnp.nan)

    @jax.jit
    def in_turn(grads):
        return update_in_turn(
            tx, halved, PARAMS, grads, tx.init(PARAMS), lambda updates: apply_updates(PARAMS, updates), [0], large=6000
        )

    new, state, squares = in_turn(grads)
    assert optax.tree.get(state, "skipped") == 1
    assert np.isnan(squares)
    for name in ("embed_tokens", "norm"):
        assert np.array_equal(new[name], PARAMS[name]) == (name == bad)


AMBIGUOUS = {
    "numbered parameters in a chain": ([jnp.ones((8, 8)), jnp.ones((8, 8)), jnp.ones((8,))], lambda: optax.adam(0.1)),
    "a group named like a parameter": (
        {"embed": jnp.ones((8, 8)), "head": jnp.ones((8, 8)), "norm": jnp.ones((8,))},
        lambda: optax.partition(
            {"embed": optax.adam(0.1), "head": optax.sgd(0.1)}, {"embed": "embed", "head": "head", "norm": "embed"}
        ),
    ),
    "one vector for all parameters": (
        {"embed": jnp.ones((8, 8)), "head": jnp.ones((8, 8)), "norm": jnp.ones((8,))},
        lambda: optax.flatten(optax.adam(0.1)),
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_state_whose_path_does_not_tell_its_parameter_is_that_of_one_update(name):
    params, make = AMBIGUOUS[name]
    tx = make()
    grads = jax.tree.map(lambda p: normal(p.size, p.shape), params)

    @jax.jit
    def in_turn(grads):
        apply = functools.partial(optax.apply_updates, params)
        return update_in_turn(tx, halved, params, grads, tx.init(params), apply, [0], large=16)[:2]

    @jax.jit
    def at_once(grads):
        updates, state = tx.update(halved(params, grads), tx.init(params), params)
        return optax.apply_updates(params, updates), state

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), in_turn(grads), at_once(grads))
