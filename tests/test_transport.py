# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The inner state when a basis turns: every state of Optax that can be carried over, the rules, and the refusals."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inner_states import (
    CARRIED,
    RATE,
    STRUCTURE,
    in_new_basis,
    low_rank,
    optimizer,
    orthogonal,
    overlaps,
    signed_permutation,
    turn,
    views_of,
)
from problems import (
    RANK,
    assert_trees_close,
    assert_trees_equal,
    leniency,
)

from galore_jax._core.per_matrix import per_matrix
from galore_jax.matrix_view import select
from galore_jax.transport import carriers, check_transport

# With "std" the kernel (6, 10) has its basis on the left, the stack (2, 12, 8) on the right.
SIDES = ("std", "reverse_std", "full")
carried = pytest.mark.parametrize("name", CARRIED)
sides = pytest.mark.parametrize("proj_type", SIDES)


def after(name, views, steps):
    """The state after some steps on random gradients, jitted."""
    inner, update = optimizer(name)
    state = inner.init(low_rank(views, 0))
    for seed in range(1, steps + 1):
        _, state = update(low_rank(views, seed), state, low_rank(views, 0))
    return state


@pytest.mark.covering(1)
@carried
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_rotate_by_a_signed_permutation_is_a_change_of_names(name, proj_type):
    """All these optimizers treat coordinates alike and signs symmetrically, so the carried state steps as the old one did, in
    the new coordinates.  A moment taken for the wrong kind, or turned along the wrong axis, would not."""
    inner, update = optimizer(name)
    views = views_of(proj_type)
    state, params, gradient = after(name, views, 4), low_rank(views, 0), low_rank(views, 9)
    qs = overlaps(views, signed_permutation)
    new_state = turn(carriers("rotate", inner, state, STRUCTURE, views), state, views, qs)
    for step in range(2):
        expected, state = update(gradient, state, params)
        updates, new_state = update(in_new_basis(gradient, views, qs), new_state, in_new_basis(params, views, qs))
        assert_trees_close(updates, in_new_basis(expected, views, qs), rtol=1e-4, atol=1e-5)
        gradient = low_rank(views, 10 + step)
    assert name in ("apply_every", "multi_steps") or all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(expected))


@pytest.mark.covering(1)
@sides
def test_a_rotation_of_the_same_subspace_leaves_the_lifted_first_moment(proj_type):
    """To 1e-6, for random rotations and for flipped columns; the count and what is not projected stay."""
    views = views_of(proj_type)
    inner, _ = optimizer("adam")
    (old, *_) = state = after("adam", views, 3)

    def lifted(view, moment, qs):
        """P_new = P_old Qᵀ gives P_newᵀ P_old = Q."""
        x = np.asarray(moment, np.float64)
        left, right = (np.linalg.qr(np.random.default_rng(0).normal(size=(k, RANK)))[0] for k in view.matrix_shape)
        q_left, q_right = (np.eye(RANK) if q is None else np.swapaxes(np.asarray(q), -1, -2) for q in qs)
        x = left @ q_left @ x if view.left else x
        return x @ np.swapaxes(right @ q_right, -1, -2) if view.right else x

    for draw in (orthogonal, lambda _, r: np.diag([-1.0] + [1.0] * (r - 1))):
        qs = overlaps(views, draw)
        new, *_ = turn(carriers("rotate", inner, state, STRUCTURE, views), state, views, qs)
        assert_trees_equal((new.count, new.mu["bias"], new.nu["bias"]), (old.count, old.mu["bias"], old.nu["bias"]))
        for name, view, q in zip(("kernel", "stack"), views[1:], qs[1:], strict=True):
            expected = lifted(view, old.mu[name], (None, None))
            np.testing.assert_allclose(lifted(view, new.mu[name], q), expected, rtol=0, atol=1e-6)
            assert np.max(np.abs(new.mu[name] - old.mu[name])) > 0.01


def expected_quadratic(q, v):
    """Row by row, float64."""
    r = len(q)
    out = np.zeros_like(v, np.float64)
    for i in range(r):
        for j in range(r):
            out[i] += q[i, j] ** 2 * v[j]
        out[i] += max(0.0, 1 - sum(q[i, j] ** 2 for j in range(r))) * sum(v) / r
    return out


def subspaces_apart(rng, r, m=24):
    """P_newᵀ P_old of two subspaces with the mean squared cosine of LDAdam's steps, about 0.65."""
    old = np.linalg.qr(rng.normal(size=(m, r)))[0]
    noise = rng.normal(size=(m, r)) / np.sqrt(m)
    return np.linalg.qr((old + 0.8 * noise) @ orthogonal(rng, r))[0].T @ old


DRAWS = {
    "subspaces apart": subspaces_apart,
    "orthogonal": orthogonal,
    "rounded": lambda rng, r: orthogonal(rng, r) * (1 + 1e-6),
    "zero": lambda rng, r: np.zeros((r, r)),
    "one direction": lambda rng, r: np.eye(r)[:, :1] @ orthogonal(rng, r)[:1],
    "not orthonormal": lambda rng, r: 2 * rng.normal(size=(r, r)),
    "ones": lambda rng, r: np.ones((r, r)),
}


