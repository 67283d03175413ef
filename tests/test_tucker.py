# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels in Tucker coordinates: against a float64 HOSVD, the inner optimizer, and the three ways the PyTorch reference fails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import assert_trees_close, assert_trees_equal
from reference import Adam, Tucker, mode_product, unfolding

from galore_jax import galore, quantize_state, state_bytes, state_sharding, tree_bytes, tucker
from galore_jax._core.call import ARGUMENT, Action, Call
from galore_jax.memory import state_bytes_by_kind
from galore_jax.tucker import TuckerState

SHAPE = (3, 2, 6, 8)
RANKS = {2: 2, 3: 3}
GAP = 3


def rank_of(path, shape):
    return 1 / 3


def normal(seed, shape=SHAPE, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def kernel(seed, dtype=jnp.float32):
    return {"conv": {"kernel": normal(seed, dtype=dtype), "bias": normal(seed + 100, (8,), dtype)}}


def adam(**arguments):
    return tucker(
        optax.scale_by_adam(),
        **{"rank": rank_of, "update_proj_gap": GAP, "projector": "eigh", "scale": 0.5} | arguments,
    )


@functools.cache
def program():
    """One transformation and its jitted update, which the tests share, so that it is compiled once."""
    tx = adam()
    return tx, jax.jit(tx.update)


def run(tx, update, gradients, state=None):
    """(updates, state) after each gradient."""
    state = tx.init(gradients[0]) if state is None else state
    for gradient in gradients:
        updates, state = update(gradient, state, gradient)
        yield updates, state


def bases_of(state, *path):
    """Those of one parameter, in the order of the modes."""
    keys = path or ("conv", "kernel")
    found = [functools.reduce(lambda node, key: node[key], keys, tree) for tree in state.basis]
    return [basis for basis in found if not isinstance(basis, optax.MaskedNode)]


def rotate_adam(inner, overlaps):
    """The rules of galore_jax.transport, mode by mode."""
    for axis, q in overlaps.items():
        inner.m = mode_product(inner.m, axis, q)
        shares = q * q
        missing = np.maximum(1 - shares.sum(axis=1), 0)
        mean = np.broadcast_to(inner.v.mean(axis=axis, keepdims=True), inner.v.shape)
        inner.v = mode_product(inner.v, axis, shares) + mode_product(mean, axis, np.diag(missing))


CASES = {
    "channels": ({}, RANKS, None),
    "rotate": ({"transport": "rotate"}, RANKS, rotate_adam),
    "all_modes": ({"modes": (0, 1, 2, 3), "transport": "rotate"}, {0: 1, 1: 1, 2: 2, 3: 3}, rotate_adam),
    "output": ({"modes": (-1,)}, {3: 3}, None),
    "window": ({"modes": (3, 0)}, {3: 3, 0: 1}, None),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("case", sorted(CASES))
def test_hosvd_in_float64(case):
    """Two refreshes, at updates 0 and 3; the core is what Adam sees, and the update is the Tucker product of its answer."""
    arguments, ranks, carry = CASES[case]
    tx = adam(**arguments)
    expected = Tucker(Adam(), ranks=ranks, update_proj_gap=GAP, scale=0.5, carry=carry)
    gradients = [kernel(seed) for seed in range(5)]
    for gradient, (updates, state) in zip(gradients, run(tx, jax.jit(tx.update), gradients), strict=True):
        bases = dict(zip(ranks, bases_of(state), strict=True))
        wanted = expected.update(gradient["conv"]["kernel"], signs_of=bases)
        for axis, basis in bases.items():
            np.testing.assert_allclose(basis, expected.bases[axis], atol=1e-5)
        np.testing.assert_allclose(updates["conv"]["kernel"], wanted, atol=2e-5)
        moments = state.inner_state
        np.testing.assert_allclose(moments.mu["conv"]["kernel"], expected.inner.m, atol=1e-5)
        np.testing.assert_allclose(moments.nu["conv"]["kernel"], expected.inner.v, atol=1e-6)
    assert int(state.count) == 5
    assert not any(map(int, (state.skipped, state.kept, state.rejected)))


def test_the_default_projector_finds_the_leading_directions():
    gradient = {"kernel": jnp.asarray(mode_product(normal(0), 3, np.diag(4.0 ** -np.arange(8))), jnp.float32)}
    tx = tucker(optax.identity(), rank=rank_of)
    _, state = tx.update(gradient, tx.init(gradient))
    for axis, basis in zip((2, 3), bases_of(state, "kernel"), strict=True):
        singular = np.linalg.svd(unfolding(np.asarray(gradient["kernel"], np.float64), axis))[0]
        captured = np.linalg.norm(np.asarray(basis).T @ unfolding(np.asarray(gradient["kernel"]), axis)) ** 2
        best = np.linalg.norm(singular[:, : basis.shape[1]].T @ unfolding(np.asarray(gradient["kernel"]), axis)) ** 2
        assert 0.98 * best < captured <= 1.0001 * best


@pytest.mark.covering(1)
@pytest.mark.parametrize("rank", [1.0, 8, 100])
def test_full_rank_is_the_inner_optimizer(rank):
    """No mode has a basis, and an int is clipped: also scale acts on nothing."""
    tx, inner = adam(rank=rank), optax.scale_by_adam()
    gradients = [kernel(seed) for seed in range(3)]
    pairs = zip(run(tx, jax.jit(tx.update), gradients), run(inner, jax.jit(inner.update), gradients), strict=True)
    for (updates, state), (expected, inner_state) in pairs:
        assert_trees_close(updates, expected, rtol=1e-6)
        assert_trees_close(state.inner_state, inner_state, rtol=1e-6)
    assert jax.tree.leaves(state.basis) == []


@pytest.mark.covering(1)
@pytest.mark.parametrize("transport", ["keep", "rotate"])
def test_gradients_inside_the_subspaces_lose_nothing(transport):
    """Momentum, linear, at a rank that all gradients together have: with rotation also over refreshes, at α = 1 that of SGD."""
    rng = np.random.default_rng(0)
    sides = [np.linalg.qr(rng.normal(size=(SHAPE[axis], r)))[0] for axis, r in RANKS.items()]

    def inside(seed):
        core = rng.normal(size=(*SHAPE[:2], *RANKS.values()))
        return {"kernel": jnp.asarray(mode_product(mode_product(core, 2, sides[0]), 3, sides[1]), jnp.float32)}

    tx = tucker(optax.trace(0.9), rank=rank_of, update_proj_gap=2, scale=1.0, transport=transport)
    gradients = [inside(seed) for seed in range(3 if transport == "rotate" else 2)]
    plain = optax.trace(0.9)
    pairs = zip(run(tx, jax.jit(tx.update), gradients), run(plain, plain.update, gradients), strict=True)
    for (updates, _), (expected, _) in pairs:
        assert_trees_close(updates, expected, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("projector", ["gaussian", "rows"])
def test_bases_that_are_not_stored_as_matrices(projector):
    """The core of a core is in its place, and the lift is the adjoint of the projection: <ΔW, G> = |R|²."""
    gradients = [{"kernel": normal(seed)} for seed in range(2)]
    tx = tucker(optax.identity(), rank=rank_of, update_proj_gap=1, projector=projector, scale=1.0)
    seen = tucker(optax.trace(0.0), rank=rank_of, update_proj_gap=1, projector=projector)
    pairs = zip(run(tx, jax.jit(tx.update), gradients), run(seen, jax.jit(seen.update), gradients), strict=True)
    for gradient, ((updates, _), (_, state)) in zip(gradients, pairs, strict=True):
        core = state.inner_state.trace["kernel"]
        assert core.shape == (3, 2, 2, 3)
        np.testing.assert_allclose(jnp.vdot(updates["kernel"], gradient["kernel"]), jnp.vdot(core, core), rtol=1e-4)


ORDERS = {"one": (4, 6, 8), "two": (2, 3, 6, 8), "three": (2, 2, 3, 6, 8)}


@pytest.mark.covering(1)
@pytest.mark.parametrize("inner", ["adafactor", "adam", "lion", "sgd"])
def test_every_optimizer_takes_kernels_of_every_order(inner):
    """There, every optimizer passes its projector an argument that it has not, and the first step raises."""
    params = {name: normal(i, shape) for i, (name, shape) in enumerate(sorted(ORDERS.items()))}
    tx = tucker(getattr(optax, inner)(0.1), rank=rank_of, projector="svd")
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    for name, shape in ORDERS.items():
        assert [basis.shape for basis in bases_of(state, name)] == [(6, 2), (8, 3)]
        assert updates[name].shape == shape
        assert float(jnp.vdot(updates[name], params[name])) < 0


def test_bases_are_refreshed_every_gap_and_only_then():
    """There, a wrong ``and`` computes a basis once and never again."""
    tx, update = program()
    before = None
    for step, (_, state) in enumerate(run(tx, update, [kernel(seed) for seed in range(2 * GAP + 1)])):
        bases = [np.asarray(basis) for basis in bases_of(state)]
        for basis in bases:
            np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
        if before is not None:
            changed = [not np.array_equal(old, new) for old, new in zip(before, bases, strict=True)]
            assert changed == [step % GAP == 0] * 2
        before = bases


def test_a_first_update_with_another_number_makes_the_bases():
    """There, a first call that is not number 0 unpacks None."""
    tx, update = program()
    state = tx.init(kernel(0))._replace(step=jnp.int32(7))
    updates, state = update(kernel(0), state, kernel(0))
    assert all(bool(jnp.any(basis != 0)) for basis in bases_of(state))
    assert bool(jnp.any(updates["conv"]["kernel"] != 0))


def test_what_goes_back_is_the_answer_of_the_inner_optimizer():
    """There, the projected gradient goes back whatever the inner optimizer said."""
    gradient = {"kernel": normal(0)}
    replies = {}
    for factor in (1.0, -4.0, 0.0):
        tx = tucker(optax.scale(factor), rank=rank_of, projector="svd", scale=1.0)
        replies[factor] = tx.update(gradient, tx.init(gradient))[0]["kernel"]
    np.testing.assert_allclose(replies[-4.0], -4.0 * replies[1.0], rtol=1e-5)
    assert not np.any(replies[0.0])
    assert np.any(replies[1.0])


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_have_the_dtype_of_the_parameters_and_state_is_float32(dtype):
    """There, the dtype is not cast back."""
    tx, update = program()
    params = kernel(0, dtype)
    state = tx.init(params)
    updates, after = update(params, state, params)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if leaf.ndim} == {jnp.dtype("float32")}
    assert_trees_equal(jax.tree.map(jnp.zeros_like, after), jax.tree.map(jnp.zeros_like, state))
    exact, _ = update(kernel(0), tx.init(kernel(0)), kernel(0))
    assert_trees_close(jax.tree.map(lambda x: x.astype(jnp.float32), updates), exact, atol=0.02)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 0.0])
