# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One table of properties that every projector has, and what each has of its own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import normal

from galore_jax import projectors
from galore_jax._core.basis import Dense, RowBasis
from galore_jax.projectors import ProjectorInput

RANK = 4
MAKERS = {
    "svd": projectors.svd,
    "eigh": projectors.eigh,
    "randomized": projectors.randomized,
    "randomized, plain sketch": lambda: projectors.randomized(power_iterations=0, oversample=0),
    "power": projectors.power,
    "power, two iterations": lambda: projectors.power(2),
    "random": projectors.random,
    "random, from its seed": lambda: projectors.random("stiefel", stored=False),
    "gaussian": lambda: projectors.random("gaussian"),
    "gaussian, from its seed": lambda: projectors.random("gaussian", stored=False),
    "rows": projectors.rows,
    "rows, sampled": lambda: projectors.rows("sampled"),
    "sampled": projectors.sampled,
    "switch, before": lambda: projectors.switch("power", "random", at=100),
    "switch, after": lambda: projectors.switch("svd", "random", at=1),
}
EXACT = ("svd", "eigh")
SKETCHED = ("randomized", "power", "power, two iterations", "switch, before")
ORDERED = ("svd", "eigh", "randomized", "randomized, plain sketch", "sampled")
GRADIENTS = {
    "wide": lambda rng: rng.normal(size=(12, 20)),
    "tall": lambda rng: rng.normal(size=(20, 12)),
    "square": lambda rng: rng.normal(size=(9, 9)),
    "as many rows as the rank": lambda rng: rng.normal(size=(RANK, 20)),
    "rank one": lambda rng: rng.normal(size=(12, 1)) * rng.normal(size=(1, 20)),
    "one entry": lambda rng: np.eye(12, 20) * (np.arange(12) == 3)[:, None],
    "one column": lambda rng: rng.normal(size=(12, 1)) * np.eye(1, 20),
}

every_projector = pytest.mark.parametrize("name", MAKERS)
every_gradient = pytest.mark.parametrize("kind", GRADIENTS)


@functools.cache
def refresher(name, transposed=False):
    refresh = MAKERS[name]().refresh
    return jax.jit(lambda *fields: refresh(ProjectorInput(*fields, transposed)))


@functools.cache
def jitted(name, method):
    storage = MAKERS[name]().storage
    static = {"project": (2,), "lift": (2,), "overlap": (2, 3)}[method]
    return jax.jit(getattr(storage, method), static_argnums=static)


def gradient_of(kind):
    gradient = GRADIENTS[kind](np.random.default_rng(0))
    return jnp.asarray(gradient / np.abs(gradient).max() * 0.9, jnp.float32)


def refreshed(name, gradient, basis=None, seed=1, step=10, transposed=False, rank=RANK):
    """(basis, coordinates) from a gradient; without a basis from the zeros that stand for none."""
    storage = MAKERS[name]().storage
    if basis is None:
        basis = storage.zeros((gradient.shape[0], rank), jnp.float32, None, gradient)
    coordinates = jitted(name, "project")(basis, gradient, rank)
    basis = refresher(name, transposed)(jax.random.key(seed), gradient, basis, coordinates, jnp.int32(step))
    basis = storage.encode(basis)
    return basis, jitted(name, "project")(basis, gradient, rank)


def as_matrix(name, basis, m, rank=RANK):
    """P, by lifting the identity."""
    return np.asarray(jitted(name, "lift")(basis, jnp.eye(rank), m), np.float64)


