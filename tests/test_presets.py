# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a preset adds around galore(): plain optimizers on the rest, weight decay of the full weight, schedules."""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_trees_close, leniency, normal

import galore_jax
from galore_jax import codecs
from galore_jax.codecs import SignedBlocks, UnsignedBlocks
from galore_jax.presets import FULL_RANK, PRESETS, RANK_ONE
from galore_jax.presets._arguments import (
    AdamW8bitArguments,
    AdamWArguments,
    CodedMuonArguments,
    GaLoreArguments,
)

PARAMS = {
    "embed": {"embedding": normal(0, (50, 16))},
    "block": {"kernel": normal(1, (16, 24)), "norm": {"scale": normal(2, (16,))}},
    "lm_head": {"kernel": normal(3, (16, 50))},
}


def gradients(steps=4):
    return [jax.tree.map(lambda p, s=s: normal(s, p.shape), PARAMS) for s in range(10, 10 + steps)]


def train(tx, params=PARAMS, gradients=None):
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def without_kernel(tree):
    return {**tree, "block": {"norm": tree["block"]["norm"]}}


def test_embeddings_head_and_norms_are_on_plain_adamw_at_the_same_learning_rate():
    schedule = optax.cosine_decay_schedule(0.1, 10)
    ours, _ = train(galore_jax.galore_adamw(schedule, rank=4, weight_decay=0.1), gradients=gradients())
    theirs, _ = train(optax.adamw(schedule, weight_decay=0.1), gradients=gradients())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        without_kernel(ours),
        without_kernel(theirs),
    )
    assert not np.allclose(ours["block"]["kernel"], theirs["block"]["kernel"])


@pytest.mark.covering(6)
@pytest.mark.parametrize("name", PRESETS)
def test_complex_parameters_are_on_plain_adamw_and_a_bad_entry_holds_them(name):
    """Adafactor has its own rest, and LDAdam other decay rates."""
    params = {"kernel": normal(0, (16, 24)), "phases": jax.lax.complex(normal(1, (8, 24)), normal(2, (8, 24)))}
    gradients = [jax.tree.map(lambda p, k=k: (p * k).astype(p.dtype), params) for k in (1.0, -2.0)]
    rank = {} if name in FULL_RANK else {"rank": 1 if name in RANK_ONE else 4}
    ours = PRESETS[name](0.1, **rank, **({"random_from": 1} if name == "golore_adamw" else {}))
    eps = 1e-6 if name.startswith(("apollo", "q_apollo")) else 1e-8
    theirs = optax.adamw(0.1, weight_decay=0, eps=eps)
    with leniency():  # Optax's own mixes dtypes
        found, state = train(ours, params, gradients)
        expected, _ = train(theirs, params, gradients)
        bad = {**params, "phases": params["phases"].at[0, 0].set(complex(0, np.nan))}
        updates, _ = jax.jit(ours.update)(bad, state, found)
    if name not in ("galore_adafactor", "ldadam"):
        np.testing.assert_allclose(found["phases"], expected["phases"], rtol=2e-5)
    np.testing.assert_array_equal(updates["phases"], 0)
    assert jnp.all(jnp.isfinite(updates["kernel"]))


def test_embeddings_head_and_norms_are_on_plain_adafactor():
    ours, _ = train(galore_jax.galore_adafactor(0.1, rank=4, momentum=0.9), gradients=gradients())
    theirs, _ = train(optax.adafactor(0.1, multiply_by_parameter_scale=False, momentum=0.9), gradients=gradients())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        without_kernel(ours),
        without_kernel(theirs),
    )


def test_adafactor_scales_by_the_full_parameter_and_factors_the_low_rank_moment():
    params = {"w": 3 * normal(0, (256, 320))}
    gradient = [{"w": normal(1, (256, 320))}]
    plain, state = train(galore_jax.galore_adafactor(0.1, rank=128), params, gradient)
    scaled, _ = train(galore_jax.galore_adafactor(0.1, rank=128, multiply_by_parameter_scale=True), params, gradient)
    rms = float(jnp.sqrt(jnp.mean(params["w"] ** 2)))
    np.testing.assert_allclose(scaled["w"] - params["w"], rms * (plain["w"] - params["w"]), rtol=1e-4, atol=1e-5)
    assert optax.tree.get(state, "v_row")["w"].size == 128
    assert optax.tree.get(state, "v_col")["w"].size == 320


@pytest.mark.covering(1)
@pytest.mark.parametrize("preset", [galore_jax.galore_adamw, galore_jax.galore_adafactor])
def test_weight_decay_acts_on_the_full_weight_and_not_in_the_subspace(preset):
    """One step with decay minus one step without it is -learning_rate · decay · W, in every direction."""
    step = gradients(1)
    decayed, _ = train(preset(0.1, rank=4, weight_decay=0.5), gradients=step)
    plain, _ = train(preset(0.1, rank=4), gradients=step)
    jax.tree.map(lambda d, p, w: np.testing.assert_allclose(d - p, -0.1 * 0.5 * w, atol=1e-6), decayed, plain, PARAMS)


