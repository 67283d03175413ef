# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory does a training step take?  Models x optimizers x targets, by the compiler's plan; nothing is run.

    pip install '.[plan]'
    python benchmarks/memory.py OUT                       60m to 13b for an RTX 4090; a program is compiled for each row
    python benchmarks/memory.py OUT --models 7b --targets rtx4090 tpu-v5e

One sequence of 256 tokens, the step of ``galore-jax pretrain``, refresh included.  Peak is arguments + outputs - aliased +
temporaries.  A row that is already in OUT is not compiled again, so a run that was cut short goes on.  Writes OUT/memory.json and
two pictures (-light.svg and -dark.svg): OUT/models of all models, and OUT/memory of the parts of the 7b (or the largest) one.
Prints a Markdown table.

Beside ours stand the paper's figures (arXiv 2403.03507, Tables 2 and 3), which are estimates of another thing: bfloat16 weights
and bfloat16 optimizer state, no gradients, no activations.  Ours has float32 or 8-bit state, because a bfloat16 second moment
stops moving; and the paper's states are 8% to 21% less than its own formula m r + 2 n r gives for its models.
"""

import argparse
import json
import pathlib
import re

from _style import Theme, bars, beside, limit, save, title
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from galore_jax.planning.targets import TARGETS, Gpu
from galore_jax.training.plan import PlanConfig, plan
from galore_jax.training.report import format_bytes

RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024, "13b": 1024}  # the paper's; 13b as 7b

BF16 = {"weights": "bf16"}
LAYERWISE = {"layerwise": True}
ROWS = {
    "adamw": {"optimizer": "adamw", **BF16},
    "adamw 8-bit": {"optimizer": "adamw_8bit", **BF16},
    "galore": {"optimizer": "galore_adamw", **BF16},
    "galore 8-bit": {"optimizer": "galore_adamw_8bit", **BF16},
    "galore 8-bit, layer-wise": {"optimizer": "galore_adamw_8bit", **BF16, **LAYERWISE},
    "q_galore (int8 weights), layer-wise": {
        "optimizer": "q_galore_adamw_8bit", "weights": "int8", **LAYERWISE,
    },
    "q_apollo_mini (int8 weights), layer-wise": {"optimizer": "q_apollo_mini", "rank": 1, "weights": "int8", **LAYERWISE},
}  # fmt: skip

OPTIMIZERS = {"adamw": "AdamW", "galore": "GaLore", "q_galore": "Q-GaLore", "q_apollo_mini": "Q-APOLLO-Mini"}

# GB of weights and optimizer state: Table 2, and for 7b Table 3.
PAPER = {
    "adamw": {"60m": 0.36, "130m": 0.76, "350m": 2.06, "1b": 7.80},
    "adamw 8-bit": {"7b": 26},
    "galore": {"60m": 0.24, "130m": 0.52, "350m": 1.22, "1b": 4.38},
    "galore 8-bit": {"7b": 18},
}


def planned(model: str, name: str, target: str, args: argparse.Namespace) -> dict:
    settings = {"rank": RANKS.get(model, 0.25)} | ROWS[name]
    chosen = PlanConfig(
        model=model,
        target=target,
        batch=args.batch,
        seq=args.seq,
        clip=0.0,  # a bound on the global norm keeps all gradients of a plain step
        **settings,
    )
    row = plan(chosen)
    if row["missing"]:
        raise SystemExit(row["missing"])
    return row | {"name": name}


def table(rows: list[dict]) -> str:
    lines = [
        "| model | target | optimizer and step | weights | optimizer state | peak | fits | the paper's weights and state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = PAPER.get(row["name"], {}).get(row["model"])
        peak = "refused" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"])
        lines.append(
            f"| {row['model']} | {row['target']} | {row['name']} | {format_bytes(row['params_bytes'])} "
            f"| {format_bytes(row['optimizer_state_bytes'])} | {peak} | {'yes' if row['fits'] else 'no'} "
            f"| {'' if paper is None else f'{paper} GB'} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], out: pathlib.Path) -> None:
    """Peaks of all models, and the parts of one, on the first target."""
    rows = [row for row in rows if row["target"] == rows[0]["target"] and row["peak_bytes"] is not None]
    save(lambda theme: peaks(rows, theme), out, "models")
    sizes = {row["model"]: row["params_bytes"] for row in rows}
    model = "7b" if "7b" in sizes else max(sizes, key=sizes.__getitem__)
    save(lambda theme: parts([row for row in rows if row["model"] == model], theme), out, "memory")


def peaks(rows: list[dict], theme: Theme) -> Figure:
    """A group of bars for each model, and the memory of the target as a line."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axis = plt.subplots(figsize=(8, 1.2 + 1.35 * len(models)), layout="constrained")
    height = 0.85 / len(ROWS)
    for number, name in enumerate(ROWS):
        found = {row["model"]: row["peak_bytes"] / 2**30 for row in rows if row["name"] == name}
        places = [models.index(model) + (number - (len(ROWS) - 1) / 2) * height for model in found]
        color = plt.get_cmap("viridis")(number / (len(ROWS) - 1))
        axis.barh(places, list(found.values()), height, label=optimizer_name(name), color=color)
    bars(axis)
    axis.set_yticks(range(len(models)), [model_name(model) for model in models])
    axis.set(xscale="log", xlabel="GiB, logarithmic")
    limit(axis, rows[0]["target_bytes"] / 2**30, card(rows[0]), theme)
    title(figure, "Peak memory of one training step")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def parts(rows: list[dict], theme: Theme) -> Figure:
    """What the peaks of one model are made of: a bar for each way to train it."""
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.48 * len(rows)), layout="constrained")
    exact = [(row["params_bytes"], row["optimizer_state_bytes"]) for row in rows]
    rest = [row["peak_bytes"] - sum(sizes) for row, sizes in zip(rows, exact, strict=True)]
    names, left = [optimizer_name(row["name"]) for row in rows], [0.0] * len(rows)
    colors = {"weights": theme.blue, "optimizer state": theme.red, "gradients, activations, workspace": theme.yellow}
    for (part, color), column in zip(colors.items(), [*zip(*exact, strict=True), rest], strict=True):
        sizes = [size / 2**30 for size in column]
        axis.barh(names, sizes, 0.65, left=left, color=color, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    memory = rows[0]["target_bytes"] / 2**30
    for number, end in enumerate(left):
        beside(axis, end, number, f"{end:.1f} GiB", memory)
    bars(axis)
    axis.set(xlabel="GiB", xlim=(0, 1.15 * max(memory, *left)))
    limit(axis, memory, card(rows[0]), theme)
    title(figure, f"Peak memory of one training step, {model_name(rows[0]['model'])}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def optimizer_name(name: str) -> str:
    """A row for people.

    >>> optimizer_name("q_galore (int8 weights), layer-wise")
    'Q-GaLore (int8 weights), layer-wise'
    """
    first, *others = re.split(r"(?=[ ,])", name, maxsplit=1)
    return "".join([OPTIMIZERS.get(first, first), *others])


def model_name(model: str) -> str:
    """A size of LLaMA for people.

    >>> model_name("350m")
    '350M LLaMA'
    """
    return f"{model.upper()} LLaMA"


def card(row: dict) -> str:
    """A target for people.

    >>> card({"target": "rtx4090", "target_bytes": 25383253115})
    'RTX 4090, 23.6 GiB usable'
    """
    hardware = TARGETS[row["target"]].hardware if row["target"] in TARGETS else None
    name = hardware.description if isinstance(hardware, Gpu) else row["target"]
    return f"{name.removeprefix('NVIDIA ').removeprefix('GeForce ')}, {row['target_bytes'] / 2**30:.1f} GiB usable"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the results")
    parser.add_argument("--models", nargs="+", default=list(RANKS))
    parser.add_argument("--targets", nargs="+", default=["rtx4090"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "memory.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    rows = []
    for target in args.targets:
        for model in args.models:
            for name in ROWS:
                key = f"{model}, {name}, {target}, {args.batch} x {args.seq}"
                if key not in done:
                    done[key] = planned(model, name, target, args)
                    file.write_text(json.dumps(done, indent=2) + "\n")
                    print(f"{key}: {done[key]['peak_bytes']} bytes", flush=True)
                rows.append(done[key])
    plot(rows, args.out)
    print(table(rows))


if __name__ == "__main__":
    main()
