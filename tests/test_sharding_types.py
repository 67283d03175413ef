# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""On meshes with explicit axes the sharding is part of the type of an array, and an update must not change it."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import assert_trees_close, galore_states, leniency, normal

import galore_jax
from galore_jax.presets import FULL_RANK, PRESETS
from galore_jax.projectors import PROJECTORS

RANK = 3
SHAPES = {"wide": (8, 16), "tall": (16, 8), "rows": (8, 16), "stack": (4, 8, 16), "layers": (8, 16, 8), "bias": (16,)}
MESHES = {
    "fsdp": (
        (8,),
        {
            "wide": P("fsdp", None),
            "tall": P("fsdp", None),
            "rows": P(None, "fsdp"),
            "stack": P(None, None, "fsdp"),
            "layers": P("fsdp", None, None),
            "bias": P("fsdp"),
        },
    ),
    "fsdp_tp": (
        (4, 2),
        {
            "wide": P("fsdp", "tp"),
            "tall": P("fsdp", "tp"),
            "rows": P(None, "tp"),
            "stack": P(None, "fsdp", "tp"),
            "layers": P("fsdp", None, "tp"),
            "bias": P("tp"),
        },
    ),
}
KINDS = [(proj_type, projector) for proj_type in ("std", "full") for projector in PROJECTORS]

meshes = pytest.mark.parametrize("mesh_name", MESHES)


def make_mesh(name, axis_type):
    sizes = MESHES[name][0]
    return jax.make_mesh(sizes, ("fsdp", "tp")[: len(sizes)], axis_types=(axis_type,) * len(sizes))


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def place(tree, mesh_name, mesh):
    return {k: jax.device_put(leaf, NamedSharding(mesh, MESHES[mesh_name][1][k])) for k, leaf in tree.items()}


def adamw(proj_type, projector):
    """With an eps that is larger than round-off: at a refresh by SVD PᵀGQ is diagonal, and a smaller eps would make updates
    of the size of the learning rate out of the noise beside the diagonal."""
    return galore_jax.galore_adamw(
        0.01, rank=RANK, update_proj_gap=2, eps=1e-3, weight_decay=0.1, proj_type=proj_type, projector=projector
    )


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def specs(tree):
    """Shape, dtype and partition spec of each leaf: the type without the mesh, which a replicated leaf need not name."""
    return jax.tree.map(lambda x: (x.shape, x.dtype.name, tuple(x.sharding.spec)), types(tree))


def three_updates(tx, update, mesh_name=None, mesh=None, names=tuple(SHAPES)):
    """State types before each update and at the end, the last updates and the last state."""

    def arrays(seed):
        tree = {name: leaf for name, leaf in random_tree(seed).items() if name in names}
        return place(tree, mesh_name, mesh) if mesh else jax.tree.map(jnp.asarray, tree)

    params = arrays(0)
    state = tx.init(params)
    seen = [types(state)]
    for seed in (1, 2, 3):
        updates, state = update(arrays(seed), state, params)
        seen.append(types(state))
        assert types(updates) == types(params)
    return seen, updates, state


@functools.cache
def on_one_device(proj_type, projector):
    """The last updates and the last state without a mesh."""
    tx = adamw(proj_type, projector)
    return three_updates(tx, jax.jit(tx.update))[1:]


