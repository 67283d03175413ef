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

A second table has models people fine-tune on cards people have, all of their parameters trained layer by layer, and what an
H100 measured where it ran the same step; a third one has 7B with its optimizer state in the host's memory.  They go into
OUT/cards.json unless --models is given, and from benchmarks/results into docs/memory.md and docs/seven-billion.md with

    python benchmarks/memory.py benchmarks/results --write

benchmarks/configs has the shapes of those from Hugging Face, as their config.json gives them.
"""

import argparse
import json
import pathlib
import re
import statistics
from typing import Any, NamedTuple

from _common import put_between
from _style import Theme, bars, beside, limit, save, title
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from galore_jax.planning.targets import TARGETS, Gpu
from galore_jax.training import plan_report
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
    "q_galore (int8 weights), layer-wise": {"optimizer": "q_galore_adamw_8bit", "weights": "int8", **LAYERWISE},
    "q_apollo_mini (int8 weights), layer-wise": {
        "optimizer": "q_apollo_mini",
        "rank": 1,
        "weights": "int8",
        **LAYERWISE,
    },
}

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


ROOT = pathlib.Path(__file__).parent.parent
MEMORY, SEVEN_BILLION = ROOT / "docs" / "memory.md", ROOT / "docs" / "seven-billion.md"
GPU = ROOT / "benchmarks" / "gpu" / "gpu.json"

CARDS = {"rtx4090": "RTX 4090", "rtx4060ti-16gb": "RTX 4060 Ti", "rtx3060-12gb": "RTX 3060", "rtx4060": "RTX 4060"}
SHAPES = {"LLaMA 7B": "7b", "LLaMA 13B": "13b"}
"""The models that are presets; the others have a config.json."""
Q_GALORE, INT8, SMALLEST = "q_galore_adamw_8bit", {"weights": "int8"}, {"proj_type": "reverse_std"}
MARGIN = 0.05
"""The share of a card that XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 leaves to the driver."""


class Case(NamedTuple):
    """A model on a card, and one way to train all of its parameters."""

    model: str  # its name for people
    card: str
    optimizer: str
    settings: dict[str, Any]
    measured: str = ""  # the row of gpu.json that ran this step in a process with no more memory than the card has

    @property
    def config(self) -> PlanConfig:
        shape = SHAPES.get(self.model, f"benchmarks/configs/{self.model.lower()}.json")
        common = {"layerwise": True, "clip": 0.0, "diagnostics": False}
        return PlanConfig(model=shape, target=self.card, optimizer=self.optimizer, **common, **self.settings)

    @property
    def key(self) -> str:
        """The flags of galore-jax plan.

        >>> Case("LLaMA 7B", "rtx4090", "galore_adamw_8bit", {"rank": 1024}).key
        '--model 7b --optimizer galore_adamw_8bit --rank 1024 --layerwise --clip 0 --no-diagnostics --target rtx4090'
        """
        chosen = "".join(f" --{name.replace('_', '-')} {value}" for name, value in self.settings.items())
        model = f"--model {self.config.model} --optimizer {self.optimizer}{chosen}"
        return f"{model} --layerwise --clip 0 --no-diagnostics --target {self.card}"


KEPT = (
    "params_bytes", "optimizer_state_bytes", "optimizer_state", "gradient_bytes", "temporary_bytes", "peak_bytes", "target_bytes",
    "compile_seconds",
)  # fmt: skip
CASES = [
    Case("Qwen3-8B", "rtx4090", Q_GALORE, {"rank": 1024, **INT8}),
    Case("Qwen3-8B", "rtx4060ti-16gb", Q_GALORE, {"rank": 128, **INT8}),
    Case("Qwen3-8B", "rtx4060ti-16gb", "q_apollo_mini", {"rank": 1, **INT8}),
    Case("Llama-3-8B", "rtx4090", Q_GALORE, {"rank": 1024, **INT8}),
    Case(
        "Llama-3-8B", "rtx4060ti-16gb", Q_GALORE, {"rank": 1024, **INT8, **SMALLEST},
        "a: llama3-8b int8, q_galore_adamw_8bit, 1 x 256",
    ),
    Case("Llama-3-8B", "rtx4060ti-16gb", Q_GALORE, {"rank": 256, **INT8}),
    Case("Llama-3-8B", "rtx4060ti-16gb", "muon_2bit", INT8),
    Case("Qwen3-4B", "rtx3060-12gb", Q_GALORE, {"rank": 1024, **INT8}),
    Case("Qwen3-4B", "rtx3060-12gb", Q_GALORE, {"rank": 512, **INT8}),
    Case("Gemma-3-4B", "rtx4060ti-16gb", Q_GALORE, {"rank": 512, **INT8}),
    Case("Gemma-3-4B", "rtx3060-12gb", Q_GALORE, {"rank": 512, **INT8}),
    Case("Gemma-3-4B", "rtx3060-12gb", "q_apollo_mini", {"rank": 1, **INT8}),
    Case("Qwen3-1.7B", "rtx4060", "galore_adamw_8bit", {"rank": 512}),
    Case("LLaMA 7B", "rtx4090", "galore_adamw_8bit", {"rank": 1024}, "a: 7b bf16, galore_adamw_8bit, 1 x 256"),
    Case("LLaMA 7B", "rtx4090", "galore_adamw_8bit", {"rank": 1024, "batch": 16, "accumulate": 16}),
    Case("LLaMA 7B", "rtx4090", Q_GALORE, {"rank": 1024, **INT8}),
    Case(
        "LLaMA 7B", "rtx3060-12gb", Q_GALORE, {"rank": 1024, **INT8, **SMALLEST},
        "a: 7b int8, q_galore_adamw_8bit, 1 x 256",
    ),
    Case("LLaMA 7B", "rtx3060-12gb", "muon_4bit", INT8),
    Case("LLaMA 7B", "rtx3060-12gb", "muon_2bit", INT8),
    Case("LLaMA 13B", "rtx4090", "muon_4bit", INT8),
]  # fmt: skip


ON_HOST = {"state_memory": "host"}
HOST_CASES = [
    Case("LLaMA 7B", "rtx4090", "adamw", ON_HOST),
    Case("LLaMA 7B", "rtx4090", "galore_adamw", {"rank": 1024, **ON_HOST}),
    Case("LLaMA 7B", "rtx3060-12gb", "adamw", {**INT8, **ON_HOST}),
]
"""The same with the optimizer state in the host's memory."""
KEPT_OF_HOST = ("host_bytes", "host_traffic", "host_seconds")


