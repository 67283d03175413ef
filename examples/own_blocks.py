# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Decoders of others in a layer-wise step: one made of Flax NNX's layers, and Tunix's Llama 3 with its own blocks.

    python examples/own_blocks.py flax                      # needs Flax (extra train)
    python examples/own_blocks.py tunix                     # needs google-tunix
    python examples/own_blocks.py tunix --target rtx3060-12gb      # needs the extra plan

It trains a small model layer by layer, beside the plain step of the model itself, and prints losses and the largest differences.
With a target, it compiles both steps of a model with a billion parameters for that card, and prints how much memory they take.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from galore_jax import describe, galore_adamw, galore_adamw_8bit
from galore_jax.layerwise import BlockStack, layerwise
from galore_jax.planning.targets import compile_for, compile_only, target

LENGTH, WINDOW = 32, 8


class Foreign(NamedTuple):
    """A model of NNX whose blocks lie in a list."""

    make: Callable[[], nnx.Module]
    blocks: str  # the name of the list
    others: tuple[str, ...]  # the names of all other parts with parameters
    embed: Callable[..., jax.Array]  # the other parts by name, tokens [B, T] -> [B, T, D]
    block: Callable[..., jax.Array]  # a block, [B, T, D], its flag if there are flags -> [B, T, D]
    logits: Callable[..., jax.Array]  # the other parts by name, [B, T, D] -> [B, T, V]
    whole: Callable[[Any, jax.Array], jax.Array]  # the model as its authors call it, tokens [B, T] -> [B, T, V]
    vocab: int
    dtype: str  # of the parameters
    flags: Any = None