def test_a_bad_gradient_reaches_no_basis_and_no_moment(bad):
    """On an update that refreshes: the kernel stands still, and the bias goes on; a zero gradient is not counted as skipped."""
    tx, update = program()
    *_, (_, before) = run(tx, update, [kernel(seed) for seed in range(GAP)])
    gradient = kernel(GAP)
    wrong = gradient["conv"]["kernel"].at[0, 0, 1, 2].set(bad) if bad else jnp.zeros(SHAPE)
    gradient["conv"]["kernel"] = wrong
    updates, after = update(gradient, before, gradient)
    assert not np.any(updates["conv"]["kernel"])
    assert np.any(updates["conv"]["bias"])
    assert_trees_equal(bases_of(before), bases_of(after))
    for old, new in zip(before.inner_state[1:], after.inner_state[1:], strict=True):
        assert_trees_equal(old["conv"]["kernel"], new["conv"]["kernel"])
    assert (int(after.skipped), int(after.kept), int(after.rejected)) == (int(bool(bad)), 2, 0)
    assert int(after.count) == int(before.count) + 1


def test_the_first_basis_comes_from_the_first_good_gradient():
    tx, update = program()
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), kernel(0))
    (updates, state), (good, after) = run(tx, update, [bad, kernel(1)])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((updates, state.basis, state.inner_state)))
    assert (int(state.count), int(state.skipped), int(after.count)) == (0, 1, 1)
    assert_trees_close(good, update(kernel(1), tx.init(kernel(1)), kernel(1))[0])


