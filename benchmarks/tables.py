# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/choose.md and docs/hyperparameters.md, from what has been measured and from the recipes; nothing is run.

    python benchmarks/tables.py             prints them
    python benchmarks/tables.py --write     puts them into the pages, between their markers

Losses and learning rates are those of docs/benchmarks.md, which benchmarks/quality.py measured.  State is counted exactly.
"""

import argparse
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import report
from _common import put_between

import galore_jax
from galore_jax.models import LlamaConfig
from galore_jax.training.config import preset_arguments
from galore_jax.training.recipes import RECIPES

DOCS = pathlib.Path(__file__).parent.parent / "docs"

LLAMA_7B_BLOCK = {
    **{f"attention/{name}/kernel": (4096, 4096) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp/{name}/kernel": (4096, 11008) for name in ("gate_proj", "up_proj")},
    "mlp/down_proj/kernel": (11008, 4096),
}


class Measured(NamedTuple):
    """An optimizer, and its names in the two tables of docs/benchmarks.md: 3.3 million parameters, and 0.9 million."""

    title: str
    build: Callable[[float], optax.GradientTransformation]
    larger: str = ""
    smaller: str = ""


def preset(name: str, **arguments: Any) -> Callable[[float], optax.GradientTransformation]:
    return lambda learning_rate: getattr(galore_jax, name)(learning_rate, **arguments)


def low_rank(name: str, **arguments: Any) -> Measured:
    return Measured(f"`{name}`", preset(name, rank=0.25, **arguments), name)


MEASURED = [
    Measured("`optax.adamw`", optax.adamw, "adamw"),
    Measured("`quantize_state(optax.adamw)`", lambda rate: galore_jax.quantize_state(optax.adamw(rate)), "adamw_8bit"),
    Measured("`optax.contrib.muon`, β .9", optax.contrib.muon, "", "`optax.contrib.muon`, β .9"),
    Measured("`muon`", preset("muon"), "", "`muon`, β .9, NorMuon's division"),
    Measured("`muon_8bit`", preset("muon_8bit"), "", "`muon_8bit`, β .9, NorMuon's division"),
    Measured("`muon_4bit`", preset("muon_4bit"), "", "`muon_4bit`, β .9, NorMuon's division"),
    Measured("`muon_2bit`", preset("muon_2bit"), "", "`muon_2bit`, β .8, NorMuon's division"),
    Measured("`muon`, β .95, without NorMuon's division", preset("muon", momentum=0.95, neuron_decay=None), "muon"),
    *map(low_rank, ("galore_adamw", "galore_adamw_8bit", "q_galore_adamw_8bit", "galore_adafactor", "fira_adamw")),
    Measured(
        '`q_galore_adamw_8bit`, `proj_type="reverse_std"`',
        preset("q_galore_adamw_8bit", rank=0.25, proj_type="reverse_std"),
        "q_galore_adamw_8bit, reverse_std",
    ),
    low_rank("golore_adamw", random_from=200),
    *map(low_rank, ("ldadam", "galore_muon", "apollo_adamw", "grass_adamw")),
    Measured("`apollo_mini`", preset("apollo_mini"), "apollo_mini"),
]


def bytes_a_weight(build: Callable[[float], optax.GradientTransformation]) -> float:
    """Bytes of state for each weight in the matrices of a block of a 7B LLaMA."""
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in LLAMA_7B_BLOCK.items()}
    return galore_jax.state_bytes(build(0.01), params) / (galore_jax.tree_bytes(params) / 4)


def cells(name: str) -> dict[str, dict[str, str]]:
    """The table of that name in docs/benchmarks.md, made from its results: first cell -> column -> cell."""
    lines = report.TABLES[name]().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def larger_model() -> dict[str, dict[str, str]]:
    return cells("quality")


def smaller_model() -> dict[str, dict[str, str]]:
    """The cells of the runs on an H100, and where there are none, those of the runs on a CPU."""
    on_gpu, on_cpu = cells("bytes"), cells("bytes on a CPU")
    return {
        name: on_cpu.get(name, {}) | {column: cell for column, cell in on_gpu.get(name, {}).items() if cell}
        for name in {**on_gpu, **on_cpu}
    }


def loss(cell: str) -> str:
    """The loss and its spread on one line, without the learning rate or the number of seeds.

    >>> loss("1.9159 ± 0.0020 (3 seeds)"), loss("1.518 (0.0042), one seed")
    ('1.9159&nbsp;±&nbsp;0.0020', '1.518')
    """
    return cell.split(" (")[0].replace(" ", "&nbsp;")


def frontier() -> str:
    """What a byte of state buys, the most bytes first."""
    larger, smaller = larger_model(), smaller_model()
    lines = [
        "| optimizer of the matrices | bytes a weight | 3.3M, 400 steps | 0.9M, 400 steps | 0.9M, 1,200 steps "
        "| 0.9M, 4,000 steps |",
        "|---|---|---|---|---|---|",
    ]
    sized = sorted(((bytes_a_weight(one.build), one) for one in MEASURED), key=lambda pair: -pair[0])
    for size, one in sized:
        long = smaller.get(one.smaller, {})
        losses = [larger[one.larger]["of all seeds"] if one.larger else ""]
        losses += [long.get(f"{steps} steps", "") for steps in ("400", "1,200", "4,000")]
        number = f"{size:.2f}" if size >= 0.005 else f"{size:.4f}"
        lines.append(f"| {one.title} | {number} | " + " | ".join(map(loss, losses)) + " |")
    return "\n".join(lines) + "\n"


def rates() -> str:
    """The learning rates of the benchmark's grid for each preset."""
    rows = larger_model()
    columns = [name for name in next(iter(rows.values())) if re.fullmatch(r"0\.\d+", name)]
    lines = [f"| matrices on | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in [one.larger for one in MEASURED if one.larger]:
        title = "`q_galore_adamw_8bit`, reverse_std" if ", " in name else f"`{name}`"
        lines.append(f"| {title} | " + " | ".join(rows[name][column] for column in columns) + " |")
    return "\n".join(lines) + "\n"


def recipes() -> str:
    """The paper's settings for each size of LLaMA, and the rows that it compares with."""
    lines = [
        "| `--recipe` | parameters | hidden size | optimizer | learning rate | rank | scale | `update_proj_gap` | steps "
        "| tokens a step | tokens |",
        "|---" * 11 + "|",
    ]
    for name, fields in RECIPES.items():
        if not name.startswith("galore-"):
            continue
        model = LlamaConfig.preset(fields["model"])
        tokens = fields["batch"] * fields["seq"]
        lines.append(
            f"| `{name}` | {model.num_params / 1e6:,.0f}M | {model.hidden_size} | `{fields['optimizer']}` "
            f"| {fields['learning_rate']} | {fields['rank']} (1/{model.hidden_size / fields['rank']:.3g}) "
            f"| {fields['scale']} | {fields['update_proj_gap']} | {fields['steps']:,} | {tokens:,} "
            f"| {tokens * fields['steps'] / 1e9:.1f}B |"
        )
    return "\n".join(lines) + "\n"


def others() -> str:
    """The recipes of the same sizes with other optimizers."""
    sizes = ("60m", "130m", "350m", "1b")
    lines = [f"| `--recipe` | {' | '.join(sizes)} |", "|---" * (1 + len(sizes)) + "|"]
    for kind in ("adamw", "lora", "relora", "low-rank", "scale"):
        row = []
        for size in sizes:
            fields = RECIPES[f"{kind}-{size}"]
            said = [f"rate {fields['learning_rate']}"]
            said += [f"rank {fields['rank']}"] if "rank" in fields else []
            said += [f"merged every {fields['update_proj_gap']:,} steps"] if "update_proj_gap" in fields else []
            row.append(", ".join(said))
        lines.append(f"| `{kind}-...` | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def betas() -> str:
    """Decay rates of the moments, the scale and the gap that the presets have by default."""
    lines = [
        "| preset | decay rates | scale | `update_proj_gap` | projector | refresh | transport |",
        "|---" * 7 + "|",
    ]
    for name in galore_jax.presets.PRESETS:
        found = preset_arguments(name)
        if "momentum" in found and found["momentum"] is not None:
            decay = f"momentum {found['momentum']}"
        elif "b1" in found:
            decay = f"b1 {found['b1']}, b2 {found['b2']}"
        else:
            decay = "the second moment's rises with the steps"
        row = [decay]
        for field in ("scale", "update_proj_gap", "projector", "refresh", "transport"):
            value = found.get(field, "")
            if value is None:
                value = {"refresh": "staggered", "transport": "keep"}[field]
            row.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        lines.append(f"| `{name}` | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "choose.md": {"what a byte of state buys": frontier},
    "hyperparameters.md": {"recipes": recipes, "other recipes": others, "learning rates": rates, "defaults": betas},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    write = parser.parse_args().write
    for page, tables in TABLES.items():
        for name, table in tables.items():
            text = table()
            if write:
                put_between(DOCS / page, name, text)
            print(f"{page}, {name}\n\n{text}")


if __name__ == "__main__":
    main()
