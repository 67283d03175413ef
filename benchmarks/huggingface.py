# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Does a model from Hugging Face compute what it should?  Its likeliest continuation of a prompt, and its loss on a text.

    python benchmarks/huggingface.py PATH TEXT        PATH: a Hugging Face folder; TEXT: a text file, which may be gzipped

The loss is in nats a token, over --sequences pieces of --seq tokens from places spread evenly over the text.  Also prints how
long reading and a new token take.
"""

import argparse
import gzip
import pathlib
import time

import jax
import numpy as np
from flax import nnx

from galore_jax.models import load_hf
from galore_jax.models.sampling import stream
from galore_jax.training.step import make_eval_step
from galore_jax.training.tokenizer import load_tokenizer


def pieces(tokenizer, path: pathlib.Path, sequences: int, seq: int) -> np.ndarray:
    """int32 [sequences, seq + 1]"""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    starts = [number * len(text) // sequences for number in range(sequences)]
    found = [tokenizer.encode(text[start : start + 16 * (seq + 1)])[: seq + 1] for start in starts]
    if min(map(len, found)) <= seq:
        raise SystemExit(f"{path} is too short for --sequences {sequences} of --seq {seq} tokens.")
    return np.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--length", type=int, default=8, help="new tokens")
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    arguments = parser.parse_args()

    clock = [time.perf_counter()]
    model = load_hf(arguments.path, arguments.dtype)
    jax.block_until_ready(nnx.state(model))
    clock.append(time.perf_counter())
    tokenizer = load_tokenizer(str(arguments.path / "tokenizer.json"))
    print(f"{model.config.num_params:,} parameters, {model.config.param_dtype}, read in {clock[1] - clock[0]:.1f} s")

    tokens, times = [], [time.perf_counter()]
    prompt = tokenizer.encode_prompt(arguments.prompt)
    for token in stream(model, prompt, arguments.length, key=jax.random.key(0), temperature=0):
        tokens.append(token)
        times.append(time.perf_counter())
    print(f"greedy: {arguments.prompt!r} -> {tokenizer.decode(tokens)!r}")
    if len(times) > 3:
        print(f"a new token: {1000 * np.median(np.diff(times)[2:]):.0f} ms")

    graphdef, params = nnx.split(model, nnx.Param)
    eval_step = make_eval_step(graphdef)
    batches = pieces(tokenizer, arguments.text, arguments.sequences, arguments.seq)
    nats = sum(float(eval_step(params, batch[None])[0]) for batch in batches) / batches[:, 1:].size
    print(f"loss: {nats:.3f} nats/token over {arguments.sequences} x {arguments.seq} tokens of {arguments.text.name}")


if __name__ == "__main__":
    main()
