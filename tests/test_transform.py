# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What galore() must do whatever the inner optimizer: degenerate cases, symmetries, batches, bad gradients."""

import copy
import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from problems import normal

import galore_jax
from galore_jax import GaLoreDimensionNumbers, galore
from galore_jax.matrix_view import PROJ_TYPES
from galore_jax.presets import FULL_RANK, PRESETS

PROJECTORS = ("power", "randomized", "svd", "eigh")  # tests/test_projectors.py has the others
SHAPES = [(12, 20), (20, 12), (14, 14)]


def separated(seed, shape):
    """A gradient whose singular values differ, as those of real ones do, so that its singular vectors are well defined."""
    u, _, vt = jnp.linalg.svd(normal(seed, shape), full_matrices=False)
    return (u * 0.7 ** jnp.arange(u.shape[1], dtype=jnp.float32)[None, :]) @ vt


def run(tx, params, gradients):
    """The updates of each step, the last state, and the last parameters."""
    state, update, history = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, state, params


def whole(_):
    return jax.tree.map(lambda _: GaLoreDimensionNumbers(), _)


@pytest.mark.covering(3)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_full_rank_sgd_with_scale_one_is_sgd(proj_type, shape, projector):
    """P is square and orthogonal on the smaller side; on the larger one it spans the gradient's columns."""
    tx = galore(
        optax.sgd(0.1),
        rank=min(shape),
        scale=1.0,
        update_proj_gap=1,
        proj_type=proj_type,
        projector=projector,
        weight_dimension_numbers=whole,
    )
    gradients = [{"w": normal(seed, shape)} for seed in range(3)]
    updates, _, _ = run(tx, {"w": jnp.zeros(shape)}, gradients)
    # A power step from the basis of an unrelated gradient, on the larger side, squares the condition number of this one.
    larger = proj_type == "full" or (proj_type, shape[0] < shape[1]) in {("left", False), ("right", True)}
    larger |= proj_type == "reverse_std"
    atol = 5e-4 if projector == "power" and larger and shape[0] != shape[1] else 2e-6
    for update, gradient in zip(updates, gradients, strict=True):
        np.testing.assert_allclose(update["w"], -0.1 * gradient["w"], atol=atol)


def test_full_rank_adam_is_adam_in_the_rotated_basis():
    shape = (10, 16)
    tx = galore(optax.adam(0.1), rank=10, scale=1.0, weight_dimension_numbers=whole)
    gradients = [{"w": normal(seed, shape)} for seed in range(5)]
    updates, state, _ = run(tx, {"w": jnp.zeros(shape)}, gradients)
    basis = np.asarray(state.left["w"])
    np.testing.assert_allclose(basis.T @ basis, np.eye(10), atol=1e-5)
    rotated = [{"w": jnp.asarray(basis.T @ np.asarray(g["w"]))} for g in gradients]
    expected, _, _ = run(optax.adam(0.1), {"w": jnp.zeros(shape)}, rotated)
    for update, plain in zip(updates, expected, strict=True):
        np.testing.assert_allclose(update["w"], basis @ np.asarray(plain["w"]), atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore:galore projects none")
@pytest.mark.parametrize(
    "nothing",
    [
        {"rank": lambda path, shape: None},
        {"rank": 999},
        {"weight_dimension_numbers": lambda p: jax.tree.map(lambda _: None, p)},
    ],
    ids=["callable", "rank", "dimension numbers"],
)
def test_nothing_selected_is_the_inner_optimizer_bit_for_bit(nothing):
    params = {"w": normal(0, (12, 20)), "b": normal(1, (20,))}
    gradients = [jax.tree.map(lambda p, s=s: normal(s, p.shape), params) for s in range(2, 6)]
    gradients[2]["b"] = jnp.zeros((20,))
    with jax.disable_jit():  # compiled, each program has its own fused multiply-adds
        ours, state, last = run(galore(optax.adamw(0.1), **nothing), params, gradients)
        theirs, their_state, their_last = run(optax.adamw(0.1), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, (ours, last, state.inner_state), (theirs, their_last, their_state))


@pytest.mark.covering(1)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_update_of_a_transposed_matrix_is_the_transposed_update(proj_type, projector):
    mirrored = {"left": "right", "right": "left"}.get(proj_type, proj_type)
    inner = optax.adam(1.0)
    if projector == "svd":  # its signs differ between a matrix and its transpose
        inner = optax.sgd(1.0)
    if proj_type == "full":  # PᵀGQ is diagonal at a refresh, and Adam would blow up the rounding noise beside it
        inner = optax.sgd(1.0)
    settings = {"rank": 4, "update_proj_gap": 2, "projector": projector}
    gradients = [separated(seed, (12, 20)) for seed in range(5)]
    one, _, _ = run(galore(inner, proj_type=proj_type, **settings), jnp.zeros((12, 20)), gradients)
    other, _, _ = run(galore(inner, proj_type=mirrored, **settings), jnp.zeros((20, 12)), [g.T for g in gradients])
    for update, transposed in zip(one, other, strict=True):
        np.testing.assert_allclose(update, transposed.T, atol=2e-5)


@pytest.mark.covering(2)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_lift_is_the_adjoint_of_project(proj_type):
    """<PᵀG, N> = <G, P N>, read off the outside: the inner transformation sees one and answers the other."""
    answer = {}

    def inner_update(updates, state, params=None):
        answer["low_rank"] = updates
        return answer["reply"](updates), state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), inner_update)
    tx = galore(inner, rank=4, scale=1.0, proj_type=proj_type)
    gradient = normal(0, (3, 12, 20))
    state = tx.init(gradient)
    answer["reply"] = lambda low: normal(7, low.shape)
    lifted, _ = tx.update(gradient, state)
    low_rank = answer["low_rank"]
    reply = normal(7, low_rank.shape)
    np.testing.assert_allclose(jnp.vdot(low_rank, reply), jnp.vdot(gradient, lifted), rtol=1e-5)


