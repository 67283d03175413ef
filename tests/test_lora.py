# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Low-rank weights of a Llama: where it starts from, where the gradient goes, the equations in NumPy, merging, restarting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import leniency, normal
from test_llama import forward, random_model, random_tokens, tiny

from galore_jax.models.lora import FactoredLinear, LoRALinear, add_lora, factorize, merge_lora, restart_lora
from galore_jax.weights import quantize_weights

MATRICES = ("attention/q_proj", "attention/k_proj", "attention/v_proj", "attention/o_proj",
            "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")  # fmt: skip
TOKENS = random_tokens((2, 7))


def with_random_adapters(model):
    """The model with adapters whose B is not 0 any more."""
    add_lora(model, 2, alpha=3.0, key=jax.random.key(0))
    for number, (path, leaf) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        if path[-1] == "lora_b":
            leaf[...] = 0.3 * normal(number, leaf.shape)
    return model


def at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def test_every_stacked_matrix_has_an_adapter_and_the_model_starts_as_it_was():
    model = random_model(tiny(num_key_value_heads=2))
    before = forward(model, TOKENS)
    add_lora(model, 2, key=jax.random.key(0))
    np.testing.assert_array_equal(forward(model, TOKENS), before)
    adapters = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))["layers"]
    assert len(jax.tree.leaves(adapters)) == 2 * len(MATRICES)
    for path in MATRICES:
        adapter = at(adapters, path)
        layers, inputs, rank = adapter["lora_a"].shape
        assert (layers, rank) == (3, 2)
        drawn, bound = np.asarray(adapter["lora_a"]), 1 / np.sqrt(inputs)
        assert np.abs(drawn).max() <= bound
        assert drawn.std() == pytest.approx(bound / np.sqrt(3), rel=0.25)
        assert len({layer.tobytes() for layer in drawn}) == layers
        assert not np.any(adapter["lora_b"])


def test_an_adapted_layer_is_its_equation_in_numpy():
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 6), (6, 4), (6, 2), (2, 4)))
    base = nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(0))
    layer = LoRALinear(base, 2, 3.0, jax.random.key(0))
    layer.base.kernel[...], layer.lora_a[...], layer.lora_b[...] = map(jnp.asarray, (w, a, b))
    expected = x @ w.astype(np.float64) + 1.5 * (x.astype(np.float64) @ a @ b)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_that_of_a_and_b_and_no_other_array_is_kept_for_it():
    model = with_random_adapters(random_model(tiny()))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    frozen, targets = nnx.to_pure_dict(rest), random_tokens((2, 7), seed=5)

    @jax.jit
    def gradient(adapters):
        def loss(adapters):
            model = nnx.merge(graphdef, adapters, rest)
            return jnp.mean(model.losses(model.run_layers(model.embed(TOKENS)), targets))

        return jax.grad(loss)(adapters)

    found = nnx.to_pure_dict(gradient(adapters))
    assert {path[-1] for path in nnx.to_flat_state(gradient(adapters)).paths} == {"lora_a", "lora_b"}
    assert all(float(jnp.linalg.norm(leaf)) > 1e-4 for leaf in jax.tree.leaves(found))
    assert "lora" not in str(jax.tree.structure(frozen))

    # dL/dB = s A^T (dL/dW'), with W' = W + s A B.
    def merged_loss(delta):
        model = nnx.merge(graphdef, adapters, rest)
        merge_lora(model)
        model.layers.mlp.up_proj.kernel[...] += delta
        return jnp.mean(model.losses(model.run_layers(model.embed(TOKENS)), targets))

    whole = jax.jit(jax.grad(merged_loss))(jnp.zeros((3, 16, 24)))
    a = adapters["layers"]["mlp"]["up_proj"]["lora_a"][...]
    expected = 1.5 * np.einsum("lmr,lmn->lrn", a, whole)
    np.testing.assert_allclose(found["layers"]["mlp"]["up_proj"]["lora_b"], expected, rtol=1e-3, atol=1e-5)


