# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One transformation for matrices and one for the rest: boxed trees, requests, replies that are not finite, a traced rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from problems import assert_trees_close, normal

import galore_jax
from galore_jax._core.call import ARGUMENT, Action, Call
from galore_jax.presets._partition import on_matrices

PARAMS = {"kernel": normal(0, (8, 12)), "embed": normal(1, (9, 8)), "bias": normal(2, (12,))}


def doubled():
    return on_matrices(lambda numbers: optax.trace(0.9), optax.scale_by_adam(), rank=2)


def linen_params():
    cut = nn.with_partitioning(lambda key, shape, dtype=None: normal(0, shape), (None, "model"))
    return nn.Dense(12, kernel_init=cut).init(jax.random.key(0), jnp.ones((1, 8)))["params"]


def nnx_params():
    return nnx.state(nnx.Linear(8, 12, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize("make", [linen_params, nnx_params])
def test_boxes_are_split_whole_and_keep_their_metadata(make):
    """As Optax treats them: one transformation for both parts gives the same trees, and so the same shardings."""
    boxed = make()
    seen = []

    def build(numbers):
        seen.append(numbers)
        return optax.scale_by_adam()

    tx = on_matrices(build, optax.scale_by_adam(), rank=2)
    state = tx.init(boxed)
    updates, state = jax.jit(tx.update)(boxed, state, boxed)
    expected, plain = jax.jit(optax.scale_by_adam().update)(boxed, optax.scale_by_adam().init(boxed), boxed)
    assert_trees_close(updates, expected)
    assert nn.get_partition_spec(updates) == nn.get_partition_spec(expected)
    masked = optax.MaskedNode()
    assert [(view.path[:6], view.reduction_axes, view.output_axes) for view in seen[0]] == [("kernel", (0,), (1,))]
    for part, name, other in ((state.matrices, "kernel", "bias"), (state.rest, "bias", "kernel")):
        assert_trees_close(part.mu[name], plain.mu[name])
        assert part.mu[other] == masked


def test_a_number_is_a_scalar_parameter():
    params = {"kernel": PARAMS["kernel"], "temperature": 0.5}
    tx = on_matrices(lambda numbers: optax.identity(), optax.adam(0.1), rank=2)
    updates, _ = tx.update(params, tx.init(params), params)
    adam, scalar = optax.adam(0.1), jnp.float32(0.5)
    assert_trees_close(updates["temperature"], adam.update(scalar, adam.init(scalar))[0])


def test_a_wrong_gradient_is_named():
    tx, wrong = doubled(), PARAMS | {"kernel": PARAMS["kernel"].T}
    with pytest.raises(ValueError, match=r"'kernel' has shape \(12, 8\), but the parameter has shape \(8, 12\)"):
        tx.update(wrong, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("action", [Action.PROJECT, Action.APPLY])
def test_low_rank_accumulation_is_refused(action):
    tx = doubled()
    with pytest.raises(ValueError, match="needs the whole gradient, which low-rank accumulation does not keep"):
        tx.update({"anything": 1.0}, tx.init(PARAMS), PARAMS, **{ARGUMENT: Call(action)})


def test_a_request_to_refresh_reaches_the_matrices_alone():
    def update(updates, state, params=None, *, galore_call):
        galore_call.answer()
        return updates, jax.tree.map(jnp.ones_like, state)

    matrices = optax.GradientTransformationExtraArgs(optax.trace(0.9).init, update)
    tx, call = on_matrices(lambda numbers: matrices, optax.scale_by_adam(), rank=2), Call(Action.REFRESH)
    state = tx.init(PARAMS)
    updates, after = tx.update(PARAMS, state, PARAMS, **{ARGUMENT: call})
    call.check_reached("refresh_bases")
    assert_trees_close(updates, PARAMS)
    assert_trees_close(after.rest, state.rest)
    assert np.all(after.matrices.trace["kernel"] == 1)


def test_an_entry_of_a_reply_that_is_not_finite_becomes_zero_alone():
    logarithm = optax.stateless(lambda updates, params: jax.tree.map(jnp.log, updates))
    tx = on_matrices(lambda numbers: optax.identity(), logarithm, rank=2)
    params = jax.tree.map(lambda p: jnp.full_like(p, 2.0), PARAMS)
    bad = params | {"bias": params["bias"].at[3].set(-4.0)}
    updates, _ = jax.jit(tx.update)(bad, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], np.where(np.arange(12) == 3, 0, np.log(2.0)), rtol=1e-6)
    np.testing.assert_allclose(updates["embed"], np.log(2.0), rtol=1e-6)


def test_a_gradient_that_is_not_finite_makes_a_zero_update_and_keeps_the_state_of_its_parameter():
    tx = on_matrices(lambda numbers: optax.identity(), optax.trace(0.5), rank=2)
    params = jax.tree.map(lambda p: jnp.full_like(p, 2.0), PARAMS)
    _, state = tx.update(params, tx.init(params), params)
    bad = params | {"bias": params["bias"].at[3].set(jnp.nan)}
    updates, after = jax.jit(tx.update)(bad, state, params)
    assert not np.any(updates["bias"])
    np.testing.assert_array_equal(after.rest.trace["bias"], 2.0)
    np.testing.assert_array_equal(after.rest.trace["embed"], 3.0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0.5])
def test_a_traced_rank_projects_what_the_state_has(rank):
    """``small`` has no smaller side that exceeds rank 2, and half of it is less."""
    params = PARAMS | {"small": normal(3, (2, 6))}

    def preset(rank, learning_rate=1.0):
        return galore_jax.ldadam(
            learning_rate, rank=rank, mask={"kernel": True, "embed": False, "bias": False, "small": True}
        )

    injected, plain = optax.inject_hyperparams(preset)(rank=rank), preset(rank)
    state, expected_state = injected.init(params), plain.init(params)
    for jit in (jax.jit, lambda update: update):
        updates, state = jit(injected.update)(params, state, params)
        expected, expected_state = jit(plain.update)(params, expected_state, params)
        assert_trees_close(updates, expected, rtol=1e-4, atol=1e-5)
    matrices = optax.tree.get(state, "LDAdamState")
    assert matrices.basis["kernel"].shape == (8, 2 if rank == 2 else 4)
    assert isinstance(matrices.basis["small"], optax.MaskedNode) == (rank == 2)


def test_a_rank_that_is_traced_in_init_says_what_to_write():
    tx = optax.inject_hyperparams(galore_jax.ldadam)(learning_rate=0.1, rank=2)
    with pytest.raises(TypeError, match=r'rank is traced.*static_args=\("rank",\)'):
        jax.eval_shape(tx.init, PARAMS)
