# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What GaLore adds to a training step: a LLaMA with optax.adamw, with optax.contrib.galore and with galore_adamw.

    python benchmarks/step.py OUT                 60m, 2,048 tokens, T = 64, 128 steps: about 20 minutes on two cores
    python benchmarks/step.py OUT --muon --steps 24    momenta in few bits beside optax.contrib.muon instead, a few minutes
    python benchmarks/step.py OUT --tpu           also compiles galore_adamw's step for a TPU v5e (needs libtpu)
    python benchmarks/step.py OUT --tpu --steps 0      nothing else
    python benchmarks/step.py OUT --gpu-hlo --steps 0     what the update alone launches and moves on an H100 that is not there

A step is forward, backward and update in one program, float32, arguments donated.  The contestants take turns in one process,
the first of a round changing; optax.contrib.galore, which knows no stacked layers, gets them one by one, and because all its
steps but those at 0, T, 2T, ... are alike it runs at every eighth round and at its refreshes.  T is 64 so that 2 T steps end in
reasonable time: with 56 matrices a refreshing step of galore_adamw refreshes one, as at its default of 200.
Writes OUT/step.json, OUT/step-light.svg and OUT/step-dark.svg, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import compile_for_gpu, compile_for_tpu, factorisations_in, language_model, launches_in
from _gpu import update_bytes
from flax import nnx

import galore_jax
from galore_jax.models import Llama, LlamaConfig
from galore_jax.planning.targets import compile_only
from galore_jax.training.optimizers import in_float32
from galore_jax.training.step import add_updates

if TYPE_CHECKING:
    from _style import Theme
    from matplotlib.figure import Figure

OURS, THEIRS, PLAIN = "galore_jax.galore_adamw", "optax.contrib.galore", "optax.adamw"
MUON = "optax.contrib.muon"


def unstacked(params):
    """Every (layers, m, n) leaf as a list of (m, n) ones."""
    return jax.tree.map(lambda leaf: list(leaf) if leaf.ndim == 3 else leaf, params)


def stacked(params):
    return jax.tree.map(
        lambda leaf: jnp.stack(leaf) if isinstance(leaf, list) else leaf, params, is_leaf=lambda x: isinstance(x, list)
    )


def is_layer_matrix(params):
    """Which parameters optax.contrib.galore is to project: the same as ours."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            optax.contrib.GaLoreDimensionNumbers(0, 1)
            if leaf.ndim == 2 and "layers" in jax.tree_util.keystr(path)
            else None
        ),
        params,
    )


def optimizers(gap: int, rank: int) -> dict[str, optax.GradientTransformation]:
    return {
        PLAIN: optax.adamw(1e-3),
        THEIRS: optax.contrib.galore(
            1e-3, rank=rank, update_proj_gap=gap, scale=0.25, weight_dimension_numbers=is_layer_matrix
        ),
        OURS: galore_jax.galore_adamw(1e-3, rank=rank, update_proj_gap=gap),
    }


def training_step(loss, tx, unstack: bool):
    def step(params, state, tokens):
        value, gradient = jax.value_and_grad(lambda p: loss(stacked(p) if unstack else p, tokens))(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def refreshing(step: int, matrices: int, gap: int) -> bool:
    """Whether a staggered run refreshes some basis at this step: at one of the ⌊j T / N⌋, or at step 0 all."""
    return step == 0 or step % gap in {j * gap // matrices for j in range(matrices)}


def run(args: argparse.Namespace) -> dict:
    loss, init, batches = language_model(args.model, args.batch, args.seq, args.layers, args.data)
    txs = optimizers(args.gap, args.rank)
    programs, state = {}, {}
    for name, tx in txs.items():
        params = unstacked(init()) if name == THEIRS else init()
        start = time.perf_counter()
        abstract = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((args.batch, args.seq + 1), jnp.int32)
        step = jax.jit(training_step(loss, tx, name == THEIRS), donate_argnums=(0, 1))
        programs[name] = step.lower(*abstract).compile()
        print(f"{name}: compiled in {time.perf_counter() - start:.1f} s", flush=True)
        state[name] = (params, jax.jit(tx.init)(params))
    [node] = [s for s in jax.tree.leaves(state[OURS][1], is_leaf=is_galore) if is_galore(s)]
    matrices = sum(leaf.shape[0] for leaf in jax.tree.leaves((node.left, node.right)))
    seconds = {name: [] for name in txs}
    for number in range(args.steps):
        tokens = jnp.asarray(next(batches))
        names = list(txs)
        for name in names[number % 3 :] + names[: number % 3]:
            if name == THEIRS and number % args.gap and number % 8:
                continue
            due = number % args.gap == 0
            if name == THEIRS:
                params, inner = state[name]
                state[name] = (params, with_count(inner, number))
            start = time.perf_counter()
            *state[name], value = jax.block_until_ready(programs[name](*state[name], tokens))
            elapsed = time.perf_counter() - start
            refreshes = {PLAIN: False, THEIRS: due, OURS: refreshing(number, matrices, args.gap)}[name]
            seconds[name].append({"step": number, "seconds": elapsed, "refreshes": refreshes, "loss": float(value)})
        if number % 16 == 0:
            print(f"step {number} of {args.steps}", flush=True)
    return {"settings": {k: str(v) for k, v in vars(args).items()}, "matrices": matrices, "steps": seconds}


def run_muon(args: argparse.Namespace) -> dict[str, dict]:
    """Medians of the steps with Muon's momentum in few bits, and of their ratios to the same step of optax.contrib.muon."""
    loss, init, batches = language_model(args.model, args.batch, args.seq, args.layers, args.data)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def matrices(params):
        views = galore_jax.matrix_view.select(params, rank=1)
        return jax.tree.unflatten(jax.tree.structure(params), [view and numbers for view in views])

    txs = {
        MUON: optax.contrib.muon(1e-3, beta=0.9, consistent_rms=0.2, muon_weight_dimension_numbers=matrices),
        **{
            f"galore_jax.{make.__name__}": make(1e-3)
            for make in (galore_jax.muon, galore_jax.muon_4bit, galore_jax.muon_2bit)
        },
    }
    step = {name: jax.jit(training_step(loss, tx, False), donate_argnums=(0, 1)) for name, tx in txs.items()}
    params = {name: init() for name in txs}
    state = {name: (params[name], jax.jit(tx.init)(params[name])) for name, tx in txs.items()}
    seconds = {name: [] for name in txs}
    names = list(txs)
    for number in range(args.steps):
        tokens = jnp.asarray(next(batches))
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            *state[name], _ = jax.block_until_ready(step[name](*state[name], tokens))
            seconds[name].append(time.perf_counter() - start)
    found = {name: np.array(each[1:]) for name, each in seconds.items()}  # the first compiles
    return {
        name: {"median": float(np.median(each)), "ratio": float(np.median(each / found[MUON]))}
        for name, each in found.items()
    }