def planned_cards(out: pathlib.Path) -> dict[str, dict]:
    """The plans of all cases, by key; those that OUT/cards.json lacks are compiled and written to it."""
    file = out / "cards.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    cases = CASES + HOST_CASES
    for case in cases:
        if case.key not in done:
            row = plan(case.config)
            if row["missing"]:
                raise SystemExit(row["missing"])
            done[case.key] = {name: row[name] for name in KEPT + (KEPT_OF_HOST if case in HOST_CASES else ())}
            file.write_text(json.dumps(done, indent=2) + "\n")
            print(f"{case.key}: {done[case.key]['peak_bytes']} bytes", flush=True)
    return {case.key: done[case.key] for case in cases}


def cards(plans: dict[str, dict], runs: dict[str, dict]) -> str:
    """The table of models on cards, without the cases that have not been compiled.

    Args:
      plans: from :func:`planned_cards`.
      runs: the rows of gpu.json.
    """
    columns = ("model", "card", "how", "weights, GiB", "state, GiB", "planned peak, GiB", "fits", "measured, GiB")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    order = list(dict.fromkeys(case.model for case in CASES))
    for case in sorted(
        (case for case in CASES if case.key in plans),
        key=lambda case: (order.index(case.model), -plans[case.key]["target_bytes"]),
    ):
        row = plans[case.key]
        memory, peak = row["target_bytes"], row["peak_bytes"]
        rank = f", rank {case.settings['rank']}" if "rank" in case.settings else ""
        side = ", `reverse_std`" if "proj_type" in case.settings else ""
        several = f", {case.config.batch} sequences" if case.config.batch > 1 else ""
        how = f"`{case.optimizer}`{rank}{side}, {case.config.weights or 'bf16'} weights{several}"
        sizes = [row["params_bytes"], row["optimizer_state_bytes"], peak]
        cells = [
            case.model.replace("-", "&#8209;"),
            f"{CARDS[case.card]}, {gib(memory)}",
            how,
            *map(gib, sizes),
            fits(row),
        ]
        run = runs.get(case.measured)
        found = measured(run)
        if run is not None and run["status"] != "done":
            found += f", when the plan was {gib(run['plan_bytes']).removesuffix(' GiB')}"
        lines.append(f"| {' | '.join(cells)} | {found} |".replace(" GiB |", " |"))
    return "\n".join(lines) + "\n"


