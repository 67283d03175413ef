# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Strict settings for every test: dtype promotion strict, rank promotion an error, 8 fake devices (warnings: pyproject.toml)."""

import contextlib
import functools
import gc
import importlib.metadata
import os

from packaging import version

# XLA on CPU shares one pool of as many threads as there are cores among all fake devices: with 8 on 2 cores, collectives that
# wait for one another can starve.  Read once, when the first backend starts.
os.environ.setdefault("NPROC", "32")

# The fake devices are CPUs, and the compilers for other hardware (extra plan) are not to look for any; also in subprocesses.
if not os.environ.get("JAX_PLATFORMS"):
    os.environ["JAX_PLATFORMS"] = "cpu"

# The suite spends its time in the compiler.  In one piece, a program is compiled for CPUs with a third less work than in many,
# which only pays where there are idle cores; and without its newer loop emitters XLA compiles twice as fast.  Later releases of
# jaxlib have no such flag, and XLA ends a process that sets a flag it does not know.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
if version.parse(importlib.metadata.version("jaxlib")) < version.parse("0.11"):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import optax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def _leniently(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped


def _lenient_factory(factory):
    """Optax mixes dtypes inside (``b1 ** count``): its own transformations run leniently, so that ours can run strictly."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        tx = factory(*args, **kwargs)
        return optax.GradientTransformationExtraArgs(
            _leniently(tx.init), _leniently(optax.with_extra_args_support(tx).update)
        )

    return wrapped


_ALIASES = (
    "adabelief adadelta adafactor adagrad adam adamax adamw amsgrad fromage lamb lars lion nadam noisy_sgd novograd "
)
_ALIASES += "optimistic_adam radam rmsprop rprop sgd sm3 yogi ema trace"
for _name in [*_ALIASES.split(), *(name for name in dir(optax) if name.startswith("scale_by_"))]:
    if _name != "scale_by_backtracking_linesearch":
        setattr(optax, _name, _lenient_factory(getattr(optax, _name)))
optax.contrib.muon = _lenient_factory(optax.contrib.muon)
optax.contrib.galore = _lenient_factory(optax.contrib.galore)
optax.contrib.scale_by_galore = _lenient_factory(optax.contrib.scale_by_galore)


# It imports galore_jax, which is to find the factories of Optax as they are now.
from problems import quickly  # noqa: E402

# Traces make many objects that live on, and a fifth of the time to trace would go to looking for garbage among them.
gc.freeze()
gc.set_threshold(100_000, 50, 50)


class _QuickDoctests:
    """A plugin, because a hook of this file sees only the tests in this folder, and the doctests are outside."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        with quickly() if isinstance(item, pytest.DoctestItem) else contextlib.nullcontext():
            return (yield)


def pytest_configure(config):
    config.pluginmanager.register(_QuickDoctests())
