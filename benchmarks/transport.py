# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What should become of the moments when a basis turns?  The demo run with each transport at equal everything, several seeds.

    python benchmarks/transport.py OUT --data python path/to/text.txt --gap 200 50

A run takes about three minutes on two cores; one that is already in OUT is not repeated, one that was cut short goes on.
Prints a Markdown table of validation losses, and writes OUT/transport.json.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys

from galore_jax.training import PretrainConfig, run_pretrain


def final_loss(out: pathlib.Path, settings: dict) -> float:
    name = "-".join(pathlib.Path(str(value)).stem for value in settings.values())
    folder = out / name
    summary = folder / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())["final_val_loss"]
    config = PretrainConfig(out=folder, resume=(folder / "config.json").exists(), sample_tokens=0, **settings)
    return run_pretrain(config)["final_val_loss"]


def table(results: list[dict]) -> str:
    lines = ["| text | update_proj_gap | transport | validation loss, seed by seed | mean |", "|---|---|---|---|---|"]
    losses: dict[tuple, list[float]] = {}
    for record in results:
        key = record["data"], record["update_proj_gap"], record["transport"]
        losses.setdefault(key, []).append(record["final_val_loss"])
    for key, values in losses.items():
        each = ", ".join(f"{value:.4f}" for value in values)
        lines.append(f"| {' | '.join(map(str, key))} | {each} | {statistics.fmean(values):.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the runs and the results")
    parser.add_argument("--data", nargs="+", default=["python"], help='texts: "python", files or folders')
    parser.add_argument("--gap", type=int, nargs="+", default=[200, 50], help="update_proj_gap")
    parser.add_argument("--transport", nargs="+", default=["keep", "rotate"])
    parser.add_argument("--projector", default="power")
    parser.add_argument("--refresh", default="staggered")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run; default: the demo's")
    args = parser.parse_args()
    results = []
    common = {"projector": args.projector, "refresh": args.refresh} | ({"steps": args.steps} if args.steps else {})
    for gap, data in itertools.product(args.gap, args.data):
        for seed, transport in itertools.product(range(args.seeds), args.transport):
            settings = {"data": data, "update_proj_gap": gap, "transport": transport, "seed": seed} | common
            record = {"data": pathlib.Path(data).stem, "final_val_loss": final_loss(args.out, settings)}
            results.append(settings | record)
            print(results[-1], file=sys.stderr, flush=True)
    (args.out / "transport.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
