# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What the plans promise, measured on a GPU: memory, steps, refreshes, galore_torch beside it, and learning.

    python benchmarks/gpu.py OUT                   all of it, about half an hour on an H100
    python benchmarks/gpu.py OUT --minutes 15      what is worth most, in a quarter of an hour
    python benchmarks/gpu.py OUT --parts a b       some parts
    python benchmarks/gpu.py OUT --tiny            small models, to see that it runs: a minute, on a CPU too
    python benchmarks/gpu.py OUT --plan h100       no GPU: the compiler's plans of parts a and b (needs the extra plan); hours
    python benchmarks/gpu.py OUT --write           puts the tables of OUT into docs/benchmarks.md

Parts: (a) a 7B model in a process limited to the memory of a card of 24 GB and of 12 GB, an 8B one to that of 16 GB, with random
weights, one batch again and again, and their speed, also with the optimizer state in the host's memory; (b) steps with several
optimizers in turns, and the update of each alone beside the bytes that it has to move; (c) one refresh with each projector; (d)
the same models of 130m and 1b with galore_torch, where torch, transformers and galore_torch are installed; (e) 60m on the bytes
of a text (--text) for 3,000 steps, each optimizer at the best rate of quality.py.

The programs are compiled first, several at a time, into OUT/cache or JAX_COMPILATION_CACHE_DIR.  Then every line of the tables
is measured in a process of its own, which has the card to itself.  OUT/gpu.json and OUT/gpu.md are written after each, and what
they have is not measured again.  OUT/gpu.log has what the processes say.  Needs jax, flax, optax, numpy and safetensors.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
from _gpu import CONTRIB, MEASUREMENTS, step_flops, training, update_bytes

from galore_jax.presets import PRESETS

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- on a GPU: begin -->\n", "<!-- on a GPU: end -->\n"
TITLES = {
    "a": "Memory and speed of large models",
    "b": "A step, and the update alone",
    "c": "A refresh",
    "d": "Beside galore_torch",
    "e": "Learning",
}

# bfloat16 products with float32 sums, dense, by NVIDIA's data sheets.
PEAK_FLOPS = {"H100 80GB": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclasses.dataclass(frozen=True)
class Row:
    """What one process measures: ``MEASUREMENTS[kind](**arguments)``."""

    part: str
    name: str
    kind: str
    arguments: dict[str, Any]
    worth: int  # those with the least go first
    limit: float | None = None  # GiB of the card
    needs: tuple[str, ...] = ()  # packages, and optimizers of galore_jax

    @property
    def key(self) -> str:
        return f"{self.part}: {self.name}"


LAYERWISE = {"layerwise": True, "steps": 1000}
LARGE: dict[str, tuple[float, dict]] = {  # GiB that CUDA reports of an RTX 4090, an RTX 3060 and an RTX 4060 Ti
    "7b bf16, galore_adamw_8bit": (
        23.64, {"model": "7b", "optimizer": "galore_adamw_8bit", "rank": 1024, "learning_rate": 0.001},
    ),
    "7b int8, q_galore_adamw_8bit": (
        11.75, {
            "model": "7b", "optimizer": "q_galore_adamw_8bit", "rank": 1024, "learning_rate": 0.001, "weights": "int8",
            "proj_type": "reverse_std",
        },
    ),
    "7b int8, muon_4bit": (
        11.75, {"model": "7b", "optimizer": "muon_4bit", "learning_rate": 0.001, "weights": "int8"},
    ),
    "llama3-8b int8, q_galore_adamw_8bit": (
        15.6, {
            "model": "llama3-8b", "optimizer": "q_galore_adamw_8bit", "rank": 1024, "learning_rate": 0.001,
            "weights": "int8", "proj_type": "reverse_std",
        },
    ),
    "7b bf16, adamw, state on the host": (
        23.64, {"model": "7b", "optimizer": "adamw", "learning_rate": 0.0003, "state_memory": "host"},
    ),
    "7b bf16, galore_adamw, state on the host": (
        23.64, {"model": "7b", "optimizer": "galore_adamw", "rank": 1024, "learning_rate": 0.001, "state_memory": "host"},
    ),
}  # fmt: skip
BATCHES = [(1, 256), (1, 1024), (4, 1024)]  # sequences, and tokens of each

COMPARED = {
    "60m": ("adamw", CONTRIB, "galore_adamw"),
    "130m": ("adamw", "galore_adamw", "galore_adamw_8bit", "muon", "fira_adamw", "muon_4bit"),
    "1b": ("adamw", "galore_adamw", "galore_adamw_8bit", "muon", "fira_adamw", "muon_4bit"),
}
RANKS = {"60m": 128, "130m": 256, "1b": 512}
GAP = 200
SHOWN = {"adamw": "optax.adamw", "muon": "optax.contrib.muon"}  # with float32 moments
RATES = {"adamw": 0.0003, "muon": 0.003, "galore_adamw": 0.01, "muon_4bit": 0.003, "galore_muon": 0.01}  # quality.py's
SHAPES = {"1b": ((2048, 5461), 512), "7b": ((4096, 11008), 1024)}
PROJECTORS = ["power (default)", "randomized", "random", "rows", "sampled", "eigh", "svd"]  # svd: jnp.linalg.svd


TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64,
}  # fmt: skip


