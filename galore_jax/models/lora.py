# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA: a low-rank addition to every projected matrix of a model whose own weights stay as they are.

For a kernel W (m x n), frozen, and its adapter A (m x r), B (r x n),

    y = x W + s (x A) B ,    s = alpha / r ,    A uniform in ±1/sqrt(m) and B = 0 at first,

so that the model starts as it was.  Merged, W + s A B is an ordinary kernel again.

Source: Hu et al. 2021, arXiv:2106.09685; A as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from galore_jax.models.llama import Llama
from galore_jax.weights import dequantize


class LoRALinear(nnx.Module):
    """A linear layer and its adapter: ``base``, and the float32 ``nnx.LoRAParam`` ``lora_a`` and ``lora_b``.

    Args:
      base: the layer, without a bias; its kernel is [*batch, inputs, outputs].
      rank: of the adapter, at least 1.
      alpha: the adapter's product is multiplied by alpha / rank.
      key: PRNG key of ``lora_a``.
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, key: jax.Array):
        *batch, inputs, outputs = jax.eval_shape(dequantize, base.kernel.get_value()).shape
        bound = 1 / math.sqrt(inputs)
        self.base = base
        self.scale = alpha / rank
        self.lora_a = nnx.LoRAParam(jax.random.uniform(key, (*batch, inputs, rank), minval=-bound, maxval=bound))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*batch, rank, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = (factor[...].astype(x.dtype) for factor in (self.lora_a, self.lora_b))
        return self.base(x) + self.scale * ((x @ a) @ b)

    def merged(self) -> nnx.Linear:
        """The base, with the adapter added to its kernel."""
        kernel = dequantize(self.base.kernel.get_value())
        whole = kernel.astype(jnp.float32) + self.scale * (self.lora_a[...] @ self.lora_b[...])
        self.base.kernel = nnx.Param(whole.astype(kernel.dtype))
        return self.base


def add_lora(model: Llama, rank: int, *, alpha: float = 16.0, key: jax.Array) -> None:
    """Put an adapter of that rank on every matrix of the blocks of ``model``, in place.

    The adapters are the model's ``nnx.LoRAParam``: ``nnx.split(model, nnx.LoRAParam, ...)`` parts them from all else.

    Raises:
      ValueError: ``rank`` is not positive, exceeds the smaller side of a matrix, or there are adapters already.

    >>> from galore_jax.models import LlamaConfig
    >>> def adapted():
    ...     model = Llama(LlamaConfig.preset("demo"), rngs=nnx.Rngs(0))
    ...     add_lora(model, 4, key=jax.random.key(0))
    ...     return model
    >>> adapters = nnx.state(nnx.eval_shape(adapted), nnx.LoRAParam)
    >>> adapters["layers"]["mlp"]["up_proj"]["lora_b"].shape, len(jax.tree.leaves(adapters))
    ((4, 4, 352), 14)
    """
    if rank < 1:
        raise ValueError(f"rank={rank} of an adapter must be at least 1.")
    for number, (path, parent, name) in enumerate(list(_places(model))):
        base = getattr(parent, name)
        if isinstance(base, LoRALinear):
            raise ValueError(f"{path} has an adapter already; merge it first.")
        smaller = min(jax.eval_shape(dequantize, base.kernel.get_value()).shape[-2:])
        if rank > smaller:
            raise ValueError(f"rank={rank} is more than the smaller side of {path}, {smaller}; choose a lower rank.")
        setattr(parent, name, LoRALinear(base, rank, alpha, jax.random.fold_in(key, number)))


def merge_lora(model: Llama) -> None:
    """Add every adapter of ``model`` to its kernel and take it away, in place; the sum is rounded to the kernel's dtype.

    >>> from galore_jax.models import LlamaConfig
    >>> def trained_and_merged():
    ...     model = Llama(LlamaConfig.preset("demo"), rngs=nnx.Rngs(0))
    ...     add_lora(model, 4, key=jax.random.key(0))
    ...     merge_lora(model)
    ...     return model
    >>> jax.tree.leaves(nnx.state(nnx.eval_shape(trained_and_merged), nnx.LoRAParam))
    []
    """
    for _, parent, name in list(_places(model)):
        layer = getattr(parent, name)
        if isinstance(layer, LoRALinear):
            setattr(parent, name, layer.merged())


def _places(model: Llama) -> Iterator[tuple[str, nnx.Module, str]]:
    """Path, parent module and name of every linear layer in the blocks, adapted or not."""
    for module_name in ("attention", "mlp"):
        parent = getattr(model.layers, module_name)
        for name, child in sorted(vars(parent).items()):
            if isinstance(child, nnx.Linear | LoRALinear):
                yield f"layers/{module_name}/{name}", parent, name
