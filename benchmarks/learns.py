# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Does GaLore learn as well as AdamW?  The demo run, each optimizer at its better of three learning rates, equal steps.

    python benchmarks/learns.py OUT        about half an hour on two cores; a run that is already in OUT is not repeated

GaLore keeps a quarter of the rank.  Prints a Markdown table, and writes OUT/learns.json and a picture, OUT/learns-light.svg
and OUT/learns-dark.svg.
"""

import argparse
import json
import pathlib

from _style import Theme, save, title
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from galore_jax.training import PretrainConfig, run_pretrain


def summary_of(out: pathlib.Path, optimizer: str, learning_rate: float, steps: int | None, data: str) -> dict:
    folder = out / f"{optimizer}-{learning_rate:g}"
    if (folder / "summary.json").exists():
        return json.loads((folder / "summary.json").read_text())
    settings = {} if steps is None else {"steps": steps}
    resume = (folder / "config.json").exists()
    config = PretrainConfig(
        optimizer=optimizer,
        learning_rate=learning_rate,
        data=data,
        sample_tokens=0,
        out=folder,
        resume=resume,
        **settings,
    )
    return run_pretrain(config)


def picture(out: pathlib.Path, results: dict[str, dict[float, dict]], theme: Theme) -> Figure:
    """Validation losses of all runs, the best of each optimizer in full color."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (optimizer, by_rate), color in zip(results.items(), (theme.faint, theme.blue), strict=True):
        best = min(by_rate, key=lambda rate: by_rate[rate]["final_val_loss"])
        for rate in by_rate:
            lines = (out / f"{optimizer}-{rate:g}" / "metrics.jsonl").read_text().splitlines()
            points = [(r["step"], r["val_loss"]) for r in map(json.loads, lines) if "val_loss" in r]
            label = f"{optimizer}, learning rate {rate:g}" + (" (best)" if rate == best else "")
            axis.plot(
                *zip(*points, strict=True), color=color, alpha=1 if rate == best else 0.35, marker="o", label=label
            )
    axis.set(xlabel="step", ylabel="validation loss, nats a byte")
    axis.grid()
    axis.legend()
    title(figure, "The demo run: GaLore at a quarter of the rank beside AdamW")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the runs and the results")
    parser.add_argument("--steps", type=int, help="steps of each run; default: the demo's")
    parser.add_argument("--data", default="python", help='text: "python", a file or a folder')
    parser.add_argument("--adamw", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="its learning rates")
    parser.add_argument("--galore-adamw", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2], help="its learning rates")
    args = parser.parse_args()
    results = {
        optimizer: {rate: summary_of(args.out, optimizer, rate, args.steps, args.data) for rate in rates}
        for optimizer, rates in {"adamw": args.adamw, "galore_adamw": args.galore_adamw}.items()
    }
    print("| optimizer | learning rate | validation loss | optimizer state (bytes) |\n|---|---|---|---|")
    for optimizer, by_rate in results.items():
        for rate, summary in by_rate.items():
            print(
                f"| {optimizer} | {rate:g} | {summary['final_val_loss']:.4f} | {summary['optimizer_state_bytes']:,} |"
            )
    best = {optimizer: min(s["final_val_loss"] for s in by_rate.values()) for optimizer, by_rate in results.items()}
    ratio = best["galore_adamw"] / best["adamw"]
    print(
        f"\nGaLore's best validation loss is {ratio:.4f} of AdamW's ({best['galore_adamw']:.4f} and {best['adamw']:.4f})."
    )
    (args.out / "learns.json").write_text(json.dumps({"runs": results, "best": best, "ratio": ratio}, indent=2) + "\n")
    save(lambda theme: picture(args.out, results, theme), args.out, "learns")


if __name__ == "__main__":
    main()
