# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Compile a program for a GPU or TPU that is not attached, and read the memory plan that its compiler made.

    peak = arguments + outputs - aliased + temporaries

in bytes, by XLA's buffer assignment; an output that takes the place of a donated argument is aliased.  It is what the
program itself allocates.  What it leaves out: the driver's context, what a library takes for itself, fragmentation, and the
scratch of autotuning, which happens on the hardware.

XLA knows a GPU by its figures alone, which :class:`Gpu` holds.  Sources: NVIDIA's architecture whitepapers and product
pages; per multiprocessor, the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
The memory of a GPU is the total that CUDA reports on Linux, which is less than the card's name says; that of a TPU is what
its compiler lets a program have.

Needs the extra ``plan``: libtpu for a TPU; JAX's CUDA plugin, ptxas and libdevice for a GPU.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib
import importlib.util
import os
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from galore_jax._core.names import did_you_mean
from galore_jax._install import how_to_install
from galore_jax.offload import HOST
from galore_jax.planning.traffic import HostTraffic, Traffic, host_traffic, traffic

__all__ = ["TARGETS", "Plan", "Target", "compile_for", "compile_only", "target"]

_MIB, _GIB = 2**20, 2**30


class MissingPackagesError(ImportError):
    """The compiler for a target is not installed; the message is one sentence with the remedy."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The published figures of an NVIDIA card that XLA's compiler asks for."""

    description: str
    capability: str  # "8.9"
    multiprocessors: int
    bandwidth: int  # of the memory, 10^9 bytes a second
    l2_cache: int  # MiB
    clock: float  # boost, GHz
    tflops: float  # 10^12 operations a second on dense bfloat16 (T4: float16) matrices with float32 sums
    bus: tuple[int, int]  # generation of PCI Express, and lanes

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second in each direction: 8, 16 or 32 GT/s a lane, of whose 130 bits 128 are data."""
        generation, lanes = self.bus
        return 2**generation * 1e9 * lanes * 128 / 130 / 8


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Slices of a TPU, as libtpu names them; the first is the smallest."""

    topologies: dict[int, str]  # by the number of devices
    kinds: tuple[str, ...]  # what JAX calls one
    tflops: float  # 10^12 operations a second of a chip on bfloat16 matrices
    chip_config: str = "default"


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to compile for, which ``hardware`` describes unless it is attached.

    ``memory`` is in bytes, of one device.
    """

    name: str
    platform: str  # cuda, tpu or cpu
    memory: int
    hardware: Gpu | Tpu | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a program; all sizes in bytes, of one device.

    ``peak_bytes`` and its parts leave out what is in the host's memory.

    If it refuses the program because it does not fit, ``refusal`` is the first sentence of its message, ``peak_bytes`` is
    the figure in it, and the parts are None.
    """

    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    temporary_bytes: int | None
    code_bytes: int | None
    peak_bytes: int | None
    fits: bool
    compile_seconds: float
    refusal: str | None = None
    traffic: Traffic | None = None  # of a program for several devices
    host_bytes: int = 0  # arguments, outputs and temporaries in the host's memory
    host_traffic: HostTraffic | None = None  # of a program with arguments there
    # That it takes at least on the card's bus, both directions at once; None if unknown.
    host_seconds: float | None = None


def _gpu(memory: float, *figures: Any) -> Target:
    """A target without a name yet; ``memory`` in GiB."""
    return Target("", "cuda", int(memory * _GIB), Gpu(*figures))


def _tpu(
    memory: float, generation: str, kinds: tuple[str, ...], tflops: float, shapes: dict[int, str], *chip_config: str
) -> Target:
    topologies = {number: f"{generation}:{shape}" for number, shape in shapes.items()}
    return Target("", "tpu", int(memory * _GIB), Tpu(topologies, kinds, tflops, *chip_config))


_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