def test_the_state_is_as_small_as_the_formula_says():
    """Σ d r + 2 (window) r_in r_out floats a kernel, whole moments of the rest, Adam's count and four counters."""
    params = {
        "conv": jax.ShapeDtypeStruct((3, 3, 64, 128), "bfloat16"),
        "image": jax.ShapeDtypeStruct((5, 5, 1, 32), "bfloat16"),
        "dense": jax.ShapeDtypeStruct((128, 10), "bfloat16"),
    }
    tx = tucker(optax.adam(1e-3), rank=0.25)
    conv = 64 * 16 + 128 * 32 + 2 * 9 * 16 * 32
    image = 32 * 8 + 2 * 25 * 1 * 8
    assert state_bytes(tx, params) == 4 * (conv + image + 2 * 1280) + 4 + 16
    state = jax.eval_shape(tx.init, params)
    assert state.inner_state[0].mu["conv"].shape == state.inner_state[0].nu["conv"].shape == (3, 3, 16, 32)
    assert state_bytes_by_kind(state)["bases"] == 4 * (64 * 16 + 128 * 32 + 32 * 8)


def test_the_state_is_arrays_with_something_in_them():
    for params in (kernel(0), {"bias": normal(0, (8,))}):
        for leaf in jax.tree.leaves(adam().init(params)):
            assert isinstance(leaf, jax.Array)
            assert leaf.size > 0


