# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How large the program of one update is, and how long it takes to make, beside optax.adamw in the same run.

python benchmarks/compile.py                                   every preset on 32 small layers, a minute or two each
python benchmarks/compile.py --presets galore_adamw --layers 4  one preset, a few seconds
python benchmarks/compile.py --model 7b                        the shapes of LLaMA-7B; nothing is allocated
python benchmarks/compile.py --tpu --model 350m                12 layers for a TPU v5e that is not attached; needs libtpu

A model has seven matrices and two norms a layer, an embedding, a head and a last norm.  Unstacked, every matrix is a leaf of its
own; stacked, a leaf holds one matrix of each layer.  HLO instructions are counted before XLA optimizes them.  Seconds are those
of all cores added up, which depend less on what else the machine does.  The script fails if a second call of the jitted update
would be traced again.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import optax
from _common import compile_for_tpu

from galore_jax.presets import FULL_RANK, PRESETS

SHAPES = {  # hidden, keys and values, MLP, vocabulary
    "small": (64, 32, 176, 256),
    "350m": (1024, 1024, 2736, 32000),
    "7b": (4096, 4096, 11008, 32000),
}
RANK = 0.25
BASELINE, OPTAX = "optax.adamw", "optax.contrib.galore"
BARS = {"galore_adamw": (4, 6)}  # most HLO instructions and seconds, as multiples of AdamW's
OTHER_BARS = (6, 10)
NEEDED = {"golore_adamw": {"random_from": 1000}}  # arguments that have no default


def model(name: str, layers: int, stacked: bool) -> dict:
    """The parameters of a LLaMA, as ``jax.ShapeDtypeStruct``."""
    hidden, keys, mlp, vocabulary = SHAPES[name]
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
        "input_norm": (hidden,),
        "mlp_norm": (hidden,),
    }

    def arrays(lead: tuple[int, ...] = ()) -> dict:
        return {leaf: jax.ShapeDtypeStruct((*lead, *shape), "float32") for leaf, shape in shapes.items()}

    return {
        "embed_tokens": jax.ShapeDtypeStruct((vocabulary, hidden), "float32"),
        "layers": arrays((layers,)) if stacked else {str(layer): arrays() for layer in range(layers)},
        "norm": jax.ShapeDtypeStruct((hidden,), "float32"),
        "lm_head": jax.ShapeDtypeStruct((hidden, vocabulary), "float32"),
    }


def optimizers(presets: list[str], name: str) -> dict[str, Callable[[], optax.GradientTransformation]]:
    """The baselines and the presets, at a quarter of the rank."""
    return {
        BASELINE: lambda: optax.adamw(1e-3),
        OPTAX: lambda: optax.contrib.galore(1e-3, rank=int(RANK * SHAPES[name][0])),
        **{
            preset: functools.partial(
                PRESETS[preset], 1e-3, **({} if preset in FULL_RANK else {"rank": RANK}), **NEEDED.get(preset, {})
            )
            for preset in presets
        },
    }


def measured(tx: optax.GradientTransformation, params: dict) -> dict:
    """HLO instructions, and seconds to trace and lower, and to compile."""
    calls = []

    @jax.jit
    def update(grads, state, params):
        calls.append(None)
        return tx.update(grads, state, params)

    state = jax.eval_shape(tx.init, params)
    start = time.process_time()
    lowered = update.trace(params, state, params).lower()
    middle = time.process_time()
    lowered.compile()
    end = time.process_time()
    _, after = jax.eval_shape(update, params, state, params)
    update.trace(params, after, params)
    if len(calls) > 1:
        raise SystemExit(
            "A second call of the jitted update is traced again: its state has other types than the first."
        )
    instructions = sum(" = " in line for line in lowered.as_text(dialect="hlo").splitlines())
    return {"instructions": instructions, "lower": middle - start, "compile": end - middle}


def row(name: str, layout: str, found: dict, baseline: dict) -> str:
    seconds = found["lower"] + found["compile"]
    larger = found["instructions"] / baseline["instructions"]
    slower = seconds / (baseline["lower"] + baseline["compile"])
    most = BARS.get(name, OTHER_BARS)
    within = "" if name in (BASELINE, OPTAX) else "yes" if larger <= most[0] and slower <= most[1] else "no"
    cells = [f"`{name}`", layout, str(found["instructions"]), f"{larger:.1f}", f"{found['lower']:.1f}"]
    return "| " + " | ".join([*cells, f"{found['compile']:.1f}", f"{slower:.1f}", within]) + " |"


def table(args: argparse.Namespace) -> None:
    print(
        "| optimizer | layers | HLO instructions | x AdamW | trace + lower (s) | compile (s) | x AdamW | within the bar |"
    )
    print("|---" * 8 + "|")
    for layout in args.layouts:
        params = model(args.model, args.layers, layout == "stacked")
        baseline = None
        for name, build in optimizers(args.presets, args.model).items():
            # Optax's has no stacks: it takes one for a single matrix.
            if layout == "stacked" and name == OPTAX:
                continue
            found = measured(build(), params)
            baseline = baseline or found
            print(row(name, layout, found, baseline), flush=True)


def tpu_table(args: argparse.Namespace) -> None:
    print("| optimizer | layers | TPU compile (s) | of all cores (s) | x stacked |")
    print("|---" * 5 + "|")
    chosen = optimizers(args.presets, args.model)
    for name in (BASELINE, *args.presets):
        tx, stacked_seconds = chosen[name](), None
        for layout in ("stacked", "unstacked"):
            params = model(args.model, args.layers, layout == "stacked")
            seconds, _, _ = compile_for_tpu(tx.update, params, jax.eval_shape(tx.init, params), params)
            stacked_seconds = stacked_seconds or seconds[0]
            cells = [f"`{name}`", layout, *(f"{s:.1f}" for s in seconds), f"{seconds[0] / stacked_seconds:.1f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, help="32 by default, and 12 with --tpu")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, help="all by default, and galore_adamw with --tpu")
    parser.add_argument("--layouts", nargs="+", choices=["unstacked", "stacked"], default=["unstacked", "stacked"])
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e")
    args = parser.parse_args()
    args.layers = args.layers or (12 if args.tpu else 32)
    args.presets = args.presets or (["galore_adamw"] if args.tpu else list(PRESETS))
    tpu_table(args) if args.tpu else table(args)


if __name__ == "__main__":
    main()
