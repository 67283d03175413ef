# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Your own Flax NNX decoder in a layer-wise step, with its memory planned for a card.

    python examples/own_blocks.py                       # needs Flax (extra train)
    python examples/own_blocks.py --target rtx4090      # needs the extra plan

It stacks the model's blocks and trains them layer by layer beside the plain step.  It prints the losses of both, and the largest
difference.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from galore_jax import galore_adamw
from galore_jax.layerwise import BlockStack, layerwise
from galore_jax.planning.targets import compile_for, target

WIDTH, HEADS, LAYERS, VOCAB, LENGTH, WINDOW = 64, 4, 4, 256, 32, 8


class Block(nnx.Module):
    """A decoder block as a model of your own has it; every second layer attends to the last WINDOW tokens only."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, local: jax.Array | bool) -> jax.Array:  # [B, T, D] -> [B, T, D]
        behind = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])[None]
        mask = (behind >= 0) & (behind < jnp.where(local, WINDOW, x.shape[1]))
        x = x + self.attention(self.norm1(x), mask=mask[None, None])
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """The model: a list of blocks, one after the other."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, number % 2 == 0)
        return self.lm_head(self.norm(x))


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))


def stacked(model: Decoder) -> tuple[BlockStack, Any]:
    """The model as a stack of blocks, and its parameters with the layers as the first axis of those of the blocks."""
    blocks = [nnx.split(block, nnx.Param) for block in model.blocks]
    block = blocks[0][0]  # the structure is the same for all
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.to_pure_dict(params) for _, params in blocks))
    rest = {name: nnx.split(getattr(model, name), nnx.Param) for name in ("embed", "norm", "lm_head")}
    graphs = {name: graphdef for name, (graphdef, _) in rest.items()}
    params = {name: nnx.to_pure_dict(state) for name, (_, state) in rest.items()} | {"blocks": layers}

    def part(name: str, params: Any) -> Any:
        return nnx.merge(graphs[name], params[name])

    def loss(rest: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return cross_entropy(part("lm_head", rest)(part("norm", rest)(x)), tokens[:, 1:])

    stack = BlockStack(
        split=lambda params: ({"blocks": params["blocks"]}, {k: v for k, v in params.items() if k != "blocks"}),
        join=lambda layers, rest: layers | rest,
        embed=lambda rest, tokens: part("embed", rest)(tokens[:, :-1]),
        block=lambda layer, x, local: nnx.merge(block, layer["blocks"])(x, local),
        loss=loss,
        flags=np.arange(LAYERS) % 2 == 0,
    )
    return stack, params


def batches() -> Iterator[np.ndarray]:
    """Arithmetic sequences of tokens, int32 [batch, LENGTH + 1]."""
    rng = np.random.default_rng(0)
    while True:
        start, step = rng.integers(0, VOCAB, (8, 1)), rng.integers(1, 5, (8, 1))
        yield ((start + step * np.arange(LENGTH + 1)) % VOCAB).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--target", default="here", help="a card to plan for, such as rtx4090")
    arguments = parser.parse_args()

    model = Decoder(nnx.Rngs(0))
    stack, params = stacked(model)
    tx = galore_adamw(3e-3, rank=16, update_proj_gap=20, scale="rms")
    init, step = layerwise(stack, tx)

    # The plain step, on the same stacked parameters and by the model itself.
    graphdef = nnx.graphdef(model)

    def plain_loss(params: Any, tokens: jax.Array) -> jax.Array:
        blocks = {i: jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(LAYERS)}
        model = nnx.merge(graphdef, params | {"blocks": blocks})
        return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

    def plain_step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(plain_loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    plan = compile_for(target(arguments.target), step, params, init(params), next(batches()), donate_argnums=(0, 1))
    print(f"a layer-wise step takes {plan.peak_bytes / 2**20:.1f} MiB on {arguments.target}")

    mine, plain = (params, init(params)), (params, tx.init(params))
    layerwise_step, plain_step = jax.jit(step), jax.jit(plain_step)
    largest = 0.0
    for number, tokens in zip(range(arguments.steps), batches(), strict=False):
        *mine, metrics = layerwise_step(*mine, tokens)
        *plain, loss = plain_step(*plain, tokens)
        largest = max(largest, abs(float(metrics.loss) - float(loss)))
        if number % 20 == 0 or number == arguments.steps - 1:
            print(f"step {number}: loss {metrics.loss:.4f}, of the plain step {loss:.4f}")
    print(f"largest difference of the losses {largest:.1e}")


if __name__ == "__main__":
    main()
