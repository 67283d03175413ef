# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""quantize_state with a codec of matrices, on the states of Optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from problems import leniency

from galore_jax import galore, quantize_state
from galore_jax.codecs import SignedBlocks, UnsignedBlocks
from galore_jax.matrix_codec import CodedMatrix, MatrixCodec

SHAPES = {"bias": (80,), "kernel": (64, 80), "small": (20, 24), "stack": (2, 48, 64), "vector": (4096,)}
PLAIN = MatrixCodec(bits=4, leading=0)


def normal(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@functools.cache
def trained(steps):
    """Nesterov's momentum in 4 bits: the updates and states of some steps."""
    tx = quantize_state(optax.trace(0.9, nesterov=True), PLAIN, seed=3)
    state, update, seen = tx.init(normal(0)), jax.jit(tx.update), []
    for step in range(steps):
        updates, state = update(normal(step), state)
        seen.append((updates, state))
    return seen


@pytest.mark.slow
def test_a_momentum_is_decoded_updated_and_encoded_matrix_by_matrix():
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step, (updates, state) in enumerate(trained(4)):
        gradient, trace = normal(step), state.inner_state.trace
        coded = {name: type(leaf) for name, leaf in trace.items() if not isinstance(leaf, jax.Array)}
        assert coded == {"kernel": CodedMatrix, "stack": CodedMatrix, "vector": SignedBlocks}
        for name in SHAPES:
            exact = np.asarray(gradient[name]) + 0.9 * momentum[name]
            np.testing.assert_allclose(updates[name], gradient[name] + 0.9 * exact, atol=1e-4)
            kept = trace[name].decode() if name in coded else trace[name]
            if coded.get(name) is CodedMatrix:
                # Within half a step, and another one each time.
                scale = np.minimum(np.abs(exact).max(axis=-1)[..., :, None], np.abs(exact).max(axis=-2)[..., None, :])
                assert np.all(np.abs(kept - exact) <= 0.51 * scale / 7)
            momentum[name] = np.asarray(kept)
    seeds = [np.asarray(state.inner_state.trace["stack"].rest.seed) for _, state in trained(4)]
    assert len({int(seed) for seed in np.ravel(seeds)}) == 4
    assert all(len(set(seed.tolist())) == 1 for seed in seeds)


def test_adam_has_its_second_moment_in_blocks_and_its_count_moves_once():
    tx, plain = quantize_state(optax.scale_by_adam(), MatrixCodec(bits=8, leading=0)), optax.scale_by_adam()
    params = normal(0)
    state, exact = tx.init(params), plain.init(params)
    update, exact_update = jax.jit(tx.update), jax.jit(plain.update)
    with leniency():
        for step in range(3):
            updates, state = update(normal(step), state, params)
            expected, exact = exact_update(normal(step), exact, params)
            assert int(state.inner_state.count) == step + 1
            if step == 0:
                jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected)
    assert isinstance(state.inner_state.mu["stack"], CodedMatrix)
    assert isinstance(state.inner_state.nu["stack"], UnsignedBlocks)
    for name in ("kernel", "stack"):
        error = np.linalg.norm(updates[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error < 0.03


def test_a_state_that_is_not_one_for_each_matrix_stays_in_blocks():
    """Novograd has one second moment for a stack."""
    with leniency():
        state = quantize_state(optax.scale_by_novograd(), PLAIN).init(normal(0))
    assert isinstance(state.inner_state.mu["stack"], SignedBlocks)
    assert isinstance(state.inner_state.mu["kernel"], CodedMatrix)


@pytest.mark.slow
def test_a_momentum_in_a_subspace_can_be_in_4_bits():
    """Also where it is carried into another basis."""
    tx = galore(quantize_state(optax.trace(0.9), MatrixCodec()), rank=32, transport="rotate", update_proj_gap=1)
    params = {"w": normal(0)["stack"]} | {
        "wide": jnp.asarray(np.random.default_rng(1).normal(size=(64, 256)), jnp.float32)
    }
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(params, state, params)
    assert isinstance(optax.tree.get(state, "trace")["wide"], CodedMatrix)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    tx = quantize_state(optax.trace(0.9), MatrixCodec(bits=3, leading_bits=4), seed=1)
    params = {"w": normal(0)["kernel"]}
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(params, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, update(params, restored), update(params, state))


@pytest.mark.slow
def test_no_second_stack_in_float32_exists():
    """Beside the gradients, which become the updates; with all of XLA's optimizations."""
    params, matrix = {"w": jax.ShapeDtypeStruct((16, 256, 256), jnp.float32)}, 4 * 256 * 256
    tx = quantize_state(optax.trace(0.9), MatrixCodec())
    lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params))
    jax.config.update("jax_disable_most_optimizations", False)
    memory = lowered.compile().memory_analysis()
    jax.config.update("jax_disable_most_optimizations", True)
    assert memory.alias_size_in_bytes > 16 * matrix
    assert memory.temp_size_in_bytes < 6 * matrix
