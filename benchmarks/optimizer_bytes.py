# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Exact bytes of optimizer state for the LLaMA presets, as a Markdown table: no array is allocated.

python benchmarks/optimizer_bytes.py             prints the table
python benchmarks/optimizer_bytes.py --write     writes it to docs/_snippets/optimizer_bytes.md, which pages include
"""

import argparse
import pathlib

import jax
import optax
from flax import nnx

import galore_jax
from galore_jax.models import Llama, LlamaConfig

RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}  # the paper's, its Table 2 and section 5.5
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "_snippets" / "optimizer_bytes.md"


def abstract_params(model: str) -> nnx.State:
    config = LlamaConfig.preset(model, param_dtype="bfloat16")
    return nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)


def optimizers(rank: int) -> dict[str, optax.GradientTransformation]:
    return {
        "adamw": optax.adamw(1e-3),
        "adamw, bf16": optax.adamw(1e-3),
        "galore_adamw": galore_jax.galore_adamw(1e-2, rank=rank),
        'galore_adamw, mu_dtype="bfloat16"': galore_jax.galore_adamw(1e-2, rank=rank, mu_dtype="bfloat16"),
        'galore_adamw, proj_type="reverse_std"': galore_jax.galore_adamw(1e-2, rank=rank, proj_type="reverse_std"),
        "galore_adafactor": galore_jax.galore_adafactor(1e-2, rank=rank),
    }


def in_float32(params: nnx.State) -> nnx.State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32"), params)


def table() -> str:
    names = list(optimizers(1))
    lines = [
        "| model | parameters (bf16) | rank | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for model, rank in RANKS.items():
        params = abstract_params(model)
        row = [model, f"{galore_jax.tree_bytes(params) / 2**30:.2f} GiB", str(rank)]
        # Full-rank AdamW with the float32 moments that ours has too, whatever the dtype of the parameters.
        full = galore_jax.state_bytes(optimizers(rank)["adamw"], in_float32(params))
        row.append(f"{full / 2**30:.2f} GiB")
        for name in names[1:]:
            ours = galore_jax.state_bytes(optimizers(rank)[name], params)
            row.append(f"{ours / 2**30:.2f} GiB ({ours / full:.0%})")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.name} too")
    text = table()
    if parser.parse_args().write:
        PAGE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
