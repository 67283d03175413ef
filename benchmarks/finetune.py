# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning as in the GaLore paper's comparison, at the size of two CPU cores: full AdamW, LoRA, GaLore and Fira.

    python benchmarks/finetune.py OUT --model SMOLLM2 --data REVIEWS       about 80 minutes on two cores
    python benchmarks/finetune.py OUT --model SMOLLM2 --data REVIEWS --short       about ten minutes

SMOLLM2 is a Hugging Face folder; REVIEWS has train.jsonl and test.jsonl with lines {"text", "label"}, in random order.

Each setting first takes --tune-steps with each learning rate of one grid.  The rate with the lowest loss on --tune-rows rows of
train.jsonl, which no run learns from, is then given --steps, one pass over the first steps x 16 rows of the others, and judged on
test.jsonl: so the test rows choose nothing.  The error of an accuracy p on n rows is the binomial sqrt(p (1 - p) / n).

The benchmark may be interrupted at any time; the same command goes on where it was.  Prints a Markdown table, and writes
OUT/finetune.json, OUT/finetune.md, OUT/finetune-light.svg and OUT/finetune-dark.svg.
"""

import argparse
import json
import math
import pathlib
import shutil
import sys

from _style import Theme, save, title
from matplotlib import pyplot as plt, ticker
from matplotlib.figure import Figure

from galore_jax.training import FinetuneConfig, run_finetune
from galore_jax.training.checkpoint import saved_steps

BATCH, SEQ = 16, 48

# GaLore's scale is four times the paper's for its rank (arXiv 2403.03507, table 7): embeddings and head are not projected,
# and at a learning rate that suits them matrices are to learn as fast as they do with the paper's scale at a larger one.
# LoRA's scale is alpha / rank.
SETTINGS = {
    "AdamW": {"optimizer": "adamw"},
    "LoRA r=4": {"optimizer": "lora", "lora_rank": 4, "lora_alpha": 16.0},
    "LoRA r=8": {"optimizer": "lora", "lora_rank": 8, "lora_alpha": 16.0},
    "GaLore r=4": {"optimizer": "galore_adamw", "rank": 4, "scale": 16.0},
    "GaLore r=8": {"optimizer": "galore_adamw", "rank": 8, "scale": 8.0},
    "Fira r=8": {"optimizer": "fira_adamw", "rank": 8, "scale": 8.0},
}


def write_rows(args: argparse.Namespace) -> dict[str, int]:
    """Write the rows of each part into OUT, and say how many they are."""
    train, test = ((args.data / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test"))
    kept = len(train) - args.tune_rows
    parts = {"train": train[: min(args.steps * BATCH, kept)], "tune": train[kept:], "test": test[: args.test_rows]}
    for name, rows in parts.items():
        (args.out / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows))
    return {name: len(rows) for name, rows in parts.items()}


def summary_of(args: argparse.Namespace, phase: str, name: str, rate: float) -> dict:
    """What a run came to; it is made, continued, or read if it is done."""
    folder = args.out / "runs" / f"{phase}-{name.replace(' ', '-').replace('=', '')}-{rate:g}"
    steps = args.tune_steps if phase == "tune" else args.steps
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        if summary["steps"] == steps:
            remove_weights(folder)
            return summary
    resume = bool(saved_steps(folder / "checkpoints"))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    config = FinetuneConfig(
        args.model,
        str(args.out / "train.jsonl"),
        str(args.out / f"{'tune' if phase == 'tune' else 'test'}.jsonl"),
        learning_rate=rate,
        steps=steps,
        batch=BATCH,
        seq=SEQ,
        update_proj_gap=50,
        eval_every=steps,
        save_every=50,
        out=folder,
        resume=resume,
        **SETTINGS[name],
    )
    print(f"\n{phase}: {name}, learning rate {rate:g}", file=sys.stderr, flush=True)
    try:
        summary = run_finetune(config)
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from here.")
    remove_weights(folder)
    return summary


def remove_weights(folder: pathlib.Path) -> None:
    """A run leaves gigabytes of weights and state, of which the benchmark needs none."""
    for name in ("checkpoints", "best", "last"):
        shutil.rmtree(folder / name, ignore_errors=True)


def result_of(args: argparse.Namespace, name: str) -> dict:
    """The figures of a setting at the best of its learning rates."""
    tuned = {}
    if len(args.rates) > 1:
        tuned = {rate: summary_of(args, "tune", name, rate)["final_val_loss"] for rate in args.rates}
        tuned = {rate: math.inf if loss is None or math.isnan(loss) else loss for rate, loss in tuned.items()}
    rate = min(tuned, key=tuned.get) if tuned else args.rates[0]
    summary = summary_of(args, "test", name, rate)
    accuracy, rows = summary["final_val_accuracy"], summary["validation_examples"]
    return {
        "learning_rate": rate,
        "tuning_losses": {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in tuned.items()},
        "accuracy": accuracy,
        "error": math.sqrt(accuracy * (1 - accuracy) / rows),
        "test_loss": summary["final_val_loss"],
        "optimizer_state_bytes": summary["optimizer_state_bytes"],
        "trained_params": summary["trained_params"],
        "step_seconds": summary["step_seconds_median"],
        "minutes": summary["step_seconds_median"] * summary["steps"] / 60,
    }


def table(results: dict[str, dict]) -> str:
    lines = [
        "| | accuracy | test loss | learning rate | optimizer state | trained parameters | seconds a step | minutes of steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['accuracy']:.3f} ± {r['error']:.3f} | {r['test_loss']:.3f} | {r['learning_rate']:g} | "
            f"{r['optimizer_state_bytes'] / 2**20:,.1f} MiB | {r['trained_params']:,} | {r['step_seconds']:.2f} | "
            f"{r['minutes']:.1f} |"
        )
    return "\n".join(lines)


def plot(written: dict, out: pathlib.Path) -> None:
    """Of the content of finetune.json."""
    save(lambda theme: picture(written, theme), out, "finetune")


def picture(written: dict, theme: Theme) -> Figure:
    """Accuracy, with its error, against bytes of optimizer state."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    colors = {"AdamW": theme.faint, "LoRA": theme.yellow, "GaLore": theme.blue, "Fira": theme.green}
    for name, r in written["results"].items():
        look = {
            "marker": "s" if "r=4" in name else "o",
            "color": colors[name.split()[0]],
            "capsize": 3,
            "linestyle": "none",
        }
        place = r["optimizer_state_bytes"] / 2**20, 100 * r["accuracy"]
        axis.errorbar(*place, 100 * r["error"], **look)
        axis.annotate(name, place, xytext=(7, 4), textcoords="offset points")
    if written["baseline"] is not None:
        axis.axhline(100 * written["baseline"], color=theme.text, linestyle=":", linewidth=1)
        where = {
            "xycoords": axis.get_yaxis_transform(),
            "textcoords": "offset points",
            "xytext": (-4, 4),
            "ha": "right",
        }
        axis.annotate("baseline", (1, 100 * written["baseline"]), fontsize=9, **where)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.margins(x=0.12)
    axis.set(xlabel="optimizer state, MiB, logarithmic", ylabel="accuracy, %")
    axis.grid()
    steps, rows = written["steps"], written["rows"]
    title(figure, f"Accuracy on {rows['test']:,} held-out rows after {steps} steps of {written['batch']} rows")
    return figure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the runs and the results")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--short", action="store_true", help="one learning rate, 40 steps, 200 test rows")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SETTINGS,
        default=list(SETTINGS),
        metavar="SETTING",
        help="some of: " + ", ".join(SETTINGS),
    )
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates; default: 2e-4 4e-4 8e-4")
    parser.add_argument("--steps", type=int, help="steps of the runs that are judged; default: 400")
    parser.add_argument("--tune-steps", type=int, default=30, help="steps with each learning rate")
    parser.add_argument("--tune-rows", type=int, default=256, help="rows that choose the learning rate")
    parser.add_argument("--test-rows", type=int, help="rows of test.jsonl; default: all")
    parser.add_argument(
        "--baseline", type=float, help="accuracy to draw a line at; of the reviews: 0.767, TF-IDF on all rows"
    )
    args = parser.parse_args()
    short = {"rates": [2e-4], "steps": 40, "test_rows": 200}
    long = {"rates": [2e-4, 4e-4, 8e-4], "steps": 400, "test_rows": None}
    for name, value in (short if args.short else long).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_same(args: argparse.Namespace) -> None:
    """A folder holds one benchmark."""
    file = args.out / "settings.json"
    names = ("model", "data", "rates", "steps", "tune_steps", "tune_rows", "test_rows")
    settings = {name: str(getattr(args, name)) for name in names}
    if file.exists() and json.loads(file.read_text()) != settings:
        sys.exit(f"{args.out} holds runs with other settings, {file.read_text().strip()}; name another folder.")
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n")


def main() -> None:
    args = arguments()
    check_same(args)
    rows = write_rows(args)
    results = {}
    for name in args.only:
        results[name] = result_of(args, name)
        written = {"rows": rows, "batch": BATCH, "steps": args.steps, "rates": args.rates, "baseline": args.baseline}
        written["results"] = results
        (args.out / "finetune.json").write_text(json.dumps(written, indent=2) + "\n")
        (args.out / "finetune.md").write_text(table(results) + "\n")
    plot(written, args.out)
    print(table(results))


if __name__ == "__main__":
    main()
