# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How fast ``galore-jax generate`` is beside ``model.generate`` of transformers, on the same processor.

    python benchmarks/generate.py OUT --model SMOLLM2        a few minutes on two cores; needs torch and transformers

SMOLLM2 is a Hugging Face folder.  Both read the same weights, continue the same prompt by the same number of tokens, always
with the likeliest one, and have the same cores.  They take turns in one process, the first of a round changing.  A turn begins
when the weights are read and ends with the text; the first one of each, in which our programs are compiled, stands apart.  With
weights in float32 the benchmark ends without a result if the two differ in a token.  With weights in bfloat16 they may differ,
because transformers also computes in bfloat16, and galore-jax on a CPU in float32.

Processor time is that of all threads together, which depends less than the seconds on what else the machine does.
Prints a Markdown table, and writes OUT/generate.json.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax

from galore_jax.models.sampling import stream
from galore_jax.training.generation import GenerateConfig, generate_text, widened
from galore_jax.training.trained import Trained, open_trained

OURS, THEIRS = "galore-jax generate", "transformers"


def our_tokens(source: Trained, config: GenerateConfig) -> list[int]:
    """The prompt and what the command goes on with, token ids; also what comes after an end, where the command stops."""
    prompt, model = source.encode(config.prompt), widened(source.load(None))
    return [*prompt.tolist(), *stream(model, prompt, config.max_new_tokens, key=jax.random.key(0), temperature=0)]


def our_turn(config: GenerateConfig) -> Callable[[], str]:
    """What the command does once it has read the weights."""
    pieces = generate_text(config)
    return lambda: "".join(pieces)


def their_tokens(source: Trained, config: GenerateConfig, threads: int) -> Callable[[], list[int]]:
    """The prompt and what transformers goes on with, by a model in the dtype of its weights."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype="auto").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = list(source.ends), source.ends[0]
    prompt = torch.tensor([source.encode(config.prompt).tolist()])
    how = {"max_new_tokens": config.max_new_tokens, "do_sample": False}

    def tokens() -> list[int]:
        with torch.inference_mode():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0].tolist()

    return tokens


def timed(turn: Callable[[], str]) -> tuple[str, dict[str, float]]:
    """The text, and what it took."""
    start = time.perf_counter(), time.process_time()
    text = turn()
    return text, {"seconds": time.perf_counter() - start[0], "processor_seconds": time.process_time() - start[1]}


def measure(config: GenerateConfig, rounds: int, threads: int) -> dict[str, dict]:
    """Of each of the two what its turns took; SystemExit if they do not say the same."""
    source = open_trained(config.model)
    tokens = their_tokens(source, config, threads)
    prepare = {OURS: lambda: our_turn(config), THEIRS: lambda: lambda: source.tokenizer.decode(tokens())}
    found = {name: [] for name in prepare}
    texts = {}
    for number in range(1 + rounds):
        for name in list(prepare)[:: 1 if number % 2 else -1]:
            texts[name], took = timed(prepare[name]())
            found[name].append(took)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    ours, theirs, before = our_tokens(source, config), tokens(), source.encode(config.prompt).size
    if set(ours[before:]) & set(source.ends) or len(theirs) < before + config.max_new_tokens:
        sys.exit(
            f"The text ends before {config.max_new_tokens} new tokens; choose another --prompt or a smaller --length."
        )
    if ours != theirs and source.load(None).config.dtype == "float32":
        sys.exit(f"The tokens differ: {texts}")
    return {name: result(turns, config.max_new_tokens) for name, turns in found.items()}


def result(turns: list[dict[str, float]], new: int) -> dict:
    """The medians of all turns but the first."""
    first, *others = turns
    seconds, processor = (statistics.median(turn[key] for turn in others) for key in ("seconds", "processor_seconds"))
    return {
        "tokens_per_second": new / seconds,
        "processor_seconds_per_token": processor / new,
        "first_seconds": first["seconds"],
        "turns": others,
    }


def table(results: dict[str, dict]) -> str:
    lines = ["| | tokens a second | processor time a token | first turn |", "|---|---|---|---|"]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['tokens_per_second']:.1f} | {1e3 * r['processor_seconds_per_token']:.1f} ms "
            f"| {r['first_seconds']:.1f} s |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the result")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="Hugging Face folder")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--length", type=int, default=64, help="new tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores; default: all")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    # XLA has as many threads as it may have cores, when it starts; torch also has them by number.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    config = GenerateConfig(args.model, args.prompt, max_new_tokens=args.length, temperature=0)
    written = {name: getattr(args, name) for name in ("prompt", "length", "rounds", "threads")}
    written["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")}
    written["results"] = measure(config, args.rounds, args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "generate.json").write_text(json.dumps(written, indent=2) + "\n")
    print(table(written["results"]))


if __name__ == "__main__":
    main()
