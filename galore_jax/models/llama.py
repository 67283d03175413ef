# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""LLaMA and its relatives in Flax nnx: a decoder-only transformer whose blocks are stacked and scanned.

One block, on the residual stream x (one row a token):

    x <- x + Attention(RMSNorm(x)) ,    x <- x + SwiGLU(RMSNorm(x))

    RMSNorm(x)   = scale * x / sqrt(mean(x^2) + eps)
    SwiGLU(x)    = (silu(x W_gate) * (x W_up)) W_down
    Attention(x) = concat_n[ softmax(Q_n K_m^T / sqrt(h) + causal mask) V_m ] W_o ,    m = floor(n K / N)

where Q = RoPE(x W_q), K = RoPE(x W_k), V = x W_v; N query heads share K key-value heads of size h. RoPE turns
the pair (i, i + h/2) of a head at position t by the angle t w_i, w_i = theta^(-2i/h). Around the blocks stand
the token embedding, and a last RMSNorm with the output head. With a sliding window of W a token attends to the
last W tokens only, itself included. Models for a context longer than the one of C tokens that they were first
trained on turn more slowly, by a factor f:

    linear:   w_i / f
    llama3:   w_i (s + (1 - s) / f) ,    s = clip((C w_i / 2 pi - low) / (high - low), 0, 1)
    yarn:     w_i (s + (1 - s) / f) ,    s = 1 - clip((i - i_fast) / (i_slow - i_fast), 0, 1) ,    and Q, K times 0.1 log f + 1
    dynamic:  w_i with theta (f n / C - f + 1)^(h / (h - 2)) in the place of theta, for a sequence of n > C tokens

where i_fast and i_slow are the pairs that turn beta_fast and beta_slow times in C tokens.

What other families change is in the configuration: biases (Qwen2), norms of each head's queries and keys (Qwen3), layers whose
queries and keys are not turned (SmolLM3), and Gemma 3's norms of what a block adds to x, GeGLU, embeddings times sqrt(D), and
local layers, with a window and a theta of their own, between global ones. The blocks of all layers have the same parameters.
What else differs between layers is a flag, which is scanned along with them.

To continue a text, `model.extend` runs new tokens on the keys and values that a cache keeps of those before.

Sources: LLaMA (arXiv:2302.13971), RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864; with the pairs of
Hugging Face's weights), SwiGLU (arXiv:2002.05202), grouped-query attention (arXiv:2305.13245), sliding window
(Mistral, arXiv:2310.06825), linear (arXiv:2306.15595), llama3 (as in the code of LLaMA 3.1), yarn (arXiv:2309.00071), dynamic
(its appendix B), Qwen2 (arXiv:2407.10671), Qwen3 (arXiv:2505.09388), Gemma 3 (arXiv:2503.19786), and transformers 5.24 for what
the papers leave open.

Shapes in comments: B sequences, T tokens, D hidden size, F intermediate size, N query heads, K key-value
heads, H head size, V vocabulary, L layers, S tokens that a cache has room for.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from galore_jax.layerwise import BlockStack
from galore_jax.models.config import LlamaConfig
from galore_jax.weights import dequantize

__all__ = ["Llama", "block_stack"]

_LOGITS_BYTES = 64 * 2**20


class Cache(NamedTuple):
    """The rotated keys and the values of every token so far, for all layers."""

    keys: jax.Array  # [L, B, S, K, H]
    values: jax.Array  # [L, B, S, K, H]


class LayerFlags(NamedTuple):
    """What one layer computes where layers differ, bool scalars; in a stack bool [L]."""

    local: np.ndarray | jax.Array  # attention has the window
    rotated: np.ndarray | jax.Array  # queries and keys are