@pytest.mark.covering(5)
@every_gradient
@every_projector
def test_the_shared_properties(name, kind):
    storage = MAKERS[name]().storage
    gradient = gradient_of(kind)
    m = gradient.shape[0]
    none = storage.zeros((m, RANK), jnp.float32, None, gradient)
    basis, coordinates = refreshed(name, gradient)

    # The basis has the shape and dtype of the zeros it replaces, and is there.
    assert jax.tree.map(lambda x: (x.shape, x.dtype), basis) == jax.tree.map(lambda x: (x.shape, x.dtype), none)
    assert not bool(storage.exists(none))
    assert bool(storage.exists(basis))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((basis, coordinates)))

    # Project is Pᵀ, lift is P, and the coordinates are those of the gradient.
    p = as_matrix(name, basis, m)
    x = normal(2, (m, 5))
    project, overlap = jitted(name, "project"), jitted(name, "overlap")
    np.testing.assert_allclose(project(basis, x, RANK), p.T @ np.asarray(x), atol=1e-5)
    np.testing.assert_allclose(coordinates, p.T @ np.asarray(gradient, np.float64), atol=2e-5 * np.abs(p).max())
    np.testing.assert_array_equal(project(none, x, RANK), 0)

    if storage.orthonormal:
        np.testing.assert_allclose(p.T @ p, np.eye(RANK), atol=1e-5)
        np.testing.assert_allclose(overlap(basis, basis, m, RANK), np.eye(RANK), atol=1e-5)

    if name in ORDERED:
        energy = np.sum(np.square(np.asarray(coordinates, np.float64)), axis=1)
        assert np.all(energy[1:] <= energy[:-1] + 1e-5 * energy[0])
        if name != "svd":
            largest = np.abs(p).max(axis=0)
            assert np.all(p.max(axis=0) >= largest * (1 - 1e-6))

    # The same key gives the same basis, and a gradient twice as large the same too.
    again, _ = refreshed(name, gradient)
    jax.tree.map(np.testing.assert_array_equal, again, basis)
    twice, _ = refreshed(name, 2 * gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), twice, basis)


@pytest.mark.covering(5)
@every_projector
def test_a_second_refresh_from_a_basis_and_a_key_of_its_own(name):
    """Into a changed gradient: the basis is orthonormal again, and the overlap is that of the two bases."""
    storage = MAKERS[name]().storage
    old, _ = refreshed(name, gradient_of("wide"))
    gradient = 0.9 * gradient_of("wide")[::-1]
    new, coordinates = refreshed(name, gradient, basis=old, seed=5)
    p, p_old = as_matrix(name, new, 12), as_matrix(name, old, 12)
    assert np.abs(p - p_old).max() > 1e-3
    np.testing.assert_allclose(coordinates, p.T @ np.asarray(gradient, np.float64), atol=1e-5)
    if storage.orthonormal:
        np.testing.assert_allclose(p.T @ p, np.eye(RANK), atol=1e-5)
        np.testing.assert_allclose(jitted(name, "overlap")(new, old, 12, RANK), p.T @ p_old, atol=1e-5)


@pytest.mark.covering(8)
@pytest.mark.parametrize("name", [*EXACT, *SKETCHED])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (40, 60)])
def test_the_captured_energy_is_near_the_largest_possible(name, shape):
    """Singular values 0.7^i, at the first refresh, or the second for those that may start from the first."""
    rng = np.random.default_rng(3)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    gradient = (u * 0.7 ** np.arange(u.shape[1])) @ vt
    optimum = np.sum(np.linalg.svd(gradient, compute_uv=False)[:RANK] ** 2)
    gradient = jnp.asarray(gradient, jnp.float32)
    basis, coordinates = refreshed(name, gradient)
    if name in SKETCHED:
        _, coordinates = refreshed(name, gradient, basis=basis)
    captured = np.sum(np.square(np.asarray(coordinates, np.float64))) / optimum
    assert captured <= 1 + 1e-5
    assert captured > (1 - 1e-5 if name in EXACT else 0.99)


def test_exact_projectors_find_the_singular_vectors():
    gradient = np.asarray(gradient_of("wide"), np.float64)
    exact = np.linalg.svd(gradient)[0][:, :RANK]
    for name in EXACT:
        p = as_matrix(name, refreshed(name, jnp.asarray(gradient, jnp.float32))[0], 12)
        np.testing.assert_allclose(np.abs(np.sum(p * exact, axis=0)), 1, atol=1e-5)


def test_svd_of_a_transposed_gradient_takes_the_signs_of_the_original():
    gradient = gradient_of("wide")
    basis, _ = refreshed("svd", gradient.T, transposed=True)
    np.testing.assert_allclose(basis, jnp.linalg.svd(gradient, full_matrices=False)[2].T[:, :RANK], atol=1e-6)