@pytest.mark.covering(3)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_rms_keeps_the_root_mean_square_of_the_inner_update(shape, proj_type):
    """Sign descent has a root mean square of exactly one."""
    sign = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
    updates, _, _ = run(galore(sign, rank=3, scale="rms", proj_type=proj_type), jnp.zeros(shape), [normal(0, shape)])
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates[0] ** 2)), 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_a_stacked_leaf_equals_separate_leaves(proj_type, projector):
    """Batch axes at the front, in the middle, and two of them."""
    inner = optax.adam(1.0, eps=1e-2 if proj_type == "full" else 1e-8)
    settings = {"rank": 4, "update_proj_gap": 2, "projector": projector, "proj_type": proj_type}
    gradients = [normal(seed, (2, 2, 12, 20)) for seed in range(4)]
    stacked, _, _ = run(galore(inner, **settings), jnp.zeros((2, 2, 12, 20)), gradients)
    middle, _, _ = run(
        galore(inner, weight_dimension_numbers=GaLoreDimensionNumbers(0, 2), **settings),
        jnp.zeros((12, 4, 20)),
        [jnp.moveaxis(g.reshape(4, 12, 20), 0, 1) for g in gradients],
    )
    separate, _, _ = run(
        galore(inner, **settings), [jnp.zeros((12, 20))] * 4, [list(g.reshape(4, 12, 20)) for g in gradients]
    )
    for a, b, c in zip(stacked, middle, separate, strict=True):
        np.testing.assert_allclose(a.reshape(4, 12, 20), jnp.stack(c), atol=2e-5)
        np.testing.assert_allclose(jnp.moveaxis(b, 1, 0), jnp.stack(c), atol=2e-5)


def test_the_refresh_predicate_of_a_stacked_leaf_stays_a_scalar():
    """A batched predicate would turn the branch into a select that runs the factorisation at every step."""
    tx = galore(optax.sgd(1.0), rank=4)
    gradient = jnp.ones((3, 12, 20))
    jaxpr = jax.make_jaxpr(tx.update)(gradient, tx.init(gradient))
    [loop] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "while"]
    assert loop.params["cond_jaxpr"].out_avals[0].shape == ()
    branches = [eqn for eqn in loop.params["body_jaxpr"].jaxpr.eqns if eqn.primitive.name == "cond"]
    assert {eqn.invars[0].aval.shape for eqn in branches} == {()}
    assert not {eqn.primitive.name for eqn in jaxpr.eqns} & {"cholesky", "triangular_solve"}


@pytest.mark.parametrize("projector", PROJECTORS)
def test_bases_turn_at_0_T_2T_and_stay_between(projector):
    tx = galore(optax.sgd(1.0), rank=4, update_proj_gap=3, projector=projector, refresh="together")
    state, update, bases = tx.init(jnp.zeros((12, 20))), jax.jit(tx.update), []
    for seed in range(8):
        gradient = separated(seed, (12, 20))
        _, state = update(gradient, state)
        bases.append(np.asarray(state.left))
        if seed % 3 == 0:  # of the very gradient it then projects
            u = np.linalg.svd(np.asarray(gradient, np.float64))[0][:, :4]
            captured = np.sum((bases[-1].T @ np.asarray(gradient)) ** 2) / np.sum((u.T @ np.asarray(gradient)) ** 2)
            assert captured > {"power": 0.9, "randomized": 0.99}.get(projector, 0.9999)
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True, False]


