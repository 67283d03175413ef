# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Micro-batches summed in the subspaces equal the batch they make up, in the memory of the low-rank sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import leniency, normal

import galore_jax
from galore_jax import galore, galore_adamw, galore_adamw_8bit
from galore_jax.accumulate import low_rank_mean, update_from_low_rank

K = 4


def small():
    params = {"layers": {"up": normal(0, (3, 24, 40)), "down": normal(1, (3, 40, 24))}, "norm": jnp.ones((24,))}
    return jax.tree.map(lambda p: p * 0.1, params)


def micro_gradient(batch):
    """Different for each micro-batch, and known without a model: batch (2,) is a seed and a factor."""
    return batch[1], jax.tree.map(
        lambda p: batch[1] * jax.random.normal(jax.random.fold_in(jax.random.key(7), batch[0].astype(int)), p.shape),
        small(),
    )


def run(tx, steps, low_rank, batches=None):
    params, state = small(), tx.init(small())

    @jax.jit
    def step(params, state, batch):
        if low_rank:
            _, mean, state = low_rank_mean(tx, micro_gradient, batch, state, params)
            updates, state = update_from_low_rank(tx, mean, state, params)
        else:
            grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), jax.vmap(micro_gradient)(batch)[1])
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        seeds = jnp.stack([jnp.arange(K, dtype=jnp.float32) + K * number, jnp.linspace(0.5, 1.5, K)], axis=1)
        params, state = step(params, state, seeds if batches is None else batches(number))
    return params, state


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("preset", "proj_type"), [(galore_adamw, "std"), (galore_adamw, "full"), (galore_adamw_8bit, "right")]
)
def test_it_equals_the_mean_gradient_between_refreshes(preset, proj_type):
    """A random basis does not look at the gradient, so here refreshes do not tell the two apart either."""
    tx = preset(
        0.01,
        rank=4,
        update_proj_gap=3,
        projector="random",
        transport="rotate",
        proj_type=proj_type,
        weight_decay=0.1,
        basis_codec="float32",
    )
    whole, _ = run(tx, 7, low_rank=False)
    summed, state = run(tx, 7, low_rank=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), summed, whole)
    assert int(state[0].count) == 7


@pytest.mark.slow
def test_a_basis_comes_from_the_first_micro_batch():
    tx = galore(optax.sgd(1.0), rank=4, refresh="together", update_proj_gap=2, projector="svd")
    _, state = run(tx, 1, low_rank=True)
    gradient = micro_gradient(jnp.array([0.0, 0.5]))[1]["layers"]["up"]
    for basis, matrix in zip(state.left["layers"]["up"], gradient, strict=True):
        leading = np.linalg.svd(matrix)[0][:, :4]
        np.testing.assert_allclose(basis @ basis.T, leading @ leading.T, atol=1e-5)
    after, later = run(tx, 2, low_rank=True)[1], run(tx, 3, low_rank=True)[1]
    np.testing.assert_array_equal(state.left["layers"]["up"], after.left["layers"]["up"])
    assert not np.allclose(later.left["layers"]["up"], after.left["layers"]["up"])


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 2])
def test_a_bad_micro_batch_skips_the_update(which):
    tx = galore_adamw(0.01, rank=4, update_proj_gap=1)

    def batches(number):
        factors = jnp.ones((K,)).at[which].set(jnp.where(number == 1, jnp.nan, 1.0))
        return jnp.stack([jnp.arange(K, dtype=jnp.float32) + 10 * number, factors], axis=1)

    before, _ = run(tx, 1, low_rank=True, batches=batches)
    bad, state = run(tx, 2, low_rank=True, batches=batches)
    jax.tree.map(np.testing.assert_array_equal, bad, before)
    assert int(state[0].skipped) == 1
    after, state = run(tx, 3, low_rank=True, batches=batches)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((after, state)))
    assert not np.array_equal(after["norm"], before["norm"])