def test_an_update_is_compiled_once():
    tx = adam(transport="rotate", projector="power")
    traces = []

    @jax.jit
    def step(gradient, state, params):
        traces.append(1)
        return tx.update(gradient, state, params, an_argument_nobody_knows=1)

    shapes = jax.eval_shape(tx.init, kernel(0))
    for _, state in run(tx, step, [kernel(seed) for seed in range(3)]):
        assert jax.tree.structure(state) == jax.tree.structure(shapes)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert len(traces) == 1


def test_which_kernels_and_which_modes():
    """Depthwise kernels have too little to span in the rest; embeddings, matrices and masked leaves are left alone."""
    params = {
        "conv": normal(0, (3, 3, 16, 32)),
        "depthwise": normal(1, (3, 3, 1, 64)),
        "patch_embed": normal(2, (4, 4, 3, 16)),
        "dense": normal(3, (16, 32)),
        "bias": normal(4, (32,)),
    }

    def ranks(**arguments):
        state = tucker(optax.sgd(0.1), **arguments).init(params)
        shapes = {name: [basis.shape for basis in bases_of(state, name)] for name in params}
        return {name: found for name, found in shapes.items() if found}

    assert ranks() == {"conv": [(16, 4), (32, 8)]}
    assert ranks(rank=4) == {"conv": [(16, 4), (32, 4)], "depthwise": [(64, 4)]}
    assert ranks(rank=20) == {"conv": [(32, 20)]}
    assert ranks(rank=lambda path, shape: None if path == "conv" else 5) == {"depthwise": [(64, 5)]}
    assert ranks(mask=lambda tree: {name: name == "patch_embed" for name in tree}) == {"patch_embed": [(3, 1), (16, 4)]}