def test_a_warm_started_power_step_converges_on_a_fixed_gradient():
    """A spectrum that decays slowly; every refresh is a power iteration more."""
    rng = np.random.default_rng(4)
    u, _, vt = np.linalg.svd(rng.normal(size=(60, 90)), full_matrices=False)
    gradient = jnp.asarray((u * (1 + np.arange(60)) ** -0.5) @ vt, jnp.float32)
    optimum = np.sum(1 / np.arange(1, 9))
    basis, captured = None, []
    for _ in range(6):
        basis, coordinates = refreshed("power", gradient, basis=basis, rank=8)
        captured.append(float(jnp.sum(jnp.square(coordinates))) / optimum)
    assert all(later > earlier - 1e-6 for earlier, later in itertools.pairwise(captured))
    assert captured[-1] > 0.97 > captured[0] - 0.1


@pytest.mark.parametrize("left", [1, 2, 4], ids="{} of 4 directions".format)
def test_power_replaces_the_directions_that_the_gradient_has_left(left):
    """In one refresh: the first step replaces them by random directions, and the next ones find the gradient."""
    gradient = jnp.zeros((12, 20)).at[:4].set(gradient_of("as many rows as the rank"))
    basis = jnp.eye(12)[:, left : 4 + left] if left < 4 else jnp.eye(12)[:, 8:]
    basis, coordinates = refreshed("power", gradient, basis=basis)
    np.testing.assert_allclose(jnp.sum(jnp.square(coordinates)), jnp.sum(jnp.square(gradient)), rtol=1e-5)


def test_a_warm_power_refresh_keeps_columns_in_their_places_and_signs():
    """Of a gradient whose leading directions are close in energy and turn a little."""
    rng = np.random.default_rng(5)
    u, _, vt = np.linalg.svd(rng.normal(size=(40, 60)), full_matrices=False)
    values = np.where(np.arange(40) < 8, 1 + 0.02 * rng.normal(size=40), 0.1)
    turn = np.linalg.qr(np.eye(40) + 0.01 * rng.normal(size=(40, 40)))[0]
    turn = turn * np.sign(np.diag(turn))
    basis, _ = refreshed("power", jnp.asarray((u * values) @ vt, jnp.float32), rank=8)
    new, _ = refreshed("power", jnp.asarray((turn @ u * values) @ vt, jnp.float32), basis=basis, rank=8)
    assert np.min(np.sum(np.asarray(basis) * np.asarray(new), axis=0)) > 0.99


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
def test_a_warm_power_refresh_is_nearly_the_basis_of_its_span_that_is_nearest_to_the_first_steps(noise):
    """By singular values: the trace of PᵀP_1 is at most its nuclear norm, which the nearest basis reaches."""
    rng = np.random.default_rng(6)
    u, _, vt = np.linalg.svd(rng.normal(size=(40, 60)), full_matrices=False)
    signal = (u * (1 + np.arange(40)) ** -0.7) @ vt
    before, now = (signal + noise * np.linalg.norm(signal) / 2400**0.5 * rng.normal(size=(40, 60)) for _ in range(2))
    basis, _ = refreshed("power", jnp.asarray(before, jnp.float32), rank=8)
    new, _ = refreshed("power", jnp.asarray(now, jnp.float32), basis=basis, rank=8)
    first, factor = np.linalg.qr(now @ now.T @ np.asarray(basis))
    cosines = np.asarray(new).T @ (first * np.sign(np.diag(factor)))
    assert np.trace(cosines) > 0.99 * np.linalg.norm(cosines, "nuc")


def test_a_gaussian_basis_has_the_moments_of_the_normal_distribution_and_seeds_are_independent():
    storage = MAKERS["gaussian, from its seed"]().storage
    first, second = (
        np.asarray(storage.lift(jnp.uint32(seed), jnp.eye(64), 4096), np.float64).ravel() * 8 for seed in (1, 2)
    )
    n = first.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs(np.mean(first**power) - moment) < 5 * (variance / n) ** 0.5
    assert 4 < np.max(np.abs(first)) < 6
    for shift in (0, 1, 64):
        assert abs(np.mean(first * np.roll(second, shift))) < 5 / n**0.5
        assert shift == 0 or abs(np.mean(first * np.roll(first, shift))) < 5 / n**0.5


def test_top_rows_are_the_rows_of_largest_norm():
    gradient = gradient_of("wide")
    basis, coordinates = refreshed("rows", gradient)
    order = np.argsort(-np.linalg.norm(np.asarray(gradient), axis=1))[:RANK]
    np.testing.assert_array_equal(basis.index, order)
    np.testing.assert_array_equal(basis.factor, 1)
    np.testing.assert_array_equal(coordinates, gradient[order])


