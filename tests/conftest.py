# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Strict settings for every test: dtype promotion strict, rank promotion an error, 8 fake devices (warnings: pyproject.toml)."""

import functools
import importlib.util
import mmap
import os
import pathlib

# XLA on CPU shares one pool of as many threads as there are cores among all fake devices: with 8 on 2 cores, collectives that
# wait for one another can starve.  Read once, when the first backend starts.
os.environ.setdefault("NPROC", "32")

# The fake devices are CPUs, and the compilers for other hardware (extra plan) are not to look for any; also in subprocesses.
if not os.environ.get("JAX_PLATFORMS"):
    os.environ["JAX_PLATFORMS"] = "cpu"


def _xla_knows(flag):
    """XLA ends a process that sets a flag it does not know."""
    libraries = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent.glob("libjax_common.*")
    for library in libraries:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(flag.encode()) >= 0
    return False


# The suite spends its time in the compiler, and without its newer loop emitters XLA compiles for CPUs twice as fast.
if _xla_knows("xla_cpu_use_fusion_emitters"):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402
import optax  # noqa: E402

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