def test_rms_keeps_the_size_of_the_inner_update():
    gradient = {"kernel": normal(0)}
    tx = tucker(optax.scale_by_sign(), rank=rank_of, scale="rms")
    updates, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates["kernel"] ** 2)), 1.0, rtol=1e-5)


def test_the_inner_optimizer_sees_the_core_of_the_parameters():
    """Decay inside acts on W ×_k P_k P_kᵀ."""
    gradient, params = {"kernel": normal(0)}, {"kernel": normal(1)}
    tx = tucker(optax.chain(optax.scale(0.0), optax.add_decayed_weights(1.0)), rank=rank_of, scale=1.0)
    updates, state = tx.update(gradient, tx.init(params), params)
    expected = np.asarray(params["kernel"], np.float64)
    for axis, basis in zip((2, 3), bases_of(state, "kernel"), strict=True):
        expected = mode_product(expected, axis, np.asarray(basis @ basis.T))
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-5)


CNN = {
    "conv": {"kernel": (3, 3, 8, 16), "bias": (16,)},
    "dense": {"kernel": (64, 16), "bias": (16,)},
    "head": {"kernel": (16, 10)},
}


def convolutional(seed):
    leaves, treedef = jax.tree.flatten(CNN, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten(normal(seed + i, shape) for i, shape in enumerate(leaves))


def dense_only(path, shape):
    return 0.25 if len(shape) == 2 else None


def composed(name):
    """Convolutions in Tucker coordinates, matrices in GaLore's subspaces, the head and biases in neither."""
    inner = optax.scale_by_adam()
    conv = tucker(inner, update_proj_gap=GAP, projector="svd")
    if name == "nested":
        return galore(conv, rank=dense_only, update_proj_gap=GAP, projector="svd")
    dense = galore(inner, rank=0.25, update_proj_gap=GAP, projector="svd")
    return optax.partition(
        {"conv": conv, "dense": dense}, lambda tree: jax.tree.map(lambda x: "conv" if x.ndim > 2 else "dense", tree)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nested", "partition"])
def test_convolutions_beside_matrices_in_galore(name):
    """Each leaf's updates are those of the one method alone."""
    gradients = [convolutional(10 * seed) for seed in range(GAP + 1)]
    alone = [
        tucker(optax.scale_by_adam(), update_proj_gap=GAP, projector="svd"),
        galore(optax.scale_by_adam(), rank=dense_only, update_proj_gap=GAP, projector="svd"),
    ]
    runs = [run(tx, jax.jit(tx.update), gradients) for tx in (composed(name), *alone)]
    for (updates, _), (conv, _), (dense, _) in zip(*runs, strict=True):
        assert_trees_close(updates["conv"]["kernel"], conv["conv"]["kernel"])
        assert_trees_close(updates["dense"], dense["dense"])
        assert_trees_close(updates["head"], dense["head"])
    sizes = [leaf.size for leaf in jax.tree.leaves(composed(name).init(gradients[0])) if leaf.size > 1]
    assert sorted(sizes) == sorted([8 * 2, 16 * 4, *2 * [9 * 2 * 4], 16 * 4, *2 * [64 * 4], *4 * [16], *2 * [160]])


def test_a_bad_kernel_inside_galore_keeps_its_state():
    tx = composed("nested")
    update = jax.jit(tx.update)
    _, (_, before) = run(tx, update, [convolutional(0), convolutional(10)])
    gradient = convolutional(20)
    gradient["conv"]["kernel"] = gradient["conv"]["kernel"].at[0].set(jnp.nan)
    updates, after = update(gradient, before, gradient)
    assert not np.any(updates["conv"]["kernel"])
    assert np.any(updates["dense"]["kernel"])
    old, new = (state.inner_state.inner_state.mu["conv"]["kernel"] for state in (before, after))
    np.testing.assert_array_equal(old, new)
    assert int(after.skipped) == 1


@pytest.mark.slow
def test_it_goes_with_galores_rotation_and_with_8_bit_moments():
    """galore reaches the moments inside a TuckerState, and tucker those that a codec stores."""
    params = convolutional(0)
    turned = galore(tucker(optax.scale_by_adam()), rank=dense_only, update_proj_gap=1, transport="rotate")
    large = {"kernel": normal(0, (3, 3, 64, 64))}
    coded = tucker(quantize_state(optax.scale_by_adam()), rank=0.5, update_proj_gap=1, transport="rotate")
    for tx, tree in ((turned, params), (coded, large)):
        state = tx.init(tree)
        update = jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(tree, state, tree)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))
    assert optax.tree.get(state, "mu")["kernel"].codes.dtype == jnp.uint8
    assert tree_bytes(state.inner_state) == 2 * 9 * 32 * (32 + 4) + 8  # a byte each, a scale a row, two counts


