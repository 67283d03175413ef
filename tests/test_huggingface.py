# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Models from and for Hugging Face: what transformers computes with them, round trips, and files that are not right."""

from __future__ import annotations

import dataclasses
import json
import warnings

import huggingface_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from huggingface_models import BASE, LLAMA3, RECORD, TOKENS, VARIETIES, YARN, write
from safetensors.numpy import load_file, save_file
from test_llama import forward

from galore_jax.models import Llama, LlamaConfig, huggingface, load_hf, save_hf
from galore_jax.models.huggingface_config import config_from_huggingface, config_to_huggingface
from galore_jax.weights import quantize_weights

RECORDED = json.loads(RECORD.read_text())
CASES = [(name, version) for name, entry in RECORDED.items() for version in entry["configs"]]
PLAIN = BASE | {"model_type": "llama"}
QWEN = {"model_type": "qwen2", "use_sliding_window": True}


@pytest.fixture
def folder(tmp_path):
    """A LLaMA, to spoil."""
    write(tmp_path / "model", PLAIN)
    return tmp_path / "model"


def tensors_in(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def refuses(folder, *says, error=ValueError):
    """One sentence, which has all of ``says``."""
    with pytest.raises(error) as caught:
        load_hf(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert all(part in message for part in says), message


# What transformers computes


def test_the_record_has_every_variety_from_transformers_4_and_5():
    assert RECORDED.keys() == VARIETIES.keys()
    assert all([version[0] for version in entry["configs"]] == ["4", "5"] for entry in RECORDED.values())


@pytest.mark.covering(3)
@pytest.mark.parametrize(("name", "version"), CASES)
def test_logits_are_those_of_transformers(name, version, tmp_path):
    write(tmp_path, RECORDED[name]["configs"][version])
    model = load_hf(tmp_path)
    logits = forward(model, jnp.asarray(TOKENS))
    assert (logits.dtype, logits.shape) == (jnp.float32, (*TOKENS.shape, BASE["vocab_size"]))
    np.testing.assert_allclose(logits[0], RECORDED[name]["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIETIES)
def test_transformers_computes_the_same_with_what_is_saved(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    write(tmp_path / "theirs", RECORDED[name]["configs"]["4.57.6"])
    save_hf(load_hf(tmp_path / "theirs"), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (huggingface_models.transformers_logits(tmp_path / kind) for kind in ("theirs", "ours"))
    np.testing.assert_array_equal(theirs, ours)
    np.testing.assert_allclose(theirs[0], RECORDED[name]["logits"], atol=1e-4, rtol=0)


@pytest.mark.covering(5)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("linear", {"rope_scaling": None}),
        ("llama3", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}),
        ("mistral", {"sliding_window": None}),
        ("llama1", {"rope_theta": 100.0}),
        ("dynamic", {"rope_scaling": None, "max_position_embeddings": 16}),
        ("yarn", {"rope_scaling": None}),
        ("yarn-mscale", {"rope_scaling": YARN}),
        ("qwen2-windows", {"max_window_layers": 2, "layer_types": None}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
        ("smollm3-windows", {"layer_types": ["full_attention"] * 3}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"rope_local_base_freq": 100.0}),
        ("gemma3", {"query_pre_attn_scalar": 12}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
        ("gemma3", {"hidden_activation": "silu"}),
    ],
)
def test_the_recorded_models_tell_such_settings_apart(name, change, tmp_path):
    write(tmp_path, RECORDED[name]["configs"]["4.57.6"] | change)
    logits = np.asarray(forward(load_hf(tmp_path), jnp.asarray(TOKENS)))
    assert np.abs(logits[0] - RECORDED[name]["logits"]).max() > 1e-3


# Round trips


@pytest.mark.covering(10)
@pytest.mark.parametrize(("name", "version"), CASES)
def test_what_is_saved_is_what_was_loaded(name, version, tmp_path):
    tensors = write(tmp_path / "theirs", RECORDED[name]["configs"][version])
    model = load_hf(tmp_path / "theirs")
    save_hf(model, tmp_path / "ours")
    assert_same_tensors(tensors_in(tmp_path / "ours"), tensors)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    resolved = dataclasses.replace(model.config, head_dim=model.config.head_size)
    assert config_from_huggingface(tmp_path / "ours" / "config.json") == resolved
    assert config_to_huggingface(model.config)["model_type"] == RECORDED[name]["configs"][version]["model_type"] or (
        name == "mistral-full"  # without its window it is a LLaMA
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"qk_norm": True, "rope_layers": "10"}, "rope_layers='10' does not occur in the nearest model_type, 'qwen3'"),
        ({"sandwich_norms": True}, "qk_norm=False does not occur in the nearest model_type, 'gemma3_text'"),
        ({"attention_output_bias": True}, "attention_output_bias=True does not occur in"),
        ({"query_pre_attn_scalar": 3.0}, "query_pre_attn_scalar=3.0 does not occur in"),
    ],
)
def test_a_model_that_transformers_lacks_is_not_saved(overrides, says, tmp_path):
    config = LlamaConfig.preset("demo", num_hidden_layers=2, vocab_size=3, **overrides)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=says):
        save_hf(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_whole_number_stays_one_as_transformers_demands():
    gemma = {"sandwich_norms": True, "zero_centered_norms": True, "scaled_embeddings": True, "qk_norm": True}
    config = LlamaConfig.preset("demo", **gemma, query_pre_attn_scalar=16.0)
    assert repr(config_to_huggingface(config)["query_pre_attn_scalar"]) == "16"


def test_a_large_model_is_cut_into_shards_with_an_index(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 4000)
    save_hf(load_hf(folder), tmp_path / "cut")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    expected = tensors_in(folder)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    for file in files:
        shard = load_file(tmp_path / "cut" / file)
        assert shard.keys() == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(value.nbytes for value in shard.values()) <= 4000
    assert_same_tensors(tensors_in(tmp_path / "cut"), expected)
    np.testing.assert_array_equal(
        *(forward(load_hf(place), jnp.asarray(TOKENS)) for place in (folder, tmp_path / "cut"))
    )


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [
        (np.float32, None, "float32"),
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (np.float16, None, "float32"),
        (np.float32, "bfloat16", "bfloat16"),
        (ml_dtypes.bfloat16, jnp.float32, "float32"),
    ],
)
def test_parameters_have_the_stored_dtype_or_the_one_that_was_asked_for(folder, tmp_path, stored, asked, dtype):
    tensors = {name: value.astype(stored) for name, value in tensors_in(folder).items()}
    save_file(tensors, folder / "model.safetensors")
    model = load_hf(folder, asked)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {dtype}
    assert (model.config.dtype, model.config.param_dtype) == (dtype, dtype)
    save_hf(model, tmp_path / "saved")
    assert_same_tensors(tensors_in(tmp_path / "saved"), {k: v.astype(dtype) for k, v in tensors.items()})
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.slow
def test_weights_in_8_bits_are_saved_as_they_are_used(folder, tmp_path):
    graphdef, params = nnx.split(load_hf(folder), nnx.Param)
    model = nnx.merge(graphdef, quantize_weights(nnx.to_pure_dict(params)))
    save_hf(model, tmp_path / "saved")
    logits, loaded = (forward(m, jnp.asarray(TOKENS)) for m in (model, load_hf(tmp_path / "saved")))
    np.testing.assert_allclose(logits, loaded, rtol=1e-6)