def mean_of_ppt(name, gradient, draws):
    """The mean of P Pᵀ over many keys."""
    storage = MAKERS[name]().storage
    m = gradient.shape[0]
    none = storage.zeros((m, RANK), jnp.float32, None, gradient)
    coordinates = jnp.zeros((RANK, gradient.shape[1]))
    refresh = MAKERS[name]().refresh

    def one(key):
        basis = refresh(ProjectorInput(key, gradient, none, coordinates, jnp.int32(0), False))
        return storage.lift(basis, storage.project(basis, jnp.eye(m), RANK), m)

    return np.asarray(jnp.mean(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws)), axis=0), np.float64)


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("random", RANK / 12),
        ("random, from its seed", RANK / 12),
        ("gaussian", 1),
        ("gaussian, from its seed", 1),
        ("rows, sampled", 1),
    ],
)
def test_random_projections_are_unbiased(name, expected):
    """E[P Pᵀ] is a multiple of the identity: 4,000 draws, 6 standard errors of the least precise."""
    mean = mean_of_ppt(name, gradient_of("wide"), 4000)
    np.testing.assert_allclose(mean, expected * np.eye(12), atol=0.012 if expected < 1 else 0.12)


def test_sampled_singular_vectors_come_with_the_frequencies_of_their_singular_values():
    """The first of 4 draws without replacement is ∝ σ; for the set, NumPy's own weighted sampling is the reference."""
    sigma = np.array([8.0, 4.0, 2.0, 2.0, 1.0, 1.0])
    projector = projectors.sampled()
    gradient = jnp.asarray(np.diag(sigma) @ np.eye(6, 8), jnp.float32) / 10

    def one(key):
        basis = projector.refresh(ProjectorInput(key, gradient, jnp.zeros((6, 2)), jnp.zeros((2, 8)), 0, False))
        return jnp.sum(jnp.square(basis), axis=1)  # 1 in the rows that were drawn

    ours = np.mean(np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))), axis=0)
    rng = np.random.default_rng(0)
    draws = [rng.choice(6, 2, replace=False, p=sigma / sigma.sum()) for _ in range(4000)]
    theirs = np.bincount(np.concatenate(draws), minlength=6) / 4000
    np.testing.assert_allclose(ours[[0, 1]], theirs[[0, 1]], atol=0.04)
    # Equal singular values share a plane, in which eigenvectors are arbitrary.
    np.testing.assert_allclose([ours[2:4].sum(), ours[4:].sum()], [theirs[2:4].sum(), theirs[4:].sum()], atol=0.05)


def test_switch_changes_over_at_its_step():
    gradient = gradient_of("wide")
    for step, name in ((0, "power"), (99, "power"), (100, "random"), (10**6, "random")):
        expected, _ = refreshed(name, gradient)
        basis, _ = refreshed("switch, before", gradient, step=step)
        np.testing.assert_allclose(basis, expected, atol=1e-6)


def test_rows_that_two_bases_share_are_carried_with_their_factors():
    storage = projectors.rows().storage
    old = RowBasis(jnp.array([2, 5, 7]), jnp.array([1.0, 2.0, 0.5]))
    new = RowBasis(jnp.array([7, 2, 3]), jnp.array([1.0, 3.0, 1.0]))
    x = normal(0, (9, 4))
    carried = storage.overlap(new, old, 9, 3) @ storage.project(old, x, 3)
    np.testing.assert_allclose(carried[:2], storage.project(new, x, 3)[:2], rtol=1e-6)
    np.testing.assert_array_equal(carried[2], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: projectors.get("qr"), "projector is 'qr': write one of power, randomized, svd"),
        (lambda: projectors.power(0), r"power\(\) needs iterations >= 1, got 0"),
        (lambda: projectors.randomized(-1), "power_iterations >= 0"),
        (lambda: projectors.random("orthogonal"), "kind='orthogonal': write one of stiefel, gaussian"),
        (lambda: projectors.rows("bottom"), "select='bottom'"),
        (lambda: projectors.switch("power", "rows", at=5), "cannot go from 'power' to 'rows'"),
        (lambda: projectors.switch("power", "random", at=-1), "at=-1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dense_storages_compare_equal():
    assert projectors.power().storage == Dense() == projectors.svd().storage
    assert projectors.random("gaussian").storage != Dense()
