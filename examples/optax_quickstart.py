# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore as an Optax transformation: a two-layer network in plain JAX, with AdamW and with GaLore at a quarter of the rank.

    python examples/optax_quickstart.py

It needs no extra.  It prints each optimizer's loss and the bytes of its state.
"""

import jax
import jax.numpy as jnp
import optax

import galore_jax

WIDTH, STEPS = 256, 300


def predict(params: dict, x: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(x @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"]


def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(predict(params, x) - y))


def train(name: str, tx: optax.GradientTransformation, params: dict, x: jax.Array, y: jax.Array) -> None:
    @jax.jit
    def step(params: dict, state: optax.OptState) -> tuple:
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(STEPS):
        params, state, value = step(params, state)
    print(f"{name:>14}: loss {float(value):.4f} after {STEPS} steps, {galore_jax.tree_bytes(state):>9,} bytes of state")


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (512, WIDTH))
    down, up = jax.random.normal(keys[1], (2, WIDTH, 16)) / WIDTH**0.25
    y = jnp.tanh(x @ down) @ up.T / 4
    params = {
        "in": {"kernel": 0.05 * jax.random.normal(keys[2], (WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)},
        "out": {"kernel": 0.05 * jax.random.normal(keys[3], (WIDTH, WIDTH))},
    }
    train("adamw", optax.adamw(1e-3), params, x, y)
    # scale="rms" keeps the size of Adam's updates, so AdamW's learning rate carries over.
    train("galore_adamw", galore_jax.galore_adamw(1e-3, rank=0.25, scale="rms", update_proj_gap=50), params, x, y)


if __name__ == "__main__":
    main()
