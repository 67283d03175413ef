# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Low-rank weights: LoRA, ReLoRA's restart of it, and matrices that are products of two factors.

LoRA adds to every projected matrix of a model whose own weights stay as they are.  For a kernel W (m x n), frozen, and its
adapter A (m x r), B (r x n),

    y = x W + s (x A) B ,    s = alpha / r ,    A uniform in ±1/sqrt(m) and B = 0 at first,

so that the model starts as it was.  Merged, W + s A B is an ordinary kernel again.  ReLoRA merges during training, and goes on
with a new adapter,

    W <- W + s A B ,    A drawn anew ,    B <- 0 ,

which leaves the function of the model as it is.  A factored matrix has no W at all:

    y = (x L) R ,    L (m x r) and R (r x n) normal, so that L R has the variance of the kernel in whose place it is.

Sources: Hu et al. 2021, arXiv:2106.09685, A as in the authors' code; Lialin et al. 2023, arXiv:2307.05695; Kamalakara et al.
2022, arXiv:2209.13569.
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
      base: the layer; its kernel is [*batch, inputs, outputs].
      rank: of the adapter, at least 1.
      alpha: the adapter's product is multiplied by alpha / rank.
      key: PRNG key of ``lora_a``.
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, key: jax.Array):
        *batch, inputs, outputs = jax.eval_shape(dequantize, base.kernel.get_value()).shape
        self.base = base
        self.scale = alpha / rank
        self.lora_a = nnx.LoRAParam(_drawn(key, (*batch, inputs, rank)))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*batch, rank, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = (factor[...].astype(x.dtype) for factor in (self.lora_a, self.lora_b))
        return self.base(x) + self.scale * ((x @ a) @ b)

    def merged(self) -> nnx.Linear:
        """The base, with the adapter added to its kernel."""
        kernel = dequantize(self.base.kernel.get_value())
        product = jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest")
        self.base.kernel = nnx.Param((kernel.astype(jnp.float32) + self.scale * product).astype(kernel.dtype))
        return self.base

    def restart(self, key: jax.Array) -> None:
        """Add the adapter to the kernel, and begin with a new one, in place."""
        self.merged()
        self.lora_a[...] = _drawn(key, self.lora_a.shape)
        self.lora_b[...] = jnp.zeros_like(self.lora_b[...])


class FactoredLinear(nnx.Module):
    """A linear layer without a kernel: the ``nnx.Param`` ``left`` [*batch, inputs, rank] and ``right`` [*batch, rank, outputs].

    Args:
      base: the layer in whose place it is, of the same shape and dtypes.
      rank: at least 1.
      std: standard deviation of the entries of left @ right.
      key: PRNG key of both.
    """

    def __init__(self, base: nnx.Linear, rank: int, std: float, key: jax.Array):
        *batch, inputs, outputs = base.kernel.shape
        self.dtype, param_dtype = base.dtype, base.kernel.dtype
        of_each = math.sqrt(std / math.sqrt(rank))  # an entry of the product is a sum of ``rank`` products
        left, right = jax.random.split(key)
        self.left = nnx.Param((of_each * jax.random.normal(left, (*batch, inputs, rank))).astype(param_dtype))
        self.right = nnx.Param((of_each * jax.random.normal(right, (*batch, rank, outputs))).astype(param_dtype))
        self.bias = base.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        left, right = (factor[...].astype(x.dtype) for factor in (self.left, self.right))
        product = (x @ left) @ right
        return product if self.bias is None else product + self.bias[None, None].astype(x.dtype)

    def merged(self) -> nnx.Linear:
        """An ordinary layer, whose kernel is the product."""
        left, right = (factor[...].astype(jnp.float32) for factor in (self.left, self.right))
        kernel = jnp.matmul(left, right, precision="highest").astype(self.left.dtype)
        inputs, outputs = kernel.shape[-2:]
        dtypes = {"dtype": self.dtype, "param_dtype": kernel.dtype}
        layer = nnx.eval_shape(lambda: nnx.Linear(inputs, outputs, use_bias=False, rngs=nnx.Rngs(0), **dtypes))
        layer.kernel = nnx.Param(kernel)
        layer.bias, layer.use_bias = self.bias, self.bias is not None
        return layer


