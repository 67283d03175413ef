# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny model, its text and its optimizer state, shared by the tests of pre-training."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from problems import normal

from galore_jax.models import Llama, LlamaConfig
from galore_jax.training.config import PretrainConfig
from galore_jax.training.optimizers import make_optimizer

TINY = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=50)


def tiny_model(**overrides):
    model = Llama(dataclasses.replace(TINY, **overrides), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def tokens(batch=8, length=9, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length)).astype(np.int32)


def small_tree(dtype=jnp.float32):
    return {
        "embed_tokens": {"embedding": normal(0, (20, 16), dtype)},
        "layers": {
            "mlp": {"up_proj": {"kernel": normal(1, (2, 16, 24), dtype)}},
            "input_norm": {"scale": normal(2, (2, 16), dtype)},
        },
        "lm_head": {"kernel": normal(3, (16, 20), dtype)},
    }


def state_of(value):
    params = {"layers": {"kernel": jnp.full((64, 64), value, jnp.bfloat16)}, "norm": jnp.full((8,), value, jnp.float32)}
    tx = make_optimizer(PretrainConfig(rank=4), optax.constant_schedule(1e-3))
    return tx, params, tx.init(params)
