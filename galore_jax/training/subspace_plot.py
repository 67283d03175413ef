# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``subspace.png``: how well the subspaces of a GaLore run do, one line a projected parameter, means over its layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from galore_jax.training.metrics import Record, finite_mean, read_metrics

_PANELS = {
    "captured_energy": "captured energy\nshare of the gradient in the subspace",
    "overlap": "overlap of successive bases\n1: the same subspace",
    "update_rms": "update RMS\nbefore the learning rate",
}
_COLORS = [f"C{number}" for number in range(10)]  # of Matplotlib's own cycle
_LINE_STYLES = ("-", "--", ":", "-.")


def plot_subspace(folder: Path, title: str) -> None:
    """Draw ``subspace.png`` from ``metrics.jsonl`` alone; nothing if no record there has diagnostics."""
    records = [record for record in read_metrics(folder) if "subspace" in record]
    leaves = sorted({leaf for record in records for leaf in record["subspace"]})
    if not leaves:
        return
    figure = Figure(figsize=(8, 9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, (quantity, label) in zip(panels, _PANELS.items(), strict=True):
        for number, (leaf, name) in enumerate(zip(leaves, short_names(leaves), strict=True)):
            points = layer_means(records, leaf, quantity)
            if quantity == "update_rms":
                points = points[points[:, 1] > 0]  # a logarithm needs them
            style = _LINE_STYLES[number // len(_COLORS) % len(_LINE_STYLES)]
            color, marker = _COLORS[number % len(_COLORS)], "." if len(points) < 30 else ""
            axes.plot(*points.T, style, color=color, linewidth=1, marker=marker, markersize=5, label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity == "update_rms":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, max(1.02, axes.get_ylim()[1]))  # above 1 where a basis is not orthonormal
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, "nothing to show yet", transform=axes.transAxes, ha="center", color="gray")
    panels[0].set_title(title)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(folder / "subspace.png")


def layer_means(records: list[Record], leaf: str, quantity: str) -> np.ndarray:
    """(step, mean over the leaf's matrices) of every record that has one, float [n, 2].

    >>> layer_means([{"step": 4, "subspace": {"q_proj": {"overlap": [0.5, 1.0, None]}}}], "q_proj", "overlap").tolist()
    [[4.0, 0.75]]
    """
    means = [(r["step"], finite_mean(r["subspace"].get(leaf, {}).get(quantity, []))) for r in records]
    return np.array([point for point in means if point[1] is not None], float).reshape(-1, 2)


def short_names(leaves: list[str]) -> list[str]:
    """The last part of each path, or the whole path where another one ends alike.

    >>> short_names(["layers/mlp/up_proj", "experts/0/down_proj", "experts/1/down_proj"])
    ['up_proj', 'experts/0/down_proj', 'experts/1/down_proj']
    """
    ends = [leaf.rpartition("/")[2] for leaf in leaves]
    return [end if ends.count(end) == 1 else leaf for leaf, end in zip(leaves, ends, strict=True)]
