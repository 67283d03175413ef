# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What other families change of a LLaMA, through the cache, the layer-wise step, adapters, meshes, plans and runs.

That the models compute what transformers does is in ``test_huggingface.py``.
"""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import leniency, shared_programs  # noqa: F401
from test_llama import assert_pieces_are_the_whole, forward, random_model, random_tokens, shapes_by_path, tiny

from galore_jax.cli import main
from galore_jax.layerwise import layerwise
from galore_jax.layouts import layouts
from galore_jax.models import Llama, LlamaConfig, generate, load_hf, save_hf
from galore_jax.models.llama import RMSNorm, block_stack
from galore_jax.models.lora import add_lora, factorize, merge_lora
from galore_jax.training import PretrainConfig, run_pretrain
from galore_jax.training.mesh import make_mesh, param_shardings
from galore_jax.training.plan import PlanConfig, prepare
from galore_jax.training.run_folder import from_json
from galore_jax.training.tokenizer import ByteTokenizer
from galore_jax.weights import is_int8, quantize_weights

QWEN = {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "qk_norm": True}
SMOLLM = {"rope_layers": "101", "attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
GEMMA = {
    "num_key_value_heads": 2, "sliding_window": 4, "local_layers": "110", "rope_local_theta": 50.0, "qk_norm": True,
    "query_pre_attn_scalar": 6.0, "sandwich_norms": True, "zero_centered_norms": True, "scaled_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_max_position_embeddings": 16}
# Each flag with each of the others: layers that are local and rotated, local and not, and global and rotated.
ALL = SMOLLM | GEMMA | YARN


def trained(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


# Parameters


@pytest.mark.parametrize("overrides", [QWEN, SMOLLM, GEMMA, ALL])
def test_closed_form_counts_the_parameters_of_every_family(overrides):
    assert tiny(**overrides).num_params == sum(math.prod(shape) for shape in shapes_by_path(tiny(**overrides)).values())


def test_only_the_matrices_of_the_blocks_are_projected_and_stored_in_8_bits():
    params = trained(nnx.eval_shape(lambda: Llama(tiny(**ALL), rngs=nnx.Rngs(0))))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    kernels = {path for path in paths if path.startswith("layers/") and path.endswith("/kernel")}
    found = dict(zip(paths, layouts(params), strict=True))
    assert len(kernels) == 7
    assert {path for path, layout in found.items() if not (layout.kind or layout.unclear)} == kernels
    assert all((found[path].reduction, found[path].output) == ((1,), (2,)) for path in kernels)
    stored = jax.eval_shape(quantize_weights, params)
    leaves = jax.tree.leaves_with_path(stored, is_leaf=is_int8)
    assert {jax.tree_util.keystr(k, simple=True, separator="/") for k, leaf in leaves if is_int8(leaf)} == kernels


def test_a_zero_centered_norm_starts_as_the_identity_with_zeros():
    norm = RMSNorm(tiny(**ALL), 4)
    assert not np.any(norm.scale[...])
    np.testing.assert_allclose(norm(jnp.array([[[1.0, -1.0, 1.0, 1.0]]])), [[[1.0, -1.0, 1.0, 1.0]]], rtol=1e-6)


def test_a_bias_is_cut_as_the_outputs_of_its_kernel():
    params = trained(nnx.eval_shape(lambda: Llama(tiny(**ALL), rngs=nnx.Rngs(0))))
    mesh = make_mesh("fsdp=2,model=2", jax.devices()[:4])
    found = param_shardings(mesh, params)["layers"]
    specs = {name: found["attention"][name]["bias"].spec for name in ("q_proj", "o_proj")}
    assert specs == {"q_proj": jax.P(None, "model"), "o_proj": jax.P(None, "fsdp")}
    assert found["attention"]["q_norm"]["scale"].spec == jax.P()


# Where layers differ


def test_a_sequence_in_pieces_has_the_residual_stream_of_the_whole():
    assert_pieces_are_the_whole(random_model(tiny(**ALL), scale=0.2))


@pytest.mark.slow
def test_a_layer_wise_step_is_the_plain_one():
    config = tiny(**ALL)
    model = random_model(config, scale=0.2)
    weights, batch = trained(model), np.asarray(random_tokens((4, 10)))
    graphdef = nnx.graphdef(random_model(dataclasses.replace(config, remat=True)))

    def loss(weights):
        model = nnx.merge(graphdef, weights)
        return jnp.mean(model.losses(model.run_layers(model.embed(batch[:, :-1])), batch[:, 1:]))

    init, step = layerwise(block_stack(config), optax.sgd(1.0), accumulate=2)
    new, _, metrics = jax.jit(step)(weights, init(weights), batch)
    value, grads = jax.jit(jax.value_and_grad(loss))(weights)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    jax.tree.map(lambda a, w, g: np.testing.assert_allclose(a, w - g, rtol=1e-4, atol=1e-5), new, weights, grads)


def test_flags_of_another_number_of_layers_are_refused():
    config = tiny(**ALL)
    weights = trained(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    stack = block_stack(config)
    flags = jax.tree.map(lambda leaf: leaf[:2], stack.flags)
    with pytest.raises(ValueError, match=r"flags\['local'\] has the shape \(2,\), but the stack has 3 layers"):
        jax.eval_shape(layerwise(stack._replace(flags=flags), optax.sgd(1.0)).init, weights)


# Lengths


def test_dynamic_wavelengths_are_those_of_a_sequence_as_long_as_the_cache():
    short = {"max_position_embeddings": 8, "rope_type": "dynamic", "rope_factor": 3.0}
    model = random_model(tiny(**short))
    tokens = random_tokens((1, 20))
    expected = forward(model, tokens)
    hidden, _ = model.extend(tokens[:, :12], model.empty_cache(1, 20), jnp.int32(0))
    np.testing.assert_allclose(model.head(hidden), expected[:, :12], rtol=1e-4, atol=1e-4)
    within = random_model(tiny(max_position_embeddings=8))
    np.testing.assert_array_equal(forward(model, tokens[:, :8]), forward(within, tokens[:, :8]))
    assert np.abs(forward(model, tokens[:, :12]) - expected[:, :12]).max() > 1e-3
    with pytest.raises(ValueError, match="exceed max_position_embeddings=24"):
        generate(model, [1, 2], 23, key=jax.random.key(0))
    with pytest.raises(ValueError, match="A sequence of 25 tokens is longer"):
        model(jnp.zeros((1, 25), jnp.int32))


# Low-rank weights


@pytest.mark.slow
def test_adapters_and_factors_keep_biases():
    tokens = random_tokens((2, 7))
    model = random_model(tiny(**ALL), scale=0.2)
    before = forward(model, tokens)
    add_lora(model, 2, key=jax.random.key(0))
    np.testing.assert_array_equal(forward(model, tokens), before)
    merge_lora(model)
    np.testing.assert_allclose(forward(model, tokens), before, rtol=1e-6)
    factorize(model, 4, key=jax.random.key(0))
    factored = forward(model, tokens)
    merge_lora(model)
    np.testing.assert_allclose(forward(model, tokens), factored, rtol=1e-4, atol=1e-4)
    assert nnx.graphdef(model) == nnx.graphdef(random_model(tiny(**ALL)))
    model.layers.mlp.up_proj.bias[...] += 1.0
    assert np.abs(forward(model, tokens) - factored).max() > 1e-3


# Configurations


def test_a_configuration_of_before_is_read_and_written_as_it_was():
    """The text of a configuration is in the fingerprint of a model that was fine-tuned."""
    config = LlamaConfig.preset("demo")
    assert repr(config) == (
        "LlamaConfig(hidden_size=128, intermediate_size=352, num_attention_heads=4, num_hidden_layers=4, vocab_size=256, "
        "num_key_value_heads=None, head_dim=None, max_position_embeddings=1024, rms_norm_eps=1e-06, rope_theta=10000.0, "
        "rope_type='default', rope_factor=1.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, "
        "rope_original_max_position_embeddings=None, sliding_window=None, tie_word_embeddings=False, "
        "initializer_range=0.02, dtype='float32', param_dtype='float32', remat=False)"
    )
    assert eval(repr(tiny(**ALL))) == tiny(**ALL)
    assert from_json(LlamaConfig, json.loads(json.dumps(dataclasses.asdict(tiny(**ALL))))) == tiny(**ALL)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"rope_layers": "10"}, "rope_layers='10' must be a string of 0 and 1, one for each of the 3 layers"),
        ({"sliding_window": 4, "local_layers": "1x0"}, "local_layers='1x0' must be a string of 0 and 1"),
        ({"local_layers": "110"}, "local_layers='110' is of local layers, and without a sliding_window there are none"),
        ({"rope_local_theta": 5.0}, "rope_local_theta=5.0 is of local layers"),
        ({"rope_local_theta": 0.0, "sliding_window": 4}, "rope_local_theta=0.0 must be a positive finite number"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not known; choose one of silu, gelu_pytorch_tanh"),
        ({"rope_type": "longrope"}, "rope_type='longrope' is not known; choose one of default, linear, dynamic"),
        ({"rope_type": "yarn", "rope_theta": 1.0}, "rope_theta=1.0 must be greater than 1"),
        ({"rope_type": "dynamic", "head_dim": 2}, "rope_type='dynamic' needs heads of more than one pair"),
    ],
)
def test_what_no_model_can_be_is_refused_in_one_sentence(overrides, says):
    with pytest.raises(ValueError, match=says) as error:
        tiny(**overrides)
    assert "\n" not in str(error.value)


# The commands


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tiny Hugging Face folder of a Gemma 3 on bytes."""
    folder = tmp_path_factory.mktemp("gemma") / "tiny-gemma"
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3, vocab_size=257, **GEMMA
    )
    save_hf(random_model(dataclasses.replace(config, max_position_embeddings=64), scale=0.2), folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    return folder


@pytest.mark.slow
def test_every_command_takes_a_gemma(gemma, tmp_path, capsys):
    """Pre-training its shape layer by layer, fine-tuning its weights, and continuing a text."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {n} of a text for a few batches." for n in range(200)))
    rows = [json.dumps({"prompt": f"say {letter}: ", "response": letter * 3}) for letter in "abcd" * 8]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    shape = str(gemma / "config.json")
    pretrained = PretrainConfig(
        model=shape, data=str(tmp_path / "text.txt"), out=tmp_path / "run", steps=2, seq=16, batch=2, sample_tokens=0,
        layerwise=True, clip=0.0, warmup_steps=0, optimizer="adamw",
    )  # fmt: skip
    with leniency():
        assert math.isfinite(run_pretrain(pretrained)["final_val_loss"])
        tune = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "tuned"), "--seq", "32", "--batch", "8"]
        assert main(["finetune", "--model", str(gemma), *tune, "--rank", "4", "--steps", "2"]) == 0
        tuned = load_hf(tmp_path / "tuned" / "best")
        assert dataclasses.asdict(tuned.config) == dataclasses.asdict(load_hf(gemma).config)
        capsys.readouterr()
        assert (
            main(
                [
                    "generate",
                    "--model",
                    str(tmp_path / "tuned" / "best"),
                    "--prompt",
                    "say a: ",
                    "--max-new-tokens",
                    "5",
                ]
            )
            == 0
        )
    assert capsys.readouterr().out.startswith("say a: ")


def test_a_plan_knows_the_parameters_and_the_state_of_a_gemma(gemma):
    settings = {"model": str(gemma / "config.json"), "target": "t4", "dtype": "f32", "batch": 2, "seq": 16}
    found = prepare(PlanConfig(**settings, optimizer="adamw", layerwise=True, clip=0.0)).exact_bytes()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(trained(load_hf(gemma)))]
    assert found["params_bytes"] == sum(sizes)
    assert 0 <= found["optimizer_state_bytes"] - 2 * sum(sizes) < 200  # counters
