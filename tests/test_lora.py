# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA on a Llama: the model it starts from, where the gradient goes, its equation in NumPy, and merging."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import leniency, quick_compilation  # noqa: F401
from test_llama import forward, random_model, random_tokens, tiny

from galore_jax.models.lora import LoRALinear, add_lora, merge_lora
from galore_jax.weights import quantize_weights

MATRICES = ("attention/q_proj", "attention/k_proj", "attention/v_proj", "attention/o_proj",
            "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")  # fmt: skip
TOKENS = random_tokens((2, 7))


def with_random_adapters(model):
    """The model with adapters whose B is not 0 any more."""
    add_lora(model, 2, alpha=3.0, key=jax.random.key(0))
    for number, (path, leaf) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        if path[-1] == "lora_b":
            leaf[...] = 0.3 * jax.random.normal(jax.random.key(number), leaf.shape)
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


@pytest.mark.parametrize(("rank", "says"), [(0, "at least 1"), (17, "layers/attention/k_proj, 16")])
def test_an_impossible_rank_is_refused(rank, says):
    with pytest.raises(ValueError, match=says):
        add_lora(random_model(tiny()), rank, key=jax.random.key(0))


def test_a_second_adapter_is_refused():
    model = with_random_adapters(random_model(tiny()))
    with pytest.raises(ValueError, match="layers/attention/k_proj has an adapter already"):
        add_lora(model, 2, key=jax.random.key(0))
