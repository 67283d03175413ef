# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Rules for the gradient outside the subspace, against their published formulas in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import leniency, normal

import galore_jax
from galore_jax import galore, residual
from galore_jax.accumulate import update_from_low_rank
from galore_jax.matrix_view import select

RANK, B1, B2, EPS, ALPHA = 4, 0.9, 0.999, 1e-8, 0.25


def gradients(shape):
    """Of very different size, so that the bound on the growth of the norm is met."""
    return [normal(i, shape) * size for i, size in enumerate((1.0, 3.0, 0.5, 0.6))]


def adam(state, r):
    m, v, t = state
    m, v, t = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2, t + 1
    return (m, v, t), (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)


def norms(x, axis):
    return np.sqrt(np.sum(x**2, axis=axis, keepdims=True))


def bounded(x, before):
    size = np.linalg.norm(x)
    if before is not None and size > 1.01 * before:
        x, size = x * 1.01 * before / size, 1.01 * before
    return x, size


def expected(name, g, p, r, n, before):
    """Of a basis on the left; the update, and the norm that is kept."""
    outside = g - p @ r
    if name == "fira":
        scaled, before = bounded(outside * (norms(n, 0) / norms(r, 0)), before)
        return ALPHA * p @ n + scaled, before
    if name == "channel":
        scaled, before = bounded(g * (norms(n, 0) / norms(r, 0)), before)
        return ALPHA * scaled, before
    if name == "tensor":
        scaled, before = bounded(g * np.linalg.norm(n) / np.linalg.norm(r), before)
        return ALPHA * scaled, before
    if name == "sgd":
        return ALPHA * p @ n + outside, before
    return ALPHA * p @ n + np.sign(outside), before


