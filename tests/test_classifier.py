# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The classifier: padding changes nothing, what transformers computes with it, and the folder that is written."""

from __future__ import annotations

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_models import BASE, write
from safetensors.numpy import load_file

from galore_jax.models import LlamaClassifier, load_hf, save_hf

TOKENS = np.array([[3, 17, 0, 8, 8, 1], [5, 9, 12, 2, 2, 2]], np.int32)  # 2 pads
LENGTHS = np.array([6, 3], np.int32)
SCORE = np.random.RandomState(1).standard_normal((3, 16)).astype(np.float32)
# What transformers 4.57.6 computes with tied embeddings and without; where it is installed, a test compares.
RECORDED = {
    False: [[-0.35702, -0.68527, 1.47791], [1.73044, 0.28672, 4.13088]],
    True: [[1.64409, -5.49882, 2.17277], [6.32527, 0.80268, 0.27799]],
}


def classifier(folder, **changes):
    """A classifier with three labels on the model of tests/huggingface_models.py, and the body's tensors."""
    tensors = write(folder, BASE | {"model_type": "llama"} | changes)
    model = LlamaClassifier(load_hf(folder), 3, rngs=nnx.Rngs(0))
    model.classification_head.kernel[...] = jnp.asarray(SCORE.T)
    return model, tensors


@nnx.jit
def logits_of(model, tokens, lengths):
    return model(tokens, lengths)


def transformers_logits(folder):
    import torch
    import transformers

    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 3)
    model.config.pad_token_id = 2  # from which transformers finds the last token
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS.astype(np.int64)), use_cache=False).logits.numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers_whatever_pads_the_text(tied, tmp_path):
    model, _ = classifier(tmp_path, tie_word_embeddings=tied)
    logits = logits_of(model, TOKENS, LENGTHS)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    np.testing.assert_allclose(logits, RECORDED[tied], atol=1e-4, rtol=0)
    other = TOKENS.copy()
    other[1, 3:] = 7
    np.testing.assert_array_equal(logits_of(model, other, LENGTHS), logits)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_same_with_what_is_saved(tied, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    save_hf(classifier(tmp_path / "theirs", tie_word_embeddings=tied)[0], tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(transformers_logits(tmp_path / "ours"), RECORDED[tied], atol=1e-4, rtol=0)


def test_what_is_saved_is_the_body_and_the_head(tmp_path):
    model, tensors = classifier(tmp_path / "theirs")
    save_hf(model, tmp_path / "ours")
    del tensors["lm_head.weight"]
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == {*tensors, "score.weight"}
    for name, value in (tensors | {"score.weight": SCORE}).items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert fields["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert fields["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_one_label_is_refused(tmp_path):
    write(tmp_path, BASE | {"model_type": "llama"})
    with pytest.raises(ValueError, match="num_labels=1 must be at least 2"):
        LlamaClassifier(load_hf(tmp_path), 1, rngs=nnx.Rngs(0))