@sides
@pytest.mark.parametrize("draw", DRAWS)
def test_rotate_equals_the_formulas(proj_type, draw):
    views = views_of(proj_type)
    inner, _ = optimizer("adam")
    state = after("adam", views, 3)
    qs = overlaps(views, DRAWS[draw], seed=5)
    new = turn(carriers("rotate", inner, state, STRUCTURE, views), state, views, qs)
    for name, q in (("kernel", qs[1]), ("stack", qs[2])):
        assert jnp.all(new[0].nu[name] >= 0)
        linear, quadratic = np.asarray(state[0].mu[name], np.float64), np.asarray(state[0].nu[name], np.float64)
        for k in [...] if linear.ndim == 2 else [0, 1]:
            m, v = linear[k], quadratic[k]
            if q[0] is not None:
                left = np.asarray(q[0], np.float64)[k]
                m, v = left @ m, expected_quadratic(left, v)
            if q[1] is not None:
                right = np.asarray(q[1], np.float64)[k]
                m, v = m @ right.T, expected_quadratic(right, v.T).T
            np.testing.assert_allclose(new[0].mu[name][k], m, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(new[0].nu[name][k], v, rtol=1e-5, atol=0)
            if draw not in ("not orthonormal", "ones"):  # a weighted mean
                assert np.min(quadratic[k]) * (1 - 1e-5) <= np.min(new[0].nu[name][k])
                assert np.max(new[0].nu[name][k]) <= np.max(quadratic[k]) * (1 + 1e-5)


def test_a_turned_second_moment_is_nearer_to_the_truth_than_a_kept_one():
    """Gradients with unequal, independent coordinates, read in a rotated basis: v in that basis is known from the samples."""
    views = views_of(params={"kernel": jnp.zeros((16, 40))}, rank=8)
    tx = optax.scale_by_rms(0.0)
    state = tx.init({"kernel": jnp.zeros((8, 40))})
    (carrier,) = carriers("rotate", tx, state, jax.tree.structure({"kernel": 0}), views)
    errors = {"rotate": [], "keep": [], "linear": []}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        samples = rng.normal(size=(400, 8, 40)) * np.geomspace(3, 0.3, 8)[:, None]
        q = orthogonal(rng, 8)
        v, truth = np.mean(samples**2, axis=0), np.mean((q @ samples) ** 2, axis=0)
        rotated = carrier.turn(jnp.asarray(v, jnp.float32), jnp.asarray(q, jnp.float32), None)
        for rule, estimate in (("rotate", rotated), ("keep", v), ("linear", np.abs(q @ v))):
            errors[rule].append(np.median(np.abs(np.log(np.asarray(estimate) / truth))))
    mean = {rule: np.mean(values) for rule, values in errors.items()}
    assert mean["rotate"] < 0.2 * min(mean["keep"], mean["linear"])


@pytest.mark.covering(1)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    ("shape", "proj_type", "shared"),
    [
        ((6, 10), "left", False),
        ((12, 8), "right", False),
        ((12, 12), "full", False),
        ((2, 6, 10), "left", False),
        ((RANK, 6, 10), "left", False),  # the batch axis is as long as the rank
        ((RANK, 12, 12), "full", False),  # and as both
        ((5, 12, 12), "full", True),
        ((5, 6, 10), "left", True),  # low rank (5, 3, 10): the column factor lacks the batch axis
    ],
)
def test_factored_moments_turn_as_the_whole_moment_would(shape, proj_type, shared, each):
    """A factor is the mean of the whole moment over one axis, before and after; unless the layers of a stack share it."""
    params = {"kernel": jnp.zeros(shape)}
    (view,) = views = select(params, rank=RANK, proj_type=proj_type)
    batch = len(view.batch_shape)
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    tx = per_matrix(tx, lambda _: views) if each else tx
    gradient = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=view.low_rank_shape), jnp.float32)}
    _, state = tx.update(gradient, tx.init(gradient), gradient)  # the first update sets the factors to those of G²
    whole = np.square(np.asarray(gradient["kernel"], np.float64))
    qs = overlaps(views, subspaces_apart)
    new = turn(carriers("rotate", tx, state, jax.tree.structure(params), views), state, views, qs)
    old, new = (state.matrices[0], new.matrices[0]) if each else (state, new)

    seen_sharing = False
    for before, now in ((old.v_row["kernel"], new.v_row["kernel"]), (old.v_col["kernel"], new.v_col["kernel"])):
        means = [np.mean(whole, axis=axis) for axis in range(whole.ndim)]
        (lacking,) = (k for k, mean in enumerate(means) if mean.shape == before.shape and np.allclose(mean, before))
        seen_sharing |= lacking < batch
        if lacking < batch:
            assert_trees_equal(now, before)
            continue
        turned = np.empty_like(whole)
        for k in np.ndindex(*view.batch_shape):
            left, right = (None if q is None else np.asarray(q, np.float64)[k] for q in qs[0])
            v = whole[k]
            v = expected_quadratic(left, v) if left is not None and lacking != batch else v
            turned[k] = expected_quadratic(right, v.T).T if right is not None and lacking != batch + 1 else v
        np.testing.assert_allclose(now, np.mean(turned, axis=lacking), rtol=1e-5)
    assert seen_sharing == (shared and not each)


