# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""When bases turn: every policy, and the separately compiled refresh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import POLICIES, leniency, normal

import galore_jax
from galore_jax import galore, refresh

T = 4


def turned(before, after):
    """Which matrices have another basis, by parameter."""
    return jax.tree.map(lambda a, b: np.any(np.asarray(a != b), axis=(-2, -1)), before.left, after.left)


def refreshes(tx, params, steps, gradient=None):
    """For each step the names, or numbers in the stack, of the matrices whose basis turned."""
    state, update, history = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        made = jax.tree.map(lambda p, s=step: normal(s, p.shape), params) if gradient is None else gradient(step)
        _, new = update(made, state, params)
        history.append(turned(state, new))
        state = new
    return history, state


def test_staggered_spreads_the_matrices_evenly_after_step_0():
    """7 matrices (5 in a stack, 2 alone) over T = 7: one a step; over T = 3: three, two, two; over T = 20: at ⌊20 j / 7⌋."""
    params = {"a": jnp.zeros((5, 12, 20)), "b": jnp.zeros((12, 20)), "c": jnp.zeros((12, 20))}
    for gap, per_step in ((7, [1] * 7), (3, [3, 2, 2]), (20, [int(s in {0, 2, 5, 8, 11, 14, 17}) for s in range(20)])):
        history, _ = refreshes(galore(optax.sgd(1.0), rank=3, update_proj_gap=gap), params, 2 * gap + 1)
        counts = [int(sum(np.sum(leaf) for leaf in jax.tree.leaves(step))) for step in history]
        assert counts == [7, *per_step[1:], *per_step, per_step[0]]
        each = sum(
            np.concatenate([np.ravel(step[name]) for name in "abc"]).astype(int) for step in history[1 : gap + 1]
        )
        np.testing.assert_array_equal(each, 1)


def test_together_refreshes_all_at_0_T_2T():
    history, _ = refreshes(
        galore(optax.sgd(1.0), rank=3, update_proj_gap=3, refresh="together"), [normal(0, (12, 20))] * 2, 7
    )
    assert [[bool(x) for x in step] for step in history] == [[step % 3 == 0] * 2 for step in range(7)]


@pytest.mark.parametrize("gap", [2**20, 10**9])
def test_a_gap_longer_than_any_run_refreshes_once(gap):
    history, _ = refreshes(galore(optax.sgd(1.0), rank=3, update_proj_gap=gap), [normal(0, (12, 20))] * 3, 4)
    assert [sum(map(int, step)) for step in history] == [3, 0, 0, 0]


def test_an_injected_gap_does_what_a_static_one_does():
    params = [normal(0, (12, 20))] * 3
    injected = optax.inject_hyperparams(galore, static_args=("rank", "seed", "diagnostics"))(
        optax.sgd(1.0), rank=3, update_proj_gap=5
    )
    state = injected.init(params)
    plain = galore(optax.sgd(1.0), rank=3, update_proj_gap=5)
    expected = plain.init(params)
    injected_update, update = jax.jit(injected.update), jax.jit(plain.update)
    for step in range(7):
        gradient = [normal(10 * step + i, (12, 20)) for i in range(3)]
        with leniency():
            _, state = injected_update(gradient, state, params)
        _, expected = update(gradient, expected, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.inner_state.left, expected.left)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "transport", "proj_type"),
    [
        *((policy, "rotate", "std") for policy in [*POLICIES, "manual"]),
        ("staggered", "keep", "std"),
        ("staggered", "reset", "std"),
        ("lazy", "reset", "full"),
        ("staggered", "rotate", "full"),
    ],
)
def test_a_stacked_leaf_equals_separate_leaves_under_every_policy(policy, transport, proj_type):
    inner = optax.adam(1.0, eps=1e-2)
    settings = {"rank": 4, "update_proj_gap": T, "refresh": POLICIES.get(policy, policy), "transport": transport}
    tx = galore(inner, proj_type=proj_type, **settings)
    renew = jax.jit(lambda grads, state: galore_jax.refresh_bases(tx, grads, state))
    stacked, separate = jnp.zeros((3, 12, 20)), [jnp.zeros((12, 20))] * 3
    one, other, update = tx.init(stacked), tx.init(separate), jax.jit(tx.update)
    for step in range(2 * T + 1):
        gradient = normal(step, (3, 12, 20))
        if policy == "manual" and step % T == 0:
            one, other = renew(gradient, one), renew(list(gradient), other)
        updates, one = update(gradient, one, stacked)
        expected, other = update(list(gradient), other, separate)
        np.testing.assert_allclose(updates, jnp.stack(expected), atol=2e-5)
        assert bool(jnp.all(jnp.any(updates != 0, axis=(1, 2))))
        jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, jnp.stack(b), atol=2e-5), one.left, *other.left)


