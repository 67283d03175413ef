# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Sequence classification: a linear head on the last token of a Llama.

With x_t the residual stream after all blocks at position t, for a text of n tokens and k labels,

    logits = RMSNorm(x_(n-1)) C ,    C of shape D x k,

the model that transformers calls ``LlamaForSequenceClassification``.  Attention is causal, so tokens that pad the text on its
right change nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from galore_jax.models.llama import Llama, linear


class LlamaClassifier(nnx.Module):
    """A Llama with a classification head, normal(initializer_range), in the place of its output head.

    `model(tokens, lengths)` maps int32 [batch, sequence], padded on the right, and int32 [batch], the tokens of each text, to
    float32 logits [batch, num_labels].

    Args:
      body: becomes ``model.body``, without its output head, if it has one of its own.
      num_labels: at least 2.
      rngs: for the head.

    Raises:
      ValueError: fewer than two labels.

    >>> from galore_jax.models import LlamaConfig
    >>> def make():
    ...     return LlamaClassifier(Llama(LlamaConfig.preset("demo"), rngs=nnx.Rngs(0)), 3, rngs=nnx.Rngs(1))
    >>> tokens, lengths = jnp.zeros((2, 16), jnp.int32), jnp.array([5, 16], jnp.int32)
    >>> nnx.eval_shape(lambda: make()(tokens, lengths)).shape
    (2, 3)
    """

    def __init__(self, body: Llama, num_labels: int, *, rngs: nnx.Rngs):
        if num_labels < 2:
            raise ValueError(f"num_labels={num_labels} must be at least 2.")
        config = body.config
        if not config.tie_word_embeddings:
            del body.lm_head
        self.body = body
        self.classification_head = linear(config, config.hidden_size, num_labels, rngs)

    @property
    def num_labels(self) -> int:
        """The number of labels, k; they are 0 .. k-1."""
        return self.classification_head.out_features

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        hidden = self.body.run_layers(self.body.embed(tokens))
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)  # [B, 1, D]
        return self.classification_head(self.body.norm(last))[:, 0].astype(jnp.float32)