def add_lora(model: Llama, rank: int | float, *, alpha: float = 16.0, key: jax.Array) -> None:
    """Put an adapter of that rank, or of that fraction of the smaller side, on every matrix of the blocks, in place.

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
    for number, (path, parent, name) in enumerate(list(_places(model))):
        base = _ordinary(path, getattr(parent, name))
        adapter = LoRALinear(base, _rank_of(path, base, rank), alpha, jax.random.fold_in(key, number))
        setattr(parent, name, adapter)


def restart_lora(model: Llama, *, key: jax.Array) -> None:
    """Add every adapter of ``model`` to its kernel, and go on with new ones, in place; the model's function stays.

    >>> from galore_jax.models import LlamaConfig
    >>> def restarted():
    ...     model = Llama(LlamaConfig.preset("demo"), rngs=nnx.Rngs(0))
    ...     add_lora(model, 4, key=jax.random.key(0))
    ...     restart_lora(model, key=jax.random.key(1))
    ...     return model
    >>> len(jax.tree.leaves(nnx.state(nnx.eval_shape(restarted), nnx.LoRAParam)))
    14
    """
    for number, (_, parent, name) in enumerate(_places(model)):
        layer = getattr(parent, name)
        if isinstance(layer, LoRALinear):
            layer.restart(jax.random.fold_in(key, number))


def factorize(model: Llama, rank: int | float, *, key: jax.Array) -> None:
    """Put a product of two random factors in the place of every matrix of the blocks, in place.

    Raises:
      ValueError: as :func:`add_lora`.

    >>> from galore_jax.models import LlamaConfig
    >>> def factored():
    ...     model = Llama(LlamaConfig.preset("demo"), rngs=nnx.Rngs(0))
    ...     factorize(model, 0.25, key=jax.random.key(0))
    ...     return model
    >>> up_proj = nnx.eval_shape(factored).layers.mlp.up_proj
    >>> up_proj.left.shape, up_proj.right.shape
    ((4, 128, 32), (4, 32, 352))
    """
    for number, (path, parent, name) in enumerate(list(_places(model))):
        base = _ordinary(path, getattr(parent, name))
        rank_of_this = _rank_of(path, base, rank)
        std = model.config.initializer_range
        setattr(parent, name, FactoredLinear(base, rank_of_this, std, jax.random.fold_in(key, number)))


def merge_lora(model: Llama) -> None:
    """Make every matrix of ``model`` an ordinary kernel, in place: W + s A B, or L R, rounded to the kernel's dtype.

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
        if isinstance(layer, LoRALinear | FactoredLinear):
            setattr(parent, name, layer.merged())


def _drawn(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A of an adapter, float32 [*batch, inputs, rank]."""
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _ordinary(path: str, layer: nnx.Module) -> nnx.Linear:
    if not isinstance(layer, nnx.Linear):
        raise ValueError(f"{path} has an adapter already; merge it first.")
    return layer


def _rank_of(path: str, base: nnx.Linear, rank: int | float) -> int:
    """A whole number, of a rank that may be a fraction of the smaller side."""
    smaller = min(jax.eval_shape(dequantize, base.kernel.get_value()).shape[-2:])
    whole = max(1, round(rank * smaller)) if isinstance(rank, float) and 0 < rank <= 1 else rank
    if not isinstance(whole, int) or whole < 1:
        raise ValueError(f"rank={rank} of an adapter must be at least 1, or a fraction of the smaller side in (0, 1].")
    if whole > smaller:
        raise ValueError(f"rank={rank} is more than the smaller side of {path}, {smaller}; choose a lower rank.")
    return whole


def _places(model: Llama) -> Iterator[tuple[str, nnx.Module, str]]:
    """Path, parent module and name of every linear layer in the blocks, adapted, factored or ordinary."""
    for module_name in ("attention", "mlp"):
        parent = getattr(model.layers, module_name)
        for name, child in sorted(vars(parent).items()):
            if isinstance(child, nnx.Linear | LoRALinear | FactoredLinear):
                yield f"layers/{module_name}/{name}", parent, name
