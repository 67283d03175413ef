# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a preset adds around galore(): plain optimizers on the rest, weight decay of the full weight, schedules."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import leniency, quick_compilation  # noqa: F401

import galore_jax
from galore_jax import codecs
from galore_jax.codecs import SignedBlocks, UnsignedBlocks


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "embed": {"embedding": normal(0, (50, 16))},
    "block": {"kernel": normal(1, (16, 24)), "norm": {"scale": normal(2, (16,))}},
    "lm_head": {"kernel": normal(3, (16, 50))},
}


def gradients(steps=4):
    return [jax.tree.map(lambda p, s=s: normal(s, p.shape), PARAMS) for s in range(10, 10 + steps)]


def train(tx, params=PARAMS, gradients=None):
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def without_kernel(tree):
    return {**tree, "block": {"norm": tree["block"]["norm"]}}


def test_embeddings_head_and_norms_are_on_plain_adamw_at_the_same_learning_rate():
    schedule = optax.cosine_decay_schedule(0.1, 10)
    ours, _ = train(galore_jax.galore_adamw(schedule, rank=4, weight_decay=0.1), gradients=gradients())
    theirs, _ = train(optax.adamw(schedule, weight_decay=0.1), gradients=gradients())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        without_kernel(ours),
        without_kernel(theirs),
    )
    assert not np.allclose(ours["block"]["kernel"], theirs["block"]["kernel"])


def test_embeddings_head_and_norms_are_on_plain_adafactor():
    ours, _ = train(galore_jax.galore_adafactor(0.1, rank=4, momentum=0.9), gradients=gradients())
    theirs, _ = train(optax.adafactor(0.1, multiply_by_parameter_scale=False, momentum=0.9), gradients=gradients())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        without_kernel(ours),
        without_kernel(theirs),
    )


def test_adafactor_scales_by_the_full_parameter_and_factors_the_low_rank_moment():
    params = {"w": 3 * normal(0, (256, 320))}
    gradient = [{"w": normal(1, (256, 320))}]
    plain, state = train(galore_jax.galore_adafactor(0.1, rank=128), params, gradient)
    scaled, _ = train(galore_jax.galore_adafactor(0.1, rank=128, multiply_by_parameter_scale=True), params, gradient)
    rms = float(jnp.sqrt(jnp.mean(params["w"] ** 2)))
    np.testing.assert_allclose(scaled["w"] - params["w"], rms * (plain["w"] - params["w"]), rtol=1e-4, atol=1e-5)
    assert optax.tree.get(state, "v_row")["w"].size == 128
    assert optax.tree.get(state, "v_col")["w"].size == 320


@pytest.mark.parametrize("preset", [galore_jax.galore_adamw, galore_jax.galore_adafactor])
def test_weight_decay_acts_on_the_full_weight_and_not_in_the_subspace(preset):
    """One step with decay minus one step without it is -learning_rate · decay · W, in every direction."""
    step = gradients(1)
    decayed, _ = train(preset(0.1, rank=4, weight_decay=0.5), gradients=step)
    plain, _ = train(preset(0.1, rank=4), gradients=step)
    jax.tree.map(lambda d, p, w: np.testing.assert_allclose(d - p, -0.1 * 0.5 * w, atol=1e-6), decayed, plain, PARAMS)


def test_a_weight_decay_mask_chooses_what_decays():
    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    step = gradients(1)
    tx = galore_jax.galore_adamw(0.1, rank=4, weight_decay=0.5, weight_decay_mask=matrices)
    masked, _ = train(tx, gradients=step)
    plain, _ = train(galore_jax.galore_adamw(0.1, rank=4), gradients=step)
    np.testing.assert_array_equal(masked["block"]["norm"]["scale"], plain["block"]["norm"]["scale"])
    assert not np.allclose(masked["block"]["kernel"], plain["block"]["kernel"])


@pytest.mark.parametrize(
    ("preset", "static"),
    [
        (galore_jax.galore_adamw, ("rank", "update_proj_gap")),
        (galore_jax.galore_adafactor, ("rank", "update_proj_gap", "min_dim_size_to_factor")),
    ],
)
def test_hyperparameters_can_be_injected_and_changed_during_training(preset, static):
    tx = optax.inject_hyperparams(preset, static_args=static)(learning_rate=0.1, rank=4)
    state = tx.init(PARAMS)
    [gradient] = gradients(1)
    update = jax.jit(tx.update)
    once, _ = update(gradient, state, PARAMS)
    state.hyperparams["learning_rate"] = state.hyperparams["learning_rate"] * 2
    twice, _ = update(gradient, state, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), once, twice)


def test_adafactor_treats_the_layers_of_a_stack_one_by_one():
    """A layer whose gradient is thirty times larger must not clip the others."""
    layers = [
        {"w": jnp.stack([normal(10 * s + i, (160, 200)) * (30.0 if i == s else 1.0) for i in range(3)])}
        for s in range(3)
    ]
    stacked, _ = train(galore_jax.galore_adafactor(0.1, rank=128), {"w": jnp.zeros((3, 160, 200))}, layers)
    separate, _ = train(
        galore_jax.galore_adafactor(0.1, rank=128), [jnp.zeros((160, 200))] * 3, [list(g["w"]) for g in layers]
    )
    np.testing.assert_allclose(stacked["w"], jnp.stack(separate), atol=2e-5)


def test_moments_are_float32_for_bfloat16_parameters_even_where_nothing_is_projected():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = galore_jax.galore_adamw(0.1, rank=1.0).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


