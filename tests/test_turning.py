# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What must hold when a basis turns: bad gradients, rejected bases, signs, rotations, diagnostics, differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import POLICIES, normal

import galore_jax
from galore_jax import galore, projectors
from galore_jax.projectors import Projector

T = 4


def spoiled(gradient, bad):
    return jnp.zeros_like(gradient) if bad == 0 else gradient.at[3, 5].set(bad)


@functools.cache
def compiled(policy):
    """A galore and its compiled update, once for all the bad gradients."""
    tx = galore(optax.adam(1.0), rank=4, update_proj_gap=T, refresh=POLICIES[policy])
    return tx, jax.jit(tx.update)


@pytest.mark.covering(9)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 0.0])
@pytest.mark.parametrize("when", [0, 3, T], ids=["first", "between", "refresh"])
def test_a_bad_gradient_keeps_the_basis_and_is_counted(policy, bad, when):
    tx, update = compiled(policy)
    params = [jnp.zeros((12, 20))] * 2
    state = tx.init(params)
    for step in range(2 * T + 1):
        gradient = [normal(step, (12, 20)), normal(100 + step, (12, 20))]
        due = [bool(jnp.all(x)) for x in due_of(policy, state)]
        if step == when:
            gradient[0] = spoiled(gradient[0], bad)
        before = state
        updates, state = update(gradient, state, params)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
        assert [bool(jnp.any(update != 0)) for update in updates] == [step != when, True]
        if step == when:
            np.testing.assert_array_equal(state.left[0], before.left[0])
            assert int(state.kept) - int(before.kept) == int(due[0])
        else:
            assert int(state.kept) == int(before.kept)
    assert int(state.skipped) == int(bad != 0)
    assert int(state.rejected) == 0


