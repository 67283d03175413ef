# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks from gradients, against NumPy's singular values and against trying every choice of ranks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import (
    GaLoreDimensionNumbers,
    galore,
    galore_adamw,
    galore_adamw_8bit,
    ranks_from_gradients,
    state_bytes,
)
from galore_jax.spectra import Ranks

ADAMW = functools.partial(galore_adamw, 0.01)


def matrix(seed, *shape, decay=1.0):
    """A gradient whose singular values fall by about ``decay`` each."""
    rng = np.random.default_rng(seed)
    *batch, m, n = shape
    left, right = (np.linalg.qr(rng.normal(size=(*batch, side, side)))[0] for side in (m, n))
    k = min(m, n)
    singular = decay ** np.arange(k) * rng.uniform(0.9, 1.1, size=(*batch, 1, k))
    return jnp.asarray((left[..., :k] * singular) @ np.swapaxes(right, -1, -2)[..., :k, :], jnp.float32)


def shares(gradient):
    """[k]: e(1), e(2), ..., the mean over the matrices of a stack."""
    squares = np.linalg.svd(np.asarray(gradient, np.float64), compute_uv=False) ** 2
    energies = np.cumsum(squares, axis=-1) / squares.sum(axis=-1, keepdims=True)
    return energies.reshape(-1, energies.shape[-1]).mean(axis=0)


@pytest.fixture(scope="module")
def gradients():
    return {
        "embed": jnp.ones((40, 6)),
        "flat": matrix(0, 6, 6),
        "stack": matrix(1, 3, 5, 8, decay=0.8),
        "steep": matrix(2, 8, 6, decay=0.4),
        "bias": jnp.ones((6,)),
    }


@pytest.mark.covering(2)
@pytest.mark.filterwarnings("ignore:galore projects none")
@pytest.mark.parametrize("extra", [0, 200, 500, 900, 1400])
def test_no_other_ranks_in_so_many_bytes_keep_more(gradients, extra):
    """The best by trying all, but for what the bytes of the next rank would have added."""
    names = ("flat", "stack", "steep")

    def bytes_of(ranks):
        return state_bytes(ADAMW(rank=lambda path, shape: ranks.get(path)), gradients)

    def kept(ranks):
        matrices = {"flat": 1, "stack": 3, "steep": 1}
        return sum(
            matrices[name] * (1.0 if rank is None else shares(gradients[name])[rank - 1])
            for name, rank in ranks.items()
        )

    most = bytes_of(dict.fromkeys(names, 1)) + extra
    found = ranks_from_gradients(gradients, most, ADAMW)
    ours = {name: found.by_path[name] for name in names}
    assert bytes_of(ours) <= most
    least = bytes_of(dict.fromkeys(names, 1))
    cost = {name: bytes_of(dict.fromkeys(names, 1) | {name: 2}) - least for name in names}
    best, per_byte = 0.0, 0.0
    for ranks in itertools.product(range(1, 6), range(1, 5), range(1, 6)):
        choice = dict(zip(names, ranks, strict=True))
        if least + sum(cost[name] * (rank - 1) for name, rank in choice.items()) <= most:
            best = max(best, kept(choice))
    for name in names:
        if ours[name] is not None:
            rise = shares(gradients[name])[ours[name]] - shares(gradients[name])[ours[name] - 1]
            per_byte = max(per_byte, {"stack": 3}.get(name, 1) * rise / cost[name])
    assert kept(ours) >= best - per_byte * max(cost.values())


def test_ranks_and_energies_are_those_of_numpys_singular_values(gradients):
    found = ranks_from_gradients(gradients, 6000, ADAMW)
    assert list(found.by_path) == ["bias", "embed", "flat", "stack", "steep"]  # the order of jax.tree.leaves
    assert found.by_path["embed"] is found.by_path["bias"] is None
    for path, energy in found.captured_energy.items():
        np.testing.assert_allclose(energy, shares(gradients[path])[found.by_path[path] - 1], rtol=1e-6)


def test_more_is_kept_than_with_one_rank_for_all():
    gradients = {f"w{i}": matrix(i, 32, 32, decay=decay) for i, decay in enumerate((1.0, 0.9, 0.7, 0.5))}
    even = state_bytes(ADAMW(rank=8), gradients)
    found = ranks_from_gradients(gradients, even, ADAMW)
    assert state_bytes(ADAMW(rank=found), gradients) <= even
    assert sum(found.captured_energy.values()) > 1.05 * sum(shares(gradient)[7] for gradient in gradients.values())
    assert list(found.by_path.values()) == sorted(found.by_path.values(), reverse=True)