def on_host(plans: dict[str, dict]) -> str:
    """The table of the cases with their state in the host's memory."""
    columns = (
        "model", "card", "optimizer", "weights, GiB", "in the host's memory, GiB", "planned peak of the card, GiB", "fits",
        "to the card and back, a step, GiB", "both at once", "one after the other",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case in HOST_CASES:
        row = plans[case.key]
        moved, rank = row["host_traffic"], f", rank {case.settings['rank']}" if "rank" in case.settings else ""
        how = f"`{case.optimizer}`{rank}, {case.config.weights or 'bf16'} weights"
        one_by_one = row["host_seconds"] * sum(moved.values()) / max(moved.values())
        sizes = [row["params_bytes"], row["host_bytes"], row["peak_bytes"]]
        cells = [case.model, f"{CARDS[case.card]}, {gib(row['target_bytes'])}", how, *map(gib, sizes), fits(row)]
        cells += [
            f"{gib(moved['to_device'])}, {gib(moved['to_host'])}",
            f"{row['host_seconds']:.1f} s",
            f"{one_by_one:.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |".replace(" GiB", ""))
    return "\n".join(lines) + "\n"


def fits(row: dict) -> str:
    memory, peak = row["target_bytes"], row["peak_bytes"]
    return "no" if peak > memory else "barely" if peak > (1 - MARGIN) * memory else "yes"


def adamw() -> str:
    """What a plain step of AdamW keeps at least: no activations, and nothing compiled."""
    lines = ["| model | parameters | weights | gradients | AdamW's state | together |", "|---" * 6 + "|"]
    for model in dict.fromkeys(case.model for case in CASES):
        config = next(case for case in CASES if case.model == model).config.model_config()
        sizes = [2 * config.num_params, 2 * config.num_params, 8 * config.num_params]
        lines.append(
            f"| {model} | {config.num_params / 1e9:.2f} billion | " + " | ".join(map(gib, [*sizes, sum(sizes)])) + " |"
        )
    return "\n".join(lines) + "\n"


def large_runs(runs: dict[str, dict]) -> str:
    """The steps of large models that an H100 ran, in processes with less memory."""
    columns = (
        "step, sequences x tokens",
        "memory",
        "plan",
        "peak",
        "median step",
        "tokens a second",
        "loss of 5 steps",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in runs.values():
        if run["part"] != "a" or run["kind"] != "memory":
            continue
        cells = [run["name"], f"{run['limit']:.2f} GiB", gib(run["plan_bytes"]), measured(run)]
        if run["status"] == "done":
            seconds = statistics.median(run["steps_seconds"])
            losses = ", ".join(f"{loss:.2f}" for loss in run["losses"])
            cells += [f"{1e3 * seconds:.0f} ms", f"{run['tokens'] / seconds:,.0f}", losses]
        lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    return "\n".join(lines) + "\n"


def printed(case: Case, plan: dict) -> str:
    """What galore-jax plan prints for a case, as a block of a page."""
    row = plan | {"optimizer": case.optimizer, "platform": "cuda", "fits": plan["peak_bytes"] <= plan["target_bytes"]}
    row |= {"devices": 1, "traffic": None, "host_traffic": None, "refusal": None, "missing": None}
    return f"```console\n$ galore-jax plan {case.key}\n{plan_report.table(case.config, [row])}\n```\n"


def tables(plans: dict[str, dict], runs: dict[str, dict]) -> dict[tuple[pathlib.Path, str], str]:
    """What the pages have of this, by page and name."""
    seven = next(case for case in CASES if case.model == "LLaMA 7B")
    return {
        (MEMORY, "adamw"): adamw(),
        (MEMORY, "models on cards"): cards(plans, runs),
        (MEMORY, "state on the host"): on_host(plans),
        (SEVEN_BILLION, "plan"): printed(seven, plans[seven.key]),
        (SEVEN_BILLION, "measured"): large_runs(runs),
    }


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def measured(run: dict | None) -> str:
    """What the H100 said, in a process limited to the card's memory."""
    if run is None:
        return ""
    if run["status"] == "done":
        return gib(run["allocator"]["peak_bytes_in_use"])
    return "out of memory"


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
    parser.add_argument(
        "--models", nargs="+", help="only the first table, and of it these; 60m to 13b if nothing is said"
    )
    parser.add_argument("--targets", nargs="+", default=["rtx4090"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--cards", action="store_true", help="only the second and third table")
    parser.add_argument("--write", action="store_true", help="compile nothing, and put OUT/cards.json into the pages")
    args = parser.parse_args()
    runs = json.loads(GPU.read_text())["rows"]
    if args.write:
        for (page, name), text in tables(json.loads((args.out / "cards.json").read_text()), runs).items():
            put_between(page, name, text)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.models is None:
        print("\n".join(tables(planned_cards(args.out), runs).values()))
    if args.cards:
        return
    file = args.out / "memory.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    rows = []
    for target in args.targets:
        for model in args.models or RANKS:
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