def run(tx, shape):
    params, state, seen = {"w": jnp.zeros(shape)}, tx.init({"w": jnp.zeros(shape)}), []
    update = jax.jit(tx.update)
    for g in gradients(shape):
        updates, state = update({"w": g}, state, params)
        seen.append((np.asarray(g, np.float64), np.asarray(updates["w"], np.float64), state))
    return seen


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("projector", ["power", "gaussian", "rows"])
@pytest.mark.parametrize("name", ["fira", "channel"])
def test_one_bad_entry_that_the_basis_does_not_see_is_refused(name, projector, bad):
    """The rules read all of a gradient.  The bases of this one are rows of the identity, but for the Gaussian one."""
    tx = galore(optax.scale_by_adam(), rank=2, residual=name, projector=projector)
    params = {"w": jnp.zeros((8, 16))}
    good = {"w": jnp.zeros((8, 16)).at[:2].set(normal(0, (2, 16)))}
    _, state = tx.update(good, tx.init(params), params)
    updates, after = tx.update({"w": good["w"].at[5, 3].set(bad)}, state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    np.testing.assert_array_equal(after.residual["w"], state.residual["w"])
    np.testing.assert_array_equal(after.inner_state.mu["w"], state.inner_state.mu["w"])
    assert int(after.skipped) == 1


@pytest.mark.parametrize("size", [1e-30, 1e25])
@pytest.mark.parametrize("name", ["fira", "channel", "tensor"])
def test_norms_beyond_the_range_of_their_squares_leave_the_update_finite(name, size):
    tx = galore(optax.identity(), rank=4, residual=name)
    state = tx.init({"w": jnp.zeros((8, 16))})
    for seed in range(3):
        updates, state = tx.update({"w": normal(seed, (8, 16)) * size}, state)
        assert jnp.all(jnp.isfinite(updates["w"]))
    updates, state = tx.update({"w": normal(3, (8, 16))}, state)
    assert float(jnp.max(jnp.abs(updates["w"]))) > 0


@pytest.mark.covering(4)
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("name", ["fira", "channel", "tensor", "sgd", "sign"])
def test_the_published_formula(name, tall):
    """Over a change of basis, which is the state's own: how it is found is tested elsewhere."""
    shape = (20, 12) if tall else (12, 20)
    tx = galore(optax.scale_by_adam(B1, B2, EPS), rank=RANK, scale=ALPHA, update_proj_gap=2, residual=name)
    inner, before, bases = (np.zeros((RANK, 20)), np.zeros((RANK, 20)), 0), None, []
    for g, update, state in run(tx, shape):
        basis = state.right["w"] if tall else state.left["w"]
        if tall:
            g, update = g.T, update.T
        p = np.asarray(basis, np.float64)
        bases.append(p)
        r = p.T @ g
        inner, n = adam(inner, r)
        wanted, before = expected(name, g, p, r, n, before)
        np.testing.assert_allclose(update, wanted, atol=2e-5 * np.abs(wanted).max())
    assert np.array_equal(bases[0], bases[1])
    assert not np.allclose(bases[1], bases[2])


def test_what_is_outside_is_orthogonal_to_the_basis_and_independent_of_the_scale():
    parts = []
    for scale in (0.25, 2.0):
        tx = galore(optax.scale_by_adam(), rank=RANK, scale=scale, residual="fira")
        _, update, state = run(tx, (12, 20))[0]
        p = np.asarray(state.left["w"], np.float64)
        parts.append(update - p @ (p.T @ update))
        without = galore(optax.scale_by_adam(), rank=RANK, scale=scale)
        np.testing.assert_allclose(p @ (p.T @ update), run(without, (12, 20))[0][1], atol=1e-5)
    np.testing.assert_allclose(*parts, atol=1e-5)
    assert np.abs(parts[0]).max() > 0.1


def test_the_growth_of_the_norm_is_bounded_or_not():
    sizes = {}
    for growth in (1.01, None):
        tx = galore(optax.identity(), rank=RANK, scale=0.0, residual=residual.fira(growth))
        sizes[growth] = [np.linalg.norm(update) for _, update, _ in run(tx, (12, 20))]
    assert sizes[1.01][1] == pytest.approx(1.01 * sizes[1.01][0], rel=1e-5)
    assert sizes[None][1] > 2 * sizes[None][0]
    with pytest.raises(ValueError, match="growth is 0"):
        residual.fira(0)


def test_orthogonal_moves_all_singular_values_to_one_and_reaches_outside_the_subspace():
    tx = galore(
        optax.trace(0.95, nesterov=True), rank=RANK, scale=1.0, transport="rotate", residual=residual.orthogonal(16.0)
    )
    for _, update, _ in run(tx, (12, 20)):
        values = np.linalg.svd(update / (0.2 * 20**0.5), compute_uv=False)
        assert values.min() > 0.5
        assert values.max() < 1.3
    exact = np.linalg.svd(np.asarray(gradients((12, 20))[0]))
    found = np.asarray(residual.newton_schulz(gradients((12, 20))[0]))
    direction = exact[0] @ exact[2][:12]
    assert np.sum(found * direction) / (np.linalg.norm(found) * np.linalg.norm(direction)) > 0.97
    assert not np.any(residual.newton_schulz(jnp.zeros((2, 3, 4))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fira", "tensor", "orthogonal"])
def test_a_stack_equals_separate_leaves_and_a_bad_matrix_is_left_alone(name):
    tx = galore(optax.scale_by_adam(), rank=RANK, residual=name, refresh="together")
    stack = normal(0, (3, 12, 20))
    both, alone = {"w": stack}, {str(i): stack[i] for i in range(3)}
    states = tx.init(both), tx.init(alone)
    for step in range(3):
        factor = jnp.array([1.0, jnp.nan if step == 1 else 2.0, 0.5])[:, None, None] * (step + 1)
        g = jnp.roll(stack, step, axis=1) * factor
        one, first = tx.update({"w": g}, states[0], both)
        many, second = tx.update({str(i): g[i] for i in range(3)}, states[1], alone)
        states = first, second
        for i in range(3):
            np.testing.assert_allclose(one["w"][i], many[str(i)], atol=2e-5)
        assert bool(jnp.all(one["w"][1] == 0)) == (step == 1)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(states))


@pytest.mark.covering(1)
@pytest.mark.parametrize("preset", [galore_jax.fira_adamw, galore_jax.apollo_adamw, galore_jax.apollo_mini])
def test_the_presets_learn_a_regression(preset):
    x = normal(0, (64, 32))
    y = x @ normal(1, (32, 48)) / 6
    params = {"w": jnp.zeros((32, 48))}
    tx = preset(0.02) if preset is galore_jax.apollo_mini else preset(0.02, rank=8)
    state = tx.init(params)

    def loss(p):
        return jnp.mean((x @ p["w"] - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = float(loss(params))
    for _ in range(60):
        params, state = step(params, state)
    assert float(loss(params)) < 0.2 * before


@pytest.mark.covering(1)
@pytest.mark.parametrize("preset", [galore_jax.fira_adamw, galore_jax.apollo_adamw])
def test_hyperparameters_can_be_injected(preset):
    # Of full rank: Adam scales the rounding errors of a row that is zero but for them up to its own size.
    params = {"w": normal(0, (12, 20))}
    plain = preset(0.02, rank=RANK)
    injected = optax.inject_hyperparams(preset, static_args=("rank", "update_proj_gap"))(0.02, rank=RANK)
    found, expected = (jax.jit(tx.update)(params, tx.init(params), params)[0]["w"] for tx in (injected, plain))
    # 1 - b2 is exact for a Python number and off by 1.3e-5 in float32, of which Adam takes the root.  An entry can be a small
    # difference of two such numbers.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(expected))))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"residual is 'fire'.*fira, sgd, sign, channel, tensor, orthogonal"):
        galore(optax.scale_by_adam(), residual="fire")
    with pytest.raises(ValueError, match=r"residual='fira'.*proj_type is \"full\""):
        galore(optax.scale_by_adam(), residual="fira", proj_type="full")
    params = {"w": jnp.zeros((12, 20))}
    tx = galore(optax.scale_by_adam(), rank=RANK, residual="fira")
    with pytest.raises(ValueError, match="residual='fira' needs the whole gradient"):
        update_from_low_rank(tx, {"w": jnp.zeros((RANK, 20))}, tx.init(params), params)


UPHILL = {
    "adam": lambda: optax.adam(1e-3),
    "warmup": lambda: optax.adam(optax.linear_schedule(0.0, 1e-3, 10)),
    "masked": lambda: optax.masked(optax.sgd(0.1), {"kernel": True, "bias": False}),
    "centralized": lambda: optax.chain(optax.centralize(), optax.sgd(0.1)),
}
ALONG = {
    "adam": optax.scale_by_adam,
    "masked": lambda: optax.masked(optax.scale_by_adam(), {"kernel": True, "bias": False}),
    "partition": lambda: optax.partition(
        {"matrix": optax.scale_by_adam(), "vector": optax.adam(1e-3)}, {"kernel": "matrix", "bias": "vector"}
    ),
    "needs a value": lambda: optax.chain(optax.scale_by_adam(), optax.contrib.reduce_on_plateau()),
    "decayed": lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(10.0)),
}


@pytest.mark.parametrize("name", UPHILL)
def test_an_inner_transformation_against_the_gradient_is_refused_at_init(name):
    params = {"kernel": jnp.zeros((12, 20)), "bias": jnp.zeros((20,))}
    tx = galore(UPHILL[name](), rank=RANK, residual="fira")
    for init in (tx.init, jax.jit(tx.init), functools.partial(jax.eval_shape, tx.init)):
        with pytest.raises(ValueError, match="update of 'kernel' by inner points against it: take the learning rate"):
            init(params)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ALONG)
def test_an_inner_transformation_along_the_gradient_passes_on_the_real_tree(name):
    params = {"kernel": normal(0, (12, 20)), "bias": jnp.ones((20,))}
    tx = galore(ALONG[name](), rank=RANK, residual="sgd")
    with leniency():  # Optax's own mixes dtypes
        updates, _ = tx.update(params, tx.init(params), params, value=jnp.float32(1.0))
    assert jnp.vdot(updates["kernel"], params["kernel"]) > 0


@pytest.mark.covering(3)
@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_fira_keeps_the_norm_of_what_is_outside_where_that_is_small(share, codec):
    """Against float64: a difference of the squared norms of G and R would be rounding errors."""
    rng = np.random.default_rng(0)
    inside = rng.normal(size=(12, RANK)) @ rng.normal(size=(RANK, 20))
    gradient = {"w": jnp.asarray(inside + share * rng.normal(size=(12, 20)), jnp.float32)}
    tx = galore(optax.identity(), rank=RANK, residual="fira", projector="svd", basis_codec=codec)
    _, state = tx.update(gradient, tx.init(gradient), gradient)
    p = np.asarray(state.left["w"], np.float64)
    g = np.asarray(gradient["w"], np.float64)
    np.testing.assert_allclose(state.residual["w"], np.linalg.norm(g - p @ (p.T @ g)), rtol=max(1e-5, 2e-6 / share))


def memory(function, *arguments, donate=()):
    """Bytes of temporaries, with all of XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", False)
    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    jax.config.update("jax_disable_most_optimizations", True)
    return compiled.memory_analysis().temp_size_in_bytes


STACK, MATRIX_BYTES = (8, 512, 1024), 4 * 512 * 1024


@pytest.mark.covering(2)
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", residual.RESIDUALS)
def test_an_update_needs_one_matrix_of_the_stack_beyond_itself(name, donate):
    tx = galore(optax.trace(0.9), rank=64, residual=name, refresh="manual")
    params = {"w": jax.ShapeDtypeStruct(STACK, jnp.float32)}
    needed = memory(tx.update, params, jax.eval_shape(tx.init, params), donate=(0, 1) if donate else ())
    assert needed <= (STACK[0] + 1) * MATRIX_BYTES


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", residual.RESIDUALS)
def test_the_workspace_of_a_rule_is_a_few_matrices_whatever_the_stack(name, dtype):
    rule, rank = residual.get(name), 64

    def update(stack):
        batch, m, n = stack
        arrays = [
            jax.ShapeDtypeStruct(*pair)
            for pair in [
                (stack, dtype),
                ((batch,), bool),
                ((batch, rank, n), jnp.float32),
                ((batch, rank, n), jnp.float32),
                ((batch, m, rank), jnp.float32),
            ]
        ]
        [view] = select(jnp.broadcast_to(0.0, stack), rank=rank)
        states = jax.eval_shape(lambda: rule.init(view))
        combine = functools.partial(residual.combine, rule, lift=lambda x, p: p @ x, alpha=0.25, axis=-2)
        return memory(combine, *arrays, states, donate=(0, 5))

    lifts = 2 if name == "sign" else 1
    if dtype == jnp.float32:
        assert update(STACK) <= (lifts + 2) * MATRIX_BYTES
        assert update((16, *STACK[1:])) < update(STACK) + MATRIX_BYTES / 100
    else:
        # XLA on CPU may not write a bfloat16 matrix in place, but it holds no stack in float32.
        assert update(STACK) <= STACK[0] * MATRIX_BYTES / 2 + (lifts + 0.01) * MATRIX_BYTES


def test_newton_schulz_is_one_loop_in_the_program_and_one_more_over_a_stack():
    for shape, loops in (((12, 20), 1), ((20, 12), 1), ((3, 12, 20), 2), ((2, 3, 12, 20), 2)):
        text = jax.jit(residual.newton_schulz).lower(jnp.ones(shape)).as_text()
        assert (text.count("stablehlo.while"), text.count("stablehlo.dot_general")) == (loops, 3)


def test_newton_schulz_of_a_stack_is_that_of_its_matrices():
    stack = normal(0, (2, 3, 20, 12))
    found = residual.newton_schulz(stack)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(found[i, j], residual.newton_schulz(stack[i, j]), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("build", [residual.fira, residual.channel, residual.sign, residual.orthogonal])
@pytest.mark.parametrize("spec", [P("a", None, None), P(None, "a", "b"), P("a", None, "b"), P(("a", "b"), None, None)])
def test_a_sharded_stack_gives_the_update_of_the_whole_one(build, spec):
    """On explicit axes, with traced settings of the rule, for which a loop over shards must not fail."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    gradients = {"w": normal(0, (8, 8, 16))}

    @jax.jit
    def two_updates(setting, gradients):
        tx = galore(optax.trace(0.9), rank=3, residual=build(setting), seed=1, projector="random", refresh="together")
        state = tx.init(gradients)
        _, state = tx.update(gradients, state)
        updates, state = tx.update(jax.tree.map(lambda g: 3 * g, gradients), state)
        return updates["w"], state.residual

    expected = two_updates(1.5, gradients)
    with jax.set_mesh(mesh):
        placed = jax.device_put(gradients, NamedSharding(mesh, spec))
        found = two_updates(1.5, placed)
        assert found[0].sharding.spec == spec
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