def muon_table(records: dict[str, dict]) -> str:
    lines = ["| optimizer | median step, s | of optax.contrib.muon's beside it |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {r['median']:.2f} | {r['ratio']:.2f} |" for name, r in records.items())])


def is_galore(node) -> bool:
    return isinstance(node, galore_jax.GaLoreState)


def with_count(state, number: int):
    """optax.contrib.galore's state at the step ``number``."""

    def at(node):
        is_node = isinstance(node, optax.contrib.GaLoreState)
        return node._replace(count=jnp.full_like(node.count, number)) if is_node else node

    return jax.tree.map(at, state, is_leaf=lambda node: isinstance(node, optax.contrib.GaLoreState))


def summary(results: dict) -> dict:
    """Medians in seconds, without step 0."""
    out = {}
    for name, records in results["steps"].items():
        later = [r for r in records if r["step"]]
        kinds = {kind: [r["seconds"] for r in later if r["refreshes"] == kind] for kind in (False, True)}
        out[name] = {
            "median": float(np.median([r["seconds"] for r in later])),
            "maximum": max(r["seconds"] for r in later),
            "first": records[0]["seconds"],
            "plain_median": float(np.median(kinds[False])) if kinds[False] else None,
            "refresh_median": float(np.median(kinds[True])) if kinds[True] else None,
        }
    return out


def table(medians: dict) -> str:
    lines = [
        "| optimizer | median step, s | of optax.adamw's | steps without a refresh | steps with one | ratio | first step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in medians.items():
        plain, refresh = (f"{m[k]:.2f}" if m[k] else "" for k in ("plain_median", "refresh_median"))
        ratio = f"{m['refresh_median'] / m['plain_median']:.2f}" if plain and refresh else ""
        share = m["median"] / medians[PLAIN]["median"]
        lines.append(f"| {name} | {m['median']:.2f} | {share:.2f} | {plain} | {refresh} | {ratio} | {m['first']:.2f} |")
    return "\n".join(lines)


def side_by_side(steps: dict[str, list[dict]]) -> float:
    """The median ratio of galore_adamw's step to the same step of AdamW, which ran beside it; without step 0."""
    pairs = zip(steps[OURS], steps[PLAIN], strict=True)
    return float(np.median([ours["seconds"] / plain["seconds"] for ours, plain in pairs if ours["step"]]))


def plot(medians: dict, out: pathlib.Path) -> None:
    from _style import save  # gpu.py does without

    save(lambda theme: picture(medians, theme), out, "step")


def picture(medians: dict, theme: Theme) -> Figure:
    """Bars of the median steps, without and with a refresh."""
    from _style import bars, beside, title
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.1), layout="constrained")
    kinds = {"plain_median": ("a step without a refresh", theme.blue), "refresh_median": ("a step with one", theme.red)}
    for kind, (label, color) in kinds.items():
        side = {"plain_median": -0.19, "refresh_median": 0.19}[kind]
        found = {
            place + side * (m["refresh_median"] is not None): m[kind]
            for place, m in enumerate(medians.values())
            if m[kind]
        }
        axis.barh(list(found), list(found.values()), 0.34, label=label, color=color)
        for place, seconds in found.items():
            beside(axis, seconds, place, f"{seconds:.2f} s")
    bars(axis)
    axis.set_yticks(range(len(medians)), list(medians))
    axis.set(xlabel="seconds, median", xlim=(0, 1.12 * max(m[kind] or 0 for m in medians.values() for kind in kinds)))
    title(figure, "Seconds of one training step")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def on_tpu(args: argparse.Namespace) -> dict:
    """The training step with galore_adamw's defaults but T, compiled for one TPU v5e core."""
    loss, init, _ = language_model(args.model, args.batch, args.seq, args.layers, args.data)
    tx = optimizers(args.gap, args.rank)[OURS]
    params = jax.eval_shape(init)
    tokens = jax.ShapeDtypeStruct((args.batch, args.seq + 1), jnp.int32)
    step = training_step(loss, tx, unstack=False)
    seconds, compiled, text = compile_for_tpu(step, params, jax.eval_shape(tx.init, params), tokens)
    memory = compiled.memory_analysis()
    return {
        "tpu_compile_seconds": seconds[0],
        "tpu_compile_cpu_seconds": seconds[1],
        "tpu_code_bytes": memory.generated_code_size_in_bytes,
        "tpu_temporary_bytes": memory.temp_size_in_bytes,
        "tpu_factorisations": factorisations_in(text),
    }