_TARGETS = {
    "rtx5090": _gpu(31.36, "NVIDIA GeForce RTX 5090", "12.0", 170, 1792, 96, 2.407, 209.5, (5, 16)),
    "rtx4090": _gpu(23.64, "NVIDIA GeForce RTX 4090", "8.9", 128, 1008, 72, 2.52, 165.2, (4, 16)),
    "rtx3090": _gpu(23.69, "NVIDIA GeForce RTX 3090", "8.6", 82, 936, 6, 1.695, 71, (4, 16)),
    "rtx4060ti-16gb": _gpu(15.6, "NVIDIA GeForce RTX 4060 Ti", "8.9", 34, 288, 32, 2.535, 44.1, (4, 8)),
    "rtx4060": _gpu(7.62, "NVIDIA GeForce RTX 4060", "8.9", 24, 272, 24, 2.46, 30.2, (4, 8)),
    "rtx3060-12gb": _gpu(11.75, "NVIDIA GeForce RTX 3060", "8.6", 28, 360, 3, 1.777, 25.4, (4, 16)),
    "t4": _gpu(14.56, "Tesla T4", "7.5", 40, 320, 4, 1.59, 65, (3, 16)),
    "l4": _gpu(22.03, "NVIDIA L4", "8.9", 58, 300, 48, 2.04, 121, (4, 16)),
    "a100-40": _gpu(39.39, "NVIDIA A100-SXM4-40GB", "8.0", 108, 1555, 40, 1.41, 312, (4, 16)),
    "a100-80": _gpu(79.14, "NVIDIA A100-SXM4-80GB", "8.0", 108, 2039, 40, 1.41, 312, (4, 16)),
    "h100": _gpu(79.1, "NVIDIA H100 80GB HBM3", "9.0", 132, 3352, 50, 1.98, 989.4, (5, 16)),
    "tpu-v4": _tpu(30.75, "v4", ("TPU v4",), 275, _DEEP, "megacore"),
    "tpu-v5e": _tpu(15.75, "v5e", ("TPU v5 lite", "TPU v5e"), 197, _FLAT),
    "tpu-v5p": _tpu(95.74, "v5p", ("TPU v5", "TPU v5p"), 459, _DEEP),
    "tpu-v6e": _tpu(31.25, "v6e", ("TPU v6 lite", "TPU v6e"), 918, _FLAT),
}

TARGETS: dict[str, Target] = {name: dataclasses.replace(target, name=name) for name, target in _TARGETS.items()}
"""Hardware that need not be there, by name."""

HERE = "here"
"""The name of the target that is the machine's own default device."""

# Compute capability -> float32 lanes, threads and KiB of shared memory of one multiprocessor, and KiB that a block may have.
_MULTIPROCESSORS = {
    "7.5": (64, 1024, 64, 64),
    "8.0": (64, 2048, 164, 163),
    "8.6": (128, 1536, 100, 99),
    "8.9": (128, 1536, 100, 99),
    "9.0": (128, 2048, 228, 227),
    "12.0": (128, 1536, 100, 99),
}

_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_PTXAS = ("nvidia.cu13", "nvidia.cuda_nvcc")  # where JAX looks for ptxas and libdevice, by CUDA's major version

_NO_CUDA_CHECK = ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
"""An environment variable: JAX's CUDA plugin loads without looking for a driver and CUDA's libraries."""

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # nobody asks Google's metadata server what machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of the machine; without one libtpu warns that it finds none
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu lets one process in, to whom the TPU belongs; here there is none
}


def target(name: str) -> Target:
    """The target called ``name``: one of :data:`TARGETS`, or "here", the first device of this machine.

    Raises:
      ValueError: no target has that name.

    >>> target("tpu-v5e").memory / 2**30
    15.75
    >>> target("rtx9999")
    Traceback (most recent call last):
    ValueError: Target 'rtx9999' is not known; choose one of rtx5090, rtx4090, ..., tpu-v6e, here.
    """
    if name == HERE:
        return _attached()
    if name not in TARGETS:
        known = [*TARGETS, HERE]
        raise ValueError(f"Target {name!r} is not known{did_you_mean(name, known)}; choose one of {', '.join(known)}.")
    return TARGETS[name]


def peak_flops(kind: str) -> float | None:
    """The published operations a second of a device on bfloat16 matrices; None if it is not among :data:`TARGETS`.

    Args:
      kind: ``device_kind`` of a JAX device.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("TPU v5 lite"), peak_flops("cpu")
    (989400000000000.0, 197000000000000.0, None)
    """
    for target in TARGETS.values():
        hardware = target.hardware
        kinds = hardware.kinds if isinstance(hardware, Tpu) else (hardware.description,) if hardware else ()
        if hardware is not None and kind in kinds:
            return hardware.tflops * 1e12
    return None


