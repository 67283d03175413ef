# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore in a Flax Linen training loop: a ``TrainState`` with any Optax optimizer in the subspace; this one has Lion.

    python examples/flax_train_state.py

It needs Flax (extra ``train``).  It prints the loss, the accuracy, and the bytes of the state beside those of full-rank Lion.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import galore_jax

STEPS = 200


class Classifier(nn.Module):
    """Says in which quarter of the circle the mean of a random walk lies."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, D] -> [B, 4]
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(4)(x)


def batch(key: jax.Array, size: int = 256) -> tuple[jax.Array, jax.Array]:
    points = jax.random.normal(key, (size, 32, 2))
    mean = points.mean(axis=1)
    label = 2 * (mean[:, 0] > 0).astype(jnp.int32) + (mean[:, 1] > 0).astype(jnp.int32)
    return points.reshape(size, 64), label


@jax.jit
def train_step(state: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array, jax.Array]:
    x, label = batch(key)

    def loss_fn(params: dict) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": params}, x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return loss, (logits.argmax(axis=-1) == label).mean()

    (loss, accuracy), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients), loss, accuracy


def main() -> None:
    model = Classifier()
    params = model.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        galore_jax.galore(optax.scale_by_lion(), rank=16, update_proj_gap=50, scale=1.0),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(1e-3, STEPS)),
    )
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for step in range(STEPS):
        state, loss, accuracy = train_step(state, jax.random.key(step))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {float(loss):.3f}, accuracy {float(accuracy):.3f}")
    full = galore_jax.state_bytes(optax.lion(1e-3), params)
    print(f"optimizer state: {galore_jax.tree_bytes(state.opt_state):,} bytes; Lion at full rank: {full:,} bytes")


if __name__ == "__main__":
    main()