def test_a_parameter_is_not_projected_when_its_whole_state_is_cheaper():
    gradients = {"flat": jnp.eye(16), "steep": matrix(0, 16, 16, decay=0.5)}
    found = ranks_from_gradients(gradients, 2500, ADAMW)
    assert found.by_path["flat"] is None
    assert 1 <= found.by_path["steep"] < 8
    assert state_bytes(ADAMW(rank=found), gradients) <= 2500
    assert set(ranks_from_gradients(gradients, 10**6, ADAMW).by_path.values()) == {None}


@pytest.mark.slow
def test_bytes_of_quantized_moments_are_counted_as_they_are():
    optimizer = functools.partial(galore_adamw_8bit, 0.01)
    gradients = {"a": matrix(0, 128, 512, decay=0.9), "b": matrix(1, 128, 512, decay=0.99)}
    most = state_bytes(optimizer(rank=16), gradients)
    found = ranks_from_gradients(gradients, most, optimizer)
    assert 0.9 * most < state_bytes(optimizer(rank=found), gradients) <= most
    assert found.by_path["a"] < 16 < found.by_path["b"]


def test_axes_and_mask_are_those_of_the_optimizer():
    heads = jnp.reshape(matrix(0, 12, 24, decay=0.6), (12, 4, 6))
    gradients = {"heads": heads, "left_out": matrix(1, 12, 12), "embed": matrix(2, 12, 12, decay=0.6)}
    settings = {
        "weight_dimension_numbers": {
            "heads": GaLoreDimensionNumbers(0, (1, 2)),
            "left_out": None,
            "embed": GaLoreDimensionNumbers(),
        },
    }
    optimizer = functools.partial(galore, optax.scale_by_adam(), **settings)
    found = ranks_from_gradients(gradients, 4000, optimizer, **settings)
    np.testing.assert_allclose(
        found.captured_energy["heads"], shares(heads.reshape(12, 24))[found.by_path["heads"] - 1], rtol=1e-6
    )
    assert found.by_path["left_out"] is None
    assert found.by_path["embed"] is not None
    mask = {"heads": False, "left_out": True, "embed": False}
    masked = functools.partial(galore, optax.scale_by_adam(), mask=mask)
    assert ranks_from_gradients(gradients, 10**5, masked, mask=mask).by_path == {
        "embed": None,
        "heads": None,
        "left_out": 11,
    }


def test_the_ranks_train():
    gradients = {"a": matrix(0, 16, 16, decay=0.5), "b": matrix(1, 2, 16, 24)}
    ranks = ranks_from_gradients(gradients, 5000, ADAMW)
    tx = ADAMW(rank=ranks)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(gradients), gradients)
    widest = np.linalg.matrix_rank(np.asarray(updates["a"]), tol=1e-5)
    assert widest == ranks.by_path["a"] < 16


@pytest.mark.parametrize(
    ("changes", "most", "says"),
    [
        (
            {"a": jnp.zeros((4, 4))},
            10**6,
            r"The gradient of 'a' with shape \(4, 4\) has a matrix whose largest magnitude is 0\.0",
        ),
        ({"a": jnp.full((4, 4), jnp.nan)}, 10**6, "The gradient of 'a'.* is nan, so it has no spectrum\\. Pass"),
        ({"a": jnp.full((4, 4), jnp.inf)}, 10**6, "The gradient of 'a'.* is inf, so it has no spectrum\\. Pass"),
        ({"a": jnp.eye(4)}, 10, "max_bytes is 10, but the optimizer state takes [0-9]+ bytes at rank 1."),
        ({"a": jnp.ones((4,)), "embed": jnp.eye(4)}, 10**6, "found no matrix to project among a, embed"),
    ],
    ids=["zero", "nan", "infinite", "too few bytes", "no matrix"],
)
def test_what_has_no_answer_is_refused(changes, most, says):
    with pytest.raises(ValueError, match=says):
        ranks_from_gradients(changes, most, ADAMW)


def test_a_parameter_that_had_no_gradient_is_named():
    with pytest.raises(ValueError, match=r"no gradient of 'other' with shape \(8, 8\)\. Pass it a tree of gradients"):
        galore(optax.scale_by_adam(), rank=Ranks({"w": 2}, {"w": 0.5})).init({"other": jnp.ones((8, 8))})
