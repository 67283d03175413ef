# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""States of inner optimizers on projected parameters, and bases that turn, shared by the tests of transport."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import RANK, leniency, tree

from galore_jax.matrix_view import select

RATE = 0.1
ONLY_MATRICES = {"kernel": True, "stack": True, "bias": False}
CARRIED = {
    "adam": lambda: optax.adam(RATE),
    "adamw": lambda: optax.adamw(RATE, weight_decay=0.1),
    "nadam": lambda: optax.nadam(RATE),
    "radam": lambda: optax.radam(RATE),
    "yogi": lambda: optax.yogi(RATE),
    "adamax": lambda: optax.adamax(RATE),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "adabelief": lambda: optax.adabelief(RATE),
    "lion": lambda: optax.lion(RATE),
    "sgd": lambda: optax.sgd(RATE),
    "momentum": lambda: optax.sgd(RATE, momentum=0.9),
    "nesterov": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "ema": lambda: optax.ema(0.9),
    "rmsprop": lambda: optax.rmsprop(RATE, momentum=0.9),
    "rms with count": lambda: optax.scale_by_rms(bias_correction=True),
    "adagrad": lambda: optax.adagrad(RATE),
    "adadelta": lambda: optax.adadelta(RATE),
    "adan": lambda: optax.adan(RATE),
    "novograd": lambda: optax.novograd(RATE, weight_decay=0.1),
    "lamb": lambda: optax.lamb(RATE),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=2, momentum=0.9),
    "adafactor, not factored": lambda: optax.adafactor(RATE, factored=False),
    "muon": lambda: optax.contrib.muon(RATE),
    "ademamix": lambda: optax.contrib.ademamix(RATE),
    "simplified ademamix": lambda: optax.contrib.simplified_ademamix(RATE, alpha=0.5),
    "optimistic": lambda: optax.optimistic_gradient_descent(RATE),
    "apply_every": lambda: optax.chain(optax.apply_every(3), optax.adam(RATE)),
    "chain": lambda: optax.chain(optax.zero_nans(), optax.clip_by_global_norm(1.0), optax.adam(RATE)),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(RATE, 0.0, 9)),
    "masked": lambda: optax.masked(optax.adam(RATE), ONLY_MATRICES),
    "partition": lambda: optax.partition(
        {"a": optax.adam(RATE), "b": optax.lion(RATE)}, {"kernel": "a", "stack": "b", "bias": "a"}
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(RATE), every_k_schedule=3).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(RATE), 3),
}


@functools.cache
def optimizer(name):
    """(the transformation, its update compiled once)"""
    inner = optax.with_extra_args_support(CARRIED[name]())

    def update(gradient, state, params):
        with leniency():
            return inner.update(gradient, state, params)

    return inner, jax.jit(update)


def views_of(proj_type="std", params=None, rank=RANK):
    return select(tree(0) if params is None else params, rank=rank, proj_type=proj_type)


def low_rank(views, seed):
    """Random low-rank gradients of the parameters {bias, kernel, stack}."""
    rng = np.random.default_rng(seed)
    shapes = [(10,) if view is None else view.low_rank_shape for view in views]
    return {
        name: jnp.asarray(rng.normal(size=s), jnp.float32)
        for name, s in zip(("bias", "kernel", "stack"), shapes, strict=True)
    }


STRUCTURE = jax.tree.structure(tree(0))


def overlaps(views, draw, seed=0):
    """One Q for each basis of each matrix: [(left or None, right or None), ...]."""
    rng = np.random.default_rng(seed)

    def q(view):
        count = int(np.prod(view.batch_shape))
        stacked = np.stack([draw(rng, view.rank) for _ in range(count)])
        return jnp.asarray(stacked.reshape(*view.batch_shape, view.rank, view.rank), jnp.float32)

    return [view and (q(view) if view.left else None, q(view) if view.right else None) for view in views]


def orthogonal(rng, r):
    return np.linalg.qr(rng.normal(size=(r, r)))[0]


def signed_permutation(rng, r):
    return np.eye(r)[rng.permutation(r)] * rng.choice([-1.0, 1.0], size=(r, 1))


def turn(carried, state, views, qs):
    """The state with every carrier applied, over the batch axes by vmap."""
    leaves, structure = jax.tree.flatten(state)
    for i, carrier in enumerate(carried):
        if carrier is not None:
            function = carrier.turn
            for _ in views[carrier.parameter].batch_shape:
                function = jax.vmap(function)
            new = function(leaves[i], *qs[carrier.parameter])
            assert (new.shape, new.dtype) == (leaves[i].shape, leaves[i].dtype)
            leaves[i] = new
    return structure.unflatten(leaves)


def in_new_basis(x, views, qs):
    """Coordinates in the new bases of a tree of coordinates in the old ones."""

    def one(leaf, q):
        if q is None:
            return leaf
        left, right = q
        leaf = leaf if left is None else jnp.einsum("...ij,...jn->...in", left, leaf)
        return leaf if right is None else jnp.einsum("...mj,...ij->...mi", leaf, right)

    return {name: one(x[name], q) for name, q in zip(x, qs, strict=True)}