def tpu_line(record: dict) -> str:
    found = ", ".join(record["tpu_factorisations"]) or "none"
    return (
        f"TPU v5e: compiled in {record['tpu_compile_seconds']:.0f} s ({record['tpu_compile_cpu_seconds']:.0f} s of one "
        f"core), {record['tpu_code_bytes'] / 2**20:.1f} MiB of code, factorizations in the HLO: {found}"
    )


def updates_on_gpu(args: argparse.Namespace) -> dict:
    """The update alone of optax.adamw and galore_adamw, with bfloat16 gradients and parameters, compiled for an H100."""
    layers = {"num_hidden_layers": args.layers} if args.layers else {}
    config = LlamaConfig.preset(args.model, param_dtype="bfloat16", **layers)
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param))
    arguments = {"rank": args.rank, "update_proj_gap": args.gap}
    txs = {
        PLAIN: in_float32(optax.adamw(1e-3)),  # as the trainer has it; the states of the others are float32 anyway
        OURS: galore_jax.galore_adamw(1e-3, **arguments),
        f"{OURS}_8bit": galore_jax.galore_adamw_8bit(1e-3, **arguments),
    }
    records = {}
    for name, tx in txs.items():

        def update(grads, params, state, tx=tx):
            updates, state = tx.update(grads, state, params)
            return add_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        compiled = compile_for_gpu(update, params, params, state, donate=(1, 2))
        text = compiled.as_text()
        (args.out / f"update-{name}.hlo").write_text(text)
        records[name] = {"launches": launches_in(text), "least_bytes": update_bytes(params, state)}
        records[name]["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    return records


def launches_table(records: dict) -> str:
    kinds = ("fusions", "library calls", "copies", "others", "conditionals", "loops")
    lines = [
        f"| update of | launches | {' | '.join(kinds)} | bytes of these | least bytes | temporaries |",
        "|---" * (5 + len(kinds)) + "|",
    ]
    for name, record in records.items():
        for place, counts in record["launches"].items():
            cells = " | ".join(str(counts.get(kind, 0)) for kind in kinds)
            whole = (record["least_bytes"], record["temporary_bytes"]) if place == "always" else ()
            sizes = [f"{size / 2**20:.1f} MiB" for size in (counts.get("bytes", 0), *whole)]
            lines.append(f"| {name} | {place} | {cells} | {' | '.join([*sizes, '', ''][:3])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the results")
    parser.add_argument("--model", default="60m")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--data", default="python", help='text: "python", a file or a folder')
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--gap", type=int, default=64, help="T, update_proj_gap")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument(
        "--muon", action="store_true", help="momenta in few bits beside optax.contrib.muon, and no others"
    )
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e too")
    parser.add_argument(
        "--gpu-hlo", action="store_true", help="compile the updates for an H100 too (needs the extra plan)"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.muon:
        records = run_muon(args)
        (args.out / "step-muon.json").write_text(json.dumps(records, indent=2) + "\n")
        print(muon_table(records))
    elif args.steps:
        results = run(args)
        results |= {"medians": summary(results), "side_by_side": side_by_side(results["steps"])}
        (args.out / "step.json").write_text(json.dumps(results, indent=2) + "\n")
        plot(results["medians"], args.out)
        print(table(results["medians"]))
    if args.tpu:
        record = on_tpu(args)
        (args.out / "step-tpu.json").write_text(json.dumps(record, indent=2) + "\n")
        print(tpu_line(record))
    if args.gpu_hlo:
        if not args.steps:
            compile_only()
        records = updates_on_gpu(args)
        (args.out / "step-gpu.json").write_text(json.dumps(records, indent=2) + "\n")
        print(launches_table(records))


if __name__ == "__main__":
    main()
