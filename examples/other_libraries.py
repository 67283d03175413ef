# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore in other libraries' models: a small language model of each, trained by AdamW and by GaLore at a quarter of the rank.

    python examples/other_libraries.py haiku        # or equinox

It needs that library (``pip install dm-haiku``, or ``equinox``) and Orbax (extra ``train``).  The text is a module of Python's
standard library.  It prints what GaLore projects, both losses, the bytes of both states, and whether an Orbax checkpoint restores
parameters and state bit for bit.  For libraries that have a trainer of their own see other_trainers.py.
"""

import argparse
import inspect
import itertools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import describe, galore_adamw, tree_bytes

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 32, 8


def haiku():
    """A scanned stack: ``hk.experimental.layer_stack`` gives every parameter an axis of layers."""
    import haiku as hk

    def norm(x):
        return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    def block(x):
        weights = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, model_size=WIDTH, w_init=weights)
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        h = norm(x)
        x = x + attention(h, h, h, mask)
        return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(4 * WIDTH)(norm(x))))

    def logits(tokens):
        positions = hk.get_parameter("positions", (LENGTH, WIDTH), init=hk.initializers.RandomNormal(0.02))
        x = hk.Embed(256, WIDTH)(tokens) + positions[None]
        x = hk.experimental.layer_stack(LAYERS)(block)(x)
        return hk.Linear(256, name="readout")(norm(x))

    model = hk.without_apply_rng(hk.transform(logits))
    return model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32)), model.apply


def equinox():
    """Weights are (outputs, inputs), and the model is the tree."""
    import equinox as eqx

    class Block(eqx.Module):
        norm1: eqx.nn.LayerNorm
        norm2: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
            self.up, self.down = (
                eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1]),
                eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2]),
            )

        def __call__(self, x):
            h = jax.vmap(self.norm1)(x)
            x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            return x + jax.vmap(lambda y: self.down(jax.nn.gelu(self.up(self.norm2(y)))))(x)

    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        position: jax.Array
        blocks: list
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, LAYERS + 3)
            self.embedding = eqx.nn.Embedding(256, WIDTH, key=keys[0])
            self.position = 0.02 * jax.random.normal(keys[1], (LENGTH, WIDTH))
            self.blocks = [Block(key) for key in keys[3:]]
            self.head = eqx.nn.Linear(WIDTH, 256, key=keys[2])

        def __call__(self, tokens):
            x = jax.vmap(self.embedding)(tokens) + self.position
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)
    return params, lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens)


LIBRARIES = {function.__name__: function for function in (haiku, equinox)}


def batches():
    """Windows of the text, int32 [BATCH, LENGTH + 1]."""
    text = np.frombuffer(Path(inspect.getfile(argparse)).read_bytes(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(len(text) - LENGTH - 1, size=BATCH)
        yield np.stack([text[start : start + LENGTH + 1] for start in starts])


def train(tx, params, logits, steps):
    """The parameters, the state and the mean loss of the last ten steps, in nats a byte."""

    def loss(params, tokens):
        found = logits(params, tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for tokens in itertools.islice(batches(), steps):
        params, state, value = step(params, state, tokens)
        losses.append(float(value))
    return params, state, np.mean(losses[-10:])


def restores(params, state):
    """Whether Orbax gives back what it saved, bit for bit."""
    import orbax.checkpoint as ocp

    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        leaves, structure = jax.tree.flatten((params, state))
        checkpointer.save(Path(folder) / "last", leaves)
        checkpointer.wait_until_finished()
        found = structure.unflatten(checkpointer.restore(Path(folder) / "last", leaves))
    return all(
        bool(np.array_equal(a, b))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((params, state)), strict=True)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    params, logits = LIBRARIES[options.library]()
    low_rank = galore_adamw(3e-3, rank=0.25, scale="rms")
    described = describe(low_rank, params)
    print(described)
    _, state, expected = train(optax.adamw(3e-3), params, logits, options.steps)
    print(f"\nadamw         loss {expected:.4f}, state {tree_bytes(state):,} bytes")
    trained, state, found = train(low_rank, params, logits, options.steps)
    print(f"galore_adamw  loss {found:.4f} ({found / expected - 1:+.1%}), state {tree_bytes(state):,} bytes")
    if tree_bytes(state) != described.state_bytes:
        raise SystemExit(f"describe says {described.state_bytes:,} bytes")
    if not restores(trained, state):
        raise SystemExit("a checkpoint does not restore bit for bit")
    print("a checkpoint restores bit for bit")


if __name__ == "__main__":
    main()
