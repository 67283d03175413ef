# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What ``galore-jax plan`` says for people: a table, and a bar chart of several optimizers."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from galore_jax.training.plan import PlanConfig, Row
from galore_jax.training.report import format_bytes

LEFT_OUT = (
    "The compiler's plan leaves out the driver's context and libraries (several hundred MiB on a GPU), fragmentation, and\n"
    "the scratch of autotuning when the program is first compiled on the hardware."
)

_PREALLOCATED = 0.75
"""Share of a GPU's memory that JAX lets a process have by default."""

_PARTS = {"parameters": "#3b6fb6", "optimizer state": "#d1495b", "gradients, activations, workspace": "#edae49"}


def table(config: PlanConfig, rows: list[Row]) -> str:
    """The plans, what they leave out, and what to do about it."""
    body = _one(rows[0]) if config.compare is None else _several(rows)
    notes = [f"{row['optimizer']}: {row['refusal']}" for row in rows if row["refusal"]]
    notes.append(rows[0]["missing"] or LEFT_OUT)
    memory = rows[0]["target_bytes"]
    tight = [row for row in rows if row["fits"] and row["peak_bytes"] > _PREALLOCATED * memory]
    if tight and rows[0]["platform"] == "cuda":
        notes.append(
            "JAX lets a process have three quarters of a GPU unless told otherwise: "
            "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."
        )
    return "\n".join([f"{_title(config)} ({format_bytes(memory)})", "", *body, "", *notes])


def _title(config: PlanConfig) -> str:
    how = "layer-wise, " if config.layerwise else ""
    how += "state on the host, " if config.state_memory == "host" else ""
    weights = config.weights or config.dtype
    where = config.target if config.mesh is None else f"{config.target}, {config.mesh}"
    return f"{config.model}, {weights} weights, {how}{config.batch} x {config.seq} tokens, on {where}"


def _one(row: Row) -> list[str]:
    """The lines of one plan."""
    kinds = [(f"  {kind}", size) for kind, size in row["optimizer_state"].items() if size]
    sizes = [
        ("parameters", row["params_bytes"]),
        (f"state of {row['optimizer']}", row["optimizer_state_bytes"]),
        *kinds,
    ]
    lines = [_line(name, format_bytes(size)) for name, size in sizes]
    if row["devices"] > 1:
        lines.append(_line("parameters a device", format_bytes(row["params_bytes_a_device"])))
        lines.append(_line("state a device", format_bytes(row["optimizer_state_bytes_a_device"])))
    if row["temporary_bytes"] is not None:
        lines.append(_line("temporaries", format_bytes(row["temporary_bytes"]), "gradients, activations, workspace"))
    gradients = format_bytes(row["gradient_bytes"])
    lines.append(_line("gradients", gradients, "that exist at a time, if none is overlapped; part of the temporaries"))
    if row["peak_bytes"] is not None:
        peak = format_bytes(row["peak_bytes"])
        lines.append(_line("peak", peak, "arguments + outputs - aliased + temporaries"))
    if row["fits"] is not None:
        lines.append(_line("fits", _fits(row)))
        lines.append(_line("compiled in", _seconds(row)))
    return lines + _bus(row) + _wire(row)


def _bus(row: Row) -> list[str]:
    """What a step moves between the memories of host and device."""
    if row["host_traffic"] is None:
        return []
    to_device, to_host = map(format_bytes, row["host_traffic"].values())
    lines = [
        _line("in the host's memory", format_bytes(row["host_bytes"]), "not part of the peak"),
        _line("to the device, a step", to_device),
        _line("and back to the host", to_host),
    ]
    if row["host_seconds"] is not None:
        note = "the least, with both directions of PCI Express at their full speed at once"
        lines.append(_line("seconds for it", f"{row['host_seconds']:.2f} s", note))
    return lines


def _wire(row: Row) -> list[str]:
    """What each device sends in a step."""
    if row["traffic"] is None:
        return []
    always, refreshes = row["traffic"]["always"], row["traffic"]["in_branches"]
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in always.items() if size)
    return [
        _line("sent by a device, a step", format_bytes(sum(always.values())), kinds),
        _line(
            "and to refresh all bases", format_bytes(sum(refreshes.values())), "what is inside branches of the program"
        ),
    ]


def _several(rows: list[Row]) -> list[str]:
    """A line for each plan."""
    width = max(len(row["optimizer"]) for row in rows)
    columns = ("parameters", "optimizer state", "temporaries", "peak", "fits", "compiled in")
    layout = f"{{:<{width}}}{{:>13}}{{:>18}}{{:>14}}{{:>12}}{{:>7}}{{:>14}}"
    lines = [layout.format("", *columns)]
    for row in rows:
        parts = ("params_bytes", "optimizer_state_bytes", "temporary_bytes", "peak_bytes")
        sizes = ["-" if row[part] is None else format_bytes(row[part]) for part in parts]
        fits = "-" if row["fits"] is None else "yes" if row["fits"] else "no"
        lines.append(layout.format(row["optimizer"], *sizes, fits, _seconds(row)))
    return lines


def _line(name: str, value: str, note: str = "") -> str:
    return f"{name:<30}{value:>12}   {note}".rstrip()


def _fits(row: Row) -> str:
    if row["peak_bytes"] is None:
        return "no"
    spare = format_bytes(abs(row["target_bytes"] - row["peak_bytes"]))
    return f"yes, {spare} to spare" if row["fits"] else f"no, {spare} too much"


def _seconds(row: Row) -> str:
    return "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f} s"


def plot(config: PlanConfig, rows: list[Row], path: Path) -> None:
    """Draw a bar for each plan, stacked from its parts, and a line where the target's memory ends.

    A plan that was not compiled, or that the compiler refused, has a bar of its exact parts alone.
    """
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [row["optimizer"] for row in rows]
    left = [0.0] * len(rows)
    for part, color in _PARTS.items():
        sizes = [_part(row, part) / 2**30 for row in rows]
        axes.barh(names, sizes, left=left, color=color, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for name, end in zip(names, left, strict=True):
        label = {"textcoords": "offset points", "xytext": (4, 0), "va": "center"}
        axes.annotate(f"{end:.1f}", (end, name), **label)
    memory = rows[0]["target_bytes"] / 2**30
    axes.axvline(memory, color="black", linestyle="--", label=f"memory of {rows[0]['target']}")
    axes.set(title=_title(config), xlabel="GiB", xlim=(0, 1.1 * max(memory, *left)))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=2)
    figure.savefig(path)


def _part(row: Row, part: str) -> int:
    if part == "parameters":
        return row["params_bytes"]
    state = row["optimizer_state_bytes"] - row["optimizer_state_bytes_on_host"]
    if part == "optimizer state":
        return state
    return max((row["peak_bytes"] or 0) - row["params_bytes"] - state, 0)
