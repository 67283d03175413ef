# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path against three independent implementations: NumPy float64, galore_torch 1.0 (recorded), optax.contrib.galore."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from problems import needs_optax_galore, optimized_compilation  # noqa: F401

import galore_jax
from galore_jax.matrix_view import PROJ_TYPES

SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (14, 14), "thin": (6, 30)}


def gradients(shape, steps, seed=0):
    """Gradients with well-separated singular values, so that singular vectors are defined to single precision."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        yield ((u * np.linspace(1, 0.1, u.shape[1])) @ vt).astype(np.float32)


def everything(_):
    """Project the leaf whatever its rank: the rule of reference.py, which rotates at full rank too."""
    return jax.tree.map(lambda _: galore_jax.GaLoreDimensionNumbers(), _)


@pytest.mark.covering(3)
@pytest.mark.parametrize("rank", [4, 999])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_equals_the_numpy_reference_over_three_refreshes(proj_type, shape, rank):
    # With bases on both sides PᵀGQ is diagonal at a refresh.  What is off the diagonal is rounding noise, which an eps of 1e-8
    # would blow up to full-size steps in any implementation.
    eps = 1e-2 if proj_type == "full" else 1e-8
    tx = galore_jax.galore(
        optax.scale_by_adam(eps=eps),
        rank=rank,
        update_proj_gap=3,
        scale=0.25,
        proj_type=proj_type,
        projector="svd",
        weight_dimension_numbers=everything,
    )
    slow = reference.GaLore(reference.Adam(eps=eps), rank=rank, update_proj_gap=3, scale=0.25, proj_type=proj_type)
    params = {"w": jnp.zeros(shape)}
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients(shape, 11):
        updates, state = update({"w": jnp.asarray(gradient)}, state)
        expected = slow.update(gradient, signs_of=(state.left["w"], state.right["w"]))
        np.testing.assert_allclose(updates["w"], expected, atol=1e-5)


def scale_by_adam_eps_first(eps, b1=0.9, b2=0.999):
    """Adam as galore_torch codes it: eps is added before bias correction."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return (jnp.zeros([], jnp.int32), zeros, zeros)

    def update(updates, state, params=None):
        count, mu, nu = state
        t = (count + 1).astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, nu, updates)
        step = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        return jax.tree.map(lambda m, v: step * m / (jnp.sqrt(v) + eps), mu, nu), (count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


def _svd_with_fixed_signs(seen):
    """The recording's convention: the largest entry of each column is positive."""
    basis = galore_jax.projectors.svd().refresh(seen)
    sign = jnp.sign(basis[jnp.argmax(jnp.abs(basis), axis=0), jnp.arange(basis.shape[1])])
    return basis * sign[None, :]


SVD_WITH_FIXED_SIGNS = galore_jax.projectors.Projector("svd with fixed signs", _svd_with_fixed_signs)
GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "galore_torch_1.0.json").read_text())


@pytest.mark.covering(2)
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['proj_type']}-{c['in']}x{c['out']}-r{c['rank']}")
def test_equals_recorded_trajectories_of_galore_torch(case):
    """A torch weight is the transpose of a kernel, so its left is our right; std and reverse_std agree."""
    shape = (case["in"], case["out"])
    proj_type = {"left": "right", "right": "left"}.get(case["proj_type"], case["proj_type"])
    tx = optax.chain(
        galore_jax.galore(
            scale_by_adam_eps_first(eps=case["eps"]),
            rank=case["rank"],
            update_proj_gap=case["update_proj_gap"],
            scale=case["scale"],
            proj_type=proj_type,
            projector=SVD_WITH_FIXED_SIGNS,
            refresh="together",
            transport="keep",
            weight_dimension_numbers=everything,
        ),
        optax.scale_by_learning_rate(case["lr"]),
    )
    params = {"w": jnp.asarray(np.asarray(case["weights"][0], np.float32).T)}
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient, expected in zip(gradients(shape, case["steps"], case["seed"]), case["weights"][1:], strict=True):
        updates, state = update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], np.asarray(expected).T, atol=1e-5)


@needs_optax_galore
@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (6, 30)])
def test_equals_optax_contrib_galore_on_its_side(shape):
    """optax.contrib.galore puts the basis on the larger side, with α = 1, and refreshes on the same steps."""
    settings = {"rank": 4, "update_proj_gap": 3, "scale": 1.0}
    ours = galore_jax.galore(optax.scale_by_adam(), proj_type="reverse_std", projector="svd", **settings)
    theirs = optax.contrib.scale_by_galore(base_optimizer=optax.scale_by_adam(), **settings)
    params = {"w": jnp.zeros(shape)}
    our_state, their_state = ours.init(params), theirs.init(params)
    our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    for gradient in gradients(shape, 11):
        gradient = {"w": jnp.asarray(gradient)}
        our_updates, our_state = our_update(gradient, our_state)
        their_updates, their_state = their_update(gradient, their_state)
        np.testing.assert_allclose(our_updates["w"], their_updates["w"], atol=1e-5)
