# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizer state on a mesh: every array is sharded as it should be from the start, stays so, and makes the same updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import galore_states, leniency

import galore_jax
from galore_jax import state_sharding
from galore_jax.layerwise import BlockStack, layerwise

EIGHT = ("fsdp", "model")  # the mesh is 2 x 4: FSDP and TP over all 8 devices take both of its axes
PARAMS = {
    "fsdp8": ((16, 40), P(EIGHT, None)),
    "tp8": ((32, 16), P(None, EIGHT)),
    "both": ((16, 1024), P("fsdp", "model")),  # large enough for 8 bits
    "stack": ((2, 16, 24), P(None, "fsdp", "model")),
    "experts": ((8, 8, 16), P(EIGHT, None, None)),  # rank = experts = m
    "embed": ((16, 512), P("model", "fsdp")),
    "bias": ((16,), P(EIGHT)),
}
RANK = 4
PRESETS = {
    "galore_adamw": {"transport": "rotate"},
    "galore_adamw_8bit": {},
    "q_galore_adamw_8bit": {"proj_type": "reverse_std"},
    "galore_adafactor": {"min_dim_size_to_factor": 4, "transport": "reset"},
    "fira_adamw": {},
    "apollo_adamw": {},
    "apollo_mini": {"rank": 1},
    "galore_muon": {},
}
STEPS = 20
TRAINED = ("fsdp8", "tp8", "both", "bias")  # by all presets

presets = pytest.mark.parametrize("preset", PRESETS)


def optimizer(preset):
    """The learning rate is small: a code of 8 bits that rounding elsewhere turns into its neighbor moves an update by 3 %."""
    settings = {"rank": RANK, "update_proj_gap": 6, "eps": 1e-3} | PRESETS[preset]
    return getattr(galore_jax, preset)(2e-4 if "8bit" in preset else 1e-3, weight_decay=0.1, **settings)


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 4), EIGHT, axis_types=(axis_type,) * 2)


def shardings_on(mesh):
    return {name: NamedSharding(mesh, spec) for name, (_, spec) in PARAMS.items()}


def abstract(shardings=None):
    sharding_of = (shardings or {}).get
    return {
        name: jax.ShapeDtypeStruct(shape, "float32", sharding=sharding_of(name)) for name, (shape, _) in PARAMS.items()
    }


def random_params(seed, names):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=PARAMS[name][0]).astype(np.float32) for name in names}


def train(tx, names, shardings=None, state_shardings=None):
    """Twenty steps down to a target with noise; the parameters, and the shardings of the state before and after."""
    out = None if shardings is None else (shardings, state_shardings)

    def step(params, state, number):
        def gradient(param, target):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(7), number), param.shape)
            return param - target + 0.1 * noise

        updates, state = tx.update(jax.tree.map(gradient, params, random_params(1, names)), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=out)
    params = jax.device_put(random_params(0, names), shardings)
    state = jax.jit(tx.init, out_shardings=state_shardings)(params)
    before = jax.tree.map(lambda x: x.sharding, state)
    for number in range(STEPS):
        params, state = step(params, state, jnp.int32(number))
    return params, before, jax.tree.map(lambda x: x.sharding, state)


@pytest.mark.slow
@presets
def test_twenty_sharded_steps_equal_those_on_one_device(preset):
    tx = optimizer(preset)
    names = tuple(PARAMS) if preset == "galore_adamw" else TRAINED
    shardings = {name: shardings_on(mesh_of())[name] for name in names}
    state_shardings = state_sharding(tx, random_params(0, names), shardings)
    expected, _, _ = train(tx, names)
    params, before, after = train(tx, names, shardings, state_shardings)
    assert before == after == state_shardings
    for name, param in params.items():
        assert param.sharding == shardings[name]
        np.testing.assert_allclose(param, expected[name], rtol=0, atol=1e-5, err_msg=name)
        assert np.max(np.abs(param - random_params(0, names)[name])) > 1e-3


@pytest.mark.covering(2)
@presets
def test_on_explicit_axes_it_is_the_type_that_init_makes_and_update_keeps(preset):
    tx = optimizer(preset)
    mesh = mesh_of(AxisType.Explicit)
    shardings = shardings_on(mesh)

    def specs(tree):
        return [(x.shape, tuple(x.sharding.spec) if x.sharding else ()) for x in jax.tree.leaves(tree)]

    expected = [tuple(sharding.spec) for sharding in jax.tree.leaves(state_sharding(tx, abstract(), shardings))]
    with jax.set_mesh(mesh):
        params = abstract(shardings)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
    assert [spec for _, spec in specs(state)] == expected
    assert specs(after) == specs(state)
    assert specs(updates) == specs(params)