def test_the_inner_optimizer_sees_params_in_the_same_coordinates():
    seen = {}

    def inner_update(updates, state, params=None, **extra):
        seen.update(params=params, extra=extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), inner_update)
    params = {"w": normal(0, (12, 20)), "b": normal(1, (20,))}
    tx = galore(inner, rank=4)
    _, state = tx.update(params, tx.init(params), params, value=3.0)
    np.testing.assert_allclose(seen["params"]["w"], state.left["w"].T @ params["w"], atol=1e-5)
    np.testing.assert_array_equal(seen["params"]["b"], params["b"])
    assert seen["extra"] == {"value": 3.0}


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_state_is_float32_and_updates_keep_the_dtype(dtype):
    params = {"w": normal(0, (12, 20)).astype(dtype), "b": jnp.ones((20,), dtype)}
    updates, state, _ = run(galore(optax.scale_by_adam(), rank=4), params, [params])
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


def test_a_second_moment_of_a_bfloat16_model_decays():
    """In bfloat16 it would stay at its first value for ever (reference implementation, optax.contrib.galore)."""
    params = {"w": jnp.ones((12, 20), jnp.bfloat16)}
    tx = galore(optax.scale_by_adam(b2=0.999), rank=4)
    update = jax.jit(tx.update)
    _, state = update({"w": normal(0, (12, 20)).astype(jnp.bfloat16)}, tx.init(params))
    before = state.inner_state.nu["w"].max()
    for _ in range(20):
        _, state = update({"w": jnp.full((12, 20), 1e-6, jnp.bfloat16)}, state)
    np.testing.assert_allclose(state.inner_state.nu["w"].max(), before * 0.999**20, rtol=1e-3)


@functools.cache
def compiled(projector):
    """A galore and its compiled update, once for all the bad gradients."""
    tx = galore(optax.adam(1.0), rank=4, update_proj_gap=2, projector=projector, refresh="together")
    return tx, jax.jit(tx.update)


@pytest.mark.covering(12)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 0.0])
@pytest.mark.parametrize("when", [0, 2, 3], ids=["first", "refresh", "between"])
def test_a_bad_gradient_changes_nothing_and_a_good_one_goes_on(bad, when, projector):
    """One matrix of a stack, at the first step, at a refresh (T = 2) and between two."""
    params = {"w": jnp.zeros((3, 12, 20)), "b": jnp.zeros((3, 20))}
    tx, update = compiled(projector)
    state = tx.init(params)
    for step in range(6):
        gradient = {"w": normal(step, (3, 12, 20)), "b": normal(step, (3, 20))}
        if step == when:
            spoiled = jnp.zeros((12, 20)) if bad == 0 else gradient["w"][1].at[3, 5].set(bad)
            gradient["w"] = gradient["w"].at[1].set(spoiled)
        before = state
        updates, state = update(gradient, state)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, state)))
        moved = jnp.any(updates["w"] != 0, axis=(1, 2))
        np.testing.assert_array_equal(moved, [True, step != when, True])
        assert jnp.all(updates["b"] != 0)
        if step == when:
            one = jax.tree.map(
                lambda x: x[1], (before.left["w"], before.inner_state[0].mu["w"], before.inner_state[0].nu["w"])
            )
            two = jax.tree.map(
                lambda x: x[1], (state.left["w"], state.inner_state[0].mu["w"], state.inner_state[0].nu["w"])
            )
            jax.tree.map(np.testing.assert_array_equal, one, two)
        else:
            orthonormal = jnp.einsum("lmr,lms->lrs", state.left["w"], state.left["w"])
            np.testing.assert_allclose(orthonormal, jnp.stack([jnp.eye(4)] * 3), atol=1e-5)
    assert state.skipped == (0 if bad == 0 else 1)


def test_a_step_with_no_good_gradient_at_all_leaves_the_state_as_it_was():
    params = {"w": jnp.zeros((12, 20)), "b": jnp.zeros((20,))}
    tx = galore(optax.adam(1.0), rank=4)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
    updates, after = tx.update(jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params), state)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
    assert after.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(skipped=state.skipped), state)


