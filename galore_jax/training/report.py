# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: ``loss.png``, ``summary.json``'s memory figures, and the closing words on the terminal."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from galore_jax import describe, state_bytes, tree_bytes
from galore_jax.training.config import PretrainConfig
from galore_jax.training.metrics import Record, rank, read_metrics
from galore_jax.training.optimizers import make_optimizer, make_schedule
from galore_jax.training.run_folder import read_json
from galore_jax.weights import dequantize

_TRAINING, _VALIDATION = "#3b6fb6", "#d1495b"
_LABEL: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 8), "ha": "right", "color": _VALIDATION}


def memory(config: PretrainConfig, params: Any, opt_state: Any, whole: Any) -> dict[str, int]:
    """Exact bytes of the parameters and this run's optimizer state, and both of full-rank AdamW; the trees may be abstract.

    ``whole`` are the parameters that AdamW would train: those of the same model with ordinary matrices.

    >>> params = {"kernel": jax.ShapeDtypeStruct((2, 64, 64), "float32")}
    >>> memory(PretrainConfig(), params, params, params)
    {'params_bytes': 32768, 'optimizer_state_bytes': 32768, 'adamw_params_bytes': 32768, 'adamw_state_bytes': 65544}
    """
    adamw = dataclasses.replace(config, optimizer="adamw")
    return {
        "params_bytes": tree_bytes(params),
        "optimizer_state_bytes": tree_bytes(opt_state),
        "adamw_params_bytes": tree_bytes(whole),
        "adamw_state_bytes": state_bytes(
            make_optimizer(adamw, make_schedule(adamw)), jax.eval_shape(dequantize, whole)
        ),
    }


def projection(config: PretrainConfig, params: Any, sizes: dict[str, int], name: str | None = None) -> str:
    """What the optimizer projects and what its state takes, as a line.

    Args:
      config: names the optimizer.
      params: that it trains, which may be abstract.
      sizes: of :func:`memory`.
      name: of the optimizer, if it is not that of ``config``.

    >>> params = {"kernel": jax.ShapeDtypeStruct((2, 64, 64), "float32")}
    >>> sizes = {"optimizer_state_bytes": 24624, "adamw_state_bytes": 65544}
    >>> projection(PretrainConfig(optimizer="galore_adamw"), params, sizes)
    "galore_adamw trains 8,192 parameters, projects 2 matrices (1 of 1 parameters) at rank 16; state 24.0 KiB, 37.6% of AdamW's"
    """
    found = describe(make_optimizer(config, make_schedule(config)), jax.eval_shape(dequantize, params))
    matrices = sum(math.prod(record.batch) for record in found.projected)
    ranks = sorted({record.rank for record in found.projected if record.rank is not None})
    some = f"{matrices:,} matrices ({len(found.projected)} of {len(found.parameters)} parameters)"
    what = "projects no matrix"
    if ranks:
        what = f"projects {some} at {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
    elif matrices:
        what = f"updates {some} as matrices"
    state, adamw = sizes["optimizer_state_bytes"], sizes["adamw_state_bytes"]
    trained = sum(math.prod(record.shape) for record in found.parameters)
    what = f"{name or config.optimizer} trains {trained:,} parameters, {what}"
    return f"{what}; state {format_bytes(state)}, {state / adamw:.1%} of AdamW's"


def memory_table(optimizer: str, sizes: dict[str, int]) -> str:
    """Two lines of a table: this run's optimizer, and full-rank AdamW with the same float32 moments.

    >>> sizes = {"params_bytes": 4096, "optimizer_state_bytes": 4096, "adamw_params_bytes": 4096, "adamw_state_bytes": 8192}
    >>> print("|" + memory_table("galore_adamw", sizes))
    |                  parameters   optimizer state   of AdamW's
    galore_adamw          4.0 KiB           4.0 KiB        50.0%
    adamw                 4.0 KiB           8.0 KiB       100.0%
    """
    columns = ("", "parameters", "optimizer state", "of AdamW's")
    lines: list[str] = ["{:<18}{:>11}{:>18}{:>13}".format(*columns)]
    rows = {"adamw": (sizes["adamw_params_bytes"], sizes["adamw_state_bytes"])}
    if optimizer != "adamw":
        rows = {optimizer: (sizes["params_bytes"], sizes["optimizer_state_bytes"])} | rows
    for name, (params, state) in rows.items():
        share = state / sizes["adamw_state_bytes"]
        lines.append(f"{name:<18}{format_bytes(params):>11}{format_bytes(state):>18}{share:>13.1%}")
    return "\n".join(lines)


