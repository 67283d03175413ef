# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Small parameter trees that really are projected, shared by the tests of Optax's contract."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import galore_jax
from galore_jax import refresh

needs_optax_galore = pytest.mark.skipif(
    not hasattr(optax.contrib, "galore"), reason="this Optax has no galore of its own"
)

RANK = 3
SHAPES = {"kernel": (6, 10), "stack": (2, 12, 8), "bias": (10,)}
# The basis of the wide kernel is on its left, those of the tall stacked matrices on their right.
LOW_RANK_SHAPES = {"kernel": (RANK, 10), "stack": (2, 12, RANK), "bias": (10,)}
# The refresh policies that act in ``update``.
POLICIES = {
    "together": "together",
    "staggered": "staggered",
    "lazy": refresh.lazy(threshold=0.3, window=1),
    "every_step": "every_step",
}


def normal(seed, shape, dtype=jnp.float32):
    """Numbers of the standard normal distribution, drawn by NumPy, for which nothing has to be compiled."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tree(seed, dtype=jnp.float32):
    """Random numbers in the shape of the parameters: {kernel: (6, 10), stack: (2, 12, 8), bias: (10,)}."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def galore_states(state):
    """The GaLoreState nodes anywhere inside an optimizer state."""

    def is_node(x):
        return isinstance(x, galore_jax.GaLoreState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_node) if is_node(node)]


def assert_projected(state):
    """The one GaLoreState inside ``state`` holds a basis for the kernel and for the stack; returns it."""
    (node,) = galore_states(state)
    assert jax.tree.map(jnp.shape, (node.left, node.right)) == (
        node.left | {"kernel": (6, RANK)},
        node.right | {"stack": (2, 8, RANK)},
    )
    assert len(jax.tree.leaves((node.left, node.right))) == 2
    return node


def assert_trees_close(actual, expected, *, rtol=1e-5, atol=1e-6):
    """Same structure, shapes and dtypes; values close."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(e), jnp.result_type(e)), name
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(e, np.float64), rtol, atol, err_msg=name)


def assert_trees_equal(actual, expected):
    """Same structure, shapes, dtypes and bits."""
    assert_trees_close(actual, expected, rtol=0, atol=0)


@contextlib.contextmanager
def leniency():
    """Lets Optax's own wrappers mix dtypes (MultiSteps divides floats by int32)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def strictly(tx):
    """``tx`` under strict promotion although an Optax wrapper around it runs under :func:`leniency`."""

    def strict(function):
        def wrapped(*args, **kwargs):
            with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
                return function(*args, **kwargs)

        return wrapped

    return optax.GradientTransformationExtraArgs(strict(tx.init), strict(tx.update))


@contextlib.contextmanager
def _optimizations_disabled(value):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", value)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def quickly():
    """Runs a part of a module that has ``optimized_compilation`` as other modules are run."""
    return _optimizations_disabled(True)


@pytest.fixture(autouse=True, scope="module")
def optimized_compilation():
    """For modules that import it: XLA's optimizations are on, as they are for a user."""
    with _optimizations_disabled(False):
        yield


@pytest.fixture(autouse=True, scope="module")
def shared_programs(tmp_path_factory):
    """For modules that import it: a program that is compiled again, as by a run that resumes, comes from a folder."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