class Block(nnx.Module):
    """A decoder block as a model of your own has it; every second layer attends to the last WINDOW tokens only."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(heads, width, use_bias=False, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, local: jax.Array | bool) -> jax.Array:  # [B, T, D] -> [B, T, D]
        behind = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])[None]
        mask = (behind >= 0) & (behind < jnp.where(local, WINDOW, x.shape[1]))
        x = x + self.attention(self.norm1(x), mask=mask[None, None])
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """A model: a list of blocks, one after the other."""

    def __init__(self, width: int, heads: int, layers: int, vocab: int, dtype: str, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.lm_head = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, number % 2 == 0)
        return self.lm_head(self.norm(x))


def flax(large: bool, dtype: str) -> Foreign:
    width, heads, layers, vocab = (2048, 16, 18, 32_000) if large else (64, 4, 4, 256)
    return Foreign(
        make=lambda: Decoder(width, heads, layers, vocab, dtype, nnx.Rngs(0)),
        blocks="blocks",
        others=("embed", "norm", "lm_head"),
        embed=lambda parts, tokens: parts["embed"](tokens),
        block=lambda block, x, local: block(x, local),
        logits=lambda parts, x: parts["lm_head"](parts["norm"](x)),
        whole=lambda model, tokens: model(tokens),
        vocab=vocab,
        dtype=dtype,
        flags=np.arange(layers) % 2 == 0,
    )


def tunix(large: bool, dtype: str) -> Foreign:
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig.llama3p2_1b()
    if not large:
        config = dataclasses.replace(
            config, num_layers=4, vocab_size=256, embed_dim=64, hidden_dim=256, num_heads=4, head_dim=16, num_kv_heads=2
        )

    def make() -> nnx.Module:
        rngs = nnx.Rngs(0)
        model = llama.Llama3(config, rngs=rngs)
        for layer in model.layers:
            # Tunix leaves these at zero, because it expects the weights of a trained model.
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                kernel = linear.kernel
                kernel[...] = 0.02 * jax.random.normal(rngs.params(), kernel.shape, kernel.dtype)
        return model

    def positions_and_mask(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, length = x.shape[:2]
        mask = jnp.tril(jnp.ones((length, length), bool))
        return jnp.broadcast_to(jnp.arange(length), (batch, length)), jnp.broadcast_to(mask, (batch, length, length))

    def block(layer: Any, x: jax.Array) -> jax.Array:
        positions, mask = positions_and_mask(x)
        return layer(x, positions, None, mask)[1]  # beside it, a cache for generation

    def whole(model: Any, tokens: jax.Array) -> jax.Array:
        positions, mask = positions_and_mask(tokens)
        return model(tokens, positions, None, mask)[0]

    return Foreign(
        make=make,
        blocks="layers",
        others=("embedder", "final_norm"),
        embed=lambda parts, tokens: parts["embedder"].encode(tokens),
        block=block,
        logits=lambda parts, x: parts["embedder"].decode(parts["final_norm"](x)),  # the head is the embedding
        whole=whole,
        vocab=config.vocab_size,
        dtype=dtype,
    )


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens).mean()


def take_apart(foreign: Foreign, model: nnx.Module) -> tuple[BlockStack, Callable, tuple[list, dict]]:
    """The model as a stack of blocks, its own loss of stacked parameters and tokens, and the parameters for ``stacked``."""
    name = foreign.blocks
    parts = {part: nnx.split(getattr(model, part), nnx.Param) for part in foreign.others}
    blocks = [nnx.split(block, nnx.Param) for block in getattr(model, name)]
    graph, block_graph = nnx.graphdef(model), blocks[0][0]  # the graph of a block is the same for all

    def merged(rest: Any) -> dict[str, Any]:
        return {part: nnx.merge(graph, rest[part]) for part, (graph, _) in parts.items()}

    stack = BlockStack(
        split=lambda params: ({name: params[name]}, {part: params[part] for part in parts}),
        join=lambda layers, rest: layers | rest,
        embed=lambda rest, tokens: foreign.embed(merged(rest), tokens[:, :-1]),
        block=lambda layer, x, *flag: foreign.block(nnx.merge(block_graph, layer[name]), x, *flag),
        loss=lambda rest, x, tokens: cross_entropy(foreign.logits(merged(rest), x), tokens[:, 1:]),
        flags=foreign.flags,
    )

    def plain_loss(params: Any, tokens: jax.Array) -> jax.Array:
        layers = {i: jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in range(len(blocks))}
        whole = nnx.merge(graph, params | {name: layers})
        return cross_entropy(foreign.whole(whole, tokens[:, :-1]), tokens[:, 1:])

    layers = [nnx.to_pure_dict(state) for _, state in blocks]
    return stack, plain_loss, (layers, {part: nnx.to_pure_dict(state) for part, (_, state) in parts.items()})


def stacked(foreign: Foreign, layers: list, rest: dict) -> dict:
    """The parameters of a model as one tree, with the layers as the first axis of those of the blocks."""
    params = rest | {foreign.blocks: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    return jax.tree.map(lambda leaf: leaf.astype(foreign.dtype), params)


def plain(loss: Callable, tx: optax.GradientTransformation) -> Callable:
    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def plan(foreign: Foreign, card: str) -> None:
    """Compiles both steps of the model for a card.  Nothing of its size is allocated."""
    stack, loss, parameters = take_apart(foreign, nnx.eval_shape(foreign.make))
    params = jax.eval_shape(partial(stacked, foreign), *parameters)
    tx = galore_adamw_8bit(1e-3, rank=512, scale="rms")
    init, step = layerwise(stack, tx)
    tokens, gib = jax.ShapeDtypeStruct((1, 513), "int32"), 2**30
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e9:.2f} billion parameters")
    for name, function, make in (("plain", plain(loss, tx), tx.init), ("layer-wise", step, init)):
        found = compile_for(target(card), function, params, jax.eval_shape(make, params), tokens, donate_argnums=(0, 1))
        fits = "fits" if found.fits else "does not fit"
        print(f"{name:<11} {found.peak_bytes / gib:5.2f} GiB: {fits} {target(card).memory / gib:.2f} GiB")


def batches(vocab: int) -> Iterator[np.ndarray]:
    """Arithmetic sequences of tokens, int32 [batch, LENGTH + 1]."""
    rng = np.random.default_rng(0)
    while True:
        start, step = rng.integers(0, vocab, (8, 1)), rng.integers(1, 5, (8, 1))
        yield ((start + step * np.arange(LENGTH + 1)) % vocab).astype(np.int32)


def train(foreign: Foreign, steps: int) -> None:
    stack, loss, parameters = take_apart(foreign, foreign.make())
    params, tx = stacked(foreign, *parameters), galore_adamw(3e-3, rank=16, update_proj_gap=20, scale="rms")
    print(describe(tx, params))
    init, step = layerwise(stack, tx)
    ours, theirs = (params, init(params)), (params, tx.init(params))
    layerwise_step, plain_step = jax.jit(step), jax.jit(plain(loss, tx))
    difference = 0.0
    for number, tokens in zip(range(steps), batches(foreign.vocab), strict=False):
        *ours, metrics = layerwise_step(*ours, tokens)
        *theirs, value = plain_step(*theirs, tokens)
        difference = max(difference, abs(float(metrics.loss) - float(value)))
        if number % 20 == 0 or number == steps - 1:
            print(f"step {number}: loss {metrics.loss:.4f}, of the plain step {value:.4f}")
    both = zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True)
    furthest = max(float(jnp.abs(one - other).max()) for one, other in both)
    print(f"largest difference: losses {difference:.1e}, parameters {furthest:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    libraries = {function.__name__: function for function in (flax, tunix)}
    parser.add_argument("library", choices=libraries)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--target", help="a card to plan for, such as rtx4090")
    options = parser.parse_args()
    make = libraries[options.library]
    if options.target is None:
        train(make(large=False, dtype="float32"), options.steps)
    else:
        compile_only()
        plan(make(large=True, dtype="bfloat16"), options.target)


if __name__ == "__main__":
    main()