def test_nothing_is_written_over(folder):
    model, before = load_hf(folder), {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(ValueError, match=f"{name} exists, and save_hf writes over nothing; name another folder."):
            save_hf(model, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        before.pop(name)
        (folder / name).unlink()


# Files that are not right


def test_a_folder_without_its_files_is_named(folder):
    (folder / "model.safetensors").unlink()
    refuses(folder, f"{folder} holds neither model.safetensors nor", error=FileNotFoundError)
    (folder / "config.json").unlink()
    refuses(folder, f"{folder / 'config.json'} does not exist", error=FileNotFoundError)


def test_a_missing_or_truncated_shard_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 8000)
    cut = tmp_path / "cut"
    save_hf(load_hf(folder), cut)
    second = sorted(cut.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    for length in (len(whole) - 5, 100, 3, 0):
        second.write_bytes(whole[:length])
        refuses(cut, f"{second} is damaged or incomplete")
    second.unlink()
    refuses(cut, f"{second} does not exist, and model.safetensors.index.json names it", error=FileNotFoundError)
    (cut / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refuses(cut, f"{cut / 'model.safetensors.index.json'} is damaged")


def test_the_index_decides_from_which_file_each_tensor_is_read(folder):
    """A tensor in two files, with the right values in the file of either name, and one that no file should have."""
    tensors = tensors_in(folder)
    (folder / "model.safetensors").unlink()
    name, other = "model.embed_tokens.weight", "model.norm.weight"
    wrong = {key: value + 1 for key, value in tensors.items() if key in (name, other)}
    right = {key: value for key, value in tensors.items() if key != other}
    places = dict.fromkeys(tensors, "a.safetensors") | {other: "b.safetensors"}
    save_file(right | {other: wrong[other]}, folder / "a.safetensors")
    save_file({other: tensors[other], name: wrong[name], "stray": np.zeros(3, np.float32)}, folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.warns(
        UserWarning, match=r"Left aside 3 tensors of .* the first of them model.norm.weight in a.safetensors"
    ):
        model = load_hf(folder)
    np.testing.assert_array_equal(model.embed_tokens.embedding[...], tensors[name])
    np.testing.assert_array_equal(model.norm.scale[...], tensors[other])
    index.write_text(json.dumps({"weight_map": places | {"model.layers.0.mlp.up_proj.weight": "b.safetensors"}}))
    refuses(
        folder,
        "b.safetensors has no tensor model.layers.0.mlp.up_proj.weight, which model.safetensors.index.json places",
    )
    index.write_text(json.dumps({"weight_map": {key: place for key, place in places.items() if key != name}}))
    with pytest.warns(UserWarning, match="Left aside"):
        refuses(folder, f"has no tensor {name}")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_model_that_sees_images_is_loaded(prefix, tmp_path):
    config = RECORDED["gemma3"]["configs"]["4.57.6"]
    tensors = write(tmp_path, config)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": config, "vision_config": {}})
    )
    theirs = {key.replace("model.", prefix, 1): value for key, value in tensors.items()}
    save_file(theirs | {"vision_tower.patch.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.warns(
        UserWarning, match=r"Left aside 1 tensor of .* not of the text model, the first of them vision_tower"
    ):
        model = load_hf(tmp_path)
    save_hf(model, tmp_path / "text")
    assert_same_tensors(tensors_in(tmp_path / "text"), tensors)


def test_a_tensor_that_is_missing_or_does_not_fit_is_named(folder):
    tensors = tensors_in(folder)
    name = "model.layers.1.mlp.up_proj.weight"

    def with_(changed):
        save_file(changed, folder / "model.safetensors")

    with_({key: value for key, value in tensors.items() if key != name})
    refuses(folder, f"has no tensor {name}")
    with_(tensors | {name: np.ascontiguousarray(tensors[name].T)})
    refuses(folder, f"{name} in {folder} has the shape [16, 24], but the model of its config.json needs [24, 16]")
    with_(tensors | {name: tensors[name].astype(np.int8)})
    refuses(folder, f"{name} in {folder} is stored as I8; only BF16, F16, F32, F64 are read")
    with_(tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)})
    refuses(folder, "has a tensor model.layers.0.self_attn.q_proj.bias")
    with_(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})  # of old files
    load_hf(folder)


def test_a_head_beside_a_tied_embedding_is_left_aside(tmp_path):
    tensors = write(tmp_path, PLAIN | {"tie_word_embeddings": True})
    before = forward(load_hf(tmp_path), jnp.asarray(TOKENS))
    save_file(tensors | {"lm_head.weight": np.zeros((19, 16), np.float32)}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(forward(load_hf(tmp_path), jnp.asarray(TOKENS)), before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "has model_type 'gpt2'; only 'llama', 'mistral', 'qwen2', 'qwen3', 'smollm3', "),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'; only 'silu', 'gelu_pytorch_tanh' are supported"),
        ({"hidden_activation": "relu"}, "has hidden_activation 'relu'; only"),
        ({"final_logit_softcapping": 30.0}, "has final_logit_softcapping 30.0; only None is supported"),
        ({"use_bidirectional_attention": True}, "has use_bidirectional_attention True; only False is supported"),
        (QWEN | {"layer_types": ["chunked_attention"] * 2}, "has layer_types 'chunked_attention'; only 'sliding_attention' and"),
        (QWEN | {"layer_types": ["full_attention"]}, "has 1 layer_types for 2 layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "has rope_type 'longrope'; only default, linear, dynamic, yarn"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "lacks factor, which rope_type 'yarn' needs"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "has rope_type 'yarn' for its local layers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, which rope_type 'llama3' needs"),
        ({"rope_scaling": "linear"}, "has rope parameters 'linear'; they must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor 0.5"),
        ({"hidden_size": None}, "describes no model that can be built: hidden_size=None must be a positive integer"),
        ({"rms_norm_eps": "small"}, "can be built: rms_norm_eps='small' must be a positive finite number"),
    ],
)  # fmt: skip
def test_a_config_that_the_model_would_not_follow_is_refused(folder, change, says):
    (folder / "config.json").write_text(json.dumps(PLAIN | change))
    refuses(folder, str(folder / "config.json"), says)


def test_a_config_that_is_not_json_or_not_complete_is_refused(folder):
    for text, says in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (folder / "config.json").write_text(text)
        refuses(folder, says)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in PLAIN.items() if k != "intermediate_size"}))
    refuses(folder, "lacks 'intermediate_size'; name the complete config.json of a model.")


def test_fields_that_are_not_there_mean_what_they_mean_to_transformers(folder):
    bare = {"hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 7, "num_attention_heads": 32}
    theirs = {
        "llama": {"max_position_embeddings": 2048},
        "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        "qwen2": {
            "vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32, "attention_bias": True,
        },
        "qwen3": {
            "vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128,
            "qk_norm": True,
        },
        "smollm3": {
            "vocab_size": 128256, "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
            "tie_word_embeddings": True, "rope_layers": "1110111",
        },
        "gemma3_text": {
            "vocab_size": 262208, "max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256,
            "rope_theta": 1e6, "rope_local_theta": 1e4, "sliding_window": 4096, "local_layers": "1111101", "qk_norm": True,
            "query_pre_attn_scalar": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
            "sandwich_norms": True, "zero_centered_norms": True, "scaled_embeddings": True,
        },
    }  # fmt: skip
    for kind, fields in theirs.items():
        (folder / "config.json").write_text(json.dumps(bare | {"model_type": kind}))
        assert config_from_huggingface(folder / "config.json") == LlamaConfig(**bare, **fields), kind