class Llama(nnx.Module):
    """A language model with random weights: normal(initializer_range) matrices, biases of zeros, norms that scale by one.

    `model(tokens)` maps int32 [batch, sequence] to float32 logits [batch, sequence, vocab_size]; it is
    `model.head(model.run_layers(model.embed(tokens)))`. Every parameter of `model.layers` has a leading layer
    axis, and one compiled block serves whatever the depth. A token id of vocab_size or more turns the logits of
    its sequence into NaN.

    Raises:
      ValueError: when called on tokens that are not [batch, sequence], or on a sequence that is too long.

    >>> model = Llama(LlamaConfig.preset("demo"), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 16), jnp.int32)).shape
    (2, 16, 256)
    >>> model.layers.attention.q_proj.kernel.shape
    (4, 128, 128)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        layer_keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(layer_keys)
        self.norm = RMSNorm(config, config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config, config.hidden_size, config.vocab_size, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.run_layers(self.embed(tokens)))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids, int32 [batch, sequence], to the residual stream, [batch, sequence, hidden]."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [batch, sequence], but their shape is {tokens.shape}.")
        longest = self.config.longest
        if tokens.shape[1] > longest:
            raise ValueError(
                f"A sequence of {tokens.shape[1]} tokens is longer than max_position_embeddings={longest}; "
                "shorten it or raise max_position_embeddings."
            )
        hidden = self.embed_tokens(tokens).astype(self.config.dtype)  # [B, T, D]
        if self.config.scaled_embeddings:
            hidden = hidden * jnp.asarray(math.sqrt(self.config.hidden_size), hidden.dtype)
        return _spread(hidden)

    def run_layers(self, hidden: jax.Array) -> jax.Array:
        """The residual stream, [batch, sequence, hidden], after all blocks, in order."""
        graphdef, stacked = nnx.split(self.layers)

        def run_block(hidden, layer_and_flags):
            layer, flags = layer_and_flags
            # Weights in 8 bits are widened here, block by block.
            return nnx.merge(graphdef, dequantize(layer))(hidden, flags), None

        if self.config.remat:
            # The loop itself keeps XLA from merging the recomputation with the forward pass.
            run_block = jax.checkpoint(run_block, prevent_cse=False)
        return jax.lax.scan(run_block, hidden, (stacked, layer_flags(self.config)))[0]

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache with room for `length` tokens of each sequence."""
        config = self.config
        shape = (config.num_hidden_layers, batch, length, config.kv_heads, config.head_size)
        return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    def extend(self, tokens: jax.Array, cache: Cache, start: jax.Array) -> tuple[jax.Array, Cache]:
        """The residual stream of `tokens`, int32 [batch, new], after all blocks, and the cache with them in it.

        They stand at positions `start`, `start` + 1, ..., and `cache` holds the tokens before; it must have room.
        The result is that of `run_layers` on the whole sequence, at these positions. With the rope_type dynamic, it is that in a
        sequence as long as the cache has room for.
        """
        graphdef, stacked = nnx.split(self.layers)

        def run_block(carry, indexed):
            hidden, cache = carry
            layer, flags, index = indexed
            return nnx.merge(graphdef, dequantize(layer)).extend(hidden, cache, index, start, flags), None

        # The cache is carried, not scanned over, so that it is updated in place.
        indices = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
        return jax.lax.scan(run_block, (self.embed(tokens), cache), (stacked, layer_flags(self.config), indices))[0]

    def losses(self, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """Cross-entropy of each target, float32 [batch, sequence], from the residual stream after all blocks.

        The sequence is taken in pieces, so that no device has more than 64 MiB of logits at a time.
        """

        def piece(hidden: jax.Array, targets: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(self.head(hidden), targets)

        batch, length = targets.shape
        # Of no more pieces than needed: on a mesh the head is gathered, and its gradient summed, for each of them.
        logits_bytes = 4 * batch * length * self.config.vocab_size / math.prod(_batch_axes().values())
        pieces = _divisor(length, at_least=logits_bytes / _LOGITS_BYTES)
        if pieces == 1:
            return piece(hidden, targets)
        cut = [jnp.moveaxis(x.reshape(batch, pieces, -1, *x.shape[2:]), 1, 0) for x in (hidden, targets)]
        losses = jax.lax.map(lambda pair: jax.checkpoint(piece)(*pair), tuple(cut))  # [pieces, B, T / pieces]
        return jnp.moveaxis(losses, 0, 1).reshape(batch, length)

    def head(self, hidden: jax.Array) -> jax.Array:
        """The residual stream, [batch, sequence, hidden], to float32 logits [batch, sequence, vocab_size]."""
        if self.config.tie_word_embeddings:
            kernel = self.embed_tokens.embedding[...].T
        else:
            kernel = self.lm_head.kernel[...]
        # Cast after the product, not in it: so the gradient of the logits, as large as they are, comes back to
        # the product in the compute dtype, and the kernel is not widened to meet it.
        logits = jnp.einsum("btd,dv->btv", self.norm(hidden), kernel.astype(self.config.dtype))
        return logits.astype(jnp.float32)


class Block(nnx.Module):
    """One decoder block: [batch, sequence, hidden] to the same, positions counted from 0.

    Where layers differ, it is called with the flags of its own.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config, config.hidden_size)
        self.attention = Attention(config, rngs=rngs)
        self.post_attention_norm = RMSNorm(config, config.hidden_size)
        self.mlp = GatedMLP(config, rngs=rngs)
        if config.sandwich_norms:
            self.attention_output_norm = RMSNorm(config, config.hidden_size)
            self.mlp_output_norm = RMSNorm(config, config.hidden_size)

    def __call__(self, hidden: jax.Array, flags: LayerFlags | None = None) -> jax.Array:
        return _spread(self._add_mlp(_spread(self._add(hidden, self.attention(self.input_norm(hidden), flags)))))

    def extend(
        self, hidden: jax.Array, cache: Cache, layer: jax.Array, start: jax.Array, flags: LayerFlags | None = None
    ) -> tuple[jax.Array, Cache]:
        """The same for tokens at positions from `start`, on `cache`, where this is block number `layer`."""
        mixed, cache = self.attention.extend(self.input_norm(hidden), cache, layer, start, flags)
        return self._add_mlp(self._add(hidden, mixed)), cache

    def _add(self, hidden: jax.Array, mixed: jax.Array) -> jax.Array:
        return hidden + (self.attention_output_norm(mixed) if hasattr(self, "attention_output_norm") else mixed)

    def _add_mlp(self, hidden: jax.Array) -> jax.Array:
        added = self.mlp(self.post_attention_norm(hidden))
        return hidden + (self.mlp_output_norm(added) if hasattr(self, "mlp_output_norm") else added)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        query_size = config.num_attention_heads * config.head_size
        kv_size = config.kv_heads * config.head_size
        self.q_proj = linear(config, config.hidden_size, query_size, rngs, config.attention_bias)
        self.k_proj = linear(config, config.hidden_size, kv_size, rngs, config.attention_bias)
        self.v_proj = linear(config, config.hidden_size, kv_size, rngs, config.attention_bias)
        self.o_proj = linear(config, query_size, config.hidden_size, rngs, config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, config.head_size)
            self.k_norm = RMSNorm(config, config.head_size)

    def __call__(self, x: jax.Array, flags: LayerFlags | None = None) -> jax.Array:
        length = x.shape[1]
        q, k, v = self._heads(x, jnp.zeros([], jnp.int32), length, flags)
        if self.config.attention == "cudnn" and jax.default_backend() == "gpu":
            window = self.config.sliding_window
            # It counts the tokens before one, without itself.
            local = None if window is None or window >= length else (window - 1, 0)
            return self._output(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")
        window = self._window(length, flags)
        mask = None if window is None else _visible(length, length, jnp.zeros([], jnp.int32), window)
        return self._output(q, k, v, mask=mask, is_causal=mask is None)

    def extend(
        self, x: jax.Array, cache: Cache, layer: jax.Array, start: jax.Array, flags: LayerFlags | None = None
    ) -> tuple[jax.Array, Cache]:
        """The same for tokens at positions from `start`, whose keys and values are added to `cache`."""
        room = cache.keys.shape[2]
        q, k, v = self._heads(x, start, room, flags)
        place = (layer, 0, start, 0, 0)
        cache = Cache(
            jax.lax.dynamic_update_slice(cache.keys, k[None], place),
            jax.lax.dynamic_update_slice(cache.values, v[None], place),
        )
        keys, values = (jax.lax.dynamic_index_in_dim(all_layers, layer, keepdims=False) for all_layers in cache)
        mask = _visible(x.shape[1], room, start, self._window(room, flags))
        return self._output(q, keys, values, mask=mask), cache

    def _heads(
        self, x: jax.Array, start: jax.Array, sequence: int, flags: LayerFlags | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H] of tokens at positions from `start` in a sequence of that length."""
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).reshape(batch, length, -1, self.config.head_size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        positions = start + jnp.arange(length, dtype=jnp.int32)
        frequencies, factor = self._rotation(sequence, flags)
        q, k = (rotate(heads, positions, frequencies, factor).astype(x.dtype) for heads in (q, k))
        return q, k, v

    def _rotation(self, sequence: int, flags: LayerFlags | None) -> tuple[jax.Array, jax.Array | float]:
        """Radians a position, float32 [H / 2], and the factor of what is rotated."""
        config = self.config
        frequencies, factor = rotary_frequencies(config, sequence), rotary_factor(config)
        if config.rope_local_theta is not None:
            local = _unstretched(config.rope_local_theta, config.head_size)
            if flags is None:
                return local, 1.0
            frequencies = jnp.where(flags.local, local, frequencies)
            factor = jnp.where(flags.local, 1.0, factor)
        if config.rope_layers is not None and flags is not None:
            frequencies = jnp.where(flags.rotated, frequencies, 0.0)
            factor = jnp.where(flags.rotated, factor, 1.0)
        return frequencies, factor

    def _window(self, sequence: int, flags: LayerFlags | None) -> int | jax.Array | None:
        """How many tokens one attends to in a sequence of that length; None: to all before it."""
        window = self.config.sliding_window
        if window is None or window >= sequence:
            return None
        return window if flags is None else jnp.where(flags.local, window, sequence)

    def _output(self, q: jax.Array, k: jax.Array, v: jax.Array, **masking: Any) -> jax.Array:
        """What attention adds to the residual stream, [B, T, D]; ``masking`` is of ``jax.nn.dot_product_attention``."""
        scale = self.config.query_pre_attn_scalar
        scale = None if scale is None else scale**-0.5
        # The softmax is float32.
        mixed = jax.nn.dot_product_attention(q, k, v, scale=scale, **masking)
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))  # [B, T, N, H] -> [B, T, D]


