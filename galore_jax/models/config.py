# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Shapes and numerics of a decoder of the LLaMA kind, and the sizes people train.

With hidden size d, intermediate size f, L layers, N query heads and K key-value heads of size h, V tokens,

    num_params = V d + L (2 d N h + 2 d K h + 3 d f + 2 d) + d + V d

whose terms are the embedding, the blocks, the last norm, and the output head (absent when it is tied).  Biases, norms of
queries and keys (2 h a block) and norms of a block's outputs (2 d) come on top where a model has them.

Sources of the presets: 60m, 130m, 350m, 1b and 7b are the models of the GaLore paper (arXiv:2403.03507,
section 5); 13b is LLaMA 13B (arXiv:2302.13971), llama3-8b is LLaMA 3 8B (arXiv:2407.21783).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from galore_jax._core.names import did_you_mean

DTYPES = ("float32", "bfloat16")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
ATTENTIONS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything that defines a decoder except its weights: a LLaMA, or what other families change of it.

    Every field is a number, a string, a bool or None, so `dataclasses.asdict(config)` is JSON.

    Raises:
      ValueError: a size is not a positive integer, the sizes do not fit together, or a dtype is unknown.

    >>> config = LlamaConfig.preset("60m", dtype="bfloat16")
    >>> config.hidden_size, config.num_hidden_layers, config.num_params
    (512, 8, 58073600)
    """

    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the gated feed-forward network."""
    num_attention_heads: int
    """Number of query heads."""
    num_hidden_layers: int
    """Number of blocks."""
    vocab_size: int = 32000
    """Number of token ids."""
    num_key_value_heads: int | None = None
    """Number of key and value heads; fewer than the query heads is grouped-query attention. None: as many."""
    head_dim: int | None = None
    """Size of one head. None: hidden_size / num_attention_heads."""
    max_position_embeddings: int = 1024
    """Longest sequence the model accepts."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside the norms."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_type: str = "default"
    """What stretches the wavelengths: default (nothing), linear (all by rope_factor), dynamic (by the length of the sequence),
    yarn or llama3 (the long ones)."""
    rope_factor: float = 1.0
    """How far all but default stretch; dynamic accepts so many times max_position_embeddings tokens."""
    rope_low_freq_factor: float = 1.0
    """llama3: wavelengths that fit less often than this into the original context are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """llama3: wavelengths that fit more often than this are left alone; between the two it is interpolated."""
    rope_original_max_position_embeddings: int | None = None
    """llama3, yarn: the context before it was stretched. None: max_position_embeddings."""
    rope_beta_fast: float = 32.0
    """yarn: pairs that turn more often than this in the original context are left alone."""
    rope_beta_slow: float = 1.0
    """yarn: pairs that turn less often than this are stretched in full; between the two it is interpolated."""
    rope_truncate: bool = True
    """yarn: Whether the two bounds are rounded outward to whole pairs."""
    rope_attention_factor: float | None = None
    """yarn: factor of rotated queries and keys. None: 0.1 log(rope_factor) + 1."""
    rope_layers: str | None = None
    """A character a layer, 1 where queries and keys are rotated and 0 where they are not. None: 1 everywhere."""
    sliding_window: int | None = None
    """A token attends to so many tokens, itself included. None: to all before it."""
    local_layers: str | None = None
    """A character a layer, 1 where attention is local, within sliding_window, and 0 where it is global. None: 1 everywhere."""
    rope_local_theta: float | None = None
    """Base of the wavelengths, which are not stretched, of the local layers. None: those of the global ones."""
    query_pre_attn_scalar: float | None = None
    """Attention's logits are divided by the root of this. None: head_dim."""
    attention_bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    attention_output_bias: bool = False
    """Whether the projection of attention's output has a bias."""
    mlp_bias: bool = False
    """Whether the matrices of the feed-forward network have biases."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normalized before they are rotated."""
    sandwich_norms: bool = False
    """Whether what attention and the feed-forward network add to the residual stream is normalized too."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + scale, with a scale of zeros at first, instead of by scale."""
    scaled_embeddings: bool = False
    """Whether embedded tokens are multiplied by the root of hidden_size."""
    hidden_act: str = "silu"
    """Activation of the gated feed-forward network: silu (SwiGLU) or gelu_pytorch_tanh (GeGLU)."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head as well."""
    initializer_range: float = 0.02
    """Standard deviation of the initial embedding and kernels."""
    dtype: str = "float32"
    """Type of activations and matrix products: float32 or bfloat16."""
    param_dtype: str = "float32"
    """Type in which the parameters are stored."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    attention: str = "xla"
    """Kernel of attention: xla, or cudnn, NVIDIA's flash attention, whose memory grows with the sequence and not with its square.
    cudnn needs bfloat16. Where JAX's default backend is no GPU, and with a cache, attention is XLA's all the same."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        for name in ("num_key_value_heads", "head_dim", "rope_original_max_position_embeddings", "sliding_window"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} must be a positive finite number.")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(
                f"rope_high_freq_factor={self.rope_high_freq_factor} must be greater than "
                f"rope_low_freq_factor={self.rope_low_freq_factor}."
            )
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta={self.rope_theta} must be greater than 1 for rope_type='yarn'.")
        self._check_heads()
        self._check_layers()
        if self.attention == "cudnn":
            self._check_cudnn()

    def __repr__(self) -> str:
        # What a LLaMA lacks is left out, so that what was computed from the text before there were such fields stays.
        shown = [f for f in dataclasses.fields(self) if f.name not in _OF_OTHERS or getattr(self, f.name) != f.default]
        return f"LlamaConfig({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def _check_layers(self) -> None:
        for name in ("rope_layers", "local_layers"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, str) and len(value) == self.num_hidden_layers and set(value) <= {"0", "1"}
            ):
                raise ValueError(
                    f"{name}={value!r} must be a string of 0 and 1, one for each of the {self.num_hidden_layers} layers."
                )
        for name in ("local_layers", "rope_local_theta"):
            if getattr(self, name) is not None and self.sliding_window is None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is of local layers, and without a sliding_window there are none."
                )

    def _check_cudnn(self) -> None:
        wrong = {
            f"computes in bfloat16, and dtype={self.dtype!r}; set dtype='bfloat16'": self.dtype != "bfloat16",
            f"takes heads of a multiple of 8 up to 256, and these have {self.head_size}": self.head_size % 8
            or self.head_size > 256,
            "has one window for all layers, and local_layers gives them different ones": self.local_layers is not None,
        }
        for reason, applies in wrong.items():
            if applies:
                raise ValueError(f"attention='cudnn' {reason}, or leave attention='xla'.")

    def _check_heads(self) -> None:
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                "change one of them or set head_dim."
            )
        if heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads={self.kv_heads} does not divide num_attention_heads={heads}; "
                "choose a divisor, or None for one key-value head per query head."
            )
        if self.head_size % 2:
            raise ValueError(
                f"The head size {self.head_size} is odd, and rotary embeddings rotate pairs; "
                "set an even head_dim, or change hidden_size or num_attention_heads."
            )

        if self.rope_type == "dynamic" and self.head_size < 4:
            raise ValueError("rope_type='dynamic' needs heads of more than one pair; set a greater head_dim.")

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads, with None resolved."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Size of one attention head, with None resolved."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def longest(self) -> int:
        """Number of tokens in the longest sequence that the model accepts.

        >>> LlamaConfig.preset("demo", rope_type="dynamic", rope_factor=4.0).longest
        4096
        """
        stretched = self.rope_factor if self.rope_type == "dynamic" else 1
        return int(self.max_position_embeddings * stretched)

    @property
    def num_params(self) -> int:
        """Number of parameters, in closed form."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_size
        block = 2 * d * h * (self.num_attention_heads + self.kv_heads) + 3 * d * f + 2 * d
        block += self.attention_bias * h * (self.num_attention_heads + 2 * self.kv_heads)
        block += self.attention_output_bias * d + self.mlp_bias * (2 * f + d)
        block += self.qk_norm * 2 * h + self.sandwich_norms * 2 * d
        token_matrices = 1 if self.tie_word_embeddings else 2
        return token_matrices * self.vocab_size * d + self.num_hidden_layers * block + d

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LlamaConfig:
        """The configuration called `name`, with any field replaced by a keyword argument.

        Raises:
          ValueError: no preset has that name, or the resulting configuration is not valid.

        >>> LlamaConfig.preset("demo", vocab_size=300).vocab_size
        300
        """
        if name not in _PRESETS:
            raise ValueError(
                f"Unknown model preset {name!r}{did_you_mean(name, _PRESETS)}; choose one of {', '.join(_PRESETS)}."
            )
        return cls(**{**_PRESETS[name], **overrides})

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names that `preset` accepts, the demo first, then by size."""
        return tuple(_PRESETS)


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)
_NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_beta_fast",
    "rope_beta_slow",
    "rope_attention_factor",
    "rope_local_theta",
    "query_pre_attn_scalar",
    "initializer_range",
)
_OF_OTHERS = {
    "rope_beta_fast", "rope_beta_slow", "rope_truncate", "rope_attention_factor", "rope_layers", "local_layers",
    "rope_local_theta", "query_pre_attn_scalar", "attention_bias", "attention_output_bias", "mlp_bias", "qk_norm",
    "sandwich_norms", "zero_centered_norms", "scaled_embeddings", "hidden_act", "attention",
}  # fmt: skip
_MAY_BE_NONE = ("rope_attention_factor", "rope_local_theta", "query_pre_attn_scalar")
_CHOICES = {
    "dtype": DTYPES,
    "param_dtype": DTYPES,
    "rope_type": ROPE_TYPES,
    "hidden_act": ACTIVATIONS,
    "attention": ATTENTIONS,
}


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer.")


def _preset(hidden: int, intermediate: int, heads: int, layers: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        **others,
    }


_PRESETS: dict[str, dict[str, Any]] = {
    # Trains on two CPU cores in minutes; 256 ids are the bytes, callers pass their tokenizer's vocab_size.
    "demo": _preset(128, 352, 4, 4, vocab_size=256),
    "9m": _preset(128, 352, 4, 4),
    "20m": _preset(256, 688, 4, 4),
    "35m": _preset(384, 1024, 8, 6),
    "60m": _preset(512, 1376, 8, 8),
    "130m": _preset(768, 2048, 12, 12),
    "250m": _preset(768, 2560, 16, 24),
    "350m": _preset(1024, 2736, 16, 24),
    "1b": _preset(2048, 5461, 32, 24),
    "3b": _preset(2560, 6848, 32, 32),
    "7b": _preset(4096, 11008, 32, 32, max_position_embeddings=2048),
    "13b": _preset(5120, 13824, 40, 40, max_position_embeddings=2048),
    "llama3-8b": _preset(
        4096,
        14336,
        32,
        32,
        vocab_size=128256,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
    ),
}