def stateful(init):
    """A transformation that changes nothing and keeps ``init(params)``."""
    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


LikeAdam = collections.namedtuple("ScaleByAdamState", ["count", "mu", "nu", "xi"])
QUANTIZED = stateful(lambda p: optax.TraceState(jax.tree.map(lambda x: x.reshape(-1).astype(jnp.int8), p)))
UNKNOWN = [
    (optax.rprop(RATE), r"ScaleByRpropState.step_sizes of 'kernel' \(inner state\[0\].step_sizes\['kernel'\], shape "),
    (optax.chain(optax.identity(), optax.sm3(RATE)), "ScaleBySM3State.mu of 'kernel'"),
    (optax.contrib.prodigy(), "ProdigyState.exp_avg of 'kernel'"),
    (optax.contrib.momo(RATE), "MomoState.exp_avg of 'kernel'"),
    (optax.contrib.schedule_free(optax.sgd(RATE), RATE), "ScheduleFreeState.z of 'kernel'"),
    (stateful(lambda p: [p]), r"an array of 'kernel' \(inner state\[0\]\['kernel'\]"),
    (stateful(lambda p: LikeAdam(0, p, p, p)), "ScaleByAdamState.mu of 'kernel'"),
    (QUANTIZED, "TraceState.trace of 'kernel'"),
]


@pytest.mark.parametrize("transport", ["rotate", "reset"])
@pytest.mark.parametrize(("inner", "message"), UNKNOWN, ids=[message.split(" of")[0] for _, message in UNKNOWN])
def test_an_unknown_state_is_refused_and_kept(inner, message, transport):
    views = views_of()
    inner = per_matrix(inner, lambda _: views) if transport == "reset" else inner
    with leniency():
        state = jax.eval_shape(inner.init, low_rank(views, 0))
    with pytest.raises(ValueError, match=f'^transport="{transport}" does not know how {message}') as error:
        carriers(transport, inner, state, STRUCTURE, views)
    assert str(error.value).endswith('write transport="keep".')
    assert carriers("keep", inner, state, STRUCTURE, views) == [None] * len(jax.tree.leaves(state))
    assert carriers(transport, inner, state, STRUCTURE, [None] * 3) == [None] * len(jax.tree.leaves(state))


def test_an_unknown_state_of_a_parameter_that_is_not_projected_is_left_alone():
    views = views_of()
    inner = optax.partition({"a": optax.adam(RATE), "b": optax.rprop(RATE)}, {"kernel": "a", "stack": "a", "bias": "b"})
    found = carriers("rotate", inner, inner.init(low_rank(views, 0)), STRUCTURE, views)
    assert sorted(carrier.parameter for carrier in found if carrier) == [1, 1, 2, 2]


def test_a_centred_second_moment_is_not_rotated():
    """Q μ and (Q∘Q) ν apart make ν - μ² negative, and the root of it NaN."""
    views = views_of()
    inner = optax.rmsprop(RATE, centered=True)
    state = inner.init(low_rank(views, 0))
    with pytest.raises(ValueError, match=r"ScaleByRStdDevState.mu of 'kernel'.*negative.*write transport=\"reset\""):
        carriers("rotate", inner, state, STRUCTURE, views)


def test_bad_arguments():
    with pytest.raises(ValueError, match="transport is 'turn': write one of keep, rotate, reset"):
        check_transport("turn")
    views = views_of()
    with pytest.raises(ValueError, match=r"ScaleByAdamState.mu of 'kernel'.*per_matrix\(inner, views_of\)"):
        carriers("reset", optax.adam(RATE), optax.adam(RATE).init(low_rank(views, 0)), STRUCTURE, views)


def test_moments_in_half_precision_keep_their_dtype():
    views = views_of()
    inner = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    gradient = low_rank(views, 1)
    _, state = inner.update(gradient, inner.init(gradient))
    qs = overlaps(views, orthogonal)
    new = turn(carriers("rotate", inner, state, STRUCTURE, views), state, views, qs)  # checks the dtypes
    exact = in_new_basis(jax.tree.map(lambda x: x.astype(jnp.float32), state.mu), views, qs)
    turned = jax.tree.map(lambda x: x.astype(jnp.float32), new.mu)
    assert_trees_close(turned, exact, rtol=2**-8, atol=1e-7)  # rounded once; float32 where terms cancel
