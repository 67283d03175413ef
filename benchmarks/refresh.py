# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a refresh costs and what its basis captures: every projector, on gradients of a real training run.

    python benchmarks/refresh.py OUT                     60m, 130m, 350m and 1b shapes, about an hour on two cores
    python benchmarks/refresh.py OUT --presets 350m      the 1024 x 2736 matrices at r = 256 alone
    python benchmarks/refresh.py OUT --presets 350m --rounds 0 --tpu     compile time and code size for a TPU v5e (needs libtpu)

Set OPENBLAS_THREAD_TIMEOUT=4 on a CPU: LAPACK's threads spin for a while after a factorization, on the cores of what comes next.

Gradients: a LLaMA of the preset's width with two layers on the source of Python's standard library (or --data), AdamW with 256
tokens a step; the gradients of 2,048 tokens with respect to the last layer's up_proj, at the start (--steps 0 10 20) and, the
default gap of 200 steps on, at 220.  The tokens are those of a trained BPE of 4,096: a hundred different bytes would confine the
gradient to about a hundred directions.  Each projector refreshes at all of these steps, a warm start from its own basis of the
step before.  Time is that of the last refresh, from a gradient and its coordinates in the old basis, which a training step has
anyway, to the new basis; all contestants take turns in one process.  Energy is
‖PᵀG‖² over the largest possible at that rank (float64).  Writes OUT/refresh.json, OUT/refresh-light.svg and OUT/refresh-dark.svg
(OUT/refresh-tpu.json), and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import pathlib
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from _common import compile_for_tpu, factorisations_in, training_gradients
from optimizer_bytes import RANKS

from galore_jax import projectors
from galore_jax.models import LlamaConfig
from galore_jax.projectors import ProjectorInput

if TYPE_CHECKING:
    from _style import Theme
    from matplotlib.figure import Figure

MATRIX = "layers/mlp/up_proj/kernel"
CONTESTANTS = {
    "power (default)": projectors.power,
    "randomized(power_iterations=1)": lambda: projectors.randomized(1),
    "randomized": projectors.randomized,
    "eigh": projectors.eigh,
    "svd": projectors.svd,
    "sampled": projectors.sampled,
    "random": projectors.random,
    "rows": projectors.rows,
    "optax.contrib.galore": None,
}


def contrib(seen: ProjectorInput):
    """What optax.contrib.galore does: an SVD of the whole, then a slice."""
    return jnp.linalg.svd(seen.gradient, full_matrices=False)[0][:, : seen.coordinates.shape[0]]


def program(name: str):
    """refresh(key, gradient, basis, coordinates), and the storage of the basis."""
    make = CONTESTANTS[name]
    refresh, storage = (contrib, projectors.svd().storage) if make is None else (make().refresh, make().storage)
    return (lambda *fields: refresh(ProjectorInput(*fields, jnp.int32(0), False))), storage