def spec(tree, *path):
    for part in path:
        tree = tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tuple(tree.spec)


def test_a_basis_and_its_moments_keep_what_they_share_with_the_parameter():
    (node,) = galore_states(state_sharding(optimizer("galore_adamw"), abstract(), shardings_on(mesh_of())))
    assert {name: spec(node.left, name) for name in ("fsdp8", "both", "stack", "experts")} == {
        "fsdp8": (EIGHT, None),
        "both": ("fsdp", None),
        "stack": (None, "fsdp", None),
        "experts": (EIGHT, None, None),
    }
    assert spec(node.right, "tp8") == (EIGHT, None)
    for moment in (node.inner_state.mu, node.inner_state.nu):
        assert {name: spec(moment, name) for name in PARAMS} == {
            "fsdp8": (None, None),
            "tp8": (None, None),
            "both": (None, "model"),
            "stack": (None, None, "model"),
            "experts": (EIGHT, None, None),
            "embed": ("model", "fsdp"),  # not projected: as the parameter
            "bias": (EIGHT,),
        }
    assert spec(node, "count") == ()


def test_codes_follow_their_arrays_and_scales_their_blocks():
    (node,) = galore_states(state_sharding(optimizer("galore_adamw_8bit"), abstract(), shardings_on(mesh_of())))
    moments = node.inner_state.inner_state.mu
    assert spec(moments, "both", "codes") == (None, "model")
    assert spec(moments, "both", "scales") == (None, "model")  # a block on each of 4 devices
    assert spec(moments, "embed", "codes") == spec(moments, "embed", "scales") == ("model", "fsdp")
    (node,) = galore_states(state_sharding(optimizer("q_galore_adamw_8bit"), abstract(), shardings_on(mesh_of())))
    assert spec(node.right, "both", "packed") == spec(node.right, "both", "scales") == ("model", None)
    assert spec(node.right, "both", "columns") == (None,)
    assert spec(node.inner_state.inner_state.mu, "both") == ("fsdp", None)


def test_blocks_that_a_cut_would_divide_are_not_cut():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    shardings = {"w": NamedSharding(mesh, P(None, "model"))}
    state = state_sharding(optimizer("galore_adamw_8bit"), {"w": jax.ShapeDtypeStruct((8, 1024), "float32")}, shardings)
    moment = optax.tree.get(state, "mu")["w"]
    assert (spec(moment, "codes"), spec(moment, "scales")) == ((None, "model"), (None, None))  # 4 blocks, 8 devices


def test_any_transformation_with_an_init_has_shardings():
    shardings = shardings_on(mesh_of())
    with leniency():
        state = state_sharding(optax.MultiSteps(optimizer("galore_adamw"), 4), abstract(), shardings)
    assert {name: spec(state, "acc_grads", name) for name in PARAMS} == {
        name: tuple(spec) for name, (_, spec) in PARAMS.items()
    }
    stack = BlockStack(
        split=lambda params: ({"w": params["w"]}, {"head": params["head"]}),
        join=lambda layers, rest: layers | rest,
        embed=lambda rest, batch: batch,
        block=lambda layer, x: x @ layer["w"],
        loss=lambda rest, x, batch: jnp.mean(x @ rest["head"]),
    )
    params = {"w": jax.ShapeDtypeStruct((3, 16, 16), "float32"), "head": jax.ShapeDtypeStruct((16,), "float32")}
    placed = {"w": NamedSharding(mesh_of(), P(None, "fsdp", "model")), "head": NamedSharding(mesh_of(), P("model"))}
    state = state_sharding(layerwise(stack, optimizer("galore_adamw")), params, placed)
    (node,) = galore_states(state.layers)
    assert (spec(node.left, "w"), spec(node.inner_state.mu, "w")) == ((None, "fsdp", None), (None, None, "model"))


def test_mistakes_name_the_parameter():
    tx, params = optimizer("galore_adamw"), {"w": jax.ShapeDtypeStruct((10, 16), "float32")}
    with pytest.raises(TypeError, match=r"sharding of 'w' is .*write a jax\.sharding\.NamedSharding"):
        state_sharding(tx, params, {"w": P("fsdp")})
    with pytest.raises(ValueError, match=r"'w' of shape \(10, 16\) cannot be sharded"):
        state_sharding(tx, params, {"w": NamedSharding(mesh_of(), P("model"))})
    other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    pair = {"w": NamedSharding(mesh_of(), P()), "z": NamedSharding(other, P())}
    with pytest.raises(ValueError, match="sharding of 'z' is on the mesh"):
        state_sharding(tx, params | {"z": params["w"]}, pair)
