# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Programs compiled for hardware that is not there: the sizes, what does not fit, and a compiler that is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import optimized_compilation  # noqa: F401

from galore_jax import galore_adamw
from galore_jax.planning.targets import HERE, TARGETS, compile_for, target
from galore_jax.sharding import maxima
from galore_jax.training.step import add_updates

EXTRA = all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda13_plugin", "nvidia"))
needs_extra = pytest.mark.skipif(not EXTRA, reason="the extra plan is not installed: pip install '.[plan]'")
GIB = 2**30


def numbers(count):
    return jax.ShapeDtypeStruct((count,), jnp.float32)


def python(script, **environment):
    """A script in a process of its own, where JAX has not started and no compiler has been loaded."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"^Target 'rtx9' is not known \(did you mean .*\?\); choose one of .*rtx4090, .*tpu-v5e, .*here\.$",
    ):
        target("rtx9")


def test_the_table_has_every_target_that_is_promised():
    promised = "rtx4090 rtx3090 rtx4060ti-16gb rtx4060 rtx3060-12gb a100-40 a100-80 h100 tpu-v4 tpu-v5e tpu-v5p tpu-v6e"
    assert set(promised.split()) <= TARGETS.keys()
    assert all(name == known.name for name, known in TARGETS.items())


def test_here_is_the_first_device():
    here = target(HERE)
    assert here.platform == jax.devices()[0].platform
    assert here.memory > GIB


class Refused:
    """A jitted function that the compiler refuses."""

    def lower(self, *_):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Unimplemented DMA from hbm to hbm.\nmore")


def test_a_program_that_is_refused_for_its_arguments_on_the_host_is_one_sentence():
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    on_host = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=host)
    says = r"^The compiler for here refuses .* \(FAILED_PRECONDITION: Unimplemented DMA from hbm to hbm\.\); keep the state"
    with pytest.raises(ValueError, match=says):
        compile_for(target(HERE), Refused(), on_host)
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_for(target(HERE), Refused(), numbers(8))


@pytest.mark.covering(5)
@needs_extra
@pytest.mark.parametrize("name", TARGETS)
def test_the_compiler_of_every_target_takes_its_figures(name):
    plan = compile_for(target(name), lambda x: x + 1, numbers(2**20))
    assert (plan.argument_bytes, plan.output_bytes, plan.alias_bytes) == (2**22, 2**22, 0)
    assert plan.fits


@pytest.mark.parametrize("name", [HERE, *(pytest.param(name, marks=needs_extra) for name in ("rtx4090", "tpu-v5e"))])
def test_a_donated_argument_is_aliased_and_counted_once(name):
    def step(weights, x):
        return weights - x, jnp.sum(x)

    arguments = ({"w": numbers(2**20)}, numbers(2**20))

    def flat_step(weights, x):
        new, total = step(weights["w"], x)
        return {"w": new}, total

    plan = compile_for(target(name), flat_step, *arguments, donate_argnums=0)
    parts = plan.argument_bytes + plan.output_bytes - plan.alias_bytes + plan.temporary_bytes
    assert plan.alias_bytes == 2**22
    assert plan.peak_bytes == parts
    assert 2 * 2**22 <= plan.peak_bytes < 3 * 2**22
    assert plan.compile_seconds > 0
    assert compile_for(target(name), jax.jit(flat_step, donate_argnums=0), *arguments).alias_bytes == 2**22


@needs_extra
def test_a_gpu_has_as_much_memory_as_its_own_figures_say():
    x = numbers(13 * GIB // 4)
    too_much = compile_for(target("rtx3060-12gb"), jnp.sum, x)
    assert not too_much.fits
    assert too_much.argument_bytes == 13 * GIB
    assert compile_for(target("rtx4090"), jnp.sum, x).fits


@needs_extra
def test_on_a_gpu_an_update_writes_no_float32_copy_of_an_embedding():
    tx = galore_adamw(1e-3, rank=8)
    params = {
        "embed": jax.ShapeDtypeStruct((32000, 512), jnp.bfloat16),
        "stack": jax.ShapeDtypeStruct((8, 1376, 512), jnp.bfloat16),
    }

    def update(grads, params, state):
        updates, state = tx.update(optax.tree.cast(grads, jnp.float32), state, params)
        return add_updates(params, updates), state

    plan = compile_for(target("h100"), update, params, params, jax.eval_shape(tx.init, params), donate_argnums=(1, 2))
    assert plan.temporary_bytes < 4 * 32000 * 512 / 2


@needs_extra
def test_what_the_tpu_compiler_refuses_is_an_answer():
    plan = compile_for(target("tpu-v5e"), lambda x: x + 1, numbers(10 * GIB // 4))
    assert not plan.fits
    assert plan.temporary_bytes is None
    assert 20 * GIB <= plan.peak_bytes < 21 * GIB
    assert plan.refusal.startswith("Ran out of memory")
    assert plan.refusal.endswith(".")
    assert "RESOURCE_EXHAUSTED" not in plan.refusal


@pytest.mark.slow
@needs_extra
def test_a_process_that_uses_jax_already_can_compile_for_a_gpu():
    script = """
