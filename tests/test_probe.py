# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Trials of inner transformations on small trees: what they find, and that they fail on none that works."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import leniency, normal

import galore_jax
from galore_jax._core import probe

PARAMS = {"kernel": jnp.ones((12, 20)), "stack": jnp.ones((2, 12, 20)), "bias": jnp.ones((20,))}
PROJECTED = [name != "bias" for name in sorted(PARAMS)]


def ema_of_parameters():
    return optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))


def norm_at_init():
    return optax.GradientTransformation(optax.tree.norm, lambda updates, state, params=None: (updates, state))


def times_zero():
    """An init that reads the values, but whose result does not depend on them."""
    init = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: 0 * p, params), lambda updates, state, params=None: (updates, state)
    )
    return optax.chain(init, optax.scale_by_adam())


COPY_PARAMETERS = {
    "schedule_free": (lambda: optax.contrib.schedule_free(optax.sgd(1e-3), 1e-3), "ScheduleFreeState.z"),
    "cocob": (optax.contrib.cocob, "COCOBState.init_particles"),
    "dowg": (optax.contrib.dowg, "DoWGState.init_params"),
    "prodigy": (optax.contrib.prodigy, "ProdigyState.params0"),
    "ema": (ema_of_parameters, "an array"),
    "norm": (norm_at_init, "an array"),
    "in a chain": (lambda: optax.chain(optax.scale_by_adam(), ema_of_parameters()), "an array"),
    "masked": (lambda: optax.masked(optax.contrib.dowg(), {"kernel": True, "stack": False, "bias": False}), "DoWG"),
}
FINE = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "8-bit": lambda: galore_jax.quantize_state(optax.adam(1e-3)),
    "masked": lambda: optax.masked(optax.adam(1e-3), {"kernel": True, "stack": True, "bias": False}),
    "copies a bias": lambda: optax.masked(optax.contrib.dowg(), {"kernel": False, "stack": False, "bias": True}),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1e-3), "b": optax.lion(1e-3)}, {"kernel": "a", "stack": "a", "bias": "b"}
    ),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-1e-3)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "noise": lambda: optax.chain(optax.scale_by_adam(), optax.add_noise(0.1, 0.5, jax.random.key(0))),
    "0 * p": times_zero,
    "insists on shapes": lambda: optax.GradientTransformation(
        lambda params: optax.tree.norm({"w": params["kernel"].reshape(12, 20)}),
        lambda updates, state, params=None: (updates, state),
    ),
}


def check(inner, tree=PARAMS):
    with leniency():
        probe.check_init_ignores_values(inner, tree, PROJECTED)


@pytest.mark.parametrize("name", COPY_PARAMETERS)
def test_an_inner_transformation_that_copies_parameters_in_init_is_refused(name):
    build, field = COPY_PARAMETERS[name]
    with pytest.raises(ValueError, match=rf"\({field}.*put galore inside"):
        check(build())


@pytest.mark.parametrize("name", FINE)
def test_an_inner_transformation_that_ignores_the_values_passes(name):
    check(FINE[name]())


def test_galore_refuses_it_at_init_and_around_galore_it_works():
    params = {"kernel": normal(0, (12, 20))}
    with leniency():
        with pytest.raises(ValueError, match=r"ScheduleFreeState\.z.*schedule_free\(galore"):
            galore_jax.galore(optax.contrib.schedule_free(optax.sgd(1e-3), 1e-3), rank=4).init(params)
        tx = optax.contrib.schedule_free(galore_jax.galore(optax.sgd(1e-3), rank=4), 1e-3)
        updates, _ = tx.update(params, tx.init(params), params)
    assert np.all(np.isfinite(updates["kernel"]))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_answer_is_the_same_under_tracing_and_on_a_mesh(axis_type):
    """In ``jit``, ``eval_shape`` and on a mesh; the parameters are arrays, tracers or abstract."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), PARAMS)
    placed["kernel"] = jax.device_put(PARAMS["kernel"], NamedSharding(mesh, P("d", None)))

    def init(params):
        check(optax.scale_by_adam(), params)
        with pytest.raises(ValueError, match="DoWGState"):
            check(optax.contrib.dowg(), params)
        first = probe.first_replies(optax.sgd(0.5), probe.small(params, np.random.default_rng(0)))[0]
        assert all(isinstance(x, np.ndarray) for x in first)
        return params

    with jax.set_mesh(mesh):
        init(placed)
        jax.jit(init)(placed)
        jax.eval_shape(init, placed)


def test_boxes_and_dtypes_reach_the_transformation():
    nnx = pytest.importorskip("flax.nnx")
    tree = {"kernel": nnx.Param(jax.ShapeDtypeStruct((100, 200), jnp.bfloat16)), "count": jnp.zeros([], jnp.int32)}
    small = probe.small(tree, np.random.default_rng(0))
    assert isinstance(small["kernel"], nnx.Param)
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), small)["count"] == ((), "int32")
    [kernel] = jax.tree.leaves(small["kernel"])
    assert (kernel.shape, kernel.dtype.name) == ((8, 8), "bfloat16")


def test_what_cannot_be_tried_is_not_tried():
    gradients = probe.small(PARAMS, np.random.default_rng(0))
    assert probe.first_replies(optax.contrib.reduce_on_plateau(), gradients) is None
    reduced = optax.GradientTransformation(optax.init_empty_state, lambda u, s, p=None: (jax.lax.pmean(u, "data"), s))
    assert probe.first_replies(reduced, gradients) is None

    @jax.jit
    def traced(learning_rate):
        assert probe.first_replies(optax.sgd(learning_rate), gradients) is None
        return learning_rate

    traced(0.1)


def test_the_check_of_adam_is_one_trace_and_computes_nothing():
    """Of a model of 32 layers with 7 matrices each."""
    params = {f"{layer}/{name}": jnp.zeros((4, 8)) for layer in range(32) for name in "qkvogud"}
    inner, seen = optax.adam(1e-3), []

    def init(tree):
        seen.append(all(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)))
        return inner.init(tree)

    probe.check_init_ignores_values(optax.GradientTransformation(init, inner.update), params, [True] * len(params))
    assert seen == [True]