EIGHT_BIT = (galore_jax.galore_adamw_8bit, galore_jax.q_galore_adamw_8bit)
eight_bit = pytest.mark.parametrize("preset", EIGHT_BIT)
LARGE = {
    "embed": {"embedding": normal(0, (300, 64))},
    "block": {"kernel": normal(1, (64, 600)), "down": normal(2, (2, 700, 64)), "norm": {"scale": normal(3, (64,))}},
    "lm_head": {"kernel": normal(4, (64, 300))},
}


@eight_bit
def test_the_8_bit_presets_take_the_arguments_of_galore_adamw(preset):
    ours, theirs = inspect.signature(preset).parameters, inspect.signature(galore_jax.galore_adamw).parameters
    assert list(ours) == list(theirs)
    changed = {name: p.default for name, p in ours.items() if p.default != theirs[name].default}
    quantized = {"refresh": "lazy", "basis_codec": "int4"}
    assert changed == ({"basis_codec": "bfloat16"} if preset is EIGHT_BIT[0] else quantized)
    assert preset.__doc__
    assert preset.__name__ in ("galore_adamw_8bit", "q_galore_adamw_8bit")
    with pytest.raises(TypeError, match="unexpected keyword argument 'rnak'"):
        preset(0.1, rnak=4)
    with pytest.raises(TypeError, match="learning_rate"):
        preset(rank=4)
    with pytest.raises(ValueError, match="basis_codec is 'int3'"):
        preset(0.1, basis_codec="int3")


@eight_bit
def test_the_hyperparameters_of_the_8_bit_presets_can_be_injected(preset):
    tx = optax.inject_hyperparams(preset, static_args=("rank",))(learning_rate=0.1, rank=16, weight_decay=0.1)
    state = tx.init(LARGE)
    assert {"learning_rate", "b1", "eps", "weight_decay"} <= set(state.hyperparams)
    update = jax.jit(tx.update)
    with leniency():
        once, _ = update(LARGE, state, LARGE)
        state.hyperparams["learning_rate"] = state.hyperparams["learning_rate"] * 2
        twice, _ = update(LARGE, state, LARGE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), once, twice)


@pytest.mark.parametrize("basis_codec", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("rank", [8, 33])
def test_the_bytes_of_the_8_bit_presets_are_the_formula(rank, basis_codec):
    """Kernel 64 x 600 with its basis on the left, two matrices 700 x 64 with theirs on the right, two embeddings, a norm."""
    r, k = rank, 64

    def basis(matrices):
        half = -(-r // 2)
        return matrices * {"float32": 4 * k * r, "bfloat16": 2 * k * r, "int4": k * half + 4 * k + 4 * r}[basis_codec]

    def moment(rows, n):
        """Of 4,096 numbers and a last axis of 16 or more one byte each and 4 for each block of up to 256; else 4 each."""
        return rows * n + 4 * rows * -(-n // 256) if rows * n >= 4096 and n >= 16 else 4 * rows * n

    moments = moment(r, 600) + moment(2 * 700, r) + moment(300, 64) + moment(64, 300) + 4 * 64
    counts = 6 * 4  # GaLoreState's four, QuantizeState's and Adam's
    tx = galore_jax.galore_adamw_8bit(0.1, rank=rank, basis_codec=basis_codec)
    assert galore_jax.state_bytes(tx, LARGE) == basis(1 + 2) + 2 * moments + counts
    assert galore_jax.state_bytes(tx, LARGE) == sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(LARGE)))
    if basis_codec == "int4":
        lazy = 3 * 4 * (1 + 1 + 5)  # for each matrix its gap, when it is due, and five overlaps
        q_galore = galore_jax.q_galore_adamw_8bit(0.1, rank=rank)
        assert galore_jax.state_bytes(q_galore, LARGE) == galore_jax.state_bytes(tx, LARGE) + lazy
        # With the bases on the larger sides the moments are on the smaller.
        bases = sum(side * -(-r // 2) + 4 * side + 4 * r for side in (600, 700, 700))
        moments = moment(64, r) + moment(2 * r, 64) + moment(300, 64) + moment(64, 300) + 4 * 64
        q_galore = galore_jax.q_galore_adamw_8bit(0.1, rank=rank, proj_type="reverse_std")
        assert galore_jax.state_bytes(q_galore, LARGE) == bases + 2 * moments + counts + lazy


TARGET = jax.tree.map(lambda p: normal(p.size, p.shape), LARGE)


@functools.cache
def trained(preset):
    """25 steps of noisy least squares: the parameters and the state."""
    tx = preset(0.05, rank=32, scale=1.0, update_proj_gap=5, proj_type="std")

    def noise(seed, p):
        return jax.random.normal(jax.random.fold_in(jax.random.key(p.size), seed), p.shape)

    def step(carry, seed):
        params, state = carry
        gradient = jax.tree.map(lambda p, t: p - t + 0.3 * noise(seed, p), params, TARGET)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    with leniency():
        run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(25)))
        (params, state), _ = run((LARGE, tx.init(LARGE)))
    return params, state


@eight_bit
def test_the_8_bit_presets_train_like_the_float32_one(preset):
    """Also embeddings and head, whose moments are large and so in 8 bits too; a small norm's are not."""
    ours, state = trained(preset)
    theirs, _ = trained(galore_jax.galore_adamw)
    adam = state[0].inner_state.inner_state
    for moment, kind in ((adam.mu, SignedBlocks), (adam.nu, UnsignedBlocks)):
        leaves, _ = codecs.flatten(moment)
        assert [type(leaf) for leaf in leaves if codecs.is_coded(leaf)] == [kind] * 4
        assert moment["block"]["norm"]["scale"].dtype == jnp.float32

    def check(a, b, start, t):
        """The distance still to go."""
        assert abs(np.linalg.norm(a - t) - np.linalg.norm(b - t)) < 0.02 * np.linalg.norm(start - t)

    jax.tree.map(check, ours, theirs, LARGE, TARGET)
