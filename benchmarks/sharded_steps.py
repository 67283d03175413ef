# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Are steps on a mesh those of one device?  The trainer's program of every preset, on eight devices made of one CPU.

    python benchmarks/sharded_steps.py                        AdamW and every preset, about ten minutes on two cores
    python benchmarks/sharded_steps.py --optimizers galore_adamw galore_muon

Each takes --steps steps of a tiny LLaMA in float32, plain and layer by layer, on one device and on the meshes fsdp=8, model=8,
fsdp=2,model=4 and data=8; on the last of them the low-rank gradient alone is sent between devices (--reduce-low-rank) where the
preset needs no more.  Bases are refreshed every fifth step.  Prints, as a Markdown table, the largest difference of any parameter
at the end on each mesh, and of any loss on the way; it ends with status 1 where one is above --tolerance.

Sums over devices are rounded otherwise than those of one device.  Where a gradient is nothing but rounding, because what it sums
cancels, Adam makes a step of it, and a moment may be rounded to the next of its 8-bit codes: so an entry may differ by some
hundredths of the learning rate.  AdamW is there to compare with, and the learning rate is so small that the tolerance is still
that of a wrong sum and not that of a step.
"""

import os

os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")

import argparse
import sys
from collections.abc import Iterator

import jax
import numpy as np

from galore_jax.models import LlamaConfig
from galore_jax.presets import LOW_RANK, PRESETS
from galore_jax.training import PretrainConfig
from galore_jax.training.mesh import make_mesh
from galore_jax.training.program import program

MODEL = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=56)
BATCH, SEQ = 8, 8

MESHES = ("fsdp=8", "model=8", "fsdp=2,model=4", "data=8")


def run(config: PretrainConfig, steps: int, mesh: jax.sharding.Mesh | None) -> tuple[list[np.ndarray], list[float]]:
    """The parameters in the end, and the losses."""
    made = program(config, MODEL, mesh)
    with made.on_mesh():
        params, opt_state = made.init(jax.random.key(0))
        step = made.step.lower(params, opt_state, made.batch).compile()
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        tokens = rng.integers(0, MODEL.vocab_size, made.batch.shape).astype(np.int32)
        params, opt_state, metrics = step(params, opt_state, jax.device_put(tokens, made.batch.sharding))
        losses.append(float(metrics["loss"]))
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)], losses


def differences(optimizer: str, layerwise: bool, args: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """For each mesh the largest difference of parameters, and of losses."""
    settings = {"optimizer": optimizer, "layerwise": layerwise, "batch": BATCH, "seq": SEQ, "rank": 8}
    settings |= {"update_proj_gap": 5, "learning_rate": args.learning_rate, "warmup_steps": 0, "diagnostics": False}
    settings["steps"] = 2 * args.steps  # a learning rate that falls to nothing would hide a difference
    alone = {}
    for name in args.meshes:
        compressed = name == "data=8" and optimizer in LOW_RANK
        clip = 0.0 if compressed else 1.0
        if clip not in alone:
            alone[clip] = run(PretrainConfig(**settings, clip=clip), args.steps, None)
        params, losses = alone[clip]
        if losses[-1] == losses[0]:
            sys.exit(f"{optimizer} has learned nothing in {args.steps} steps: equal parameters would show nothing.")
        config = PretrainConfig(**settings, clip=clip, reduce_low_rank=compressed)
        found, sharded_losses = run(config, args.steps, make_mesh(name))
        difference = max(float(np.max(np.abs(a - b))) for a, b in zip(found, params, strict=True))
        yield difference, float(np.max(np.abs(np.subtract(sharded_losses, losses))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ("adamw", *PRESETS)
    parser.add_argument("--optimizers", nargs="+", choices=known, default=known, metavar="OPTIMIZER")
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=MESHES, metavar="MESH")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # of many programs, each of which runs for a moment
    print(f"| optimizer | step | {' | '.join(args.meshes)} | losses |\n{'|---' * (3 + len(args.meshes))}|", flush=True)
    worst = 0.0
    for optimizer in args.optimizers:
        for layerwise in (False, True):
            params, losses = zip(*differences(optimizer, layerwise, args), strict=True)
            cells = [
                f"`{optimizer}`",
                "layer-wise" if layerwise else "plain",
                *(f"{x:.1e}" for x in (*params, max(losses))),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
            worst = max(worst, *params, *losses)
    print(f"\nThe largest difference is {worst:.1e}.")
    if not worst <= args.tolerance:
        sys.exit(f"{worst:.1e} is above {args.tolerance:g}.")


if __name__ == "__main__":
    main()