def test_a_weight_decay_mask_chooses_what_decays():
    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    step = gradients(1)
    tx = galore_jax.galore_adamw(0.1, rank=4, weight_decay=0.5, weight_decay_mask=matrices)
    masked, _ = train(tx, gradients=step)
    plain, _ = train(galore_jax.galore_adamw(0.1, rank=4), gradients=step)
    np.testing.assert_array_equal(masked["block"]["norm"]["scale"], plain["block"]["norm"]["scale"])
    assert not np.allclose(masked["block"]["kernel"], plain["block"]["kernel"])


every_preset = pytest.mark.parametrize("name", PRESETS)
# A few presets need or have more than a learning rate.
ARGUMENTS = {
    "golore_adamw": {"random_from": 1},
    "galore_adafactor": {"momentum": 0.9, "multiply_by_parameter_scale": True},
}


def rank_of(name):
    """A rank for matrices of 16 x 24, if the preset has one."""
    return {} if name in FULL_RANK else {"rank": 1 if name in RANK_ONE else 4}


@pytest.mark.covering(1)
@every_preset
def test_a_preset_can_be_injected_and_its_learning_rate_changed(name):
    """Every other number is an array then, such as update_proj_gap, seed, momentum or random_from."""
    arguments = rank_of(name) | ARGUMENTS.get(name, {})
    injected = optax.inject_hyperparams(PRESETS[name], static_args=("rank",) if "rank" in arguments else ())(
        learning_rate=0.1, **arguments
    )
    plain = PRESETS[name](0.2, **arguments)
    state, expected_state = injected.init(PARAMS), plain.init(PARAMS)
    numbers = {"learning_rate", "weight_decay", "seed"} & inspect.signature(PRESETS[name]).parameters.keys()
    assert numbers <= state.hyperparams.keys()
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    with leniency():
        update, expected_update = jax.jit(injected.update), jax.jit(plain.update)
        for gradient in gradients(2):
            updates, state = update(gradient, state, PARAMS)
            expected, expected_state = expected_update(gradient, expected_state, PARAMS)
            assert_trees_close(updates, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.covering(5)
@every_preset
def test_a_default_that_fixes_shapes_is_no_hyperparameter(name):
    """Without ``static_args`` and at every default, also where ``init`` and ``update`` are traced."""
    params = {"kernel": jax.ShapeDtypeStruct((300, 320), jnp.float32), "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}
    arguments = {"random_from": 1} if name == "golore_adamw" else {}
    injected, plain = (
        optax.inject_hyperparams(PRESETS[name])(learning_rate=0.1, **arguments),
        PRESETS[name](0.1, **arguments),
    )
    state = jax.eval_shape(injected.init, params)
    expected = jax.eval_shape(plain.init, params)
    assert jax.tree.map(jnp.shape, state.inner_state) == jax.tree.map(jnp.shape, expected)
    with leniency():
        _, after = jax.eval_shape(injected.update, params, state, params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["galore_adamw", "galore_muon", "ldadam"])
def test_hyperparameters_in_float32_are_those_of_a_preset_on_bfloat16_parameters(name):
    """The documented recipe; in bfloat16, the dtype of the parameters, b2 = 0.999 is 1."""
    params, gradient = (jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree) for tree in (PARAMS, gradients(1)[0]))
    inject = optax.inject_hyperparams(PRESETS[name], static_args="rank", hyperparam_dtype=jnp.float32)
    injected, plain = inject(learning_rate=0.1, rank=4), PRESETS[name](0.1, rank=4)
    state = injected.init(params)
    assert state.hyperparams["b2"].dtype == jnp.float32
    with leniency():
        updates, _ = jax.jit(injected.update)(gradient, state, params)
        expected, _ = jax.jit(plain.update)(gradient, plain.init(params), params)
    # As with Optax's own optimizers, these updates are in float32.
    updates = jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates)
    assert_trees_close(updates, expected, rtol=2**-7, atol=1e-6)


ADAM = [name for name in PRESETS if "mu_dtype" in inspect.signature(PRESETS[name]).parameters]