def setting(model: str, optimizer: str) -> dict:
    """Of a row of part b."""
    galore = {"rank": RANKS[model], "update_proj_gap": GAP} if optimizer not in ("adamw", "muon", "muon_4bit") else {}
    return {"optimizer": optimizer, "steps": 1000, "learning_rate": 1e-3, "diagnostics": False} | galore


def rows(tiny: bool, text: str | None) -> list[Row]:
    """Everything, in the order of the tables."""
    card = {"copy_bytes": 2**22 if tiny else 2**32, "size": 256 if tiny else 8192, "rounds": 10}
    found = [Row("a", "card", "card", card, 0)]
    found += large_rows(tiny) + compared_rows(tiny) + refresh_rows(tiny) + beside_rows(tiny) + learning_rows(tiny, text)
    return [dataclasses.replace(row, arguments=_tiny(row)) for row in found] if tiny else found


def _tiny(row: Row) -> dict:
    """The arguments with a model and a batch that a CPU trains in a moment."""
    small = {"model": "demo", "shape": TINY}

    def shrunk(settings: dict) -> dict:
        return settings | small | ({"rank": 8} if "rank" in settings else {})

    arguments = row.arguments | {"rounds": 3, "batch": 2, "seq": 8, "settings": {}, "every": 2}
    if row.kind == "memory":
        arguments["settings"] = shrunk(row.arguments["settings"])
    elif row.kind == "steps":
        arguments |= {"model": small, "optimizers": {k: shrunk(v) for k, v in row.arguments["optimizers"].items()}}
    elif row.kind == "learning":
        arguments["settings"] = shrunk(row.arguments["settings"]) | {"steps": 6, "warmup_steps": 0}
    elif row.kind == "torch_steps":
        arguments |= {"model": row.arguments["model"] | TINY, "rank": 8}
    elif row.kind == "refreshes":
        arguments |= {"shape": (32, 64), "rank": 8, "names": PROJECTORS[:4:3]}
    elif row.kind == "torch_svd":
        arguments |= {"shape": (32, 64), "rank": 8}
    return {name: value for name, value in arguments.items() if name in row.arguments}


def large_rows(tiny: bool) -> list[Row]:
    found = []
    for batch, seq in BATCHES[: 1 if tiny else None]:
        for name, (limit, settings) in LARGE.items():
            arguments = {"settings": LAYERWISE | settings, "batch": batch, "seq": seq, "rounds": 20}
            first, needs = (batch, seq) == BATCHES[0], _needs(settings["optimizer"])
            # A step with its state on the host takes seconds.
            worth = 1 if first and "state_memory" not in settings else 5
            row = Row("a", f"{name}, {batch} x {seq}", "memory", arguments, worth, limit, needs)
            found.append(row if first else dataclasses.replace(row, limit=None))
    return found[:1] if tiny else found


