# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a refresh costs and what its basis captures: every projector, on gradients of a real training run.

    python benchmarks/refresh.py OUT                     60m, 130m, 350m and 1b shapes, about half an hour on two cores
    python benchmarks/refresh.py OUT --presets 350m      the 1024 x 2736 matrices at r = 256 alone
    python benchmarks/refresh.py OUT --tpu               adds compile time and code size for a TPU v5e (needs libtpu)

Gradients: a LLaMA of the preset's width with two layers on the bytes of Python's standard library (or --data), AdamW, 2,048
tokens a step; its last layer's up_proj at steps T apart, T = 10.  Time is that of one refresh, from a gradient and its
coordinates in the old basis, which a training step has anyway, to the new basis and the coordinates in it, which it needs
next; all contestants take turns in one process.  Energy is ‖PᵀG‖² over the largest possible at that rank (float64 SVD), the
least over the refreshes.  Writes OUT/refresh.json and OUT/refresh.png, and prints a Markdown table.
"""

import argparse
import json
import multiprocessing
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from _common import compile_for_tpu, factorisations_in, training_gradients

from galore_jax import projectors
from galore_jax.projectors import Observation

STEPS = [0, 10, 20, 30]
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


def contrib(seen: Observation):
    """What optax.contrib.galore does: an SVD of the whole, then a slice."""
    basis = jnp.linalg.svd(seen.gradient, full_matrices=False)[0][:, : seen.coordinates.shape[0]]
    return basis, basis.T @ seen.gradient


def program(name: str):
    """refresh(key, gradient, basis, coordinates), and the storage of the basis."""
    make = CONTESTANTS[name]
    refresh, storage = (contrib, projectors.svd().storage) if make is None else (make().refresh, make().storage)
    return (lambda *fields: refresh(Observation(*fields, jnp.int32(0), False))), storage


def gradients_of(out: pathlib.Path, preset: str, data: str) -> list[np.ndarray]:
    cache = out / f"gradients-{preset}.npz"
    if not cache.exists():
        kept = training_gradients(preset, layers=2, steps=STEPS, batch=8, seq=256, data=data)
        np.savez(cache, **{key: value for key, value in kept.items() if key.startswith(MATRIX)})
    archive = np.load(cache)
    gradients = [archive[f"{MATRIX}@{step}"] for step in STEPS]
    return [gradient / np.abs(gradient).max() for gradient in gradients]


def measure(preset: str, gradients: list[np.ndarray], rounds: int) -> list[dict]:
    """One record a contestant."""
    m, n = gradients[0].shape
    rank = m // 4
    optima = [np.sum(np.linalg.svd(g.astype(np.float64), compute_uv=False)[:rank] ** 2) for g in gradients]
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
            basis, _ = compiled(*arguments)
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
    slowest = np.median(seconds["svd"])
    for name, record in records.items():
        median = float(np.median(seconds[name]))
        record |= {"seconds": median, "times_faster_than_svd": float(slowest / median)}
    return list(records.values())


def tpu_record(name: str, shape: tuple[int, int], rank: int, queue) -> None:
    refresh, storage = program(name)
    basis = storage.zeros((shape[0], rank), jnp.float32, None, None)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))

    def from_data(data, *rest):
        return refresh(jax.random.wrap_key_data(data), *rest)

    arguments = key, jnp.zeros(shape), basis, jnp.zeros((rank, shape[1]))
    seconds, compiled, text = compile_for_tpu(from_data, *arguments)
    code = compiled.memory_analysis().generated_code_size_in_bytes
    queue.put({"tpu_compile_seconds": seconds, "tpu_code_bytes": code, "tpu_factorisations": factorisations_in(text)})


def on_tpu(name: str, shape: tuple[int, int], rank: int, timeout: int) -> dict:
    """In a process of its own, which is stopped after ``timeout`` seconds."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=tpu_record, args=(name, shape, rank, queue))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return {"tpu_compile_seconds": None}
    if process.exitcode:
        raise SystemExit(f"Compiling {name} for the TPU failed; is libtpu installed, and no other process using it?")
    return queue.get()


def table(records: list[dict], timeout: int) -> str:
    lines = [
        "| shape, rank | projector | ms | times faster than SVD | energy, of the optimum | max abs PᵀP - I | compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        shape = f"{r['shape'][0]} x {r['shape'][1]}, {r['rank']}"
        lines.append(
            f"| {shape} | {r['projector']} | {1e3 * r['seconds']:.1f} | {r['times_faster_than_svd']:.1f} "
            f"| {min(r['captured_energy']):.4f} | {r['defect']:.0e} | {r['compile_seconds']:.1f} |"
        )
    on_a_tpu = [r for r in records if "tpu_compile_seconds" in r]
    if on_a_tpu:
        lines += ["", "| projector | TPU v5e compile, s | code, MiB | factorisations in the HLO |", "|---|---|---|---|"]
    for r in on_a_tpu:
        if r["tpu_compile_seconds"] is None:
            lines.append(f"| {r['projector']} | > {timeout} | | |")
            continue
        found = ", ".join(r["tpu_factorisations"]) or "none"
        size = r["tpu_code_bytes"] / 2**20
        lines.append(f"| {r['projector']} | {r['tpu_compile_seconds']:.1f} | {size:.1f} | {found} |")
    return "\n".join(lines)


def plot(records: list[dict], path: pathlib.Path) -> None:
    presets = list(dict.fromkeys(r["preset"] for r in records))
    figure, axes = plt.subplots(
        1, len(presets), figsize=(1 + 4.5 * len(presets), 4.5), layout="constrained", squeeze=False, sharey=True
    )
    for axis, preset in zip(axes[0], presets, strict=True):
        chosen = [r for r in records if r["preset"] == preset]
        for index, r in enumerate(chosen):
            axis.scatter(1e3 * r["seconds"], min(r["captured_energy"]), s=60, color=f"C{index}", label=r["projector"])
        axis.set(xscale="log", xlabel="one refresh (ms)", ylim=(-0.03, 1.05))
        axis.set_title(f"{preset}: {chosen[0]['shape'][0]} x {chosen[0]['shape'][1]}, r = {chosen[0]['rank']}")
        axis.grid(alpha=0.25, which="both")
    axes[0][0].set_ylabel("captured energy, of the optimum")
    axes[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the gradients and the results")
    parser.add_argument("--presets", nargs="+", default=["60m", "130m", "350m", "1b"])
    parser.add_argument("--data", default="python", help='text: "python", a file or a folder')
    parser.add_argument("--rounds", type=int, default=7, help="timings of each contestant")
    parser.add_argument("--tpu", action="store_true", help="compile the last preset's refreshes for a TPU v5e too")
    parser.add_argument("--tpu-timeout", type=int, default=300, help="seconds")
    args = parser.parse_args()
    matplotlib.use("Agg")
    args.out.mkdir(parents=True, exist_ok=True)
    records = []
    for preset in args.presets:
        records += measure(preset, gradients_of(args.out, preset, args.data), args.rounds)
    if args.tpu:
        for record in records[-len(CONTESTANTS) :]:
            record |= on_tpu(record["projector"], tuple(record["shape"]), record["rank"], args.tpu_timeout)
    (args.out / "refresh.json").write_text(json.dumps(records, indent=2) + "\n")
    plot(records, args.out / "refresh.png")
    print(table(records, args.tpu_timeout))


if __name__ == "__main__":
    main()