@pytest.mark.slow
def test_staggered_and_together_are_the_same_at_T_1():
    params = {"a": jnp.zeros((3, 12, 20)), "b": jnp.zeros((20, 12))}
    runs = [galore(optax.adam(1.0), rank=4, update_proj_gap=1, refresh=name) for name in ("staggered", "together")]
    runs.append(galore(optax.adam(1.0), rank=4, update_proj_gap=50, refresh="every_step"))
    states, updates = [tx.init(params) for tx in runs], [jax.jit(tx.update) for tx in runs]
    for step in range(4):
        gradient = jax.tree.map(lambda p, s=step: normal(s, p.shape), params)
        results = [update(gradient, state, params) for update, state in zip(updates, states, strict=True)]
        states = [state for _, state in results]
        for other in results[1:]:
            jax.tree.map(np.testing.assert_array_equal, results[0], other)


@pytest.mark.slow
def test_lazy_that_never_grows_is_staggered():
    params = {"a": jnp.zeros((3, 12, 20)), "b": jnp.zeros((12, 20))}
    never = galore(optax.sgd(1.0), rank=3, update_proj_gap=5, refresh=refresh.lazy(threshold=2.0))
    staggered = galore(optax.sgd(1.0), rank=3, update_proj_gap=5, refresh="staggered")
    for a, b in zip(refreshes(never, params, 12)[0], refreshes(staggered, params, 12)[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_lazy_doubles_the_gap_of_a_subspace_that_stays_and_not_of_one_that_turns():
    """Q-GaLore: once the last 2 overlaps average 0.9, T doubles at every refresh.  The first matrix always has one gradient."""
    tx = galore(
        optax.sgd(1.0), rank=3, update_proj_gap=2, refresh=refresh.lazy(threshold=0.9, window=2), projector="eigh"
    )
    state, update, steady, moving = tx.init([normal(0, (12, 20))] * 2), jax.jit(tx.update), [], []
    for step in range(30):
        gradient = [normal(0, (12, 20)) * (1 + 0.1 * step), normal(step, (12, 20))]
        before = state.schedule
        _, state = update(gradient, state)
        for found, old, new in zip((steady, moving), before, state.schedule, strict=True):
            if int(new.next) != int(old.next):
                found.append(step)
    # The first basis has no overlap; those at 2 and 4 fill the window, and from there on the gap is 4, 8, 16.
    assert steady == [0, 2, 4, 8, 16]
    assert moving == list(range(1, 30, 2))
    assert int(state.schedule[0].gap) == 16
    np.testing.assert_allclose(state.schedule[0].overlaps, 1, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("transport", ["keep", "rotate", "reset"])
def test_manual_steps_hold_no_factorisation_and_refresh_bases_does_what_a_refresh_does(transport):
    """Refreshed by hand before every T-th update, it is together."""
    settings = {"rank": 4, "update_proj_gap": T, "transport": transport}
    params = {"w": jnp.zeros((2, 12, 20)), "b": jnp.zeros((2, 20))}

    def made(policy):
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            galore(optax.scale_by_adam(), refresh=policy, **settings),
            optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, 100)),
        )

    manual, automatic = made("manual"), made("together")
    mine, theirs = manual.init(params), automatic.init(params)
    text = jax.jit(manual.update).lower(params, mine, params).as_text()
    assert "cholesky" not in text
    assert "stablehlo.while" not in text
    renew = jax.jit(lambda grads, state: galore_jax.refresh_bases(manual, grads, state))
    update, expected_update = jax.jit(manual.update), jax.jit(automatic.update)
    for step in range(2 * T + 1):
        gradient = jax.tree.map(lambda p, s=step: normal(s, p.shape), params)
        if step % T == 0:
            mine = renew(gradient, mine)
        updates, mine = update(gradient, mine, params)
        expected, theirs = expected_update(gradient, theirs, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updates, expected)
    assert int(mine[2].count) == 2 * T + 1


@pytest.mark.slow
def test_manual_parameters_stand_still_until_the_first_refresh():
    tx = galore(optax.adam(1.0), rank=4, refresh="manual")
    params = {"w": normal(0, (12, 20)), "b": normal(1, (20,))}
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert bool(jnp.all(updates["b"] != 0))
    state = galore_jax.refresh_bases(tx, params, state)
    updates, _ = tx.update(params, state, params)
    assert bool(jnp.any(updates["w"] != 0))


