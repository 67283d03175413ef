# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-train a tiny LLaMA from Python: ``galore-jax pretrain`` as a function call.

    python examples/pretrain_llama.py [run folder]

It needs the extra ``train``.  It prints the validation loss, and the run folder gets checkpoints, the figures and ``loss.png``.
"""

import pathlib
import sys

from galore_jax.training import PretrainConfig, run_pretrain


def main() -> None:
    config = PretrainConfig(
        model="demo",
        optimizer="galore_adamw",
        rank=0.25,  # of each matrix's smaller side
        update_proj_gap=50,
        steps=60,
        batch=8,
        seq=128,
        eval_every=30,
        eval_tokens=10_000,
        sample_tokens=100,
        out=pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None,
    )
    summary = run_pretrain(config)
    print(f"validation loss {summary['final_val_loss']:.3f} nats a byte after {summary['steps']} steps")


if __name__ == "__main__":
    main()