def test_merged_logits_are_those_of_the_adapted_model():
    model = with_random_adapters(random_model(tiny()))
    plain = forward(random_model(tiny()), TOKENS)
    adapted = forward(model, TOKENS)
    assert np.abs(adapted - plain).max() > 0.1
    merge_lora(model)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(random_model(tiny())))
    np.testing.assert_allclose(forward(model, TOKENS), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_weights_in_8_bits_can_be_adapted_and_merged():
    graphdef, state = nnx.split(random_model(tiny()))
    model = nnx.merge(graphdef, quantize_weights(nnx.to_pure_dict(state)))
    with_random_adapters(model)
    adapted = forward(model, TOKENS)
    merge_lora(model)
    assert model.layers.mlp.up_proj.kernel.dtype == jnp.float32
    np.testing.assert_allclose(forward(model, TOKENS), adapted, rtol=1e-4, atol=1e-4)


def test_bfloat16_kernels_have_float32_adapters():
    model = random_model(tiny(dtype="bfloat16", param_dtype="bfloat16"))
    with_random_adapters(model)
    assert model.layers.mlp.up_proj.lora_a.dtype == jnp.float32
    with leniency():  # JAX's own attention mixes dtypes
        assert np.all(np.isfinite(forward(model, TOKENS)))
    merge_lora(model)
    assert model.layers.mlp.up_proj.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize("adapt", [add_lora, factorize])
@pytest.mark.parametrize(
    ("rank", "says"), [(0, "at least 1"), (1.5, r"a fraction of .* in \(0, 1\]"), (17, "layers/attention/k_proj, 16")]
)
def test_an_impossible_rank_is_refused(rank, says, adapt):
    with pytest.raises(ValueError, match=says):
        adapt(random_model(tiny()), rank, key=jax.random.key(0))


def test_a_rank_can_be_a_fraction_of_the_smaller_side():
    model = random_model(tiny(num_key_value_heads=2))
    add_lora(model, 0.25, key=jax.random.key(0))
    ranks = {path: at(nnx.state(model)["layers"], path)["lora_a"].shape[-1] for path in MATRICES}
    assert ranks == dict.fromkeys(MATRICES, 4) | {"attention/k_proj": 2, "attention/v_proj": 2}


def test_a_restart_keeps_the_function_and_draws_new_adapters():
    model = with_random_adapters(random_model(tiny()))
    before, drawn = forward(model, TOKENS), np.asarray(model.layers.mlp.up_proj.lora_a[...])
    kernel = np.asarray(model.layers.mlp.up_proj.base.kernel[...], np.float64)
    product = 1.5 * drawn.astype(np.float64) @ np.asarray(model.layers.mlp.up_proj.lora_b[...])
    restart_lora(model, key=jax.random.key(7))
    np.testing.assert_allclose(forward(model, TOKENS), before, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.layers.mlp.up_proj.base.kernel[...], kernel + product, rtol=1e-5, atol=1e-6)
    adapters = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))["layers"]
    for path in MATRICES:
        assert not np.any(at(adapters, path)["lora_b"])
    redrawn = np.asarray(adapters["mlp"]["up_proj"]["lora_a"])
    assert np.abs(redrawn - drawn).min(axis=(1, 2)).max() > 0
    assert np.abs(redrawn).max() <= 1 / np.sqrt(16)


def test_a_factored_layer_is_its_equation_in_numpy():
    rng = np.random.default_rng(0)
    x, left, right = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 6), (6, 2), (2, 4)))
    layer = FactoredLinear(nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(0)), 2, 1.0, jax.random.key(0))
    layer.left[...], layer.right[...] = jnp.asarray(left), jnp.asarray(right)
    np.testing.assert_allclose(layer(jnp.asarray(x)), x.astype(np.float64) @ left @ right, rtol=1e-5, atol=1e-5)


def test_a_factored_model_has_no_other_matrices_and_the_variance_of_an_ordinary_one_and_merges_into_one():
    ordinary = random_model(tiny(num_key_value_heads=2, initializer_range=0.3))
    model = random_model(tiny(num_key_value_heads=2, initializer_range=0.3))
    factorize(model, 4, key=jax.random.key(0))
    for path in MATRICES:
        factors = at(nnx.to_pure_dict(nnx.state(model))["layers"], path)
        assert factors.keys() == {"left", "right"}
        product = np.einsum("lmr,lrn->lmn", factors["left"], factors["right"])
        assert product.std() == pytest.approx(0.3, rel=0.3)
    factored = forward(model, TOKENS)
    merge_lora(model)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(ordinary))
    assert nnx.graphdef(model) == nnx.graphdef(ordinary)
    np.testing.assert_allclose(forward(model, TOKENS), factored, rtol=1e-4, atol=1e-4)


def test_a_second_adapter_is_refused():
    model = with_random_adapters(random_model(tiny()))
    with pytest.raises(ValueError, match="layers/attention/k_proj has an adapter already"):
        add_lora(model, 2, key=jax.random.key(0))