def compared_rows(tiny: bool) -> list[Row]:
    found = []
    for model, names in COMPARED.items():
        there = [name for name in names if not missing(_needs(name))]
        arguments = {
            # Or the activations of the 1b model would be most of the memory.
            "model": {"model": model, "remat": model == "1b"},
            "optimizers": {name: setting(model, name) for name in there},
            "batch": 64, "seq": 256, "rounds": 24 if model == "1b" else 96, "compile_for": 150.0,
        }  # fmt: skip
        found.append(Row("b", model, "steps", arguments, {"130m": 2, "1b": 3, "60m": 7}[model]))
    return found[:1] if tiny else found


def refresh_rows(tiny: bool) -> list[Row]:
    found = []
    for model, worth in {"1b": 4, "7b": 6}.items():
        shape, rank = SHAPES[model]
        arguments = {"shape": shape, "rank": rank, "rounds": 5}
        found.append(Row("c", f"{model}, galore_jax", "refreshes", arguments | {"names": PROJECTORS}, worth))
        found.append(Row("c", f"{model}, torch", "torch_svd", arguments, worth, needs=("torch",)))
    return found[:2] if tiny else found


def beside_rows(tiny: bool) -> list[Row]:
    numbers, found = {"batch": 64, "seq": 256, "rounds": 20}, []
    for model, worth in {"130m": 4, "1b": 8}.items():
        for optimizer in ("adamw", "galore_adamw"):
            settings = {"model": model, "remat": True} | setting(model, optimizer)
            name = f"{model}, {SHOWN.get(optimizer, f'galore_jax.{optimizer}')}"
            found.append(Row("d", name, "memory", numbers | {"settings": settings}, worth))
        for optimizer, needs in {"torch.optim.AdamW": (), "galore_torch": ("galore_torch",)}.items():
            arguments = numbers | {
                "model": torch_config(model),
                "optimizer": optimizer,
                "rank": RANKS[model],
                "gap": GAP,
            }
            needs = ("torch", "transformers", *needs)
            found.append(Row("d", f"{model}, {optimizer}", "torch_steps", arguments, worth, needs=needs))
    return found[2:4] if tiny else found


def learning_rows(tiny: bool, text: str | None) -> list[Row]:
    found = []
    for optimizer, rate in RATES.items():
        run = {"model": "60m", "learning_rate": rate, "steps": 3000, "warmup_steps": 300}
        arguments = {"settings": setting("60m", optimizer) | run, "batch": 32, "seq": 256, "text": text, "every": 100}
        found.append(Row("e", optimizer, "learning", arguments, 9, needs=_needs(optimizer)))
    return found[:1] if tiny else found


def missing(needs: tuple[str, ...]) -> list[str]:
    """The packages, and the optimizers of galore_jax, that are not there."""
    presets = [name for name in needs if name.startswith("galore_jax.")]
    packages = [name for name in needs if name not in presets and importlib.util.find_spec(name) is None]
    return packages + [name for name in presets if name.removeprefix("galore_jax.") not in PRESETS]


def _needs(optimizer: str) -> tuple[str, ...]:
    return () if optimizer in (*SHOWN, CONTRIB) else (f"galore_jax.{optimizer}",)


def torch_config(model: str) -> dict:
    """The keyword arguments of transformers.LlamaConfig."""
    from galore_jax.models import LlamaConfig

    config = LlamaConfig.preset(model)
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    return {name: getattr(config, name) for name in names} | {"max_position_embeddings": config.max_position_embeddings}


# Measuring.