def test_refresh_bases_reaches_galore_through_wrappers_and_says_when_there_is_none():
    params = {"w": normal(0, (12, 20)), "b": normal(1, (20,))}
    low_rank = galore_jax.galore_adamw(1e-3, rank=4, refresh="manual", weight_decay=0.1)
    for tx in (
        low_rank,
        optax.masked(low_rank, {"w": True, "b": False}),
        optax.partition({"low": low_rank, "full": optax.sgd(1.0)}, {"w": "low", "b": "full"}),
        optax.apply_if_finite(low_rank, 3),
    ):
        state = galore_jax.refresh_bases(tx, params, tx.init(params), params)
        nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, galore_jax.GaLoreState))
        [node] = [x for x in nodes if isinstance(x, galore_jax.GaLoreState)]
        basis = np.asarray(node.left["w"], np.float64)
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
        assert int(node.count) == 0
    with pytest.raises(ValueError, match="reached no galore in tx"):
        galore_jax.refresh_bases(optax.adam(1e-3), params, optax.adam(1e-3).init(params))


def test_the_published_projector_keeps_the_published_schedule_and_moments():
    """projector="svd" stands for GaLore as published: together, keep."""
    explicit = galore(optax.adam(0.1), rank=4, update_proj_gap=3, projector="svd", refresh="together", transport="keep")
    implied = galore(optax.adam(0.1), rank=4, update_proj_gap=3, projector="svd")
    params = {"a": normal(0, (12, 20)), "b": normal(1, (12, 20))}
    one, other = explicit.init(params), implied.init(params)
    update, implied_update = jax.jit(explicit.update), jax.jit(implied.update)
    for step in range(5):
        gradient = jax.tree.map(lambda p, s=step: normal(s, p.shape), params)
        (updates, one), (expected, other) = update(gradient, one), implied_update(gradient, other)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"refresh": "sometimes"},
            "refresh is 'sometimes': write one of together, staggered, lazy, every_step, manual",
        ),
        ({"refresh": 5}, "refresh is 5: write one of"),
        ({"transport": "move"}, "transport is 'move': write one of keep, rotate, reset"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"projector": "qr"}, "projector is 'qr'"),
    ],
)
def test_bad_settings_are_named_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        galore(optax.adam(0.1), rank=4, **settings)


@pytest.mark.parametrize("bad", [{"window": 0}, {"factor": 0.5}, {"threshold": -1.0}, {"update_proj_gap": -3}])
def test_bad_policies_are_named_at_construction(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        refresh.lazy(**bad)


def test_an_inner_state_that_cannot_be_carried_is_refused_at_init_unless_kept():
    params = {"w": normal(0, (12, 20))}
    with pytest.raises(ValueError, match=r"ScaleBySM3State.*'w'.*transport=\"keep\""):
        galore(optax.sm3(0.1), rank=4, transport="rotate").init(params)
    galore(optax.sm3(0.1), rank=4).init(params)


def test_pairs_of_policies_compare_by_value():
    assert refresh.staggered(5) == refresh.staggered(5)
    assert all(
        a != b for a, b in itertools.combinations([refresh.together(5), refresh.staggered(5), refresh.lazy(5)], 2)
    )


@pytest.mark.filterwarnings("ignore:galore projects none")
def test_reset_with_nothing_projected_is_the_inner_optimizer():
    params = {"b": normal(0, (20,))}
    tx, inner = galore(optax.adam(0.1), rank=4, transport="reset"), optax.adam(0.1)
    state, expected_state = tx.init(params), inner.init(params)
    for step in range(3):
        gradient = {"b": normal(step, (20,))}
        updates, state = tx.update(gradient, state, params)
        expected, expected_state = inner.update(gradient, expected_state, params)
        np.testing.assert_allclose(updates["b"], expected["b"], rtol=1e-6)


@pytest.mark.parametrize("transport", ["keep", "rotate", "reset"])
def test_the_matrices_of_one_shape_share_one_refresh(transport):
    def loops(count):
        params = {str(i): jnp.ones((8, 16)) for i in range(count)}
        tx = galore(optax.adam(0.1), rank=2, transport=transport)
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params))).count("while[")

    assert loops(3) == loops(1) > 0


def test_a_reset_starts_each_matrix_as_its_own_optimizer_does():
    """The matrices have one shape, and states of the same fields."""
    params = {"a": normal(0, (8, 16)), "b": normal(1, (8, 16)), "c": normal(2, (8, 16))}
    rms = {"zeros": optax.scale_by_rms(), "threes": optax.scale_by_rms(initial_scale=3.0)}
    inner = optax.partition(rms, {"a": "zeros", "b": "threes", "c": "zeros"})
    tx = galore(inner, rank=2, transport="reset", refresh="manual")
    start = refresh.refresh_bases(tx, params, tx.init(params))
    _, state = tx.update(params, start)
    moved, fresh = (jax.tree.leaves(x.inner_state) for x in (state, refresh.refresh_bases(tx, params, state)))
    expected = jax.tree.leaves(tx.init(params).inner_state)
    assert sorted(float(jnp.max(x)) for x in expected) == [0, 0, 3]
    for old, new, first in zip(moved, fresh, expected, strict=True):
        assert jnp.all(old != first)
        np.testing.assert_array_equal(new, first)
