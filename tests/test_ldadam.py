# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""LDAdam against its published formula in float64 NumPy, and two transformations for one tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import normal

import galore_jax
from galore_jax.presets._partition import on_matrices
from galore_jax.presets.ldadam import LDAdamState

RANK, B1, B2, EPS, RHO = 4, 0.8, 0.95, 1e-8, 0.7


def ldadam(**arguments):
    return galore_jax.ldadam(-1.0, **{"rank": RANK, "b1": B1, "b2": B2, "rho": RHO} | arguments)


def found_by(tx, gradients):
    params = {"w": jnp.zeros(gradients[0].shape)}
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update({"w": gradient}, state, params)
        yield np.asarray(gradient, np.float64), np.asarray(updates["w"], np.float64), inner(state)


def inner(state):
    matrices = state[0].matrices
    return LDAdamState(matrices.count, *(np.asarray(tree["w"], np.float64) for tree in matrices[1:]))


def reference(gradients, first_basis):
    """Algorithm 1, the full-size B and all, from a first basis; (update, error, momentum P m) of each step."""
    p, m, v, e = first_basis, 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        a = g + e
        if t == 1:
            turned_m = turned_v = carried = kept = 0.0
        else:
            m_hat, v_hat = m / (1 - B1 ** (t - 1)), v / (1 - B2 ** (t - 1))
            b = RHO * p @ m_hat + (1 - RHO) * a
            old, p = p, np.linalg.qr(b @ (b.T @ p))[0]
            q = p.T @ old
            turned_m = q @ m
            turned_v = (1 - B2 ** (t - 1)) * np.abs((q * q) @ (v_hat - m_hat**2) + (q @ m_hat) ** 2)
            carried, kept = old @ m, p @ turned_m
        r = p.T @ a
        e = a - p @ r + B1 / (1 - B1) * (carried - kept)
        m, v = B1 * turned_m + (1 - B1) * r, B2 * turned_v + (1 - B2) * r * r
        yield p @ ((m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)), e, p @ m


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
def test_the_published_formula(tall):
    """But for the first basis, an exact SVD there, a sketch with power steps here."""
    gradients = [normal(i, (20, 12) if tall else (12, 20)) * (1 + i) for i in range(6)]
    found = list(found_by(ldadam(), gradients))
    turn = np.transpose if tall else np.asarray
    wanted = reference([turn(g) for g, _, _ in found], found[0][2].basis)
    for (_, update, state), (expected, error, momentum) in zip(found, wanted, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(turn(update), expected, atol=1e-3 * scale)
        np.testing.assert_allclose(state.error, error, atol=1e-4 * np.abs(error).max())
        np.testing.assert_allclose(state.basis @ state.mu, momentum, atol=1e-4 * np.abs(momentum).max())
        np.testing.assert_allclose(state.basis.T @ state.basis, np.eye(RANK), atol=1e-5)


def test_the_first_basis_holds_the_leading_directions():
    u, _, vt = np.linalg.svd(np.asarray(normal(0, (12, 20))), full_matrices=False)
    gradient = jnp.asarray((u * 2.0 ** -np.arange(12)) @ vt, jnp.float32)
    [(_, _, state)] = found_by(ldadam(), [gradient])
    assert np.linalg.norm(u[:, :RANK].T @ state.basis) ** 2 > 0.999 * RANK


def test_nothing_is_lost():
    """Gradients so far = what the momentum in full space has taken up, (M_t - β₁ M_(t-1)) / (1 - β₁), and the error."""
    gradients = [normal(i, (12, 20)) for i in range(5)]
    total, taken, before = 0.0, 0.0, 0.0
    for g, _, state in found_by(ldadam(), gradients):
        momentum = state.basis @ state.mu
        total, taken, before = total + g, taken + (momentum - B1 * before) / (1 - B1), momentum
        np.testing.assert_allclose(taken + state.error, total, atol=1e-4)
    assert np.linalg.norm(state.error) > 1


def test_a_small_rank_reaches_a_target_of_full_rank_by_feedback():
    target = normal(0, (12, 20))
    tx = galore_jax.ldadam(optax.cosine_decay_schedule(0.1, 400), rank=2)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update({"w": w - target}, state, {"w": w})
        return (w + updates["w"], state), None

    start = jnp.zeros_like(target)
    (w, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=400))((start, tx.init({"w": start})))
    assert float(jnp.linalg.norm(w - target)) < 0.05 * float(jnp.linalg.norm(target))