@pytest.mark.covering(4)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_tiny_huge_and_rank_deficient_gradients_give_orthonormal_bases(magnitude, projector):
    gradient = magnitude * jnp.outer(jnp.arange(1.0, 13), jnp.arange(1.0, 21))  # rank one, and 4 columns are asked for
    tx = galore(optax.scale_by_sign(), rank=4, projector=projector)
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    np.testing.assert_allclose(state.left.T @ state.left, jnp.eye(4), atol=1e-5)
    assert jnp.all(jnp.isfinite(updates))


@pytest.mark.filterwarnings("ignore:galore projects none")
def test_a_single_row_trains():
    """A parameter of shape (1, n) has no smaller rank than its smaller side."""
    updates, _, _ = run(galore(optax.adam(1.0), rank=4), jnp.zeros((1, 20)), [normal(s, (1, 20)) for s in range(3)])
    assert jnp.all(updates[-1] != 0)


def test_init_survives_an_empty_tree_and_abstract_parameters():
    tx = galore(optax.adam(1.0), rank=4)
    assert jax.tree.leaves(tx.init({}).left) == []
    params = {"w": jnp.zeros((12, 20)), "b": jnp.zeros((20,), jnp.bfloat16)}
    concrete = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(params))
    for state in (jax.eval_shape(tx.init, params), tx.init(jax.eval_shape(lambda: params))):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == concrete


def test_state_holds_no_empty_array_and_no_object():
    params = {"w": jnp.zeros((12, 20)), "b": jnp.zeros((20,)), "s": jnp.zeros(())}
    leaves = jax.tree.leaves(galore(optax.adam(1.0), rank=4).init(params))
    assert all(isinstance(leaf, jax.Array) and leaf.size for leaf in leaves)


def test_a_bare_galore_projects_and_warns_once():
    params = {"w": normal(0, (12, 20))}
    tx = galore(rank=4, scale=0.5)
    with pytest.warns(galore_jax.GaLoreMemoryWarning, match=r"saves no memory.*galore_jax\.chain") as caught:
        state = tx.init(params)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init(params)
    updates, state = tx.update(params, state)
    basis = state.left["w"]
    np.testing.assert_allclose(updates["w"], 0.5 * basis @ (basis.T @ params["w"]), atol=1e-5)


def test_a_bare_galore_in_a_plain_chain_works_and_names_the_remedy():
    params = {"w": normal(0, (12, 20))}
    tx = optax.chain(galore(rank=4), optax.adam(0.1))
    with pytest.warns(galore_jax.GaLoreMemoryWarning):
        state = tx.init(params)
    assert state[1][0].mu["w"].shape == (12, 20)
    updates, _ = tx.update(params, state, params)
    assert jnp.all(jnp.isfinite(updates["w"]))


def test_galore_jax_chain_runs_what_follows_inside():
    params = {"w": normal(0, (12, 20)), "b": normal(1, (20,))}
    gradients = [jax.tree.map(lambda p, s=s: normal(s, p.shape), params) for s in range(3)]
    chained = galore_jax.chain(optax.clip_by_global_norm(1.0), galore(rank=4), optax.adam(0.1), optax.scale(2.0))
    wrapped = optax.chain(
        optax.clip_by_global_norm(1.0), galore(optax.chain(optax.adam(0.1), optax.scale(2.0)), rank=4)
    )
    ours, state, _ = run(chained, params, gradients)
    theirs, _, _ = run(wrapped, params, gradients)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert state[1].inner_state[0][0].mu["w"].shape == (4, 20)


def test_galore_jax_chain_without_a_bare_galore_is_optax_chain():
    params = {"w": normal(0, (12, 20))}
    members = optax.clip(0.1), galore(optax.adam(0.1), rank=4)
    ours, _, _ = run(galore_jax.chain(*members), params, [params])
    theirs, _, _ = run(optax.chain(*members), params, [params])
    np.testing.assert_array_equal(ours[0]["w"], theirs[0]["w"])


@pytest.mark.parametrize("members", [(galore(rank=4),), (galore(rank=4), galore(rank=2), optax.sgd(1.0))])
def test_galore_jax_chain_refuses_a_bare_galore_it_cannot_fill(members):
    with pytest.raises(ValueError, match="write one, with the transformation it is to hold behind it"):
        galore_jax.chain(*members)