def shape_of(preset: str) -> tuple[int, int, int]:
    """m, n and the rank of the matrices of a preset."""
    config = LlamaConfig.preset(preset)
    return config.hidden_size, config.intermediate_size, RANKS.get(preset, config.hidden_size // 4)


def gradients_of(args: argparse.Namespace, preset: str) -> tuple[list[np.ndarray], list[float]]:
    """The gradients, the largest entry of each 1, and the losses; of an earlier call with the same settings if there was one."""
    settings = {name: str(getattr(args, name)) for name in ("steps", "batch", "seq", "data", "tokenizer")}
    cache = args.out / f"gradients-{preset}.npz"
    archive = np.load(cache) if cache.exists() else {"settings": None}
    if str(archive["settings"]) != str(settings):
        found, losses = training_gradients(
            MATRIX, preset, 2, args.steps, args.batch, args.seq, args.data, args.tokenizer
        )
        np.savez(cache, settings=str(settings), gradients=np.stack(found), losses=losses)
        archive = np.load(cache)
    return [gradient / np.abs(gradient).max() for gradient in archive["gradients"]], archive["losses"].tolist()


def best_energies(gradients: list[np.ndarray], rank: int) -> list[float]:
    """The largest ‖PᵀG‖² at that rank for each gradient: of its leading squared singular values, in float64."""
    wide = [gradient.astype(np.float64) for gradient in gradients]
    return [float(np.linalg.eigvalsh(g @ g.T)[-rank:].sum()) for g in wide]


def measure(preset: str, gradients: list[np.ndarray], rounds: int) -> list[dict]:
    """One record a contestant."""
    m, n, rank = shape_of(preset)
    optima = best_energies(gradients, rank)
    devices = [jnp.asarray(g) for g in gradients]
    records, calls = {}, {}
    for name in CONTESTANTS:
        refresh, storage = program(name)
        basis = storage.zeros((m, rank), jnp.float32, None, None)
        arguments = (jax.random.key(0), devices[0], basis, jnp.zeros((rank, n)))
        start = time.perf_counter()
        compiled = jax.jit(refresh).lower(*arguments).compile()
        records[name] = {"preset": preset, "shape": [m, n], "rank": rank, "projector": name}
        records[name]["compile_seconds"] = time.perf_counter() - start
        energies, defects = [], []
        for number, (gradient, optimum) in enumerate(zip(devices, optima, strict=True)):
            arguments = (jax.random.key(number), gradient, basis, storage.project(basis, gradient, rank))
            basis = compiled(*arguments)
            p = np.asarray(storage.lift(basis, jnp.eye(rank), m), np.float64)
            energies.append(float(np.sum((p.T @ np.asarray(gradient, np.float64)) ** 2) / optimum))
            defects.append(float(np.abs(p.T @ p - np.eye(rank)).max()))
        records[name] |= {"captured_energy": energies, "defect": max(defects)}
        calls[name] = (compiled, arguments)  # the last refresh, from the basis before it
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (compiled, arguments) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds[name].append(time.perf_counter() - start)
    for name, record in records.items():
        ratios = np.divide(seconds["svd"], seconds[name])  # of neighbours in time
        record |= {"seconds": seconds[name], "times_faster_than_svd": float(np.median(ratios))}
    return list(records.values())


def tpu_record(name: str, shape: tuple[int, int], rank: int, timeout: int, queue) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, resource.RLIM_INFINITY))
    refresh, storage = program(name)
    basis = storage.zeros((shape[0], rank), jnp.float32, None, None)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))

    def from_data(data, *rest):
        return refresh(jax.random.wrap_key_data(data), *rest)

    arguments = key, jnp.zeros(shape), basis, jnp.zeros((rank, shape[1]))
    seconds, compiled, text = compile_for_tpu(from_data, *arguments)
    code = compiled.memory_analysis().generated_code_size_in_bytes
    record = {"tpu_compile_seconds": seconds[0], "tpu_compile_cpu_seconds": seconds[1], "tpu_code_bytes": code}
    queue.put(record | {"tpu_factorisations": factorisations_in(text)})