class GatedMLP(nnx.Module):
    """The gated feed-forward network."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.gate_proj = linear(config, config.hidden_size, config.intermediate_size, rngs, config.mlp_bias)
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size, rngs, config.mlp_bias)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size, rngs, config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(
            _ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        )  # [B, T, F] -> [B, T, D]


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class RMSNorm(nnx.Module):
    """Root-mean-square normalization along the last axis, of that size, of [batch, sequence, ...], computed in float32."""

    def __init__(self, config: LlamaConfig, size: int):
        self.eps = config.rms_norm_eps
        self.dtype = config.dtype
        self.offset = 1.0 if config.zero_centered_norms else 0.0
        self.scale = nnx.Param(jnp.full(size, 1.0 - self.offset, config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


def layer_flags(config: LlamaConfig) -> LayerFlags | None:
    """The flags of all layers, bool [layers]; None if layers are alike.

    >>> layer_flags(LlamaConfig.preset("demo", sliding_window=8, local_layers="1110")).local.tolist()
    [True, True, True, False]
    """
    if config.local_layers is None and config.rope_layers is None:
        return None
    number = config.num_hidden_layers
    local = config.local_layers or ("0" if config.sliding_window is None else "1") * number
    rotated = config.rope_layers or "1" * number
    return LayerFlags(*(np.array([flag == "1" for flag in flags]) for flags in (local, rotated)))


def block_stack(config: LlamaConfig) -> BlockStack:
    """The model for a layer-wise step, on the tree of ``nnx.to_pure_dict`` and batches int32 [batch, sequence + 1].

    >>> stack = block_stack(LlamaConfig.preset("demo"))
    >>> layers, rest = stack.split({"embed_tokens": 1, "layers": 2, "norm": 3, "lm_head": 4})
    >>> layers, sorted(rest)
    ({'layers': 2}, ['embed_tokens', 'lm_head', 'norm'])
    """
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    block = nnx.graphdef(model.layers)
    del model.layers
    ends = nnx.graphdef(model)

    return BlockStack(
        split=lambda params: ({"layers": params["layers"]}, {k: v for k, v in params.items() if k != "layers"}),
        join=lambda layers, rest: layers | rest,
        embed=lambda rest, batch: nnx.merge(ends, rest).embed(batch[:, :-1]),
        block=lambda layer, hidden, flags=None: nnx.merge(block, layer["layers"])(hidden, flags),
        loss=lambda rest, hidden, batch: jnp.mean(nnx.merge(ends, rest).losses(hidden, batch[:, 1:])),
        flags=layer_flags(config),
    )


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array, factor: jax.Array | float = 1.0) -> jax.Array:
    """Rotary position embedding of heads [batch, sequence, heads, head_size] at positions int32 [sequence], times a factor.

    Angles, rotation and result are float32: bfloat16 cannot tell position 257 from 256.
    """
    angles = jnp.outer(positions.astype(jnp.float32), frequencies)[None, :, None]  # [1, T, 1, H/2]
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotary_frequencies(config: LlamaConfig, length: int = 1) -> jax.Array:
    """Radians a position that each pair of a head is turned by, float32 [head_size / 2], in a sequence of that length.

    >>> config = LlamaConfig.preset("demo", rope_type="linear", rope_factor=4.0)
    >>> float(rotary_frequencies(config)[0])
    0.25
    """
    size, theta, factor = config.head_size, config.rope_theta, config.rope_factor
    context = config.rope_original_max_position_embeddings or config.max_position_embeddings
    match config.rope_type:
        case "linear":
            return _unstretched(theta, size) / factor
        case "dynamic":
            most = config.max_position_embeddings
            longer = factor * max(length, most) / most - (factor - 1)
            return _unstretched(theta * longer ** (size / (size - 2)), size)
        case "yarn":
            first, last = (
                size * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))
                for turns in (config.rope_beta_fast, config.rope_beta_slow)
            )
            if config.rope_truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, size - 1)
            # Equal bounds make a step, as transformers has it.
            ramp = (jnp.arange(size // 2, dtype=jnp.float32) - first) / (last - first or 0.001)
            return _stretched(_unstretched(theta, size), 1 - jnp.clip(ramp, 0.0, 1.0), factor)
        case "llama3":
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            frequencies = _unstretched(theta, size)
            turns = context / (2 * math.pi) * frequencies
            return _stretched(frequencies, jnp.clip((turns - low) / (high - low), 0.0, 1.0), factor)
    return _unstretched(theta, size)


def rotary_factor(config: LlamaConfig) -> float:
    """Factor of rotated queries and keys.

    >>> round(rotary_factor(LlamaConfig.preset("demo", rope_type="yarn", rope_factor=4.0)), 4)
    1.1386
    """
    if config.rope_type != "yarn":
        return 1.0
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    return max(0.1 * math.log(config.rope_factor) + 1, 1.0)


def _unstretched(theta: float, size: int) -> jax.Array:
    return theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def _stretched(frequencies: jax.Array, kept: jax.Array, factor: float) -> jax.Array:
    """Frequencies that are divided by the factor, except for the share that is kept, in [0, 1]."""
    return frequencies * (kept + (1 - kept) / factor)


def _visible(queries: int, keys: int, start: jax.Array, window: int | jax.Array | None) -> jax.Array:
    """Which keys each query attends to, bool [1, 1, queries, keys]; the first query is at `start`, the first key at 0."""
    ahead = jnp.arange(keys, dtype=jnp.int32)[None] - jnp.arange(queries, dtype=jnp.int32)[:, None] - start
    visible = ahead <= 0
    if window is not None:
        visible &= ahead > -window
    return visible[None, None]


def _spread(hidden: jax.Array) -> jax.Array:
    """The residual stream, its sequences spread over the automatic axes "data" and "fsdp" of the mesh.

    Left to itself, the compiler may cut it along the hidden size, as it finds the weights.
    """
    axes = tuple(_batch_axes())
    return jax.lax.with_sharding_constraint(hidden, PartitionSpec(axes)) if axes else hidden


def _batch_axes() -> dict[str, int]:
    """The sizes of the automatic axes "data" and "fsdp" of the mesh, where there are any."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name: mesh.shape[name] for name in ("data", "fsdp") if kinds.get(name) == AxisType.Auto}


def _divisor(length: int, at_least: float) -> int:
    """The smallest divisor of ``length`` that is at least so large; ``length`` itself if none is."""
    return next((d for d in range(1, length) if length % d == 0 and d >= at_least), length)


def linear(config: LlamaConfig, inputs: int, outputs: int, rngs: nnx.Rngs, bias: bool = False) -> nnx.Linear:
    """A layer, normal(initializer_range), in the dtypes of ``config``."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(config.initializer_range),
        rngs=rngs,
    )
