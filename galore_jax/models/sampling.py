# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Text from a model, one token at a time.

Token t is drawn from p = softmax(logits(tokens before t) / temperature), restricted to the top_k likeliest tokens and, of
those, to the fewest likeliest ones that together have the probability top_p (nucleus sampling, arXiv:1904.09751);
temperature 0 takes the likeliest token.  The prompt is run once, and then each token on the keys and values of those before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from galore_jax.models.llama import Cache, Llama

__all__ = ["generate", "stream"]


class _Sampler(NamedTuple):
    """How a token is drawn."""

    key: jax.Array
    temperature: ArrayLike
    top_k: ArrayLike
    top_p: ArrayLike


def generate(
    model: Llama,
    prompt: ArrayLike,
    length: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Continue `prompt`, integers [prompt_length], by `length` tokens: int32 [length], without the prompt.

    The same `key` gives the same tokens; at temperature 0 the key does not matter. Compiles once for each
    length of a prompt and of a continuation.

    Raises:
      ValueError: the prompt is empty, not one sequence of integers, or outside the vocabulary; `length` or
        `top_k` is not positive; `top_p` is not in (0, 1]; `temperature` is negative or not finite; or prompt
        and continuation exceed the model's max_position_embeddings.

    >>> from galore_jax.models import LlamaConfig
    >>> model = Llama(LlamaConfig.preset("demo", num_hidden_layers=1), rngs=nnx.Rngs(0))
    >>> generate(model, [72, 105], 5, key=jax.random.key(0), top_k=40, top_p=0.9).shape
    (5,)
    """
    prompt = _checked(model, prompt, length, temperature, top_k, top_p)
    sampler, how = _sampler(model, key, temperature, top_k, top_p)
    graphdef, state = nnx.split(model)
    first, cache = _first(graphdef, state, prompt, sampler, room=prompt.size + length, **how)
    if length == 1:
        return first
    rest, _ = _next(graphdef, state, first, cache, prompt.size, sampler, count=length - 1, **how)
    return jnp.concatenate([first, rest])


def stream(
    model: Llama,
    prompt: ArrayLike,
    length: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[int]:
    """The tokens of :func:`generate`, each as soon as it is drawn; mistakes are raised here, not at the first token.

    >>> from galore_jax.models import LlamaConfig
    >>> model = Llama(LlamaConfig.preset("demo", num_hidden_layers=1), rngs=nnx.Rngs(0))
    >>> key = jax.random.key(0)
    >>> list(stream(model, [72, 105], 5, key=key)) == generate(model, [72, 105], 5, key=key).tolist()
    True
    """
    prompt = _checked(model, prompt, length, temperature, top_k, top_p)
    sampler, how = _sampler(model, key, temperature, top_k, top_p)

    def tokens() -> Iterator[int]:
        graphdef, state = nnx.split(model)
        token, cache = _first(graphdef, state, prompt, sampler, room=prompt.size + length, **how)
        yield int(token[0])
        for position in range(prompt.size, prompt.size + length - 1):
            token, cache = _next(graphdef, state, token, cache, position, sampler, count=1, **how)
            yield int(token[0])

    return tokens()


def _checked(
    model: Llama, prompt: ArrayLike, length: int, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """The prompt, int32; ValueError for what :func:`generate` cannot do."""
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
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; None draws from all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be greater than 0 and at most 1; None draws from all tokens.")
    longest = model.config.longest
    if prompt.size + length > longest:
        raise ValueError(
            f"A prompt of {prompt.size} tokens and {length} new ones exceed "
            f"max_position_embeddings={longest}; shorten the prompt or ask for fewer tokens."
        )
    return prompt.astype(np.int32)


def _sampler(
    model: Llama, key: jax.Array, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[_Sampler, dict[str, bool]]:
    """The sampler, and what of it is compiled into the program."""
    how = {"greedy": temperature == 0, "filtered": top_k is not None or top_p is not None}
    vocabulary = model.config.vocab_size
    top_k = vocabulary if top_k is None else min(top_k, vocabulary)
    return _Sampler(key, np.float32(temperature), np.int32(top_k), np.float32(1.0 if top_p is None else top_p)), how


@partial(jax.jit, static_argnames=("graphdef", "room", "greedy", "filtered"))
def _first(
    graphdef: nnx.GraphDef, state: nnx.State, prompt: jax.Array, sampler: _Sampler, *, room: int, **how: bool
) -> tuple[jax.Array, Cache]:
    """The token after the prompt, int32 [1], and a cache of the prompt with room for so many tokens in all."""
    model = nnx.merge(graphdef, state)
    return _advance(model, prompt, model.empty_cache(1, room), jnp.zeros([], jnp.int32), sampler, **how)


@partial(jax.jit, static_argnames=("graphdef", "count", "greedy", "filtered"), donate_argnames=("cache",))
def _next(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    token: jax.Array,
    cache: Cache,
    position: ArrayLike,
    sampler: _Sampler,
    *,
    count: int,
    **how: bool,
) -> tuple[jax.Array, Cache]:
    """The `count` tokens after `token`, int32 [1] at `position`, which is not in the cache yet."""
    model = nnx.merge(graphdef, state)

    def add(carry, position):
        token, cache = carry
        token, cache = _advance(model, token, cache, position, sampler, **how)
        return (token, cache), token[0]

    positions = jnp.asarray(position, jnp.int32) + jnp.arange(count, dtype=jnp.int32)
    (_, cache), tokens = jax.lax.scan(add, (token, cache), positions)
    return tokens, cache


def _advance(
    model: Llama, tokens: jax.Array, cache: Cache, start: jax.Array, sampler: _Sampler, *, greedy: bool, filtered: bool
) -> tuple[jax.Array, Cache]:
    """Put tokens [new] at positions from `start` into the cache, and draw the one after them, int32 [1]."""
    hidden, cache = model.extend(tokens[None], cache, start)
    logits = model.head(hidden[:, -1:])[0, 0]
    # The noise of a token depends on the key and its position, so that a stream draws what one call does.
    key = jax.random.fold_in(sampler.key, start + tokens.shape[0])
    if greedy:
        token = jnp.argmax(logits)
    elif filtered:
        token = _draw_filtered(key, logits / sampler.temperature, sampler.top_k, sampler.top_p)
    else:
        token = jax.random.categorical(key, logits / sampler.temperature)
    return token.astype(jnp.int32)[None], cache


def _draw_filtered(key: jax.Array, logits: jax.Array, top_k: ArrayLike, top_p: ArrayLike) -> jax.Array:
    """A token drawn from the softmax of logits [vocab] restricted to the nucleus of the top_k likeliest."""
    order = jnp.argsort(logits, descending=True)
    ordered = jnp.where(jnp.arange(logits.size, dtype=jnp.int32) < top_k, logits[order], -jnp.inf)
    likelihoods = jax.nn.softmax(ordered)
    likelier = jnp.cumsum(likelihoods) - likelihoods  # of each token, what the likelier ones have together
    return order[jax.random.categorical(key, jnp.where(likelier < top_p, ordered, -jnp.inf))]