def test_where_nothing_is_projected_one_warning_names_the_largest_parameters_and_why():
    params = {"mlp": {"kernel": jnp.ones((64, 256)), "bias": jnp.ones((256,))}, "embed": jnp.ones((100, 64))}
    reasons = (
        r"'mlp/kernel' of shape \(64, 256\) \(rank 128 is not below its smaller side 64\), 'embed' .* \(embedding\)"
    )
    for tx in (galore(optax.adam(0.1)), galore_jax.galore_adamw(0.1), galore_jax.galore_muon(0.1)):
        with pytest.warns(galore_jax.GaLoreMemoryWarning, match=reasons) as caught:
            tx.init(params)
        assert len(caught) == 1
    galore_jax.galore_adamw(0.1, rank=8).init(params)


def test_numbers_are_parameters():
    params = {"w": jnp.ones((12, 20)), "temperature": 0.5}
    tx = galore_jax.galore_adamw(0.1, rank=4)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["temperature"], -0.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda g: {"a": g["a"]}, r"The gradients have no leaf 'b', where the parameters have one of shape \(20,\)"),
        (
            lambda g: g | {"a": g["a"].T},
            r"The gradient of 'a' has shape \(20, 12\), but the parameter has shape \(12, 20\)",
        ),
        (
            lambda g: g | {"c": g["b"]},
            r"The gradients have a leaf 'c' of shape \(20,\), which the parameters do not have",
        ),
    ],
    ids=["missing", "transposed", "too many"],
)
def test_gradients_that_are_not_those_of_the_parameters_are_named(wrong, message):
    params = {"a": jnp.ones((12, 20)), "b": jnp.ones((20,))}
    for tx in (
        galore(optax.adam(0.1), rank=4),
        galore_jax.galore_muon(0.1, rank=4),
        galore_jax.tucker(optax.adam(0.1)),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(tx.update, wrong(params), tx.init(params), params)


def test_swapped_arguments_are_named():
    tx = galore(optax.adam(0.1), rank=4)
    gradient = {"w": jnp.ones((12, 20))}
    with pytest.raises(ValueError, match=r"state is a dict, not the GaLoreState that init\(\) made"):
        tx.update(tx.init(gradient), gradient)


@pytest.mark.slow
def test_copies_of_a_bare_galore_are_bound_as_it_is():
    bare, params = galore(rank=4), {"w": normal(0, (12, 20))}

    def update(bare):
        tx = galore_jax.chain(bare, optax.scale_by_adam())
        return tx.update(params, tx.init(params), params)[0]

    for copied in (copy.copy(bare), copy.deepcopy(bare)):
        jax.tree.map(np.testing.assert_array_equal, update(copied), update(bare))


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"grass_adamw"}))
def test_the_state_of_a_preset_has_one_count(name):
    """As AdamW's has.  Grass starts moments again, so that each of its matrices has a count of its own."""
    extra = {"random_from": 5} if name == "golore_adamw" else {}
    extra |= {"min_dim_size_to_factor": 2} if name == "galore_adafactor" else {}
    params = {"w": normal(0, (12, 20)), "b": normal(1, (20,))}
    extra |= {} if name in FULL_RANK else {"rank": 4}
    tx = PRESETS[name](0.1, **extra)
    _, state = tx.update(params, tx.init(params), params)
    assert int(optax.tree.get(state, "count")) == 1