def test_a_stack_equals_separate_leaves_and_a_bad_matrix_is_left_alone():
    tx = ldadam()
    stack = normal(0, (3, 12, 20))
    both, alone = {"w": stack}, {str(i): stack[i] for i in range(3)}
    states, update = (tx.init(both), tx.init(alone)), jax.jit(tx.update)
    for step in range(3):
        g = jnp.roll(stack, step, axis=1) * jnp.array([1.0, jnp.nan if step == 1 else 2.0, 0.5])[:, None, None]
        one, first = update({"w": g}, states[0], both)
        many, second = update({str(i): g[i] for i in range(3)}, states[1], alone)
        states = first, second
        for i in range(3):
            np.testing.assert_allclose(one["w"][i], many[str(i)], atol=1e-4)
        assert bool(jnp.all(one["w"][1] == 0)) == (step == 1)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(states))


def test_both_sides_are_refused_and_bad_arguments_named():
    with pytest.raises(ValueError, match="proj_type is \"full\", which would project 'w' from both sides"):
        ldadam(proj_type="full").init({"w": jnp.zeros((12, 20))})
    with pytest.raises(ValueError, match="proj_type is 'up'"):
        ldadam(proj_type="up")
    with pytest.raises(ValueError, match="rank is 0"):
        ldadam(rank=0)


@pytest.mark.filterwarnings("ignore:galore projects none")
def test_one_transformation_for_matrices_and_another_for_the_rest():
    params = {"kernel": jnp.ones((3, 4, 8)), "embed": jnp.ones((6, 8)), "bias": jnp.ones((8,))}
    tx = on_matrices(lambda numbers: optax.scale(2.0), optax.scale(3.0), rank=2)
    updates, state = tx.update(params, tx.init(params), params)
    assert {name: float(leaf.max()) for name, leaf in updates.items()} == {"kernel": 2.0, "embed": 3.0, "bias": 3.0}
    assert jax.tree.leaves(state) == []


@pytest.mark.filterwarnings("ignore:galore projects none")
def test_a_bad_gradient_of_the_rest_reaches_no_moment():
    tx = on_matrices(lambda numbers: optax.identity(), optax.scale_by_adam(), rank=2)
    params = {"embed": jnp.ones((6, 8)), "bias": jnp.ones((8,))}
    _, state = tx.update(params, tx.init(params), params)
    updates, after = tx.update(params | {"bias": params["bias"].at[0].set(jnp.nan)}, state, params)
    assert not np.any(updates["bias"])
    np.testing.assert_array_equal(after.rest.mu["bias"], state.rest.mu["bias"])
    assert np.all(after.rest.mu["embed"] > state.rest.mu["embed"])


def test_a_mask_and_dimension_numbers_choose_the_matrices():
    """The mask takes a leaf out; the numbers merge two axes of another."""
    params = {"heads": normal(0, (12, 4, 5)), "kernel": normal(1, (12, 20))}
    numbers = {"heads": galore_jax.GaLoreDimensionNumbers(0, (1, 2)), "kernel": galore_jax.GaLoreDimensionNumbers()}
    tx = ldadam(mask={"heads": True, "kernel": False}, weight_dimension_numbers=numbers)
    state = tx.init(params)
    assert state[0].matrices.error["heads"].shape == (12, 20)
    assert isinstance(state[0].matrices.error["kernel"], optax.MaskedNode)
    updates, _ = jax.jit(tx.update)(params, state, params)
    flat = {"w": params["heads"].reshape(12, 20)}
    plain, _ = jax.jit(ldadam().update)(flat, ldadam().init(flat), flat)
    np.testing.assert_allclose(updates["heads"].reshape(12, 20), plain["w"], atol=1e-5)