def on_tpu(name: str, shape: tuple[int, int], rank: int, timeout: int) -> dict:
    """In a process of its own, which SIGXCPU ends once its threads have run for ``timeout`` seconds together."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=tpu_record, args=(name, shape, rank, timeout, queue))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGXCPU:
        return {"tpu_compile_seconds": None}
    if process.exitcode:
        raise SystemExit(f"Compiling {name} for the TPU failed; is libtpu installed, and no other process using it?")
    return queue.get()


def table(results: dict) -> str:
    lines = [
        "| shape, rank | projector | ms | times faster than SVD | least energy, of the optimum | max abs PᵀP - I | compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results["refreshes"]:
        lines.append(
            f"| {size(r)} | {r['projector']} | {1e3 * np.median(r['seconds']):.1f} | {r['times_faster_than_svd']:.1f} "
            f"| {min(r['captured_energy']):.4f} | {r['defect']:.0e} | {r['compile_seconds']:.1f} |"
        )
    steps = results["steps"]
    header = "| shape, rank | energy captured, of the optimum | " + " | ".join(f"step {step}" for step in steps) + " |"
    lines += ["", header, "|---" * (2 + len(steps)) + "|"]
    for preset, found in results["gradients"].items():
        chosen = [r for r in results["refreshes"] if r["preset"] == preset]
        rows = {"(loss)": (found["losses"], 2), "(optimum, of the whole)": (found["optimal_shares"], 4)}
        rows |= {r["projector"]: (r["captured_energy"], 4) for r in chosen}
        for name, (values, digits) in rows.items():
            cells = " | ".join(f"{value:.{digits}f}" for value in values)
            lines.append(f"| {size(chosen[0])} | {name} | {cells} |")
    return "\n".join(lines)


def size(record: dict) -> str:
    return f"{record['shape'][0]} x {record['shape'][1]}, {record['rank']}"


def tpu_table(records: list[dict], timeout: int) -> str:
    lines = [
        "| shape, rank | projector | TPU v5e compile, s | s of one core | code, MiB | factorizations in the HLO |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        cells = f" | > {timeout} | |"
        if r["tpu_compile_seconds"] is not None:
            found = ", ".join(r["tpu_factorisations"]) or "none"
            seconds = f"{r['tpu_compile_seconds']:.1f} | {r['tpu_compile_cpu_seconds']:.1f}"
            cells = f"{seconds} | {r['tpu_code_bytes'] / 2**20:.1f} | {found}"
        lines.append(f"| {size(r)} | {r['projector']} | {cells} |")
    return "\n".join(lines)


def plot(records: list[dict], out: pathlib.Path) -> None:
    from _style import save  # gpu.py does without

    save(lambda theme: picture(records, theme), out, "refresh")


def picture(records: list[dict], theme: Theme) -> Figure:
    """Bars of the times, and the energy that each projector captures at its worst step; a panel for each shape."""
    from _style import bars, beside, title
    from matplotlib import pyplot as plt

    presets = list(dict.fromkeys(r["preset"] for r in records))
    figure, axes = plt.subplots(
        len(presets), 1, figsize=(8, 0.6 + 3.4 * len(presets)), layout="constrained", squeeze=False
    )
    for axis, preset in zip(axes[:, 0], presets, strict=True):
        chosen = [r for r in records if r["preset"] == preset]
        times = [1e3 * np.median(r["seconds"]) for r in chosen]
        colors = [theme.blue if index == 0 else theme.faint for index in range(len(chosen))]  # the default is the first
        axis.barh([r["projector"] for r in chosen], times, 0.65, color=colors)
        for place, (r, time_) in enumerate(zip(chosen, times, strict=True)):
            beside(axis, time_, place, f"{time_:.0f} ms, {min(r['captured_energy']):.2%}")
        bars(axis)
        axis.set(xlim=(0, 1.25 * max(times)), xlabel=f"{size(chosen[0])}: one refresh, ms")
    title(figure, "Time of one refresh, and the energy it captures of the most that is possible")
    return figure


def compare(args: argparse.Namespace) -> None:
    """The contestants on this machine."""
    settings = {k: str(v) for k, v in vars(args).items() if k != "out"}
    results = {"settings": settings, "steps": args.steps, "gradients": {}, "refreshes": []}
    for preset in args.presets:
        gradients, losses = gradients_of(args, preset)
        wholes = [float(np.sum(np.square(g, dtype=np.float64))) for g in gradients]
        shares = np.divide(best_energies(gradients, shape_of(preset)[2]), wholes).tolist()
        results["gradients"][preset] = {"losses": losses, "optimal_shares": shares}
        results["refreshes"] += measure(preset, gradients, args.rounds)
        (args.out / "refresh.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"{preset} measured", file=sys.stderr, flush=True)
    plot(results["refreshes"], args.out)
    print(table(results))


def compile_all_for_tpu(args: argparse.Namespace) -> None:
    records = []
    for preset, name in itertools.product(args.presets, CONTESTANTS):
        m, n, rank = shape_of(preset)
        record = {"preset": preset, "shape": [m, n], "rank": rank, "projector": name}
        records.append(record | on_tpu(name, (m, n), rank, args.tpu_timeout))
        written = {"timeout": args.tpu_timeout, "records": records}
        (args.out / "refresh-tpu.json").write_text(json.dumps(written, indent=2) + "\n")
        print(records[-1], file=sys.stderr, flush=True)
    print(tpu_table(**written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the gradients and the results")
    parser.add_argument("--presets", nargs="+", default=["60m", "130m", "350m", "1b"])
    parser.add_argument("--data", default="python", help='text: "python", a file or a folder')
    parser.add_argument("--tokenizer", default="bpe", help='"bpe" or "bytes"')
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 10, 20, 220], help="of the refreshes")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a gradient")
    parser.add_argument("--seq", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each contestant; 0: only --tpu")
    parser.add_argument("--tpu", action="store_true", help="compile the refreshes for a TPU v5e")
    parser.add_argument("--tpu-timeout", type=int, default=300, help="seconds of one core")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rounds:
        compare(args)
    if args.tpu:
        compile_all_for_tpu(args)


if __name__ == "__main__":
    main()