@pytest.mark.slow
def test_parameters_in_boxes_keep_bare_arrays_where_the_shape_differs():
    """The metadata of a box holds for the shape of the parameter alone."""
    names = ("embed", "mlp")
    params = {"w": nn.Partitioned(normal(0, (12, 20)), names), "b": nn.Partitioned(normal(1, (20,)), ("mlp",))}
    plain = jax.tree.map(lambda box: box.value, params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    for tx in (
        galore(optax.adam(0.1), rank=4),
        galore_jax.fira_adamw(0.1, rank=4),
        galore_jax.galore_muon(0.1, rank=4),
    ):
        state = tx.init(params)
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
            if isinstance(leaf, nn.Partitioned):
                assert len(leaf.names) == leaf.value.ndim
        updates, _ = tx.update(params, state, params)
        expected, _ = tx.update(plain, tx.init(plain), plain)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.covering(1)
@pytest.mark.parametrize("projector", ["power", "svd", "eigh"])
def test_a_gradient_whose_projection_would_overflow_is_left_alone(projector):
    """Also the first one, which makes no basis: that is kept, and there is nothing to project on."""
    tx, params = galore_jax.galore_adamw(0.01, rank=2, projector=projector), {"w": jnp.ones((8, 16))}
    state, update = tx.init(params), jax.jit(tx.update)
    huge, counted = jnp.full((8, 16), 2e38), []
    for gradient, moves in ((huge, False), (normal(0, (8, 16)), True), (huge, False), (normal(1, (8, 16)), True)):
        updates, state = update({"w": gradient}, state, params)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
        assert bool(jnp.any(updates["w"] != 0)) == moves
        counted.append(tuple(int(optax.tree.get(state, name)) for name in ("kept", "skipped")))
    assert counted == [(1, 0), (1, 0), (1, 1), (1, 1)]


def test_an_answer_that_is_not_finite_makes_no_update_and_is_counted():
    """Adam with b2 = 1 divides zero by zero."""
    params = {"w": normal(0, (8, 16)), "b": normal(1, (16,))}
    tx = galore(optax.scale_by_adam(b2=1.0), rank=2)
    updates, state = tx.update(params, tx.init(params), params)
    assert not np.any(updates["w"])
    assert not np.any(updates["b"])
    assert int(state.skipped) == 1


def test_the_entries_of_an_answer_that_are_not_finite_are_zeros_and_the_others_move():
    """A whole answer decides only where it is counted: for a matrix that is projected."""
    bad = {"w": (0, 3), "b": (5,)}

    def spoil(updates, params):
        return {name: u.at[bad[name]].set(jnp.nan) for name, u in updates.items()}

    params = {"w": normal(0, (8, 16)), "b": normal(1, (16,))}
    for spoiled, skipped in ((("w", "b"), 1), (("b",), 0)):
        tx = galore(
            optax.stateless(lambda u, p, names=spoiled: u | {n: spoil(u, p)[n] for n in names}), rank=2, scale=1.0
        )
        updates, state = jax.jit(tx.update)(params, tx.init(params))
        assert np.flatnonzero(updates["b"] == 0).tolist() == [5]
        assert np.all(np.isfinite(updates["w"]))
        assert np.any(updates["w"])
        assert (int(state.step), int(state.skipped)) == (1, skipped)

    rest, tx = {"b": params["b"]}, galore(optax.stateless(spoil), rank=2)
    with pytest.warns(galore_jax.GaLoreMemoryWarning):
        state = tx.init(rest)
    updates, state = jax.jit(tx.update)(rest, state)
    assert np.flatnonzero(updates["b"] == 0).tolist() == [5]
    assert (int(state.step), int(state.skipped)) == (1, 0)


def test_an_overlap_is_at_most_one_also_for_a_basis_that_is_not_orthonormal():
    """Two unrelated Gaussian bases have about r/m, so that a lazy gap stays as it is."""
    policy = galore_jax.refresh.lazy(2, threshold=0.4, window=2)
    tx = galore(optax.scale_by_adam(), rank=8, projector="gaussian", refresh=policy, diagnostics=True)
    state, update = tx.init(jnp.ones((64, 128))), jax.jit(tx.update)
    for step in range(8):
        _, state = update(normal(step, (64, 128)), state)
    assert 0 < float(state.diagnostics.overlap) < 3 * 8 / 64
    assert int(state.schedule.gap) == 2


@pytest.mark.slow
def test_a_basis_is_refreshed_alike_alone_and_in_a_group():
    """Four parameters of one shape and a stack of it, of another dtype, of another side: each as if it stood alone."""
    shapes = {"a": (12, 20), "b": (12, 20), "c": (2, 3, 12, 20), "d": (20, 12), "e": (12, 20)}
    gradients = {name: normal(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    gradients["e"] = gradients["e"].astype(jnp.bfloat16)
    tx = galore(optax.adam(0.1), rank=4, update_proj_gap=2, refresh="together", transport="rotate", diagnostics=True)
    update = jax.jit(tx.update)
    state = tx.init(gradients)
    alone = {name: tx.init({name: gradient}) for name, gradient in gradients.items()}
    for step in range(4):
        turned = jax.tree.map(lambda g, s=step: jnp.roll(g, s, -1) * (1 + s), gradients)
        updates, state = update(turned, state)
        for name in gradients:
            expected, alone[name] = update({name: turned[name]}, alone[name])
            np.testing.assert_allclose(
                updates[name].astype(jnp.float32),
                expected[name].astype(jnp.float32),
                atol=1e-5 if name != "e" else 1e-2,
            )
            np.testing.assert_allclose(
                state.diagnostics.overlap[name], alone[name].diagnostics.overlap[name], atol=1e-5
            )