def test_presets_on_adam_take_mu_dtype():
    without = {
        "galore_adafactor",
        "galore_adamw_8bit",
        "q_galore_adamw_8bit",
        "q_apollo_mini",
        "muon_8bit",
        "muon_4bit",
        "muon_2bit",
        "adamw_4bit",
    }
    assert set(PRESETS) - set(ADAM) == without


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ADAM)
def test_first_moments_take_two_bytes_a_number_in_bfloat16(name):
    """Bytes of state on bfloat16 parameters, and the same updates as Optax's AdamW where nothing is projected."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    arguments = {"rank": 1 if name in RANK_ONE else 4, "random_from": 1, "update_proj_gap": 1}
    taken = inspect.signature(PRESETS[name]).parameters
    make = functools.partial(PRESETS[name], 0.1, **{key: value for key, value in arguments.items() if key in taken})
    tx = make(mu_dtype="bfloat16")
    # The moments of LDAdam's matrices stay in float32.
    of_the_matrix = {"ldadam": 0, "muon": 16 * 24}.get(name, arguments["rank"] * 24)
    numbers = of_the_matrix + 50 * 16 + 16 + 16 * 50
    assert galore_jax.state_bytes(make(), params) - galore_jax.state_bytes(tx, params) == 2 * numbers

    state = tx.init(params)
    rest = {"embed": PARAMS["embed"], "lm_head": PARAMS["lm_head"]}
    settings = {key: taken[key].default for key in ("b1", "b2", "eps", "weight_decay")}
    adamw = optax.adamw(0.1, **settings, mu_dtype="bfloat16")
    adam_state = adamw.init(rest)
    update, adam_update = jax.jit(tx.update), jax.jit(adamw.update)
    with leniency():
        for gradient in gradients(3):
            gradient = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient)
            updates, new = update(gradient, state, params)
            assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
            state = new
            wide = {key: jax.tree.map(lambda g: g.astype(jnp.float32), gradient[key]) for key in rest}
            expected, adam_state = adam_update(wide, adam_state, rest)
            narrow = jax.tree.map(lambda u: u.astype(jnp.bfloat16), expected)
            assert_trees_close({key: updates[key] for key in rest}, narrow, rtol=2**-7, atol=1e-5)
    assert np.any(updates["block"]["kernel"])


@pytest.mark.parametrize(
    ("arguments", "preset"),
    [
        (GaLoreArguments, galore_jax.galore),
        (AdamWArguments, galore_jax.galore_adamw),
        (AdamW8bitArguments, galore_jax.galore_adamw_8bit),
        (CodedMuonArguments, galore_jax.muon_8bit),
    ],
)
def test_type_checkers_see_the_arguments_of_a_preset(arguments, preset):
    names = set(inspect.signature(preset).parameters) - {"learning_rate", "inner"}
    assert typing.get_type_hints(arguments).keys() == names | ({"residual"} if "rank" in names else set())


@pytest.mark.slow
def test_adafactor_treats_the_layers_of_a_stack_one_by_one():
    """A layer whose gradient is thirty times larger must not clip the others."""
    layers = [
        {"w": jnp.stack([normal(10 * s + i, (160, 200)) * (30.0 if i == s else 1.0) for i in range(3)])}
        for s in range(3)
    ]
    stacked, _ = train(galore_jax.galore_adafactor(0.1, rank=128), {"w": jnp.zeros((3, 160, 200))}, layers)
    separate, _ = train(
        galore_jax.galore_adafactor(0.1, rank=128), [jnp.zeros((160, 200))] * 3, [list(g["w"]) for g in layers]
    )
    np.testing.assert_allclose(stacked["w"], jnp.stack(separate), atol=2e-5)


@pytest.mark.filterwarnings("ignore:galore projects none")
def test_moments_are_float32_for_bfloat16_parameters_even_where_nothing_is_projected():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = galore_jax.galore_adamw(0.1, rank=1.0).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


EIGHT_BIT = (galore_jax.galore_adamw_8bit, galore_jax.q_galore_adamw_8bit)
eight_bit = pytest.mark.parametrize("preset", EIGHT_BIT)
LARGE = {
    "embed": {"embedding": normal(0, (300, 64))},
    "block": {"kernel": normal(1, (64, 600)), "down": normal(2, (2, 700, 64)), "norm": {"scale": normal(3, (64,))}},
    "lm_head": {"kernel": normal(4, (64, 300))},
}


@eight_bit
def test_the_8_bit_presets_take_the_arguments_of_galore_adamw(preset):
    ours, theirs = inspect.signature(preset).parameters, inspect.signature(galore_jax.galore_adamw).parameters
    assert list(ours) == [name for name in theirs if name != "mu_dtype"]
    changed = {name: p.default for name, p in ours.items() if p.default != theirs[name].default}
    quantized = {"refresh": "lazy", "basis_codec": "int4"}
    assert changed == ({"basis_codec": "bfloat16"} if preset is EIGHT_BIT[0] else quantized)
    assert preset.__doc__
    assert preset.__name__ in ("galore_adamw_8bit", "q_galore_adamw_8bit")
    with pytest.raises(TypeError, match="unexpected keyword argument 'rnak'"):
        preset(0.1, rnak=4)
    with pytest.raises(TypeError, match="learning_rate"):
        preset(rank=4)
    with pytest.raises(ValueError, match="basis_codec is 'int3'"):
        preset(0.1, basis_codec="int3")


@pytest.mark.slow
@eight_bit
def test_the_hyperparameters_of_the_8_bit_presets_can_be_injected(preset):
    tx = optax.inject_hyperparams(preset, static_args=("rank",))(learning_rate=0.1, rank=16, weight_decay=0.1)
    state = tx.init(LARGE)
    assert {"learning_rate", "b1", "eps", "weight_decay"} <= set(state.hyperparams)
    update = jax.jit(tx.update)
    with leniency():
        once, _ = update(LARGE, state, LARGE)
        state.hyperparams["learning_rate"] = state.hyperparams["learning_rate"] * 2
        twice, _ = update(LARGE, state, LARGE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), once, twice)


@pytest.mark.covering(1)
@pytest.mark.parametrize("basis_codec", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("rank", [8, 33])
def test_the_bytes_of_the_8_bit_presets_are_the_formula(rank, basis_codec):
    """Kernel 64 x 600 with its basis on the left, two matrices 700 x 64 with theirs on the right, two embeddings, a norm."""
    r, k = rank, 64

    def basis(matrices):
        half = -(-r // 2)
        return matrices * {"float32": 4 * k * r, "bfloat16": 2 * k * r, "int4": k * half + 4 * k + 4 * r}[basis_codec]

    def moment(rows, n):
        """Of 4,096 numbers and a last axis of 16 or more one byte each and 4 for each block of up to 256; else 4 each."""
        return rows * n + 4 * rows * -(-n // 256) if rows * n >= 4096 and n >= 16 else 4 * rows * n

    moments = moment(r, 600) + moment(2 * 700, r) + moment(300, 64) + moment(64, 300) + 4 * 64
    counts = 6 * 4  # GaLoreState's four, QuantizeState's and Adam's
    tx = galore_jax.galore_adamw_8bit(0.1, rank=rank, basis_codec=basis_codec)
    assert galore_jax.state_bytes(tx, LARGE) == basis(1 + 2) + 2 * moments + counts
    assert galore_jax.state_bytes(tx, LARGE) == sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(LARGE)))
    if basis_codec == "int4":
        lazy = 3 * 4 * (1 + 1 + 5)  # for each matrix its gap, when it is due, and five overlaps
        q_galore = galore_jax.q_galore_adamw_8bit(0.1, rank=rank)
        assert galore_jax.state_bytes(q_galore, LARGE) == galore_jax.state_bytes(tx, LARGE) + lazy
        # With the bases on the larger sides the moments are on the smaller.
        bases = sum(side * -(-r // 2) + 4 * side + 4 * r for side in (600, 700, 700))
        moments = moment(64, r) + moment(2 * r, 64) + moment(300, 64) + moment(64, 300) + 4 * 64
        q_galore = galore_jax.q_galore_adamw_8bit(0.1, rank=rank, proj_type="reverse_std")
        assert galore_jax.state_bytes(q_galore, LARGE) == bases + 2 * moments + counts + lazy


TARGET = jax.tree.map(lambda p: normal(p.size, p.shape), LARGE)


@functools.cache
def trained(preset):
    """25 steps of noisy least squares: the parameters and the state."""
    tx = preset(0.05, rank=32, scale=1.0, update_proj_gap=5, proj_type="std")

    def noise(seed, p):
        return jax.random.normal(jax.random.fold_in(jax.random.key(p.size), seed), p.shape)

    def step(carry, seed):
        params, state = carry
        gradient = jax.tree.map(lambda p, t: p - t + 0.3 * noise(seed, p), params, TARGET)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    with leniency():
        run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(25)))
        (params, state), _ = run((LARGE, tx.init(LARGE)))
    return params, state


@pytest.mark.slow
@eight_bit
def test_the_8_bit_presets_train_like_the_float32_one(preset):
    """Also embeddings and head, whose moments are large and so in 8 bits too; a small norm's are not."""
    ours, state = trained(preset)
    theirs, _ = trained(galore_jax.galore_adamw)
    adam = state[0].inner_state.inner_state
    for moment, kind in ((adam.mu, SignedBlocks), (adam.nu, UnsignedBlocks)):
        leaves, _ = codecs.flatten(moment)
        assert [type(leaf) for leaf in leaves if codecs.is_coded(leaf)] == [kind] * 4
        assert moment["block"]["norm"]["scale"].dtype == jnp.float32

    def check(a, b, start, t):
        """The distance still to go."""
        assert abs(np.linalg.norm(a - t) - np.linalg.norm(b - t)) < 0.02 * np.linalg.norm(start - t)

    jax.tree.map(check, ours, theirs, LARGE, TARGET)
