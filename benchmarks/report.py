# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of the documentation and writes the tables of docs/benchmarks.md; nothing is measured.

    python benchmarks/report.py

Figures come from benchmarks/results/*.json, which the benchmarks wrote into their OUT, and for the first picture from
benchmarks/gpu/gpu.json too; gpu.py --write and optimizer_bytes.py --write have their own tables.  To publish a new run, copy its
JSON into benchmarks/results and call this.  Of the older runs (all but memory.json) the JSON has the figures of the published
tables, with the digits that were published.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import finetune
import generate
import landing
import memory
import quality
import refresh
import step
import transport
from _common import put_between
from _style import Theme, save, title
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parent.parent
RESULTS, PAGE, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"


def result(name: str) -> Any:
    """The content of benchmarks/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def ablation_table(records: list[dict]) -> str:
    lines = ["| projector | transport | none | `fira` | `orthogonal` |", "|---" * 5 + "|"]
    for record in records:
        losses = " | ".join(f"{loss:.3f}" for loss in record["losses"].values())
        lines.append(f"| `{record['projector']}` | `{record['transport']}` | {losses} |")
    return "\n".join(lines)


def bytes_table(records: list[dict]) -> str:
    """A column for each number of steps, or for each task that the losses are named after."""
    marks = list(dict.fromkeys(mark for record in records for mark in record["losses"]))
    if all(map(str.isdigit, marks)):
        marks.sort(key=int)
    named = (f"{int(mark):,} steps" if mark.isdigit() else mark for mark in marks)
    heads = ["matrices on", "bytes a weight", *named]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for record in records:
        name = f"`{record['optimizer']}`, β {record['momentum']:g}".replace("β 0", "β ")
        cells = [name + (", NorMuon's division" if record["normuon"] else ""), f"{record['bytes_per_weight']:.2f}"]
        for mark in marks:
            cells.append("")
            if found := record["losses"].get(mark):
                spread = "" if found["seeds"] == 1 else f" ± {found['deviation']:.4f}"
                cells[-1] = f"{found['loss']:.4f}{spread} ({found['learning_rate']:g})" + (
                    "" if spread else ", one seed"
                )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bytes_picture(records: list[dict], steps: str, theme: Theme) -> Figure:
    """Loss against bytes a weight, of the records that have it after so many steps."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    kinds = {
        "optax.contrib.muon": {"color": theme.red, "fmt": "o"},
        "galore_jax": {"color": theme.blue, "fmt": "o"},
    }
    for record in records:
        if (found := record["losses"].get(steps)) is None:
            continue
        place = record["bytes_per_weight"], found["loss"]
        look = kinds.get(record["optimizer"], kinds["galore_jax"])
        axis.errorbar(*place, yerr=found["deviation"], capsize=3, **look)
        if record["optimizer"] not in kinds:
            inwards = ("left", 8) if place[0] < 2 else ("right", -8)
            axis.annotate(
                record["optimizer"], place, xytext=(inwards[1], -3), textcoords="offset points", ha=inwards[0]
            )
    for label, look in kinds.items():
        axis.errorbar([], [], [], label=label, **look)
    axis.set(
        xlim=(0, 4.9), xlabel="optimizer state, bytes a weight of the matrices", ylabel="validation loss, nats a byte"
    )
    axis.grid()
    title(figure, f"Muon's loss against the bytes of its momentum, after {int(steps):,} steps")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def short_table(results: dict[str, dict]) -> str:
    """Of runs of which only these figures are published."""
    lines = ["| | accuracy | test loss | learning rate |", "|---|---|---|---|"]
    for name, r in results.items():
        accuracy = f"{r['accuracy']:.3f} ± {r['error']:.3f}"
        lines.append(f"| {name} | {accuracy} | {r['test_loss']:.3f} | {r['learning_rate']:g} |")
    return "\n".join(lines)


def sharded_table(records: list[dict]) -> str:
    meshes = list(records[0]["parameters"])
    lines = [f"| optimizer | step | {' | '.join(meshes)} | losses |", "|---" * (3 + len(meshes)) + "|"]
    for record in records:
        cells = " | ".join(f"{x:.1e}" for x in (*record["parameters"].values(), record["losses"]))
        lines.append(f"| `{record['optimizer']}` | {record['step']} | {cells} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "step": lambda: step.table(result("step")["medians"]),
    "step on a TPU": lambda: step.tpu_line(result("step-tpu")),
    "refresh": lambda: refresh.table(result("refresh")),
    "refresh on a TPU": lambda: refresh.tpu_table(**result("refresh-tpu")),
    "transport": lambda: transport.table(result("transport")),
    "quality": lambda: quality.table(result("quality")["results"]),
    "ablation": lambda: ablation_table(result("ablation")),
    "bytes": lambda: bytes_table(result("bytes")),
    "bytes on a CPU": lambda: bytes_table(result("bytes-cpu")),
    "adamw in few bits": lambda: bytes_table(result("bytes-adamw")),
    "bytes elsewhere": lambda: bytes_table(result("bytes-elsewhere")),
    "fine-tuning": lambda: finetune.table(result("finetune")["results"]),
    "shorter fine-tuning": lambda: short_table(result("finetune-short")["results"]),
    "generate": lambda: generate.table(result("generate")["results"]),
    "generate in bfloat16": lambda: generate.table(result("generate-bfloat16")["results"]),
    "meshes": lambda: sharded_table(result("sharded_steps")),
    "memory": lambda: memory.table(list(result("memory").values())),
    "launches": lambda: step.launches_table(result("step-gpu")),
}
"""By the name of the markers in docs/benchmarks.md."""


def draw(out: pathlib.Path) -> None:
    """The pictures of the documentation."""
    made, card = landing.found(json.loads(landing.MEMORY.read_text()), json.loads(landing.GPU.read_text()))
    save(lambda theme: landing.draw(made, card, theme), out, "landing")
    step.plot(result("step")["medians"], out)
    refresh.plot([record for record in result("refresh")["refreshes"] if record["preset"] == "350m"], out)
    lines = result("quality")["results"]
    save(lambda theme: quality.against_state(lines, theme), out, "quality-state")
    save(lambda theme: quality.against_rates(lines, theme), out, "quality-rates")
    save(lambda theme: bytes_picture(result("bytes-cpu"), "1200", theme), out, "quality-bytes")
    finetune.plot(result("finetune"), out)
    seven = [row for row in result("memory").values() if row["model"] == "7b" and row["target"] == "rtx4090"]
    save(lambda theme: memory.parts(seven, theme), out, "memory")


def main() -> None:
    draw(IMAGES)
    for name, table in TABLES.items():
        put_between(PAGE, name, table() + "\n")


if __name__ == "__main__":
    main()