def compile_for(
    target: Target, function: Callable[..., Any], *arguments: Any, donate_argnums: int | Sequence[int] = ()
) -> Plan:
    """Compile ``function`` for ``target``, run nothing, and return the compiler's memory plan.

    Args:
      target: from :func:`target`.
      function: what ``jax.jit`` takes, or what it has returned; then ``donate_argnums`` has been decided before.
      arguments: pytrees of arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes matter, and the ``NamedSharding`` that a
        ``ShapeDtypeStruct`` may have, on a mesh of :func:`devices_of` the target.  All others are for one device.  With the
        memory kind ``pinned_host``, on any mesh, an argument is in the host's memory.
      donate_argnums: of ``jax.jit``.

    Raises:
      MissingPackagesError: the target's compiler is not installed.
      ValueError: the compiler refuses a program with arguments in the host's memory.

    >>> add = lambda x, y: x + y
    >>> x = jax.ShapeDtypeStruct((256, 256), "float32")
    >>> plan = compile_for(target("here"), add, x, x, donate_argnums=0)
    >>> plan.argument_bytes, plan.output_bytes, plan.alias_bytes, plan.peak_bytes, plan.fits
    (524288, 262144, 262144, 524288, True)
    """
    asked = [leaf.sharding for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    on_host = any(sharding is not None and sharding.memory_kind == HOST for sharding in asked)
    given = {
        sharding.mesh
        for sharding in asked
        if isinstance(sharding, jax.sharding.NamedSharding) and sharding.memory_kind != HOST
    }
    mesh = given.pop() if given else jax.sharding.Mesh(np.array(devices_of(target)), ("one",))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    # A GPU that is not there has no memories, and JAX would forget the kind on a mesh of such.
    host = jax.sharding.NamedSharding(mesh.abstract_mesh, jax.P(), memory_kind=HOST)

    def place(leaf: jax.ShapeDtypeStruct, argument: Any) -> jax.ShapeDtypeStruct:
        sharding = (argument.sharding if isinstance(argument, jax.ShapeDtypeStruct) else None) or whole
        sharding = host if sharding.memory_kind == HOST else sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)

    abstract = jax.tree.map(place, jax.eval_shape(lambda *leaves: leaves, *arguments), arguments)
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function, donate_argnums=donate_argnums)
    lowered = jitted.lower(*abstract)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if re.match("RESOURCE_EXHAUSTED.*hbm", str(error), re.DOTALL | re.IGNORECASE):
            return _refused(str(error), time.perf_counter() - start)
        if on_host:
            raise ValueError(
                f"The compiler for {target.name} refuses this program with its state in the host's memory "
                f"({str(error).splitlines()[0]}); keep the state on the device."
            ) from error
        raise
    seconds = time.perf_counter() - start
    sizes = compiled.memory_analysis()
    peak = (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )
    return Plan(
        argument_bytes=sizes.argument_size_in_bytes,
        output_bytes=sizes.output_size_in_bytes,
        alias_bytes=sizes.alias_size_in_bytes,
        temporary_bytes=sizes.temp_size_in_bytes,
        code_bytes=sizes.generated_code_size_in_bytes,
        peak_bytes=peak,
        fits=peak <= target.memory,
        compile_seconds=seconds,
        traffic=traffic(compiled.as_text(), mesh.size) if mesh.size > 1 else None,
        **(_on_the_bus(target, compiled) if on_host else {}),
    )


def _on_the_bus(target: Target, compiled: Any) -> dict[str, Any]:
    """The fields of a :class:`Plan` about the host's memory; none for a CPU, whose own it is."""
    if target.platform == "cpu":
        return {}
    sizes, moved = compiled.memory_analysis(), host_traffic(compiled.as_text())
    kept = sizes.host_argument_size_in_bytes + sizes.host_output_size_in_bytes - sizes.host_alias_size_in_bytes
    hardware = target.hardware
    seconds = max(moved) / hardware.bus_bandwidth if isinstance(hardware, Gpu) else None
    return {"host_bytes": kept + sizes.host_temp_size_in_bytes, "host_traffic": moved, "host_seconds": seconds}


def hush_idle_compilers() -> None:
    """Keeps the compilers of the extra ``plan`` from complaining, in any process that uses JAX, that they find no hardware.

    Call it before JAX starts, that is, before the first device is used.
    """
    if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")):
        os.environ.setdefault(*_NO_CUDA_CHECK)
    if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*"):
        _describe_no_tpu()


