# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Text from a model, one token at a time.

Token t is drawn from softmax(logits(tokens before t) / temperature); temperature 0 takes the likeliest token.
The whole sequence is run again for each token, which is enough for a look at a model in training.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from galore_jax.models.llama import Llama


def generate(model: Llama, prompt: ArrayLike, length: int, *, key: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Continue `prompt`, integers [prompt_length], by `length` tokens: int32 [length], without the prompt.

    The same `key` gives the same tokens; at temperature 0 the key does not matter. Compiles once for each
    total length (prompt and continuation).

    Raises:
      ValueError: the prompt is empty, not one sequence of integers, or outside the vocabulary; `length` is
        not positive; `temperature` is negative or not finite; or prompt and continuation exceed the model's
        max_position_embeddings.

    >>> from galore_jax.models import LlamaConfig
    >>> model = Llama(LlamaConfig.preset("demo", num_hidden_layers=1), rngs=nnx.Rngs(0))
    >>> generate(model, [72, 105], 5, key=jax.random.key(0)).shape
    (5,)
    """
    prompt = np.asarray(prompt)
    if prompt.ndim != 1 or not prompt.size or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"The prompt must be one non-empty sequence of integers, but it is {prompt.dtype}{list(prompt.shape)}."
        )
    if prompt.min() < 0 or prompt.max() >= model.config.vocab_size:
        raise ValueError(
            f"The prompt's token ids, {prompt.min()} to {prompt.max()}, must lie in 0 to "
            f"{model.config.vocab_size - 1}, the model's vocabulary; use the tokenizer it was trained with."
        )
    if length < 1:
        raise ValueError(f"length={length} must be at least 1.")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be finite and not negative; 0 takes the likeliest token.")
    longest = model.config.max_position_embeddings
    if prompt.size + length > longest:
        raise ValueError(
            f"A prompt of {prompt.size} tokens and {length} new ones exceed "
            f"max_position_embeddings={longest}; shorten the prompt or ask for fewer tokens."
        )
    graphdef, state = nnx.split(model)
    tokens = np.pad(prompt.astype(np.int32), (0, length))
    tokens = _continue(graphdef, state, tokens, prompt.size, key, float(temperature), greedy=temperature == 0)
    return tokens[prompt.size :]


@partial(jax.jit, static_argnames=("graphdef", "greedy"))
def _continue(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    start: ArrayLike,
    key: jax.Array,
    temperature: ArrayLike,
    *,
    greedy: bool,
) -> jax.Array:
    """Fill tokens[start:]. Causality hides the padding after a position from the token drawn there."""
    model = nnx.merge(graphdef, state)

    def add_token(position, tokens):
        hidden = model.run_layers(model.embed(tokens[None]))
        last = jax.lax.dynamic_slice_in_dim(hidden, position - 1, 1, axis=1)
        logits = model.head(last)[0, 0]
        if greedy:
            token = jnp.argmax(logits)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
        return tokens.at[position].set(token.astype(jnp.int32))

    return jax.lax.fori_loop(start, tokens.shape[0], add_token, tokens)
