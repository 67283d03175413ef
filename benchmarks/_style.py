# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How the pictures of the documentation look: SVG, twice, for light and dark pages, without a background of their own.

The same data, versions and fonts give the same bytes.
"""

import io
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Theme(NamedTuple):
    """Colors that can be told apart on one kind of page."""

    text: str
    faint: str
    """What is there for comparison."""
    blue: str
    red: str
    yellow: str
    green: str
    purple: str


THEMES = {
    "light": Theme("#24292f", "#8b949e", "#2f6fb7", "#c8423f", "#d6900c", "#2f8f5b", "#8257b0"),
    "dark": Theme("#e2e4e9", "#8b93a1", "#6aa9ee", "#f0807a", "#eab84d", "#63c08c", "#b99ae2"),
}


def names_of(name: str) -> list[str]:
    """The files of a picture.

    >>> names_of("step")
    ['step-light.svg', 'step-dark.svg']
    """
    return [f"{name}-{theme}.svg" for theme in THEMES]


def save(draw: Callable[[Theme], Any], folder: pathlib.Path, name: str) -> None:
    """Writes the figure that ``draw`` makes in each theme, as ``name``-light.svg and ``name``-dark.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    for theme, file in zip(THEMES.values(), names_of(name), strict=True):
        with matplotlib.rc_context(_settings(theme)):
            figure = draw(theme)
            written = io.StringIO()
            figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
            plt.close(figure)
        text = re.sub(r"[ \t]+$", "", written.getvalue(), flags=re.MULTILINE)
        (folder / file).write_text(text, encoding="utf-8")


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "svg.hashsalt": "galore_jax",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.faint,
        "axes.titlecolor": theme.text,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.prop_cycle": matplotlib.cycler(color=[theme.blue, theme.red, theme.yellow, theme.green, theme.purple]),
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "grid.color": theme.faint,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }


def bars(axis: Axes) -> None:
    """Horizontal bars from the top: names on the left without ticks, lines for the lengths only."""
    axis.invert_yaxis()
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)


def beside(axis: Axes, end: float, y: float, text: str, line: float = 0.0) -> None:
    """Text after the end of a horizontal bar, or behind a vertical line at ``line`` that the bar does not reach."""
    axis.annotate(text, (max(end, line), y), xytext=(6, 0), textcoords="offset points", va="center")


def title(figure: Figure, text: str) -> None:
    """Above all of the figure."""
    figure.suptitle(text, fontsize=11, fontweight="bold")


def limit(axis: Axes, x: float, text: str, theme: Theme) -> None:
    """A vertical line with its name above the bars."""
    axis.axvline(x, color=theme.text, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    place = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points", "xytext": (0, 4)}
    axis.annotate(text, (x, 1), ha="center", va="bottom", fontsize=9, **place)
