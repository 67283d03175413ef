# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The picture that the README and the first page of the documentation open with: memory of a 7B model against a card's.

    python benchmarks/landing.py docs/images

Nothing is compiled or run.  A bar is what a card measured, benchmarks/gpu/gpu.json, or else what the compiler planned for an
RTX 4090, benchmarks/results/memory.json (gpu.py and memory.py wrote these files).  Every optimizer has its defaults.
"""

import argparse
import json
import pathlib
from typing import Any, NamedTuple

from _style import Theme, bars, beside, limit, save, title
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent
GPU, MEMORY = HERE / "gpu" / "gpu.json", HERE / "results" / "memory.json"

LINES = {
    "AdamW\nbfloat16 weights": ("adamw", None),
    "GaLore, 8-bit\nlayer-wise, bfloat16 weights": (
        "galore 8-bit, layer-wise",
        "a: 7b bf16, galore_adamw_8bit, 1 x 256",
    ),
    "Q-APOLLO-Mini\nlayer-wise, int8 weights": ("q_apollo_mini (int8 weights), layer-wise", None),
}
"""Row of memory.py, and of gpu.py if it has measured that row."""


class Bar(NamedTuple):
    name: str
    bytes: int
    how: str


def found(planned: dict[str, Any], measured: dict[str, Any]) -> tuple[list[Bar], int]:
    """The bars, and the memory of the card.

    Args:
      planned: content of memory.json.
      measured: content of gpu.json.
    """
    made = []
    for name, (plan, run) in LINES.items():
        if run is None:
            made.append(Bar(name, planned[f"7b, {plan}, rtx4090, 1 x 256"]["peak_bytes"], "planned"))
        else:
            made.append(Bar(name, measured["rows"][run]["allocator"]["peak_bytes_in_use"], "measured"))
    return made, planned["7b, adamw, rtx4090, 1 x 256"]["target_bytes"]


def draw(made: list[Bar], card: int, theme: Theme) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 2.9), layout="constrained")
    colors = (theme.faint, theme.blue, theme.green)
    sizes = [bar.bytes / 2**30 for bar in made]
    axis.barh([bar.name for bar in made], sizes, 0.62, color=colors)
    for number, (bar, size) in enumerate(zip(made, sizes, strict=True)):
        beside(axis, size, number, f"{size:.1f} GiB, {bar.how}", card / 2**30)
    bars(axis)
    axis.set(xlim=(0, 1.24 * max(sizes)), xlabel="GiB")
    limit(axis, card / 2**30, f"RTX 4090, {card / 2**30:.1f} GiB usable", theme)
    title(figure, "Peak memory of one training step, 7B LLaMA")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for landing-light.svg and landing-dark.svg")
    args = parser.parse_args()
    made, card = found(json.loads(MEMORY.read_text()), json.loads(GPU.read_text()))
    save(lambda theme: draw(made, card, theme), args.out, "landing")


if __name__ == "__main__":
    main()