def test_the_buffers_are_low_rank():
    """By XLA's own account the sums of whole gradients are gone."""
    params = {"w": jnp.zeros((512, 1024))}
    tx = galore(optax.sgd(0.1), rank=16, refresh="manual")
    state = tx.init(params)

    def gradient(batch):
        x, y = batch
        return jax.value_and_grad(lambda p: jnp.mean((jnp.tanh(x @ p["w"]) - y) ** 2))(params)

    def whole(state, batches):
        def add(total, batch):
            return jax.tree.map(jnp.add, total, gradient(batch)[1]), None

        mean = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]
        return tx.update(mean, state, params)

    def low_rank(state, batches):
        return update_from_low_rank(tx, *low_rank_mean(tx, gradient, batches, state, params)[1:], params)

    batches = jnp.zeros((K, 8, 512)), jnp.zeros((K, 8, 1024))
    temporary = {
        step: jax.jit(step).lower(state, batches).compile().memory_analysis().temp_size_in_bytes
        for step in (whole, low_rank)
    }
    assert temporary[low_rank] < 0.5 * params["w"].nbytes < temporary[whole]


@pytest.mark.filterwarnings("ignore:galore projects none")
def test_where_nothing_is_projected_it_is_the_ordinary_mean():
    tx = galore(optax.sgd(0.1), rank=999)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        run(tx, 2, low_rank=True)[0],
        run(tx, 2, low_rank=False)[0],
    )


def test_there_must_be_one_galore():
    batch = jnp.ones((K, 2))
    adam = optax.adam(0.1)
    with pytest.raises(ValueError, match="reached no galore"):
        low_rank_mean(adam, micro_gradient, batch, adam.init(small()), small())
    with pytest.raises(ValueError, match="reached no galore"):
        update_from_low_rank(adam, small(), adam.init(small()), small())
    two = optax.chain(galore(optax.sgd(0.1), rank=4), galore(optax.sgd(0.1), rank=4))
    with pytest.raises(ValueError, match="found two galore"):
        low_rank_mean(two, micro_gradient, batch, two.init(small()), small())


@pytest.mark.slow
def test_a_gradient_outside_the_basis_is_treated_as_in_the_plain_step():
    """Not zero, but zero in its subspace: both steps leave the matrix alone."""
    params = {"kernel": jnp.zeros((8, 16))}
    first = {"kernel": jnp.zeros((8, 16)).at[:2].set(1 + jnp.arange(32.0).reshape(2, 16) ** 2)}
    second = {"kernel": jnp.zeros((8, 16)).at[4:].set(1.0)}
    tx = galore_jax.galore(optax.adam(0.1), rank=2, scale=1.0)
    _, state = tx.update(first, tx.init(params), params)
    plain, plain_state = tx.update(second, state, params)
    _, mean, new = low_rank_mean(tx, lambda batch: (0, batch), {"kernel": second["kernel"][None]}, state, params)
    updates, new = update_from_low_rank(tx, mean, new, params)
    np.testing.assert_array_equal(updates["kernel"], plain["kernel"])
    jax.tree.map(np.testing.assert_array_equal, new, plain_state)


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("wrapped", "works"),
    [
        (lambda tx: optax.MultiSteps(tx, 2), ()),
        (lambda tx: optax.apply_if_finite(tx, 3), ("refresh",)),
        (lambda tx: optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update)), ()),
        (lambda tx: optax.chain(optax.clip(1.0), tx), ("refresh", "accumulate")),
    ],
    ids=["MultiSteps", "apply_if_finite", "jitted", "chain"],
)
def test_a_request_through_a_wrapper_works_or_is_refused_in_one_sentence(wrapped, works):
    params = {"kernel": normal(0, (8, 16))}
    tx = wrapped(galore_jax.galore_adamw(0.1, rank=2))
    state = tx.init(params)

    def refresh():
        galore_jax.refresh_bases(tx, params, state, params)

    def accumulate():
        low_rank_mean(tx, lambda batch: (0, batch), {"kernel": params["kernel"][None]}, state, params)

    for name, request in {"refresh": refresh, "accumulate": accumulate}.items():
        with leniency():
            if name in works:
                request()
            else:
                with pytest.raises(
                    ValueError, match=r"(refresh_bases\(\)|Low-rank accumulation) reached (no|the) galore"
                ):
                    request()