def compile_only() -> None:
    """Sets up a process, before JAX starts, that compiles for absent hardware and leaves this machine's own alone."""
    jax.config.update("jax_platforms", "cpu")
    if (
        os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1"
    ):  # what JAX sets, and under which XLA warns of all that does not fit
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def gpu_target_config(gpu: Gpu, memory: int) -> str:
    """The text of XLA's ``stream_executor.GpuTargetConfigProto`` for a card with ``memory`` bytes.

    >>> print(gpu_target_config(TARGETS["rtx4090"].hardware, 2**34))
    gpu_device_info {
      cuda_compute_capability { major: 8 minor: 9 }
      core_count: 128
    ...
    """
    major, minor = gpu.capability.split(".")
    lanes, threads, shared, shared_of_a_block = _MULTIPROCESSORS[gpu.capability]
    # 9.0 has instructions that its successors lack, and XLA's kernels for it use them.
    extension = " feature_extension: ACCELERATED_FEATURES" if gpu.capability == "9.0" else ""
    return textwrap.dedent(f"""\
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
          core_count: {gpu.multiprocessors}
          fpus_per_core: {lanes}
          clock_rate_ghz: {gpu.clock}
          device_memory_size: {memory}
          memory_bandwidth: {gpu.bandwidth * 10**9}
          l2_cache_size: {gpu.l2_cache * _MIB}
          threads_per_core_limit: {threads}
          shared_memory_per_core: {shared * 1024}
          shared_memory_per_block: {48 * 1024}
          shared_memory_per_block_optin: {shared_of_a_block * 1024}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 }}
        runtime_version {{ major: 13 }}
        device_description_str: "{gpu.description}"
        """)


def _attached() -> Target:
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:  # a CPU
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Target(HERE, "cuda" if device.platform == "gpu" else device.platform, limit, None)


def devices_of(target: Target, number: int = 1) -> list[Any]:
    """Devices of ``target`` that programs can be compiled for.

    Raises:
      MissingPackagesError: the target's compiler is not installed.
      ValueError: there is no slice of a TPU with that number of devices, or the machine has fewer.
    """
    if target.hardware is None:
        found = jax.devices()
        if len(found) < number:
            raise ValueError(f"This machine has {len(found)} devices, and {number} are asked for; name another target.")
        return found[:number]
    os.environ.setdefault(*_NO_CUDA_CHECK)
    if isinstance(target.hardware, Gpu):
        return _cuda_devices(gpu_target_config(target.hardware, target.memory), number)
    return _tpu_devices(target.hardware, number)


def _tpu_devices(tpu: Tpu, number: int) -> list[Any]:
    from jax.experimental import topologies

    if not _installed("libtpu"):
        raise MissingPackagesError(f"To compile for a TPU, install libtpu: {how_to_install('plan')}.")
    _describe_no_tpu()
    smallest = min(tpu.topologies)
    if number > smallest and number not in tpu.topologies:
        raise ValueError(
            f"There is no slice of {number} such TPUs; choose one of {', '.join(map(str, tpu.topologies))}."
        )
    topology = {"topology_name": tpu.topologies[max(number, smallest)], "chip_config_name": tpu.chip_config}
    return list(topologies.get_topology_desc(platform="tpu", **topology).devices[:number])


def _describe_no_tpu() -> None:
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _cuda_devices(config: str, number: int) -> list[Any]:
    from jax.experimental import topologies

    plugin = next((name for name in _CUDA_PLUGINS if _installed(name)), None)
    if plugin is None or not any(_installed(package) for package in _PTXAS):
        raise MissingPackagesError(
            f"To compile for a GPU, install JAX's CUDA plugin and ptxas: {how_to_install('plan')}."
        )

    def describe() -> list[Any]:
        topology = {"topology_name": "", "topology": f"1x1x{number}", "target_config": config}
        return list(topologies.get_topology_desc(platform="cuda", **topology).devices)

    try:
        return describe()
    except NotImplementedError:  # JAX looked for plugins before, when this one refused to load without a driver
        importlib.import_module(plugin).initialize()
        return describe()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def _refused(message: str, seconds: float) -> Plan:
    """The plan of a program that the compiler refused with a message like "RESOURCE_EXHAUSTED: Used 20G of 15G hbm."

    >>> message = "RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 1.5G of 1G hbm. Exceeded hbm capacity by 0.5G."
    >>> plan = _refused(message, 1.0)
    >>> plan.peak_bytes / 2**30, plan.fits, plan.refusal
    (1.5, False, 'Ran out of memory in hbm.')
    """
    text = " ".join(message.partition(": ")[2].split())
    figure = re.search(r"([\d.]+)([KMGT])", text)
    peak = None if figure is None else int(float(figure[1]) * 1024 ** (1 + "KMGT".index(figure[2])))
    refusal = re.match(r".*?\.(?!\S)|.*", text)
    return Plan(None, None, None, None, None, peak, False, seconds, refusal and refusal[0])