def test_a_sharded_kernel_has_a_sharded_basis_and_the_same_update():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Explicit,))
    params = {"kernel": normal(0)}
    shardings = {"kernel": NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp"))}
    tx = tucker(optax.scale_by_adam(), rank=rank_of, projector="svd")
    assert state_sharding(tx, params, shardings).basis[1]["kernel"].spec == PartitionSpec("fsdp", None)
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(jax.device_put, params, shardings)
        state = jax.jit(tx.init)(sharded)
        updates, after = jax.jit(tx.update)(sharded, state, sharded)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert jax.typeof(updates["kernel"]) == jax.typeof(sharded["kernel"])
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], atol=1e-5)


@pytest.mark.slow
def test_a_flax_optimizer_steps_twice():
    """nnx.Optimizer takes a container in the place of a parameter apart: every array of the state has a place of its own."""
    model = nnx.Conv(6, 8, (3, 3), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adam(), wrt=nnx.Param)
    before = model.kernel[...]
    for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param))
    assert bool(jnp.any(model.kernel[...] != before))
    assert int(optimizer.opt_state.count[...]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modes": ()}, r"modes is \(\)"),
        ({"modes": (True,)}, r"modes is \(True,\)"),
        ({"projector": "up"}, "projector is 'up'"),
        ({"rank": 0}, "rank is 0"),
        ({"scale": "max"}, "scale is 'max'"),
        ({"seed": -1}, "seed is -1"),
        ({"transport": "reset"}, "transport is 'reset'"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0"),
    ],
)
def test_bad_arguments_are_named_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        tucker(optax.adam(1e-3), **arguments)


def test_bad_trees_are_named_at_init():
    params = kernel(0)
    for modes in ((2, -2), (4,)):
        with pytest.raises(ValueError, match=r"modes is .* 'conv/kernel' has the shape \(3, 2, 6, 8\)"):
            adam(modes=modes).init(params)
    with pytest.raises(ValueError, match="mask selects none of the 2 parameters"):
        adam(mask=False).init(params)
    with pytest.raises(ValueError, match=r"SM3State.*of 'conv/kernel' .* core of shape \(3, 2, 2, 3\)"):
        tucker(optax.sm3(0.1), rank=rank_of, transport="rotate").init(params)
    with pytest.raises(TypeError, match="inner is 3"):
        tucker(3)


def test_low_rank_accumulation_is_refused():
    tx = adam()
    with pytest.raises(ValueError, match="needs the whole gradient"):
        tx.update(kernel(0), tx.init(kernel(0)), **{ARGUMENT: Call(Action.APPLY)})


def test_the_state_is_a_named_tuple_that_optax_can_walk():
    state = adam().init(kernel(0))
    assert isinstance(state, TuckerState)
    doubled = optax.tree.map_params(adam(), lambda x: x + 1, state)
    assert float(doubled.inner_state.mu["conv"]["kernel"].min()) == 1.0
    assert int(doubled.count) == 0


def test_an_empty_tree_is_updated():
    tx = tucker(optax.adam(0.1))
    updates, state = tx.update({}, tx.init({}))
    assert updates == {}
    assert int(state.skipped) == 0