def format_bytes(size: float) -> str:
    """Bytes in the unit that suits them.

    >>> format_bytes(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def read_summary(path: Path) -> Record | None:
    """``summary.json``; None if there is none or it is damaged, since all of it but the durations can be computed anew.

    >>> read_summary(Path("there is no such run"))
    """
    try:
        summary = read_json(path)
    except (OSError, ValueError):
        return None
    needed = {"steps", "final_val_loss", "final_val_perplexity"}
    return summary if isinstance(summary, dict) and needed <= summary.keys() else None


def closing_words(config: PretrainConfig, folder: Path, summary: Record, sizes: dict[str, int]) -> str:
    """The last lines of a run."""
    lines = ["", memory_table(config.optimizer, sizes), ""]
    if summary["final_val_loss"] is not None:
        loss, perplexity = summary["final_val_loss"], summary["final_val_perplexity"]
        lines.append(f"validation loss {loss:.4f}, perplexity {perplexity:.2f} after {summary['steps']} steps")
    lines.append(f"loss curve: {folder / 'loss.png'}")
    if (folder / "subspace.png").exists():
        lines.append(f"subspaces: {folder / 'subspace.png'}")
    lines.append(f"run folder: {folder}")
    return "\n".join(lines)


def plot_loss(folder: Path, title: str, per: str = "token") -> None:
    """Draw ``loss.png`` from ``metrics.jsonl``: training loss, smoothed too, validations, and the best of them."""
    records = read_metrics(folder)
    training = _points(records, "loss")
    validation, accuracy = _points(records, "val_loss"), _points(records, "val_accuracy")
    panels = 2 if len(accuracy) else 1
    figure = Figure(figsize=(8, 5 + 2 * (panels - 1)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes, *others = figure.subplots(panels, squeeze=False, sharex=True, height_ratios=[2.5, 1][:panels])[:, 0]
    if len(training):
        axes.plot(*training.T, color=_TRAINING, alpha=0.3, linewidth=1)
        axes.plot(*smooth(training).T, color=_TRAINING, linewidth=2, label="training (smoothed)")
    if len(validation):
        axes.plot(*validation.T, "o-", color=_VALIDATION, linewidth=1, markersize=5, label="validation")
        _mark(axes, validation, best=_best_step(records))
    for other in others:
        other.plot(*accuracy.T, "o-", color=_VALIDATION, linewidth=1, markersize=5)
        _mark(other, accuracy, best=_best_step(records))
        other.set(ylabel="accuracy")
        other.margins(y=0.25)
    axes.set(title=title, ylabel=f"loss (nats per {per})")
    [axes, *others][-1].set(xlabel="step")
    for panel in (axes, *others):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if len(training) or len(validation):
        axes.legend(frameon=False)
    figure.savefig(folder / "loss.png")


def _best_step(records: list[Record]) -> int:
    """Step of the best validation."""
    return min((record for record in records if record.get("val_loss") is not None), key=rank)["step"]


def _mark(axes: Any, validation: np.ndarray, best: int) -> None:
    """Write the last value beside its point, and the best one with a star."""
    axes.annotate(f"{validation[-1, 1]:.3f}", validation[-1], **_LABEL)
    point = validation[validation[:, 0] == best][0]
    axes.plot(*point, "*", color=_VALIDATION, markersize=13, label=f"best validation, step {best}")
    if point[0] != validation[-1, 0]:
        axes.annotate(f"{point[1]:.3f}", point, **_LABEL)


def smooth(points: np.ndarray) -> np.ndarray:
    """Centred moving average of (x, y) points, [n, 2], over about a tenth of them.

    Near an end it is over fewer, as many on either side: one to one side only would lie below the start of a curve that falls.

    >>> smooth(np.array([[float(x), 100.0 - x] for x in range(60)]))[:2].tolist()
    [[0.0, 100.0], [1.0, 99.0]]
    """
    half = len(points) // 20
    sides = [min(half, i, len(points) - 1 - i) for i in range(len(points))]
    means = [points[i - side : i + side + 1, 1].mean() for i, side in enumerate(sides)]
    return np.column_stack([points[:, 0], means])


def _points(records: list[Record], name: str) -> np.ndarray:
    """(step, value) of every record that has a finite value, float [n, 2]."""
    return np.array([(r["step"], r[name]) for r in records if r.get(name) is not None], float).reshape(-1, 2)
