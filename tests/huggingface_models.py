# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models in Hugging Face's layout, and what transformers computes with them.

    python tests/huggingface_models.py      with transformers and torch; records tests/data/huggingface.json

The record holds, for each model, the config.json that each version of transformers wrote, and the logits of TOKENS.  Another
major version of transformers adds its config.json, and its logits must be those of the first.
"""

import json
import pathlib
import tempfile

import numpy as np
from safetensors.numpy import save_file

RECORD = pathlib.Path(__file__).parent / "data" / "huggingface.json"

BASE = {
    "vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
# The wavelengths of the four pairs of a head, 6.3, 63, 628 and 6283, are left alone, between, stretched and stretched.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NO_SPECIALS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
THETAS = {
    "rope_theta": 100.0, "rope_local_base_freq": 10.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
VARIETIES = {
    "llama1": ("Llama", {"rms_norm_eps": 1e-6}),
    "llama2-grouped": ("Llama", {"num_attention_heads": 4, "hidden_size": 32}),
    "llama3": ("Llama", {"num_key_value_heads": 1, "rope_scaling": LLAMA3}),
    "linear": ("Llama", {"rope_theta": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "head-dim": ("Llama", {"head_dim": 12, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": 4}),
    "mistral-full": ("Mistral", {"head_dim": 12, "num_key_value_heads": 1, "sliding_window": None}),
    "smollm": ("Llama", {"num_attention_heads": 3, "hidden_size": 24, "num_key_value_heads": 1, "rope_theta": 100000.0,
                         "tie_word_embeddings": True}),
    "biases": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    # Longer than the 8 tokens that it was trained on, which stretches its wavelengths.
    "dynamic": ("Llama", {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "yarn": ("Qwen3", {"rope_theta": 100.0, "head_dim": 16, "rope_scaling": YARN}),
    "yarn-mscale": ("Llama", {"rope_theta": 50.0, "rope_scaling": YARN | {
        "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4,
                                "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "rope_theta": 100.0, "tie_word_embeddings": True, **NO_SPECIALS}),
    "smollm3-windows": ("SmolLM3", {"num_hidden_layers": 3, "rope_theta": 100.0, "no_rope_layers": [1, 0, 1],
                                    "use_sliding_window": True, "sliding_window": 3, **NO_SPECIALS}),
    "gemma3": ("Gemma3Text", {"num_hidden_layers": 3, "head_dim": 12, "num_key_value_heads": 1, "query_pre_attn_scalar": 20,
                              "sliding_window": 4, "layer_types": LAYERS, "tie_word_embeddings": True, **THETAS}),
    "gemma3-local": ("Gemma3Text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4,
                                    "tie_word_embeddings": True, **THETAS}),
}  # fmt: skip
TOKENS = np.array([[3, 17, 0, 8, 8, 1, 12, 5, 9, 18]], np.int32)


def shapes(config):
    """Name -> shape of every tensor of a config.json."""
    hidden, inner, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = (size * config[name] for name in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [queries, hidden], "self_attn.k_proj": [keys, hidden], "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries], "mlp.gate_proj": [inner, hidden], "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }  # fmt: skip
    kind = config["model_type"]
    if kind == "gemma3_text":
        layer |= {"pre_feedforward_layernorm": [hidden], "post_feedforward_layernorm": [hidden]}
    if kind in ("qwen3", "gemma3_text"):
        layer |= {"self_attn.q_norm": [size], "self_attn.k_norm": [size]}
    biased = ["q_proj", "k_proj", "v_proj"] if kind == "qwen2" or config.get("attention_bias") else []
    biased += ["o_proj"] * config.get("attention_bias", False)
    biased += ["gate_proj", "up_proj", "down_proj"] * config.get("mlp_bias", False)
    tied = config.get("tie_word_embeddings", config["model_type"] in ("smollm3", "gemma3_text"))
    ends = {"model.embed_tokens": [vocab, hidden], "model.norm": [hidden]} | (
        {} if tied else {"lm_head": [vocab, hidden]}
    )
    layers = {f"model.layers.{i}.{k}": v for i in range(config["num_hidden_layers"]) for k, v in layer.items()}
    found = {f"{name}.weight": shape for name, shape in (ends | layers).items()}
    return found | {f"{k}.bias": v[:1] for k, v in layers.items() if k.split(".")[-1] in biased}


def weights(config):
    """Random tensors that are the same with every version of NumPy, whose new generators may change their stream."""
    draw = np.random.RandomState(0).standard_normal
    of_norms = 0.0 if config["model_type"] == "gemma3_text" else 1.0  # those of Gemma multiply by 1 + weight
    return {
        name: (of_norms * name.endswith("norm.weight") + 0.3 * draw(shape)).astype(np.float32)
        for name, shape in sorted(shapes(config).items())
    }


def write(folder, config):
    """A Hugging Face folder of that config.json with random weights; returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def transformers_logits(folder):
    """What transformers computes from TOKENS with the model in a folder, float32 [batch, sequence, vocabulary]."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS.astype(np.int64)), use_cache=False).logits.numpy()


def record():
    """Add what the installed transformers writes and computes to the record."""
    import transformers

    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, (kind, changes) in VARIETIES.items():
        if any(version[0] == transformers.__version__[0] for version in known.get(name, {"configs": ()})["configs"]):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            architecture = kind.removesuffix("Text") + "ForCausalLM"
            config = getattr(transformers, f"{kind}Config")(**BASE | changes, architectures=[architecture])
            config.save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())
            write(folder, config)
            logits = transformers_logits(folder)
        rounded = [[round(float(x), 5) for x in row] for row in logits[0]]
        entry = known.setdefault(name, {"configs": {}, "logits": rounded})
        entry["configs"][transformers.__version__] = config
        difference = np.abs(np.asarray(entry["logits"]) - logits[0]).max()
        print(f"{name}: largest logit {np.abs(logits).max():.2f}, difference from the record {difference:.1e}")
        assert difference < 2e-5, name
    RECORD.write_text(json.dumps(known, separators=(",", ":")).replace("],[", "],\n[") + "\n")


if __name__ == "__main__":
    record()
