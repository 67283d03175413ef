# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-train LLaMA 7B on one card with 24 GB, such as an RTX 4090: all parameters, low-rank 8-bit state, layer by layer.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python examples/pretrain_7b_24gb.py --tokenizer tokenizer.json --out runs/7b

It needs the extras ``train`` and ``hub``, and a tokenizer.json, such as LLaMA's; without ``--tokenizer`` it trains one on the
text.  The variable lets JAX take more than three quarters of the card's memory.  A run that was stopped continues with

    galore-jax pretrain --resume --out runs/7b

Weights are in bfloat16 (12.6 GiB), moments in 8 bits and bases in bfloat16 (5.3 GiB), and only one layer's gradient exists at a
time.  ``galore-jax plan --model 7b --optimizer galore_adamw_8bit --rank 1024 --layerwise --clip 0`` prints the compiler's plan.
The learning rate, the rank and the refresh are the paper's for 7B (arXiv 2403.03507, section 5.5).  ``--int8`` keeps the weights
in 8 bits too (Q-GaLore, arXiv 2407.08296), which leaves room for longer sequences or fits a smaller card.
"""

import argparse
import pathlib

from galore_jax.training import PretrainConfig, run_pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="run folder")
    parser.add_argument(
        "--data", default="hf:allenai/c4:en", help='text: a file, a folder, hf:NAME[:CONFIG] or "python"'
    )
    parser.add_argument("--tokenizer", default="bpe", help="a tokenizer.json; bpe trains one on the text")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150_000)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step, one at a time on the card")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--int8", action="store_true", help="weights in 8 bits")
    args = parser.parse_args()
    config = PretrainConfig(
        model=args.model,
        optimizer="q_galore_adamw_8bit" if args.int8 else "galore_adamw_8bit",
        rank=args.rank,
        update_proj_gap=500,
        learning_rate=0.005,
        clip=0.0,  # a bound on the global norm would take a second backward pass
        steps=args.steps,
        batch=args.batch,
        accumulate=args.batch,
        seq=args.seq,
        data=args.data,
        tokenizer=args.tokenizer,
        vocab_size=32_000 if args.model == "7b" else 512,
        dtype="bf16",
        weights="int8" if args.int8 else "bf16",
        layerwise=True,
        diagnostics=False,
        save_every=min(1000, args.steps),
        eval_every=min(1000, args.steps),
        out=args.out,
    )
    summary = run_pretrain(config)
    state = summary["optimizer_state_bytes"] / summary["adamw_state_bytes"]
    print(f"optimizer state: {state:.0%} of AdamW's; validation loss {summary['final_val_loss']:.3f}")


if __name__ == "__main__":
    main()
