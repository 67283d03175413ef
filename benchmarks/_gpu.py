# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The measurements of gpu.py.  Each runs in a process of its own, and reports after every stage what it has so far."""

import functools
import gzip
import importlib
import importlib.util
import json
import math
import pathlib
import sys
import sysconfig
import tempfile
import time
import types
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Report = Callable[[dict], None]

# JAX is imported where it is used: the measurements with PyTorch have the card to themselves.


def card(report: Report, *, copy_bytes: int, size: int, rounds: int) -> None:
    """The two ceilings of the device, measured: a copy in its memory, and a bfloat16 matrix product on random numbers."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    found = {"jax": jax.__version__, "device": device.device_kind, "platform": device.platform}
    x = jax.random.normal(jax.random.key(0), (copy_bytes // 4,), jnp.float32)
    copy = jax.jit(lambda x: -x)  # reads each number once and writes it once
    found["copy_bytes_per_second"] = (
        2 * copy_bytes / float(np.median(_seconds(lambda: copy(x).block_until_ready(), rounds)))
    )
    a, b = jax.random.normal(jax.random.key(1), (2, size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    found["product_flops_per_second"] = (
        2 * size**3 / float(np.median(_seconds(lambda: product(a, b).block_until_ready(), rounds)))
    )
    report(found)


def programs(report: Report, *, settings: dict, batch: int, seq: int, started: bool, updated: bool) -> None:
    """Compiles a step, and runs the programs that start it or compiles the update alone, for the processes that measure them."""
    import jax

    made = training(settings, batch, seq)
    found = compiled_step(made)[1]
    report(found)
    params, state, _ = made.abstract
    if updated:
        update_program(made.tx).lower(params, params, state).compile()
    if started:
        jax.block_until_ready(made.init(jax.random.key(0)))
    report(found)


def memory(report: Report, *, settings: dict, batch: int, seq: int, fall: int = 5, rounds: int = 20) -> None:
    """A training step on one repeated batch: what it takes of the device's memory, whether it learns, and how long it takes.

    ``fall`` steps come first, the first of which refreshes every basis; then ``rounds`` are timed one by one.
    """
    import jax

    made = training(settings, batch, seq)
    compiled, found = compiled_step(made)
    found |= {"tokens": batch * seq, "flops": step_flops(made.model, batch, seq), "allocator_compiled": allocator()}
    report(found)
    params, state = jax.block_until_ready(made.init(jax.random.key(0)))
    found["allocator_started"] = allocator()
    tokens = _tokens(made.model.vocab_size, batch, seq)
    losses, seconds = [], []
    for _ in range(fall + rounds):
        start = time.perf_counter()
        params, state, metrics = jax.block_until_ready(compiled(params, state, tokens))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
        if len(losses) in (fall, fall + rounds):
            found |= {"losses": losses[:fall], "falls": losses[fall - 1] < losses[0], "first_step_seconds": seconds[0]}
            found |= {"steps_seconds": seconds[fall:], "allocator": allocator()}
            report(found)
    report(found | {"profile": profiled(lambda: compiled(params, state, tokens))})


def steps(
    report: Report, *, model: dict, optimizers: dict[str, dict], batch: int, seq: int, rounds: int, compile_for: float
) -> None:
    """Training steps with several optimizers, in turns, and then the update of each alone.

    What has not begun to compile after ``compile_for`` seconds is left out.
    """
    import jax

    from galore_jax.memory import tree_bytes

    begun, found, runs = time.perf_counter(), {}, {}
    for name, settings in optimizers.items():
        if time.perf_counter() - begun > compile_for:
            found[name] = {"left_out": "no time to compile it"}
            continue
        made = training(model | settings, batch, seq)
        compiled, found[name] = compiled_step(made)
        found[name] |= {
            "flops": step_flops(made.model, batch, seq),
            "refreshes": refreshes_of(made, model | settings, rounds),
        }
        runs[name] = [made, compiled, *made.init(jax.random.key(0))]
        print(f"{name}: compiled in {found[name]['compile_seconds']:.1f} s", file=sys.stderr, flush=True)
    names, seconds = list(runs), {name: [] for name in runs}
    vocab_size = runs[names[0]][0].model.vocab_size
    for number in range(rounds):
        tokens = _tokens(vocab_size, batch, seq, number)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _, compiled, params, state = runs[name]
            start = time.perf_counter()
            *runs[name][2:], _ = jax.block_until_ready(compiled(params, state, tokens))
            seconds[name].append(time.perf_counter() - start)
        if number % 8 == 7 or number == rounds - 1:
            for name in names:
                found[name]["steps_seconds"] = seconds[name]
            report({"tokens": batch * seq, "optimizers": found})
    for name in names:
        made, compiled, params, state = runs.pop(name)
        found[name] |= {"state_bytes": tree_bytes(state), "update_bytes": update_bytes(params, state)}
        found[name]["update_seconds"], found[name]["update_profile"] = update_seconds(made.tx, params, state)
        del params, state
        report({"tokens": batch * seq, "optimizers": found})


def refreshes(report: Report, *, shape: tuple[int, int], rank: int, names: list[str], rounds: int) -> None:
    """One refresh with each projector: its time, and the energy ‖PᵀG‖² that its basis captures."""
    import jax
    import jax.numpy as jnp
    from refresh import program

    m, n = shape
    falling = 1 / jnp.arange(1, m + 1, dtype=jnp.float32)
    keys, sizes = jax.random.split(jax.random.key(0), 3), [(m, m), (m, n), (m, n)]
    one, two, three = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))
    before = (one * falling[None]) @ two
    after = before + 0.1 * jnp.linalg.norm(before) / jnp.linalg.norm(three) * three
    found: dict[str, dict] = {}
    for name in names:
        refresh, storage = program(name)
        basis = storage.zeros((m, rank), jnp.float32, None, None)
        start = time.perf_counter()
        compiled = jax.jit(refresh).lower(jax.random.key(0), before, basis, jnp.zeros((rank, n))).compile()
        compile_seconds = time.perf_counter() - start
        basis = compiled(jax.random.key(0), before, basis, storage.project(basis, before, rank))
        arguments = (jax.random.key(1), after, basis, storage.project(basis, after, rank))
        call = functools.partial(compiled, *arguments)
        seconds = _seconds(lambda call=call: jax.block_until_ready(call()), rounds)
        energy = float(jnp.sum(jnp.square(storage.project(call(), after, rank))))
        found[name] = {"compile_seconds": compile_seconds, "seconds": seconds, "energy": energy}
        report({"shape": list(shape), "rank": rank, "refreshes": found})


def torch_svd(report: Report, *, shape: tuple[int, int], rank: int, rounds: int) -> None:
    """What galore_torch does at a refresh: an SVD of the whole in float32."""
    import torch

    gradient = torch.randn(*shape, device="cuda" if torch.cuda.is_available() else "cpu")

    def svd() -> None:
        torch.linalg.svd(gradient, full_matrices=False)
        _torch_wait()

    report({"shape": list(shape), "rank": rank, "refreshes": {"torch.linalg.svd": {"seconds": _seconds(svd, rounds)}}})


def torch_steps(
    report: Report, *, model: dict, optimizer: str, rank: int, gap: int, batch: int, seq: int, rounds: int
) -> None:
    """The same LLaMA in PyTorch: a step with galore_torch's AdamW, or with PyTorch's own, fused."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model)).to(device, torch.bfloat16)
    llama.gradient_checkpointing_enable()
    llama.train()
    if optimizer == "galore_torch":
        projected = [p for name, p in llama.named_parameters() if p.ndim == 2 and "layers" in name]
        chosen = {id(p) for p in projected}
        low_rank = {"params": projected, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
        others = {"params": [p for p in llama.parameters() if id(p) not in chosen]}
        tx = _galore_torch_adamw()([others, low_rank], lr=1e-3)
    else:
        tx = torch.optim.AdamW(llama.parameters(), lr=1e-3, fused=device == "cuda")
    seconds = []
    for number in range(rounds + 1):
        tokens = torch.from_numpy(_tokens(model["vocab_size"], batch, seq, number)[:, :-1].astype(np.int64)).to(device)
        _torch_wait()
        start = time.perf_counter()
        llama(input_ids=tokens, labels=tokens).loss.backward()
        tx.step()
        tx.zero_grad(set_to_none=True)
        _torch_wait()
        seconds.append(time.perf_counter() - start)
        found = {"tokens": batch * seq, "first_step_seconds": seconds[0], "steps_seconds": seconds[1:]}
        found["torch"] = torch.__version__
        if device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        report(found)


def learning(report: Report, *, settings: dict, batch: int, seq: int, text: str | None, every: int) -> None:
    """A whole run on the bytes of a text, of which the last twentieth is held out."""
    import jax

    from galore_jax.training.step import make_eval_step

    data = read_bytes(text)
    cut = len(data) - max(len(data) // 20, 8 * (seq + 1))
    shape = settings.get("shape", {}) | {"vocab_size": 256}
    run, total = training(settings | {"shape": shape}, batch, seq), settings["steps"]
    params, state = run.init(jax.random.key(0))
    evaluate = make_eval_step(run.graphdef)
    rng = np.random.default_rng(0)
    held_out = _windows(data[cut:], np.random.default_rng(1), 8 * batch, seq).reshape(8, batch, seq + 1)
    found: dict[str, Any] = {"text_bytes": len(data), "tokens": batch * seq, "train": [], "validation": []}
    start = time.perf_counter()
    for number in range(1, total + 1):
        params, state, metrics = run.step(params, state, _windows(data[:cut], rng, batch, seq))
        if number % every == 0 or number == total:
            found["train"].append([number, float(metrics["loss"])])
            summed, count = np.sum([evaluate(params, part) for part in held_out], axis=0)
            found["validation"].append([number, float(summed / count)])
            found["seconds"] = time.perf_counter() - start
            report(found)


# What they share.


class Training(NamedTuple):
    """What the trainer makes of some settings."""

    model: Any  # LlamaConfig
    tx: Any
    graphdef: Any
    init: Any  # PRNG key -> params, state
    step: Any  # jitted; params, state (both donated), batch -> params, state, metrics
    abstract: tuple  # params, state, batch


CONTRIB = "optax.contrib.galore"


def training(settings: dict, batch: int, seq: int) -> Training:
    """The trainer's program, in bfloat16 and without a bound on the gradient, which would keep all of it.

    ``settings`` are fields of PretrainConfig, and ``shape`` fields of LlamaConfig.
    """
    import jax

    from galore_jax.models import LlamaConfig
    from galore_jax.training.config import PretrainConfig, check
    from galore_jax.training.optimizers import make_optimizer, make_schedule
    from galore_jax.training.program import program
    from galore_jax.training.step import make_train_step

    settings = {"dtype": "bf16", "clip": 0.0, "warmup_steps": 0, "batch": batch, "seq": seq} | settings
    shape = settings.pop("shape", {})
    contrib = settings["optimizer"] == CONTRIB
    config = PretrainConfig(**settings | ({"optimizer": "adamw"} if contrib else {}))
    check(config)
    model = LlamaConfig.preset(config.model, **shape, **config.numerics)
    made = program(config, model)
    if not contrib:
        tx = make_optimizer(config, make_schedule(config), clip=False)
        return Training(model, tx, made.graphdef, made.init, made.step, (*made.state, made.batch))
    tx = _contrib_galore(config.learning_rate, config.rank, config.update_proj_gap)

    def init(key: Any) -> tuple:
        params = made.init(key)[0]
        return params, jax.jit(tx.init)(params)

    abstract = (*jax.eval_shape(init, jax.random.key(0)), made.batch)
    return Training(model, tx, made.graphdef, init, make_train_step(made.graphdef, tx), abstract)


def refreshes_of(made: Training, settings: dict, rounds: int) -> list[bool] | None:
    """Whether the optimizer refreshes some basis in each of its first steps; None for one without bases."""
    from step import refreshing

    from galore_jax import describe

    if settings["optimizer"] == CONTRIB:
        return [number % settings["update_proj_gap"] == 0 for number in range(rounds)]
    # A momentum of full size is projected on nothing.
    matrices = sum(math.prod(found.batch) for found in describe(made.tx, made.abstract[0]).projected if found.rank)
    if not matrices:
        return None
    return [refreshing(number, matrices, settings["update_proj_gap"]) for number in range(rounds)]


def _contrib_galore(learning_rate: float, rank: int, gap: int) -> Any:
    """Optax's own, in float32 and on the layers one by one, because it knows no stacks of them."""
    import optax
    from step import is_layer_matrix, stacked, unstacked

    from galore_jax.training.optimizers import in_float32

    tx = optax.contrib.galore(
        learning_rate, rank=rank, update_proj_gap=gap, scale=0.25, weight_dimension_numbers=is_layer_matrix
    )

    def update(updates: Any, state: Any, params: Any) -> tuple:
        updates, state = tx.update(unstacked(updates), state, unstacked(params))
        return stacked(updates), state

    return in_float32(optax.GradientTransformation(lambda params: tx.init(unstacked(params)), update))


def compiled_step(made: Training) -> tuple[Any, dict]:
    """The compiled step, and the compiler's plan for it."""
    start = time.perf_counter()
    compiled = made.step.lower(*made.abstract).compile()
    return compiled, {"compile_seconds": time.perf_counter() - start, "plan_bytes": planned_bytes(compiled)}


def planned_bytes(compiled: Any) -> int:
    """Arguments, outputs that replace none of them, and temporaries."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def step_flops(model: Any, batch: int, seq: int) -> float:
    """Of the model alone, without what is recomputed: 6 N a token, and attention (arXiv 2204.02311, appendix B)."""
    products = model.num_params - (0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size)
    attention = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_size * seq
    return float((6 * products + attention) * batch * seq)


def update_bytes(params: Any, state: Any) -> int:
    """The least that an update without a refresh moves: gradients and bases once, parameters and moments twice."""
    from galore_jax.memory import state_bytes_by_kind, tree_bytes

    sizes = state_bytes_by_kind(state)
    return 3 * tree_bytes(params) + 2 * (sizes["moments"] + sizes["scales"]) + sizes["bases"]


def update_program(tx: Any) -> Any:
    """Jitted: gradients in the dtype of the parameters, parameters and state (both donated) -> parameters and state."""
    import jax
    import jax.numpy as jnp
    import optax

    from galore_jax.training.step import add_updates

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def update(grads: Any, params: Any, state: Any) -> tuple:
        updates, state = tx.update(optax.tree.cast(grads, jnp.float32), state, params)
        return add_updates(params, updates), state

    return update


def update_seconds(tx: Any, params: Any, state: Any, rounds: int = 20) -> tuple[float, dict]:
    """Of one update of given gradients in the dtype of the parameters, refreshes included, and its profile; all is donated."""
    import jax

    update = update_program(tx)

    def noise(path: tuple, leaf: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jax.random.normal(key, leaf.shape, leaf.dtype)

    grads = jax.jit(lambda: jax.tree_util.tree_map_with_path(noise, params))()
    params, state = jax.block_until_ready(update(grads, params, state))
    start = time.perf_counter()
    for _ in range(rounds):
        params, state = update(grads, params, state)
    jax.block_until_ready((params, state))
    seconds = (time.perf_counter() - start) / rounds
    return seconds, profiled(lambda: update(grads, params, state))


def profiled(call: Callable[[], Any]) -> dict:
    """What one call does on the GPU: kernels, copies, their seconds, those in between, and the kernels that take longest."""
    import jax

    if jax.devices()[0].platform != "gpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        for file in pathlib.Path(folder).rglob("*.trace.json.gz"):
            return read_trace(json.loads(gzip.decompress(file.read_bytes()))["traceEvents"])
    return {"left_out": "the profiler wrote no trace"}


def read_trace(events: list[dict]) -> dict:
    """The events on the streams of a GPU, which lie beside lines that say the same by operation and by module."""
    named = {
        (e["pid"], e.get("tid")): e["args"]["name"]
        for e in events
        if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
    }
    devices = {pid for (pid, _), name in named.items() if "/device:GPU" in name}
    streams = {key for key, name in named.items() if key[0] in devices and name.startswith("Stream")}
    done = [e for e in events if e.get("ph") == "X" and (e["pid"], e["tid"]) in streams]
    if not done:
        return {"lines": sorted({f"{pid}/{tid}: {name}" for (pid, tid), name in named.items()})}
    copies = [e for e in done if e["name"].startswith(("Memcpy", "Memset"))]
    longest: dict[str, list] = {}
    for e in done:
        one = longest.setdefault(e["name"], [0, 0.0])
        one[0], one[1] = one[0] + 1, one[1] + e["dur"] / 1e6
    span = max(e["ts"] + e["dur"] for e in done) - min(e["ts"] for e in done)
    return {
        "kernels": len(done) - len(copies), "copies": len(copies), "copy_seconds": sum(e["dur"] for e in copies) / 1e6,
        "busy_seconds": sum(e["dur"] for e in done) / 1e6, "span_seconds": span / 1e6,
        "longest": sorted(([name, *one] for name, one in longest.items()), key=lambda one: -one[2])[:25],
    }  # fmt: skip


def allocator() -> dict[str, int]:
    """The allocator's figures, in bytes; none on a CPU."""
    import jax

    return jax.devices()[0].memory_stats() or {}


def read_bytes(text: str | None) -> np.ndarray:
    """A text as token ids 0 ... 255, without one the source of Python's standard library."""
    if text is not None:
        found = pathlib.Path(text).read_bytes()
        return np.frombuffer(gzip.decompress(found) if text.endswith(".gz") else found, np.uint8)
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)


def _windows(data: np.ndarray, rng: np.random.Generator, batch: int, seq: int) -> np.ndarray:
    starts = rng.integers(0, len(data) - seq, batch)
    return np.stack([data[start : start + seq + 1] for start in starts]).astype(np.int32)


def _tokens(vocab_size: int, batch: int, seq: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, seq + 1)).astype(np.int32)


def _seconds(function: Callable[[], Any], rounds: int) -> list[float]:
    """Of each of ``rounds`` calls that wait for the device, after one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _galore_torch_adamw() -> Any:
    """Its AdamW, without its ``__init__``, which imports bitsandbytes for the 8-bit one."""
    spec = importlib.util.find_spec("galore_torch")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def _torch_wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


MEASUREMENTS = {f.__name__: f for f in (card, programs, memory, steps, refreshes, torch_svd, torch_steps, learning)}