import jax, jax.numpy as jnp
print(jax.devices()[0].platform)
from galore_jax.planning.targets import compile_for, target
print(compile_for(target("rtx4090"), jnp.sum, jax.ShapeDtypeStruct((1024,), jnp.float32)).argument_bytes)
print(jax.devices()[0].platform)
"""
    done = python(script, JAX_PLATFORMS="")
    assert done.stdout.split() == ["cpu", "4096", "cpu"], done.stderr


@pytest.mark.slow
@needs_extra
def test_two_processes_compile_for_a_tpu_at_once():
    script = """
import sys, jax, jax.numpy as jnp
from galore_jax.planning.targets import compile_for, target
plan = compile_for(target("tpu-v5e"), jnp.sum, jax.ShapeDtypeStruct((1024,), jnp.float32))
print(plan.argument_bytes, flush=True)
sys.stdin.read()  # stay, with the library loaded
"""
    start = lambda: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with start() as one, start() as other:
        assert [one.stdout.readline(), other.stdout.readline()] == ["4096\n", "4096\n"]
        one.stdin.close(), other.stdin.close()


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("name", "package", "module"),
    [("rtx4090", "plugin and ptxas", "jax_plugins.xla_cuda13"), ("tpu-v5e", "libtpu", "libtpu")],
)
def test_a_compiler_that_is_not_installed_is_named_with_the_remedy(name, package, module):
    script = f"""
import sys
sys.modules["{module}"] = None  # as if it were not installed
import jax, jax.numpy as jnp
from galore_jax.planning.targets import MissingPackagesError, compile_for, target
try:
    compile_for(target("{name}"), jnp.sum, jax.ShapeDtypeStruct((1024,), jnp.float32))
except MissingPackagesError as error:
    print(error)
"""
    done = python(script)
    assert package in done.stdout, done.stderr
    assert done.stdout.endswith("pip install '.[plan]' in the folder of galore_jax's source.\n")


@pytest.mark.slow
@needs_extra
def test_a_process_that_only_trains_is_not_told_of_missing_hardware():
    script = "import sys; from galore_jax import cli; cli.main(['pretrain', '--model', 'x']); import jax; jax.devices()"
    done = python(script, JAX_PLATFORMS="")
    assert [line[:29] for line in done.stderr.splitlines()] == ["error: Unknown model preset '"], done.stderr


@needs_extra
def test_a_tpu_compiles_the_scales_of_long_and_low_moments():
    """As on each of 64 devices that share the moments of an embedding of 32,000 tokens."""
    moments = jax.ShapeDtypeStruct((64, 32000), jnp.float32)
    assert compile_for(target("tpu-v5e"), lambda x: maxima(x, 256), moments).output_bytes >= 64 * 125 * 4
