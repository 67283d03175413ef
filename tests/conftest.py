# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Strict settings for every test: dtype promotion strict, rank promotion an error, 8 fake devices (warnings: pyproject.toml)."""

import functools
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

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

# Of programs that are run a few times, most of XLA's optimizations cost more than they save (problems.optimized_compilation).
jax.config.update("jax_disable_most_optimizations", True)
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
for _name in ("muon", "galore", "scale_by_galore"):
    if hasattr(optax.contrib, _name):
        setattr(optax.contrib, _name, _lenient_factory(getattr(optax.contrib, _name)))


# Traces make many objects that live on, and a fifth of the time to trace would go to looking for garbage among them.
gc.freeze()
gc.set_threshold(100_000, 50, 50)


def _covering(cases, count):
    """``count`` of the cases of a test: one after the other, the case with the most values that no case before it has."""
    values = {case: {(name, repr(value)) for name, value in case.callspec.params.items()} for case in cases}
    kept, seen = [], set()
    for _ in range(count):
        best = max((case for case in cases if case not in kept), key=lambda case: len(values[case] - seen))
        kept.append(best)
        seen |= values[best]
    return kept


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks doctests as pages, and as slow the cases of a test that ``covering`` does not keep, before ``-m`` selects."""
    tests = {}
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.pages)
        if item.get_closest_marker("covering"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for cases in tests.values():
        kept = _covering(cases, min(len(cases), *cases[0].get_closest_marker("covering").args))
        for case in cases:
            if case not in kept:
                case.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the site, built with every warning an error."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (extra docs)")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, timeout=480,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark by name."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module