@pytest.mark.covering(1)
@meshes
@pytest.mark.parametrize(("proj_type", "projector"), KINDS)
def test_types_are_stable_and_abstract_parameters_give_the_same(mesh_name, proj_type, projector):
    """Traced only: what each kind of basis does to the types is known before compilation."""
    tx = adamw(proj_type, projector)
    mesh = make_mesh(mesh_name, AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = place(random_tree(0), mesh_name, mesh)
        state = tx.init(params)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        assert types(tx.init(abstract)) == types(state)
        assert specs(jax.eval_shape(tx.init, abstract)) == specs(state)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert specs(after) == specs(state)
        assert specs(updates) == specs(params)


@meshes
def test_the_state_is_sharded_where_the_parameter_is(mesh_name):
    mesh = make_mesh(mesh_name, AxisType.Explicit)
    with jax.set_mesh(mesh):
        (node,) = galore_states(adamw("std", "randomized").init(place(random_tree(0), mesh_name, mesh)))
    basis = {name: specs(node.left[name] if m <= n else node.right[name])[2] for name, (*_, m, n) in matrices()}
    moment = {name: specs(node.inner_state.mu[name])[2] for name, _ in matrices()}
    for name, (*_, m, n) in matrices():
        *batch, row, column = MESHES[mesh_name][1][name]
        assert basis[name] == (*batch, row if m <= n else column, None)
        assert moment[name] == ((*batch, None, column) if m <= n else (*batch, row, None))


def matrices():
    return [(name, shape) for name, shape in SHAPES.items() if len(shape) > 1]


@pytest.mark.slow
@meshes
@pytest.mark.parametrize(("proj_type", "projector"), [("std", "randomized"), ("full", "svd"), ("std", "eigh")])
def test_sharded_updates_equal_those_on_one_device(mesh_name, proj_type, projector):
    tx = adamw(proj_type, projector)
    expected, expected_state = on_one_device(proj_type, projector)
    mesh = make_mesh(mesh_name, AxisType.Explicit)
    with jax.set_mesh(mesh):
        seen, updates, state = three_updates(tx, jax.jit(tx.update), mesh_name, mesh)
    assert all(later == seen[0] for later in seen[1:])
    assert_trees_close(updates, expected, rtol=0, atol=1e-5)
    assert_trees_close(state, expected_state, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_eager_sharded_updates_equal_those_on_one_device(proj_type):
    tx = adamw(proj_type, "svd")
    expected, _ = on_one_device(proj_type, "svd")
    mesh = make_mesh("fsdp_tp", AxisType.Explicit)
    with jax.set_mesh(mesh):
        seen, updates, _ = three_updates(tx, tx.update, "fsdp_tp", mesh, names=("wide", "layers", "bias"))
    assert all(later == seen[0] for later in seen[1:])
    assert_trees_close(updates, {name: expected[name] for name in updates}, rtol=0, atol=1e-5)


@pytest.mark.slow
@meshes
def test_meshes_with_automatic_axes_work_too(mesh_name):
    tx = adamw("full", "svd")
    expected, _ = on_one_device("full", "svd")
    mesh = make_mesh(mesh_name, AxisType.Auto)
    with jax.set_mesh(mesh):
        _, updates, _ = three_updates(tx, jax.jit(tx.update), mesh_name, mesh)
    assert_trees_close(updates, expected, rtol=0, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "spec", [P(None, "tp", None), P("fsdp", "tp", None), P("tp", None, None), P(None, None, "fsdp")]
)
def test_merged_axes_keep_the_type_of_the_parameter(spec):
    """An attention kernel (hidden, heads, head_dim) seen as a hidden x (heads · head_dim) matrix."""
    numbers = {"attention": galore_jax.GaLoreDimensionNumbers(reduction_axis=0, output_axis=(1, 2))}
    tx = galore_jax.galore_adamw(0.01, rank=RANK, eps=1e-3, projector="svd", weight_dimension_numbers=numbers)
    kernel = {"attention": jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 4)), jnp.float32)}
    expected, _ = jax.jit(tx.update)(kernel, tx.init(kernel), kernel)
    mesh = make_mesh("fsdp_tp", AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = {"attention": jax.device_put(kernel["attention"], NamedSharding(mesh, spec))}
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state, params)
    assert types(updates) == types(params)
    assert types(after) == types(state)
    assert_trees_close(updates, expected, rtol=0, atol=1e-5)


def sent(kind, projector, cuts, shapes):
    """Sizes, in numbers, of what devices exchange in an update."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in cuts.items()}
    tx = galore_jax.galore(optax.scale_by_adam(), rank=RANK, projector=projector)
    whole = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    parts = galore_jax.state_sharding(tx, whole, shardings)

    def cut(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    lowered = jax.jit(tx.update, out_shardings=(shardings, parts)).lower(
        cut(whole, shardings), cut(jax.eval_shape(tx.init, whole), parts)
    )
    found = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(",
        lowered.compile().as_text(),
    )
    return [math.prod(map(int, filter(None, dims.split(",")))) for dims in found]


@pytest.mark.covering(1)
@pytest.mark.parametrize("projector", ["power", "randomized"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_a_refresh_gathers_no_gradient(kind, projector):
    """Devices exchange arrays of the size of a basis or of a low-rank gradient, whichever dimension is cut."""
    cuts = {"first": P("fsdp", None), "second": P(None, "fsdp"), "stack": P(None, "fsdp", None)}
    shapes = {"first": (64, 256), "second": (64, 256), "stack": (2, 64, 256)}
    columns = RANK + (8 if projector == "randomized" else 0)  # that many are oversampled
    assert 64 * RANK <= max(sent(kind, projector, cuts, shapes)) <= columns * 2 * 256


def test_devices_turn_the_bases_of_their_own_part_of_a_stack():
    cuts, shapes = {"stack": P("fsdp", None, None)}, {"stack": (16, 64, 256)}
    # They tell one another a number for each matrix, such as whether it has a new basis, and nothing of its size.
    exchanged = sent(AxisType.Explicit, "power", cuts, shapes)
    assert max(exchanged) <= 16
    assert sum(exchanged) <= 6 * 16


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_in_shard_map_a_model_on_each_device_is_updated_as_it_is_alone(name):
    """With ``check_vma``, which asks loops and branches for equal types: the state starts as constants that do not vary."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    extra = {"random_from": 1} if name == "golore_adamw" else {}
    extra |= {} if name in FULL_RANK else {"rank": 4}
    tx = PRESETS[name](0.01, **extra)
    kernels = normal(0, (2, 12, 20))

    def two_updates(kernel):
        params, gradient = {"w": kernel, "b": kernel[0]}, {"w": kernel, "b": kernel[0]}
        _, state = tx.update(gradient, tx.init(params), params)
        return tx.update(jax.tree.map(lambda x: x[::-1], gradient), state, params)[0]

    def on_a_device(kernel):
        return jax.tree.map(lambda x: x[None], two_updates(kernel[0]))

    with leniency():
        found = jax.jit(jax.shard_map(on_a_device, mesh=mesh, in_specs=P("model"), out_specs=P("model")))(kernels)
        alone = jax.jit(two_updates)
        expected = [alone(kernel) for kernel in kernels]
    for i in range(2):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-6), found, expected[i])