def due_of(policy, state):
    """By the definition of each policy, which of two matrices are due at this update."""
    count = int(state.count)
    if policy == "every_step":
        return [True, True]
    if policy == "lazy":
        return [count >= int(schedule.next) for schedule in state.schedule]
    return [count % T == 0, count % T == (T // 2 if policy == "staggered" else 0)]


@functools.cache
def compiled_with(projector, transport, projected):
    """``projected``: by a word on the leaf itself, without which a single row is not."""
    spec = {"weight_dimension_numbers": {"w": galore_jax.GaLoreDimensionNumbers(0, 1)}} if projected else {}
    settings = {"projector": projector, "transport": transport, "diagnostics": True}
    tx = galore(optax.adam(0.1), rank=4, update_proj_gap=3, **settings, **spec)
    return tx, jax.jit(tx.update)


@pytest.mark.covering(2)
@pytest.mark.filterwarnings("ignore:galore projects none")
@pytest.mark.parametrize(
    ("kind", "projector", "transport"),
    [
        *(
            (kind, projector, transport)
            for kind in (
                "zero at first",
                "zero for 10 steps",
                "rank 1",
                "a NaN at every third step",
                "one row, projected",
            )
            for projector, transport in (
                *((projector, "rotate") for projector in ("power", "randomized", "eigh", "random", "rows", "sampled")),
                ("power", "keep"),
                ("power", "reset"),
            )
        ),
        ("one row", "power", "rotate"),
    ],
)
def test_training_goes_on_whatever_the_gradients(kind, projector, transport):
    """T = 3: a NaN at every third step meets every refresh that is due, the first included."""
    shape = (1, 20) if "one row" in kind else (12, 20)
    tx, update = compiled_with(projector, transport, projected=kind != "one row")
    params = {"w": jnp.zeros(shape)}
    state = tx.init(params)
    for step in range(14):
        gradient, bad = normal(step, shape), False
        if kind == "rank 1":
            gradient = normal(step, (12, 1)) * normal(50 + step, (1, 20))
        if (kind == "zero at first" and step < 10) or (kind == "zero for 10 steps" and 1 <= step <= 10):
            gradient, bad = gradient * 0, True
        if kind == "a NaN at every third step" and step % 3 == 0:
            gradient, bad = gradient.at[3, 5].set(jnp.nan), True
        updates, state = update({"w": gradient}, state, params)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
        assert bool(jnp.any(updates["w"] != 0)) != bad
    assert isinstance(state.left["w"], optax.MaskedNode) == (kind == "one row")


def test_a_basis_that_fails_its_check_is_rejected_and_counted():
    """A projector that promises orthonormal columns and breaks its word at its second refresh."""

    def broken(seen):
        factor = jnp.where(seen.step == 0, 1.0, jnp.where(seen.step == 2, 1.01, jnp.nan))
        return projectors.eigh().refresh(seen) * factor

    tx = galore(optax.adam(1.0), rank=4, update_proj_gap=2, projector=Projector("broken", broken))
    state, update = tx.init(normal(0, (12, 20))), jax.jit(tx.update)
    _, first = update(normal(0, (12, 20)), state)
    state = first
    for step, rejected in ((1, 0), (2, 1), (3, 1), (4, 2)):
        updates, state = update(normal(step, (12, 20)), state)
        np.testing.assert_array_equal(state.left, first.left)
        assert int(state.rejected) == rejected
        assert bool(jnp.all(jnp.isfinite(updates)))
        assert bool(jnp.any(updates != 0))


def test_bases_turn_without_a_change_to_what_the_signs_of_a_basis_are():
    """Rotation carries moments to the new signs: a projector that flips them at random changes no weight."""

    def flipping(seen):
        basis = projectors.eigh().refresh(seen)
        sign = jnp.where(jax.random.bernoulli(seen.key, shape=(basis.shape[1],)), 1.0, -1.0)
        return basis * sign[None, :]

    settings = {"rank": 4, "update_proj_gap": 2, "transport": "rotate", "refresh": "together"}
    plain = galore(optax.adam(0.1), projector="eigh", **settings)
    flipped = galore(optax.adam(0.1), projector=Projector("flipping", flipping), **settings)
    one, other = plain.init(normal(0, (12, 20))), flipped.init(normal(0, (12, 20)))
    update, flipped_update = jax.jit(plain.update), jax.jit(flipped.update)
    differ = 0
    for step in range(9):
        updates, one = update(normal(step, (12, 20)), one)
        expected, other = flipped_update(normal(step, (12, 20)), other)
        np.testing.assert_allclose(updates, expected, atol=2e-6)
        differ += int(np.any(np.asarray(one.left * other.left).sum(0) < 0))
    assert differ


@pytest.mark.covering(1)
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_a_basis_that_rotates_in_its_subspace_leaves_the_lifted_first_moment(proj_type):
    """Of the whole transformation, to 1e-6: other bases of one subspace at each refresh, against a basis that stays."""

    def of_a_fixed_subspace(rotate):
        def make(seen):
            fixed = np.linalg.qr(np.random.default_rng(0).normal(size=(len(seen.gradient), 4)))[0]
            turn = jnp.linalg.qr(jax.random.normal(seen.key, (4, 4)))[0] if rotate else jnp.eye(4)
            return jnp.matmul(jnp.asarray(fixed, jnp.float32), turn, precision=jax.lax.Precision.HIGHEST)

        return Projector("fixed", make)

    def lifted(state):
        x = np.asarray(state.inner_state.mu, np.float64)
        for basis, swap in ((state.left, False), (state.right, True)):
            if isinstance(basis, jax.Array):
                x = np.swapaxes(x, -1, -2) if swap else x
                x = np.asarray(basis, np.float64) @ x
                x = np.swapaxes(x, -1, -2) if swap else x
        return x

    settings = {"rank": 4, "update_proj_gap": 2, "proj_type": proj_type, "transport": "rotate"}
    runs = [
        galore(optax.scale_by_adam(), projector=of_a_fixed_subspace(rotate), **settings) for rotate in (False, True)
    ]
    params = jnp.zeros((2, 12, 20))
    states, updates = [tx.init(params) for tx in runs], [jax.jit(tx.update) for tx in runs]
    for step in range(7):
        gradient = normal(step, params.shape)
        states = [update(gradient, state)[1] for update, state in zip(updates, states, strict=True)]
        one, other = map(lifted, states)
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6)
        assert bool(jnp.all(states[1].inner_state.nu >= 0))
        assert np.max(np.abs(states[1].inner_state.mu - states[0].inner_state.mu)) > 0.01
    assert np.max(np.abs(one)) > 0.1


def test_diagnostics_are_what_they_say():
    tx = galore(optax.adam(0.1), rank=4, update_proj_gap=3, diagnostics=True, refresh="together", scale=0.5)
    params = {"w": jnp.zeros((2, 12, 20)), "tall": jnp.zeros((20, 12)), "b": jnp.zeros((2, 20))}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(5):
        before = state
        gradient = jax.tree.map(lambda p, s=step: 1e20 * normal(s, p.shape), params)
        updates, state = update(gradient, state, params)
        for name, bases, old in (("w", state.left, before.left), ("tall", state.right, before.right)):
            p, g = np.asarray(bases[name], np.float64), np.asarray(gradient[name], np.float64)
            g = np.swapaxes(g, -1, -2) if name == "tall" else g
            inside = np.sum((np.swapaxes(p, -1, -2) @ g) ** 2, axis=(-2, -1)) / np.sum(g**2, axis=(-2, -1))
            np.testing.assert_allclose(state.diagnostics.captured_energy[name], inside, rtol=1e-5)
            rms = np.sqrt(np.mean(np.asarray(updates[name], np.float64) ** 2, axis=(-2, -1)))
            np.testing.assert_allclose(state.diagnostics.update_rms[name], rms, rtol=1e-5)
            if step == 3:
                q = np.swapaxes(p, -1, -2) @ np.asarray(old[name], np.float64)
                overlap = np.sum(q**2, axis=(-2, -1)) / 4
                np.testing.assert_allclose(state.diagnostics.overlap[name], overlap, rtol=1e-5)
            elif step < 3:
                np.testing.assert_array_equal(state.diagnostics.overlap[name], -1)
        assert isinstance(state.diagnostics.overlap["b"], optax.MaskedNode)


def test_a_refresh_is_a_constant_to_differentiation():
    tx = galore(optax.sgd(1.0), rank=4, scale=1.0)
    gradient = normal(0, (12, 20))
    state = tx.init(gradient)

    def loss(gradient):
        updates, _ = tx.update(gradient, state)
        return jnp.sum(jnp.square(updates)) / 2

    _, new = jax.jit(tx.update)(gradient, state)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(gradient), new.left @ (new.left.T @ gradient), atol=1e-4)


@pytest.mark.slow
def test_what_a_moment_was_reaches_the_update_where_no_basis_turns():
    """As an outer optimizer that differentiates through steps needs it."""
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)}
    tx = galore_jax.galore(optax.trace(0.9), rank=2, transport="rotate", update_proj_gap=100, refresh="together")
    _, state = tx.update(gradient, tx.init(gradient))

    def total(momentum):
        updates, _ = tx.update(gradient, state._replace(inner_state=optax.TraceState({"w": momentum})))
        return jnp.sum(updates["w"] ** 2)

    assert float(jnp.max(jnp.abs(jax.grad(total)(state.inner_state.trace["w"])))) > 0.01
