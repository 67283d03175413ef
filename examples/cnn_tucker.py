# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A small Flax NNX CNN on scikit-learn's handwritten digits: Adam, and Adam in Tucker coordinates, for as many steps.

    python examples/cnn_tucker.py

It needs Flax (extra ``train``) and scikit-learn (``pip install scikit-learn``).  It prints each optimizer's test accuracy and the
bytes of its state.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import galore_jax

STEPS, BATCH, TEST = 200, 64, 450


class CNN(nnx.Module):
    """8 x 8 grey images, ten classes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.conv3 = nnx.Conv(64, 64, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(256, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, 8, 8, 1] -> [B, 10]
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x))  # [B, 4, 4, 64]
        x = nnx.relu(self.conv3(x))  # [B, 2, 2, 64]
        x = nnx.relu(self.dense(x.reshape(x.shape[0], -1)))
        return self.head(x)


def digits() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The images and labels for training, and those for the test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images[order].reshape(-1, 8, 8, 1) / 16, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return (images[TEST:], labels[TEST:]), (images[:TEST], labels[:TEST])


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    def loss(model: CNN) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def train(name: str, tx: optax.GradientTransformation) -> None:
    (images, labels), test = digits()
    model = CNN(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batches = np.random.default_rng(1).integers(len(labels), size=(STEPS, BATCH))
    for batch in batches:
        train_step(model, optimizer, images[batch], labels[batch])
    accuracy = jnp.mean(jnp.argmax(model(test[0]), axis=-1) == test[1])
    state = galore_jax.state_bytes(tx, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    print(f"{name:<28} {float(accuracy):>13.1%} {state:>15,}")


def main() -> None:
    print(f"{'optimizer':<28} {'test accuracy':>13} {'bytes of state':>15}")
    train("adam", optax.adam(1e-3))
    # scale="rms" keeps the size of Adam's updates, so that its learning rate carries over.
    convolutions = galore_jax.tucker(optax.adam(1e-3), rank=0.25, update_proj_gap=50, scale="rms")
    train("tucker(adam)", convolutions)
    matrices = {"rank": lambda path, shape: 0.25 if len(shape) == 2 else None, "update_proj_gap": 50, "scale": "rms"}
    train("galore(tucker(adam))", galore_jax.galore(convolutions, **matrices))


if __name__ == "__main__":
    main()