def measure_all(args: argparse.Namespace) -> None:
    file = args.out / "gpu.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results |= {"driver": driver(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "tiny": args.tiny}
    results.setdefault("rows", {})
    print(f"driver: {results['driver'] or 'no NVIDIA card'}", flush=True)
    chosen = [row for row in rows(args.tiny, args.text) if row.part in args.parts or row.kind == "card"]
    chosen = [row for row in chosen if row.kind == "card" or re.search(args.rows, row.key)]
    chosen = [row for row in chosen if results["rows"].get(row.key, {}).get("status") != "done"]
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out.resolve() / "cache"))
    if not args.tiny:
        compile_all(chosen, environment, args.out / "gpu.log", end)
    if args.compile:
        return
    for row in sorted(chosen, key=lambda row: row.worth):
        left = 900.0 if end is None else end - time.monotonic()
        if left < (1 if args.tiny else 20):
            print("no time is left", flush=True)
            break
        start = time.monotonic()
        if missing(row.needs):
            record = {"status": f"left out: needs {', '.join(missing(row.needs))}"}
        else:
            record = measured(row, left, args.out / "gpu.log", results["driver"], environment | slow(args.tiny))
        limit = row.limit if results["driver"] else None
        results["rows"][row.key] = {"part": row.part, "name": row.name, "kind": row.kind, "limit": limit} | record
        file.write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "gpu.md").write_text(tables(results, plans(args.out)))
        print(f"{row.key}: {record['status']}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"\n{tables(results, plans(args.out))}")


def compile_all(chosen: list[Row], environment: dict, log: pathlib.Path, end: float | None) -> None:
    """Compiles what the rows will run, as many programs at a time as there are pairs of cores."""
    jobs: dict[str, None] = {}
    for row in sorted(chosen, key=lambda row: row.worth):
        if missing(row.needs) or row.kind not in ("memory", "steps", "learning"):
            continue
        sizes = {name: row.arguments[name] for name in ("batch", "seq")}
        for settings in settings_of(row).values():
            arguments = {"settings": settings, "started": row.kind == "memory", "updated": row.kind == "steps"}
            jobs[json.dumps(["programs", arguments | sizes])] = None
    environment = environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def compiled(job: str) -> None:
        left = None if end is None else max(1.0, end - time.monotonic())
        command, start = [sys.executable, "-u", __file__, "--measure", job], time.monotonic()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
            said = done.stdout.strip() or done.stderr[-2000:]
        except subprocess.TimeoutExpired:
            said = "cut off"
        with log.open("a") as file:
            print(f"--- compiled in {time.monotonic() - start:.0f} s: {job}\n{said}", file=file, flush=True)

    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        list(pool.map(compiled, jobs))
    print(f"{len(jobs)} programs compiled in {time.monotonic() - start:.0f} s", flush=True)


def settings_of(row: Row) -> dict[str, dict]:
    """What a row trains with, by name."""
    if row.kind == "steps":
        model = row.arguments["model"]
        return {f"{row.name}, {name}": model | settings for name, settings in row.arguments["optimizers"].items()}
    shape = {"shape": {"vocab_size": 256}} if row.kind == "learning" else {}
    return {row.name: row.arguments["settings"] | shape}


def slow(tiny: bool) -> dict[str, str]:
    """The environment of a tiny run: optimizations take longer than its steps."""
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if tiny else {}


def driver() -> dict | None:
    """The card's name, its memory in bytes and the driver's version, by nvidia-smi; None without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        name, memory, version = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"card": name, "memory": int(memory) * 2**20, "version": version}


def measured(row: Row, seconds: float, log: pathlib.Path, card: dict | None, environment: dict) -> dict:
    """The last report of a process that measures the row, and how it ended."""
    environment = dict(environment)
    if row.limit is not None and card is not None:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{row.limit * 2**30 / card['memory']:.4f}"
    elif row.kind != "torch_steps":
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    command = [sys.executable, "-u", __file__, "--measure", json.dumps([row.kind, row.arguments])]
    with log.open("a") as stderr:
        print(f"--- {row.key}", file=stderr, flush=True)
        start = stderr.tell()
        try:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, timeout=seconds)
            output, status = done.stdout, "done" if done.returncode == 0 else "failed"
        except subprocess.TimeoutExpired as expired:
            output, status = expired.stdout or b"", "cut off"
    if status == "failed":
        said = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        errors = [line for line in said if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
        status = f"failed: {(errors or said or ['no message'])[-1][:200]}"
    reports = [
        line for line in output.decode().splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")
    ]
    return (json.loads(reports[-1]) if reports else {}) | {"status": status}


def measure(kind: str, arguments: dict) -> None:
    """In a process of its own: each line of the standard output is a report, the last of which holds the others."""
    MEASUREMENTS[kind](lambda found: print(json.dumps(found), flush=True), **arguments)


# Planning.


def plan_all(args: argparse.Namespace) -> None:
    """The plans of parts a and b for hardware that is not there."""
    from galore_jax.planning.targets import compile_for, compile_only, target

    compile_only()
    file = args.out / "plan.json"
    for row in sorted(rows(args.tiny, None), key=lambda row: row.worth):
        if (
            row.part not in args.parts
            or row.kind not in ("memory", "steps")
            or row.part not in "ab"
            or missing(row.needs)
        ):
            continue
        for name, settings in settings_of(row).items():
            found = plans(args.out)
            if name in found or not re.search(args.rows, f"{row.part}: {name}"):
                continue
            batch, seq = row.arguments["batch"], row.arguments["seq"]
            made = training(settings, batch, seq)
            hardware = target(args.plan)
            plan = compile_for(hardware, made.step, *made.abstract)
            found[name] = {
                "target": args.plan, "peak_bytes": plan.peak_bytes, "fits": plan.fits, "compile_seconds": plan.compile_seconds,
                "flops": step_flops(made.model, batch, seq), "update_bytes": update_bytes(*made.abstract[:2]),
            }  # fmt: skip
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: {gib(plan.peak_bytes)}, compiled in {plan.compile_seconds:.0f} s", flush=True)


def plans(out: pathlib.Path) -> dict:
    file = out / "plan.json"
    return json.loads(file.read_text()) if file.exists() else {}


# Tables.

NOT_YET = "not yet"


def tables(results: dict, planned: dict) -> str:
    """Parts a and b with their plans, measured or not; of the others what has been measured."""
    found = list(results.get("rows", {}).values())
    card = next((r for r in found if r["kind"] == "card" and r["status"] == "done"), None)
    parts = {
        "a": memory_table([r for r in found if r["part"] == "a" and r["kind"] == "memory"], planned, card),
        "b": steps_table([r for r in found if r["part"] == "b"], planned, card),
        "c": refresh_table([r for r in found if r["part"] == "c"]),
        "d": beside_table([r for r in found if r["part"] == "d"]),
        "e": learning_table([r for r in found if r["part"] == "e"]),
    }
    lines = [described(results, card, planned)]
    for part, table in parts.items():
        if len(table) > 2:
            lines += ["", f"### {TITLES[part]}", "", *table]
    left_out = [f"* {r['part']}: {r['name']}: {r['status']}" for r in found if r["status"] != "done"]
    return "\n".join([*lines, *([""] if left_out else []), *left_out]) + "\n"


def described(results: dict, card: dict | None, planned: dict) -> str:
    targets = {plan["target"] for plan in planned.values()}
    plan = f"Planned: by the compiler for {', '.join(sorted(targets))}, without the card. " if targets else ""
    if card is None:
        return f"{plan}Nothing in this part has been measured yet."
    has = results["driver"]
    name = f"{has['card']}, driver {has['version']}" if has else card["device"]
    return (
        f"{plan}Measured: {name}, jax {card['jax']}, {results['date']}. A copy in its memory moves "
        f"{card['copy_bytes_per_second'] / 1e12:.2f} TB/s, read and written; a bfloat16 matrix product runs at "
        f"{card['product_flops_per_second'] / 1e12:.0f} TFLOP/s."
    )


def memory_table(found: list[dict], planned: dict, card: dict | None) -> list[str]:
    measured = {r["name"]: r for r in found if r["status"] == "done"}
    names = list(dict.fromkeys([*(n for n, p in planned.items() if " x " in n), *measured]))
    lines = _header(
        "model and optimizer, sequences x tokens", "limit", "planned", "plan on the card", "peak in use", "over its plan",
        "loss of 5 steps", "median step", "longest", "tokens/s", "MFU",
    )  # fmt: skip
    for name in names:
        cells = [name, "", gib(planned[name]["peak_bytes"]) if name in planned else "", *[NOT_YET] * 8]
        if name in measured:
            r = measured[name]
            seconds = float(np.median(r["steps_seconds"]))
            peak = r["allocator"].get("peak_bytes_in_use")
            over = "" if peak is None else f"{peak / r['plan_bytes'] - 1:+.1%}"
            cells[1] = "" if r["limit"] is None else gib(r["limit"] * 2**30)
            cells[3:] = [
                gib(r["plan_bytes"]), "" if peak is None else gib(peak), over, f"{r['losses'][0]:.2f} to {r['losses'][-1]:.2f}",
                ms(seconds), ms(max(r["steps_seconds"])), f"{r['tokens'] / seconds:,.0f}", mfu(r["flops"], seconds, card),
            ]  # fmt: skip
        lines.append(_line(cells))
    return lines


def steps_table(found: list[dict], planned: dict, card: dict | None) -> list[str]:
    measured = {
        f"{r['name']}, {name}": o for r in found for name, o in r.get("optimizers", {}).items() if "steps_seconds" in o
    }
    names = list(dict.fromkeys([*(n for n in planned if " x " not in n), *measured]))
    lines = _header(
        "model, optimizer", "planned peak", "least bytes of an update", "at the bandwidth", "update alone",
        "of the least time", "median step", "of AdamW's", "longest, of its median", "median without a refresh",
        "median with one", "MFU",
    )  # fmt: skip
    for name in names:
        model, optimizer = name.split(", ", 1)
        plan, r = planned.get(name, {}), measured.get(name, {})
        least = r.get("update_bytes", plan.get("update_bytes"))
        cells = [
            f"{model}, {SHOWN.get(optimizer, optimizer)}",
            gib(plan["peak_bytes"]) if plan else "",
            gib(least) if least else "",
            *[NOT_YET] * 9,
        ]
        if card is not None and least:
            cells[3] = ms(least / card["copy_bytes_per_second"])
        elif plan and least:
            cells[3] = ms(least / bandwidth(plan["target"]))
        if r:
            # The first steps compile nothing, but the first of all refreshes every basis.
            seconds = r["steps_seconds"][1:]
            median = float(np.median(seconds))
            beside = (
                float(np.median(measured[f"{model}, adamw"]["steps_seconds"][1:]))
                if f"{model}, adamw" in measured
                else None
            )
            cells[6:] = [
                ms(median), f"{median / beside:.3f}" if beside else "", f"{max(seconds) / median:.2f}", *by_refresh(r),
                mfu(r["flops"], median, card),
            ]  # fmt: skip
            if "update_seconds" in r:
                cells[4] = ms(r["update_seconds"])
                cells[5] = "" if card is None else f"{r['update_seconds'] * card['copy_bytes_per_second'] / least:.2f}"
        lines.append(_line(cells))
    return lines


def by_refresh(record: dict) -> list[str]:
    """The median steps without and with a refresh, the first step left out; nothing for an optimizer without bases."""
    if record["refreshes"] is None:
        return ["", ""]
    seconds = list(zip(record["steps_seconds"], record["refreshes"], strict=True))[1:]
    kinds = [[one for one, refreshes in seconds if refreshes is kind] for kind in (False, True)]
    return [ms(float(np.median(kind))) if kind else "" for kind in kinds]


def refresh_table(found: list[dict]) -> list[str]:
    lines = _header("shape, rank", "projector", "median", "times faster than jnp.linalg.svd", "energy, of the SVD's")
    shapes = list(dict.fromkeys((*r["shape"], r["rank"]) for r in found if "shape" in r))
    for shape in shapes:
        records = {
            k: v for r in found if (*r.get("shape", ()), r.get("rank")) == shape for k, v in r["refreshes"].items()
        }
        exact = records.get("svd")
        for name, record in records.items():
            median = float(np.median(record["seconds"]))
            faster = f"{float(np.median(exact['seconds'])) / median:.1f}" if exact else ""
            energy = f"{record['energy'] / exact['energy']:.4f}" if exact and "energy" in record else ""
            lines.append(_line([f"{shape[0]} x {shape[1]}, {shape[2]}", name, ms(median), faster, energy]))
    return lines


def beside_table(found: list[dict]) -> list[str]:
    lines = _header("16,384 tokens a step, blocks recomputed", "first step", "median step", "longest", "peak")
    for r in found:
        if r.get("steps_seconds"):
            peak = r.get("peak_bytes", r.get("allocator", {}).get("peak_bytes_in_use"))
            seconds = r["steps_seconds"]
            cells = [ms(float(np.median(seconds))), ms(max(seconds)), gib(peak) if peak else ""]
            lines.append(_line([r["name"], f"{r['first_step_seconds']:.2f} s", *cells]))
    return lines


def learning_table(found: list[dict]) -> list[str]:
    found = [r for r in found if r.get("validation")]
    marks = sorted({step for r in found for step, _ in r["validation"]})
    marks = [mark for i, mark in enumerate(marks) if (i + 1) % max(1, len(marks) // 6) == 0] if marks else []
    lines = _header("60m, validation loss, nats a byte", *(f"step {mark}" for mark in marks), "seconds")
    for r in found:
        losses = dict(map(tuple, r["validation"]))
        lines.append(
            _line([r["name"], *(f"{losses[m]:.3f}" if m in losses else "" for m in marks), f"{r['seconds']:.0f}"])
        )
    return lines


def _header(*names: str) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def gib(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def mfu(flops: float, seconds: float, card: dict | None) -> str:
    """Of the data sheet's peak; nothing for a card whose peak is not in the table."""
    peaks = [peak for name, peak in PEAK_FLOPS.items() if card is not None and name in card["device"]]
    return f"{flops / seconds / peaks[0]:.1%}" if peaks else ""


def bandwidth(name: str) -> float:
    """Bytes a second, published."""
    from galore_jax.planning.targets import TARGETS

    return TARGETS[name].hardware.bandwidth * 1e9


def write(out: pathlib.Path) -> None:
    file = out / "gpu.json"
    text = tables(json.loads(file.read_text()) if file.exists() else {}, plans(out))
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(before + BEGIN + text + END + rest.split(END)[1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        return measure(*json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the results")
    parser.add_argument("--parts", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--rows", default="", metavar="REGEX", help="only the lines whose name it is found in")
    parser.add_argument(
        "--compile", action="store_true", help="fill the cache of compiled programs, and measure nothing"
    )
    parser.add_argument("--minutes", type=float, help="end by then, what is worth most first; default: no end")
    parser.add_argument("--text", help="a file to learn from; default: the source of Python's standard library")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps")
    parser.add_argument("--plan", metavar="TARGET", help="compile for a GPU that is not there, and run nothing")
    parser.add_argument(
        "--write", action="store_true", help="write the tables into docs/benchmarks.md, and run nothing"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.write:
        write(args.out)
    elif args.plan:
        plan_all(args)
    else:
        measure_all(args)


if __name__ == "__main__":
    main()
