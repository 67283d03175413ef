# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What learns best?  Optimizers for the matrices of a small LLaMA, at equal tokens, everything else on the same AdamW.

    python benchmarks/quality.py OUT --data TEXT               two to four minutes on two cores for each of about eighty runs;
                                                               those in OUT are not repeated, and --only NAMES makes some
    python benchmarks/quality.py OUT --data TEXT --report      table and picture of the runs that are in OUT, and no new ones
    python benchmarks/quality.py OUT --data TEXT --short       five minutes: five optimizers, 40 steps, two learning rates
    python benchmarks/quality.py OUT --data TEXT --ablation    projector x transport x residual of galore, at one learning rate
    python benchmarks/quality.py OUT --data TEXT --frontier    what a byte of state buys: momenta of every size at their own decay

--only takes names and patterns of names of all of these, such as 'muon_4bit-*-nor'.  In a name, b is the decay rate of the
momentum, b2 that of Adam's second moment, nor is NorMuon's division, polar Polar Express, c the weight of the gradient outside,
k16 a subspace of a sixteenth of the smaller side, and pr4 that subspace in four bits.

A byte-level LLaMA of 3.3 million parameters (the preset 20m), 1,024 tokens a step, float32, warm-up over a tenth of the steps
and a cosine to a tenth, gradients bounded to a global norm of 1.  Each optimizer gets the matrices of the blocks alone and its
learning rate from one grid: from the middle of it, up and then down, as far as the validation loss falls.  Embeddings, head and
norms are on AdamW at --rest-rate in every run, so that what differs is the treatment of the matrices.  The best --leaders, and
AdamW, Muon and galore_adamw, are run with more seeds at their best rate; with --frontier, all that nothing of at most as many
bytes is better than.

Low-rank optimizers keep --rank of each matrix's smaller side.  State is counted for the matrices, in bytes, and as a share of
AdamW's.  The update's RMS is the mean over the run of the root mean square of what is added to the matrices, over the rate.
Writes OUT/runs/*.json, OUT/quality.json and three pictures (-light.svg and -dark.svg), OUT/quality-state, OUT/quality-rates and
OUT/quality-steps: the loss against state, against learning rates and against steps.  Prints a Markdown table.
"""

import argparse
import dataclasses
import fnmatch
import functools
import inspect
import itertools
import json
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import language_text
from _style import Theme, save, title
from flax import nnx
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

import galore_jax
from galore_jax._core.state_fields import Kind, kinds
from galore_jax.matrix_codec import MatrixCodec
from galore_jax.matrix_view import is_matrix_name
from galore_jax.models import Llama
from galore_jax.training.adapters import adapt, join, make_restart, part
from galore_jax.training.column_normalized import scale
from galore_jax.training.config import LOW_RANK_WEIGHTS, PretrainConfig
from galore_jax.training.optimizers import make_schedule
from galore_jax.training.step import token_losses

ADAMW, MUON = "adamw", "optax_muon-b.95"
# So many points in the picture that only those with several seeds, or with the lowest loss for their bytes, get names.
ALWAYS_AGAIN = (ADAMW, MUON, "galore_adamw")


class Preset(NamedTuple):
    """(learning rate, rank) -> a preset of galore_jax."""

    make: Any
    settings: dict[str, Any]
    has_rank: bool

    def __call__(self, learning_rate, rank):
        return self.make(learning_rate, **self.arguments(rank))

    def arguments(self, rank):
        return ({"rank": rank} if self.has_rank else {}) | self.settings

    def published(self, rank):
        """What galore_jax.recommend reads; how often bases are refreshed goes by the length of the run."""
        arguments = {name: value for name, value in self.arguments(rank).items() if name != "update_proj_gap"}
        if "codec" in arguments:
            codec = arguments.pop("codec")
            if codec != inspect.signature(self.make).parameters["codec"].default:
                arguments["codec"] = dataclasses.asdict(codec)
        return {"preset": self.make.__name__, "arguments": arguments}


def preset(make, **settings):
    return Preset(make, settings, True)


def full_rank(make, **settings):
    return Preset(make, settings, False)


def direction(make):
    """(learning rate, rank) -> what ``make`` returns, which answers in the direction of the gradient."""
    return lambda learning_rate, rank: optax.chain(make(), optax.scale_by_learning_rate(learning_rate))


def optax_muon(beta):
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    everywhere = functools.partial(jax.tree.map, lambda _: numbers)
    against = optax.contrib.muon(1.0, beta=beta, consistent_rms=0.2, muon_weight_dimension_numbers=everywhere)
    return optax.chain(against, optax.scale(-1.0))


def coded_galore_muon(learning_rate, rank, codec, beta, factor, neuron_decay=None, times=1, **settings):
    """galore_muon with its momentum in a codec and ``times`` the rank."""
    momentum = galore_jax.quantize_state(optax.trace(beta, nesterov=True), codec)
    rule = galore_jax.residual.orthogonal(factor, neuron_decay)
    low_rank = galore_jax.galore(
        momentum, rank=times * rank, residual=rule, **{"scale": 1.0, "transport": "rotate"} | settings
    )
    return optax.chain(low_rank, optax.scale_by_learning_rate(learning_rate))


class FactoredAdamState(NamedTuple):
    FIELD_KINDS = kinds("count mu", v_row=Kind.ROW, v_col=Kind.COLUMN)

    count: jax.Array
    mu: Any
    v_row: Any  # (*batch, m)
    v_col: Any  # (*batch, n)


def scale_by_factored_adam(b1=0.9, b2=0.999):
    """Adam on matrices whose second moment is the product of its means over rows and columns, as in Adafactor."""

    def init(params):
        means = [jax.tree.map(functools.partial(jnp.mean, axis=axis), params) for axis in (-1, -2)]
        zeros = [jax.tree.map(jnp.zeros_like, tree) for tree in (params, *means)]
        return FactoredAdamState(jnp.zeros([], jnp.int32), *zeros)

    def update(gradients, state, params=None):
        count = state.count + 1
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        squares = jax.tree.map(lambda g: g * g + 1e-30, gradients)
        rows, columns = (
            jax.tree.map(lambda v, g, axis=axis: b2 * v + (1 - b2) * jnp.mean(g, axis=axis), old, squares)
            for axis, old in ((-1, state.v_row), (-2, state.v_col))
        )

        def direction(mu, row, column):
            variance = row[..., :, None] * (column / jnp.mean(row, axis=-1, keepdims=True))[..., None, :]
            return mu / (1 - b1**count) / (jnp.sqrt(variance / (1 - b2**count)) + 1e-8)

        return jax.tree.map(direction, mu, rows, columns), FactoredAdamState(count, mu, rows, columns)

    return optax.GradientTransformation(init, update)


def contestants(steps: int) -> dict:
    """Each optimizer of the comparison, a function of learning rate and rank.

    Bases are refreshed eight times in a run, those of galore_muon four times.  Adam trains low-rank weights too (lora, relora,
    low_rank), and relora merges three times.
    """
    gap = max(1, steps // 8)
    galore_muon = functools.partial(preset, galore_jax.galore_muon)
    return {
        ADAMW: direction(optax.scale_by_adam),
        MUON: direction(lambda: optax_muon(0.95)),
        "adamw_8bit": direction(lambda: galore_jax.quantize_state(optax.scale_by_adam())),
        **dict.fromkeys(LOW_RANK_WEIGHTS, direction(optax.scale_by_adam)),
        "adafactor": direction(lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=32)),
        "scale": lambda learning_rate, rank: scale(learning_rate),
        "galore_adamw": preset(galore_jax.galore_adamw, update_proj_gap=gap),
        "galore_adamw_8bit": preset(galore_jax.galore_adamw_8bit, update_proj_gap=gap),
        **{
            f"galore_adamw_8bit, {side}": preset(galore_jax.galore_adamw_8bit, update_proj_gap=gap, proj_type=side)
            for side in ("reverse_std", "left", "right")
        },
        "q_galore_adamw_8bit": preset(galore_jax.q_galore_adamw_8bit, update_proj_gap=gap),
        "q_galore_adamw_8bit, reverse_std": preset(
            galore_jax.q_galore_adamw_8bit, update_proj_gap=gap, proj_type="reverse_std"
        ),
        "galore_adafactor": preset(galore_jax.galore_adafactor, update_proj_gap=gap),
        "galore_adamw, sign": preset(galore_jax.galore_adamw, update_proj_gap=gap, residual="sign"),
        "golore_adamw": preset(galore_jax.golore_adamw, update_proj_gap=gap, random_from=steps * 4 // 5),
        "grass_adamw": preset(galore_jax.grass_adamw, update_proj_gap=gap),
        "fira_adamw": preset(galore_jax.fira_adamw, update_proj_gap=gap),
        "apollo_adamw": preset(galore_jax.apollo_adamw, update_proj_gap=gap),
        "apollo_mini": preset(galore_jax.apollo_mini, rank=1, update_proj_gap=gap),
        "ldadam": preset(galore_jax.ldadam),
        "galore_muon": galore_muon(update_proj_gap=2 * gap),
        "galore_muon, keep": galore_muon(update_proj_gap=2 * gap, transport="keep"),
        "galore_muon, power": galore_muon(update_proj_gap=2 * gap, projector="power"),
        "galore_muon, power, c = 8": galore_muon(update_proj_gap=2 * gap, projector="power", factor=8.0),
        "galore_muon, power, c = 30, T = 200": galore_muon(update_proj_gap=4 * gap, projector="power", factor=30.0),
    }


BETAS = (0.8, 0.9, 0.95)
BETAS_2 = (0.95, 0.99, 0.999)
NORMUON = {"": None, "-nor": 0.95}  # neuron_decay, which muon has by default
# Momenta in few bits: those that may be on the frontier, and those that show what a part of them is worth.
MOMENTA = {
    "8bit": MatrixCodec(bits=8, leading=0),
    "4bit": MatrixCodec(bits=4),
    "4bit-pr4": MatrixCodec(bits=4, leading_bits=4),
    "3bit": MatrixCodec(bits=3),
    "3bit-k8": MatrixCodec(bits=3, leading=1 / 8),
    "3bit-pr4": MatrixCodec(bits=3, leading_bits=4),
    "3bit-k8-pr4": MatrixCodec(bits=3, leading=1 / 8, leading_bits=4),
    "2bit": MatrixCodec(bits=2),
    "2bit-k8": MatrixCodec(bits=2, leading=1 / 8),
    "2bit-k8-pr4": MatrixCodec(bits=2, leading=1 / 8, leading_bits=4),
    "0bit-k16": MatrixCodec(bits=0),
    "0bit-k8": MatrixCodec(bits=0, leading=1 / 8),
    "0bit-k4": MatrixCodec(bits=0, leading=1 / 4),
    "0bit-k4-pr4": MatrixCodec(bits=0, leading=1 / 4, leading_bits=4),
}
OTHER_MOMENTA = {
    "8bit-k16": MatrixCodec(bits=8),
    "4bit-k0": MatrixCodec(bits=4, leading=0),
    "4bit-k32": MatrixCodec(bits=4, leading=1 / 32),
    "4bit-k8": MatrixCodec(bits=4, leading=1 / 8),
    "4bit-nearest": MatrixCodec(bits=4, rounding="nearest"),
    "4bit-stochastic": MatrixCodec(bits=4, rounding="stochastic"),
}


def name_of(number: float) -> str:
    """.9 for 0.9"""
    return f"{number:g}".lstrip("0")


def muons(momenta: dict[str, MatrixCodec]) -> dict:
    """Muon with each momentum, each decay rate, and NorMuon's division or without."""

    def make(codec):
        return {8: galore_jax.muon_8bit, 2: galore_jax.muon_2bit}.get(codec.bits, galore_jax.muon_4bit)

    return {
        f"muon_{name}-b{name_of(beta)}{nor}": full_rank(make(codec), codec=codec, momentum=beta, neuron_decay=decay)
        for name, codec in momenta.items()
        for nor, decay in NORMUON.items()
        for beta in BETAS
    }


def variants(steps: int) -> dict:
    """Momenta in few bits without a part of the method, and Polar Express."""
    polar = {
        f"{make.__name__}-b{name_of(beta)}{nor}-polar": full_rank(
            make, momentum=beta, ns_coeffs="polar_express", neuron_decay=decay
        )
        for make in (galore_jax.muon, galore_jax.muon_4bit)
        for nor, decay in NORMUON.items()
        for beta in BETAS
    }
    return muons(OTHER_MOMENTA) | polar


def frontier(steps: int) -> dict:
    """Optimizers with state of every size, each with several decay rates of its moments."""
    gap = max(1, steps // 8)
    found: dict = {f"optax_muon-b{name_of(beta)}": direction(functools.partial(optax_muon, beta)) for beta in BETAS}
    found |= {
        f"muon-b{name_of(beta)}{nor}": full_rank(galore_jax.muon, momentum=beta, neuron_decay=decay)
        for nor, decay in NORMUON.items()
        for beta in BETAS
    }
    found |= muons(MOMENTA)
    for (nor, decay), beta in itertools.product(NORMUON.items(), BETAS):
        settings = {} if decay is None else {"neuron_decay": decay}
        for factor in (4, 8, 16):
            low_rank = {"momentum": beta, "factor": float(factor), "update_proj_gap": 2 * gap}
            found[f"galore_muon-b{name_of(beta)}-c{factor}{nor}"] = preset(
                galore_jax.galore_muon, **low_rank, **settings
            )
        for projector, bits in itertools.product(PROJECTORS, (8, 4)):
            low_rank = {"update_proj_gap": 2 * gap, "beta": beta, "factor": 0.8 / (1 - beta), **PROJECTORS[projector]}
            codec = MatrixCodec(bits=bits, leading=1 / 16 if bits == 4 else 0)
            name = f"galore_muon_{bits}bit-{projector}-b{name_of(beta)}{nor}"
            found[name] = functools.partial(coded_galore_muon, codec=codec, **low_rank, **settings)
    for b2 in BETAS_2:
        suffix = "" if b2 == 0.999 else f"-b2{name_of(b2)}"
        found |= {
            f"{ADAMW}{suffix}": direction(functools.partial(optax.scale_by_adam, b2=b2)),
            f"adamw_8bit{suffix}": direction(lambda b2=b2: galore_jax.quantize_state(optax.scale_by_adam(b2=b2))),
            f"adamw_factored{suffix}": direction(functools.partial(scale_by_factored_adam, b2=b2)),
            f"adamw_4bit{suffix}": full_rank(galore_jax.adamw_4bit, b2=b2),
            f"galore_adamw{suffix}": preset(galore_jax.galore_adamw, update_proj_gap=gap, b2=b2),
            f"fira_adamw{suffix}": preset(galore_jax.fira_adamw, update_proj_gap=gap, b2=b2),
        }
    return found


# Bases of galore_muon with a momentum in few bits: random ones in 4 bits, those of which only the seed is stored, also at twice
# the rank, and rows.
PROJECTORS = {
    "random": {"projector": "random", "basis_codec": "int4"},
    "seeded": {"projector": galore_jax.projectors.random(stored=False)},
    "seeded-r2": {"projector": galore_jax.projectors.random(stored=False), "times": 2},
    "rows": {"projector": "rows", "transport": "keep"},
}
SHORT = (ADAMW, MUON, "galore_adamw", "fira_adamw", "galore_muon")


def ablation(steps: int) -> dict:
    """galore with each projector, transport and residual."""
    found = {}
    for projector, transport, rule in itertools.product(
        ("power", "random", "rows"), ("keep", "rotate"), (None, "fira", "orthogonal")
    ):
        make = galore_jax.galore_adamw if rule is None else galore_jax.fira_adamw
        make = galore_jax.galore_muon if rule == "orthogonal" else make
        if (projector, transport) != ("rows", "rotate"):  # rows come and go whole: nothing is left to turn
            settings = {"projector": projector, "transport": transport, "update_proj_gap": max(1, steps // 8)}
            found[f"{projector}, {transport}, {rule or 'none'}"] = preset(make, **settings)
    return found


def matrices_and_rest(params):
    """ "matrices" or "rest" for each parameter."""

    def kind(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "matrices" if leaf.ndim >= 2 and is_matrix_name(name) else "rest"

    return jax.tree_util.tree_map_with_path(kind, params)


class Task:
    """The model and its text; the same for all runs of one seed, but for what ``name`` makes of the matrices (``adapters``)."""

    def __init__(self, args: argparse.Namespace, name: str, seed: int):
        self.args, self.text = args, text_of(args.data, args.batch, args.seq, seed)
        self.config = PretrainConfig(
            model=args.model, optimizer=name if name in LOW_RANK_WEIGHTS else ADAMW, rank=args.rank, steps=args.steps, seed=seed,
            update_proj_gap=max(1, args.steps // 4),
        )  # fmt: skip
        model = Llama(self.config.model_config(self.text.tokenizer.vocab_size), rngs=nnx.Rngs(seed))
        whole = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        kinds_of_whole = jax.tree.leaves(matrices_and_rest(whole))
        whole = zip(jax.tree.leaves(whole), kinds_of_whole, strict=True)
        self.weights = sum(x.size for x, kind in whole if kind == "matrices")
        adapt(model, self.config, jax.random.key(seed))
        self.graphdef, params = nnx.split(model, nnx.Param)
        self.params = nnx.to_pure_dict(params)
        self.labels = matrices_and_rest(part(self.params)[0])
        self.restart = make_restart(self.graphdef, self.config)

    def loss(self, trained, frozen, tokens):
        return jnp.mean(token_losses(self.graphdef, join(trained, frozen), tokens))

    def schedule(self, peak):
        shape = make_schedule(dataclasses.replace(self.config, learning_rate=1.0))
        return lambda count: peak * shape(count)  # the peak can be one of a batch

    def optimizer(self, make, rate):
        rest = dataclasses.replace(self.config, optimizer=ADAMW, learning_rate=self.args.rest_rate)
        parts = {"matrices": make(self.schedule(rate), self.args.rank), "rest": optax.adam(make_schedule(rest))}
        return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(parts, self.labels))

    def matrices(self, tree):
        return [
            x for x, kind in zip(jax.tree.leaves(tree), jax.tree.leaves(self.labels), strict=True) if kind == "matrices"
        ]

    def train_step(self, tx):
        """(parameters, state, tokens) -> parameters, state, (the loss, the root mean square of the matrices' updates)."""

        def restarted(params, state):
            clipped, partitioned = state
            matrices = partitioned.inner_states["matrices"]
            params, matrices = self.restart(params, matrices)
            inner = partitioned.inner_states | {"matrices": matrices}
            return params, (clipped, partitioned._replace(inner_states=inner))

        def step(params, state, tokens):
            if self.restart is not None:
                params, state = restarted(params, state)
            trained, frozen = part(params)
            value, grads = jax.value_and_grad(self.loss)(trained, frozen, tokens)
            updates, state = tx.update(grads, state, trained)
            changed = self.matrices(updates)
            square = sum(jnp.sum(jnp.square(x)) for x in changed) / sum(x.size for x in changed)
            return join(optax.apply_updates(trained, updates), frozen), state, (value, jnp.sqrt(square))

        return step

    def validation(self):
        """Parameters -> the loss on the held-out text."""
        evaluate = jax.jit(self.loss)
        held_out = list(self.text.validation_batches(self.args.val_tokens))
        return lambda params: float(np.mean([evaluate(*part(params), batch) for batch in held_out]))


@functools.lru_cache
def text_of(data, batch, seq, seed):
    return language_text(data, batch, seq, seed=seed)


def run(task: Task, make, rate: float) -> dict:
    """One training run: its curve, its held-out losses, the bytes of its state and its seconds."""
    tx, steps = task.optimizer(make, rate), task.args.steps
    params, state = task.params, tx.init(part(task.params)[0])
    state_bytes = galore_jax.tree_bytes(state[1].inner_states["matrices"])
    step, validation = jax.jit(task.train_step(tx), donate_argnums=(0, 1)), task.validation()
    batches, schedule = task.text.train_iterator(), task.schedule(rate)
    curve, sizes, seconds, validations = [], [], [], []
    for number in range(steps):
        start = time.perf_counter()
        params, state, (value, size) = step(params, state, jnp.asarray(next(batches)))
        curve.append(float(value))
        seconds.append(time.perf_counter() - start)
        if (now := float(schedule(number))) > 0:
            sizes.append(float(size) / now)
        if (number + 1) % max(1, steps // 8) == 0 or number + 1 == steps:
            validations.append((number + 1, validation(params)))
    return {
        "train_loss": curve, "validation": validations, "val_loss": validations[-1][1],
        "update_rms": statistics.fmean(sizes),
        "matrix_state_bytes": state_bytes, "bytes_per_weight": state_bytes / task.weights,
        "seconds_per_step": statistics.median(seconds),
    }  # fmt: skip


def run_together(tasks: list[Task], make, rates: list[float]) -> dict[tuple[float, int], dict]:
    """What ``run`` returns for each rate and seed, made by one program in which the runs are a batch.

    A small model leaves most of an accelerator idle; this fills it.  The seconds are those of all runs over their number.
    """
    task, members = tasks[0], [(rate, seed) for rate in rates for seed in range(len(tasks))]
    peaks, seeds = jnp.array([rate for rate, _ in members]), np.array([seed for _, seed in members])

    def step(peak, params, state, tokens):
        return task.train_step(task.optimizer(make, peak))(params, state, tokens)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def several(params, state, tokens):
        def one(carry, tokens):
            params, state, found = jax.vmap(step)(peaks, *carry, tokens[seeds])
            return (params, state), found

        return jax.lax.scan(one, (params, state), tokens)

    params = jax.tree.map(lambda *leaves: jnp.stack(leaves)[seeds], *(each.params for each in tasks))
    start = jax.jit(jax.vmap(lambda peak, params: task.optimizer(make, peak).init(part(params)[0])))
    state = start(peaks, params)
    state_bytes = galore_jax.tree_bytes(state[1].inner_states["matrices"]) // len(members)
    evaluate = jax.jit(jax.vmap(task.loss))
    held_out = np.stack([list(each.text.validation_batches(task.args.val_tokens)) for each in tasks], axis=1)
    batches = [each.text.train_iterator() for each in tasks]
    steps, every = task.args.steps, max(1, task.args.steps // 8)
    losses, sizes, seconds, validations = [], [], 0.0, []
    for number in range(0, steps, every):
        taken = min(every, steps - number)
        tokens = jnp.asarray(np.stack([[next(each) for each in batches] for _ in range(taken)]))
        begun = time.perf_counter()
        (params, state), (loss, size) = jax.block_until_ready(several(params, state, tokens))
        seconds += time.perf_counter() - begun
        losses.append(loss), sizes.append(size)
        value = np.mean([evaluate(*part(params), tokens[seeds]) for tokens in held_out], axis=0)
        validations.append((number + taken, value))
    curves, rates_now = np.concatenate(losses), np.array(list(map(task.schedule(1.0), range(steps))))
    relative = np.concatenate(sizes)[rates_now > 0] / rates_now[rates_now > 0, None] / np.asarray(peaks)
    return {
        member: {
            "train_loss": curves[:, i].tolist(), "validation": [(number, float(value[i])) for number, value in validations],
            "val_loss": float(validations[-1][1][i]), "update_rms": float(relative[:, i].mean()),
            "matrix_state_bytes": state_bytes, "bytes_per_weight": state_bytes / task.weights,
            "seconds_per_step": seconds / steps / len(members),
        }
        for i, member in enumerate(members)
    }  # fmt: skip


class Runs:
    """The runs in OUT, made when they are asked for and not there."""

    def __init__(self, args: argparse.Namespace, contestants: dict):
        self.args, self.contestants = args, contestants
        self.settings = {
            name: str(getattr(args, name))
            for name in ("model", "data", "steps", "batch", "seq", "val_tokens", "rank", "rest_rate")
        }
        (args.out / "runs").mkdir(parents=True, exist_ok=True)

    def path(self, name: str, rate: float, seed: int) -> pathlib.Path:
        return self.args.out / "runs" / f"{name}-{rate:g}-{seed}.json".replace(" ", "_").replace("/", "_")

    def make_together(self, name: str) -> None:
        """The runs of one optimizer with all rates and seeds, unless they are all there."""
        members = list(itertools.product(self.args.rates, range(self.args.seeds)))
        if all(self.path(name, *member).exists() for member in members):
            return
        tasks = [Task(self.args, name, seed) for seed in range(self.args.seeds)]
        for (rate, seed), found in run_together(tasks, self.contestants[name], self.args.rates).items():
            self.write(name, rate, seed, found)

    def write(self, name: str, rate: float, seed: int, found: dict) -> dict:
        record = {"optimizer": name, "learning_rate": rate, "seed": seed, "settings": self.settings} | found
        self.path(name, rate, seed).write_text(json.dumps(record) + "\n")
        print(f"{name}, {rate:g}, seed {seed}: {record['val_loss']:.4f}", file=sys.stderr, flush=True)
        return record

    def get(self, name: str, rate: float, seed: int = 0) -> dict | None:
        path = self.path(name, rate, seed)
        if path.exists():
            record = json.loads(path.read_text())
            if record["settings"] != self.settings:
                raise SystemExit(
                    f"{path} is of a run with {record['settings']}, not {self.settings}: choose another OUT."
                )
            return record
        if self.args.report:
            return None
        return self.write(name, rate, seed, run(Task(self.args, name, seed), self.contestants[name], rate))

    def grid(self) -> dict[str, dict]:
        """Each contestant's best run with the first seed, and under "tried" the losses by learning rate."""
        best = {}
        for name in self.contestants:
            get = functools.partial(self.get, name)
            if self.args.report:
                tried = {rate: record for rate in self.args.rates if (record := get(rate)) is not None}
            else:
                tried = walk(self.args.rates, get)
            if tried:
                losses = {f"{rate:g}": tried[rate]["val_loss"] for rate in sorted(tried)}
                best[name] = min(tried.values(), key=loss_of) | {"tried": losses}
        return best


def walk(rates: list[float], get) -> dict[float, dict]:
    """``get(rate)`` by rate, from the middle of the rates as far as the loss falls: up, and down if up is worse."""
    rates = sorted(rates)
    middle = len(rates) // 2
    start = rates[middle]
    found = {start: get(start)}
    for way in (rates[middle + 1 :], rates[:middle][::-1]):
        best = start
        for rate in way:
            found[rate] = get(rate)
            if not loss_of(found[rate]) < loss_of(found[best]):
                break
            best = rate
        if best != start:
            break
    return found


def loss_of(record: dict) -> float:
    """The validation loss of a run; infinite if it is not a number."""
    return float(np.nan_to_num(record["val_loss"], nan=np.inf))


def undominated(found: dict[str, tuple[float, float]]) -> list[str]:
    """The names of the (bytes, loss) that none of at most as many bytes has a lower loss than, the fewest bytes first."""
    names, least = [], np.inf
    for name, (_, loss) in sorted(found.items(), key=lambda item: item[1]):
        if loss < least:
            names, least = [*names, name], loss
    return names


def summaries(runs: Runs, best: dict[str, dict], seeds: int, leaders: int, frontier: bool) -> list[dict]:
    """One line a contestant, the lowest loss first."""
    order = sorted(best, key=lambda name: loss_of(best[name]))
    again = {*order[:leaders], *ALWAYS_AGAIN} & set(order)
    if frontier:
        again |= set(undominated({name: (best[name]["bytes_per_weight"], loss_of(best[name])) for name in order}))
    adamw = best[ADAMW]["matrix_state_bytes"] if ADAMW in best else None
    lines = []
    for name in order:
        found = best[name]
        others = [runs.get(name, found["learning_rate"], seed) for seed in range(1, seeds)] if name in again else []
        losses = [record["val_loss"] for record in (found, *others) if record is not None]
        several = {"loss": statistics.fmean(losses), "seeds": len(losses)}
        several["deviation"] = statistics.stdev(losses) if len(losses) > 1 else None
        line = {
            key: found[key]
            for key in (
                "optimizer", "learning_rate", "tried", "matrix_state_bytes", "bytes_per_weight", "update_rms",
                "seconds_per_step",
            )
        }  # fmt: skip
        lines.append(line | several | {"val_losses": losses, "share": adamw and found["matrix_state_bytes"] / adamw})
    return sorted(lines, key=lambda line: line["loss"])


def table(lines: list[dict]) -> str:
    """Markdown: the validation losses by learning rate with the first seed, the best of them bold, and of all seeds with it."""
    rates = sorted({rate for line in lines for rate in line["tried"]}, key=float)
    heads = [
        "matrices on", *rates, "of all seeds", "of AdamW's", "matrix state, MB", "bytes a weight", "of AdamW's", "update RMS",
        "s a step",
    ]  # fmt: skip
    text = [heads, ["---"] * len(heads)]
    reference = next((line["loss"] for line in lines if line["optimizer"] == ADAMW), None)
    for line in lines:
        tried = {rate: f"{loss:.3f}" for rate, loss in line["tried"].items()}
        best, mean = f"{line['learning_rate']:g}", line["loss"]
        tried[best] = f"**{tried[best]}**"
        several = "" if line["deviation"] is None else f" ± {line['deviation']:.4f} ({line['seeds']} seeds)"
        text.append([
            line["optimizer"], *(tried.get(rate, "") for rate in rates), f"{mean:.4f}{several}",
            f"{mean / reference:.3f}" if reference else "", f"{line['matrix_state_bytes'] / 1e6:.2f}",
            f"{line['bytes_per_weight']:.2f}",
            "" if line["share"] is None else f"{line['share']:.1%}", f"{line['update_rms']:.2g}",
            f"{line['seconds_per_step']:.2f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def label_points(axis: Axes, points: list[tuple[float, float, str]], theme: Theme) -> None:
    """Names beside (x, y), the lowest first, each at least a line above those that it would cover."""
    axis.figure.draw_without_rendering()
    placed = []
    for x, y, name in sorted(points, key=lambda point: point[1]):
        left, bottom = axis.transData.transform((x, y))
        right = left + 10 + 6 * len(name)
        covered = [above for start, end, above in placed if start < right and left < end]
        bottom = max([bottom + (8 if placed else -11), *(above for above in covered if above > bottom)])
        placed.append((left, right, bottom + 15))
        arrow = {"arrowstyle": "-", "linewidth": 0.6, "color": theme.faint}
        axis.annotate(
            name, (x, y), xytext=axis.transData.inverted().transform((left + 10, bottom)), textcoords="data", fontsize="small",
            verticalalignment="center", arrowprops=arrow,
        )  # fmt: skip


KINDS = {
    "low-rank gradients": ("galore", "q_galore", "fira", "golore", "ldadam", "apollo", "grass"),
    "low-rank weights": ("lora", "relora", "low_rank"),
    "momentum of every direction": ("muon", "optax_muon"),
    "others": ("",),
}
"""What an optimizer keeps state of, by the beginning of its name."""


def kind_of(name: str) -> str:
    """Of an optimizer.

    >>> kind_of("galore_muon, keep"), kind_of("muon_8bit-b.9"), kind_of("adamw")
    ('low-rank gradients', 'momentum of every direction', 'others')
    """
    return next(kind for kind, beginnings in KINDS.items() if name.startswith(beginnings))


def colors_of(theme: Theme) -> dict[str, str]:
    return dict(zip(KINDS, (theme.blue, theme.yellow, theme.purple, theme.faint), strict=True))


def plot(runs: Runs, lines: list[dict], out: pathlib.Path, group: str) -> None:
    save(lambda theme: against_state(lines, theme), out, f"{group}-state")
    if any(len(line["tried"]) > 1 for line in lines):
        save(lambda theme: against_rates(lines, theme), out, f"{group}-rates")
    curves = {line["optimizer"]: runs.get(line["optimizer"], line["learning_rate"])["validation"] for line in lines}
    save(lambda theme: against_steps(lines, curves, theme), out, f"{group}-steps")


def frontier_of(lines: list[dict]) -> list[str]:
    """The optimizers that nothing smaller is better than; a picture names these, and AdamW."""
    return undominated({line["optimizer"]: (line["bytes_per_weight"], line["loss"]) for line in lines})


def against_state(lines: list[dict], theme: Theme) -> Figure:
    """Loss against bytes of state, with the frontier as a line."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    places = {line["optimizer"]: (line["bytes_per_weight"], line["loss"]) for line in lines}
    best = frontier_of(lines)
    axis.step(*np.array([places[name] for name in best]).T, where="post", color=theme.faint, linewidth=1, zorder=1)
    for kind, color in colors_of(theme).items():
        chosen = [line for line in lines if kind_of(line["optimizer"]) == kind]
        if chosen:
            points = np.array([places[line["optimizer"]] for line in chosen]).T
            spread = [line["deviation"] or 0.0 for line in chosen]
            axis.errorbar(*points, yerr=spread, color=color, fmt="o", label=kind, zorder=2)
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_xlim(-0.02, 30)
    axis.xaxis.set_major_locator(FixedLocator([0, 0.1, 0.3, 1, 3, 8]))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="optimizer state, bytes a weight of the matrices", ylabel="validation loss, nats a byte")
    axis.grid()
    title(figure, "Loss against optimizer state")
    figure.legend(loc="outside lower center", ncols=4)
    label_points(axis, [(*places[name], name) for name in {*best, ADAMW} & places.keys()], theme)
    return figure


def against_rates(lines: list[dict], theme: Theme) -> Figure:
    """Loss against learning rates."""
    lines = [line for line in lines if len(line["tried"]) > 1]
    curves = {line["optimizer"]: [(float(rate), loss) for rate, loss in line["tried"].items()] for line in lines}
    figure, axis = in_color(lines, curves, theme)
    axis.set_xscale("log")
    rates = sorted({rate for curve in curves.values() for rate, _ in curve})
    axis.xaxis.set_major_locator(FixedLocator(rates))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="learning rate of the matrices")
    title(figure, "Loss against learning rate")
    return figure


def against_steps(lines: list[dict], curves: dict[str, list], theme: Theme) -> Figure:
    """Loss during the run with the first seed, at the best learning rate."""
    figure, axis = in_color(lines, curves, theme)
    axis.set(xlabel="step")
    title(figure, "Loss against steps")
    return figure


def in_color(lines: list[dict], curves: dict[str, list[tuple[float, float]]], theme: Theme) -> tuple[Figure, Axes]:
    """The curves; those of the frontier and of the usual optimizers have colors and names."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    shown = {*frontier_of(lines), *ALWAYS_AGAIN}
    colors = [theme.blue, theme.red, theme.yellow, theme.green, theme.purple, theme.text]
    looks = ({"marker": marker, "color": color} for marker in itertools.cycle("os^") for color in colors)
    for line in lines:
        name = line["optimizer"]
        look = next(looks) | {"label": name} if name in shown else {"marker": "o", "color": theme.faint, "alpha": 0.3}
        axis.plot(
            *zip(*curves[name], strict=True),
            markersize=4,
            linewidth=1.4,
            zorder=2 + (name in shown),
            **look,
        )
    low = min(line["loss"] for line in lines)
    axis.set_ylim(low - 0.03, low + 0.8)
    axis.set(ylabel="validation loss, nats a byte")
    axis.grid()
    figure.legend(loc="outside lower center", ncols=4)
    return figure, axis


def publish(lines: list[dict], contestants: dict, steps: int, rank: float, path: pathlib.Path) -> None:
    """Puts the presets that nothing smaller is better than into the file of galore_jax.recommend, in place of those at as many
    steps.
    """
    file = json.loads(path.read_text())
    lines = [line for line in lines if isinstance(contestants[line["optimizer"]], Preset)]
    losses = {line["optimizer"]: statistics.fmean(line["val_losses"]) for line in lines}
    best = undominated({line["optimizer"]: (line["bytes_per_weight"], losses[line["optimizer"]]) for line in lines})
    found = [
        contestants[line["optimizer"]].published(rank)
        | {"steps": steps, "loss": round(losses[line["optimizer"]], 4), "learning_rate": line["learning_rate"]}
        for line in lines
        if line["optimizer"] in best
    ]
    points = [point for point in file["points"] if point["steps"] != steps] + found
    points = ",\n".join(f"    {json.dumps(point)}" for point in sorted(points, key=lambda x: (-x["steps"], x["loss"])))
    path.write_text(f'{{\n  "source": {json.dumps(file["source"])},\n  "points": [\n{points}\n  ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the runs and the results")
    parser.add_argument("--data", default="python", help='text: "python", a file or a folder')
    parser.add_argument("--model", default="20m")
    parser.add_argument("--only", nargs="+", help="names of optimizers or patterns of names; the others are left out")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--rest-rate", type=float, default=3e-3, help="of AdamW on embeddings, head and norms")
    parser.add_argument("--rank", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--val-tokens", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, default=3, help="of the leaders")
    parser.add_argument("--leaders", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument(
        "--together", action="store_true", help="all rates and seeds of an optimizer as one batch, for an accelerator"
    )
    parser.add_argument("--frontier", action="store_true")
    parser.add_argument(
        "--publish",
        type=pathlib.Path,
        help="galore_jax/presets/frontier.json, for the presets that are best for their bytes",
    )
    parser.add_argument("--report", action="store_true", help="of the runs in OUT, and make no new ones")
    args = parser.parse_args()
    if args.ablation:
        args.rates, args.leaders, args.seeds = [1e-2], 0, 1
    if args.short:
        args.only, args.rates, args.steps, args.seeds = args.only or SHORT, [3e-3, 1e-2], 40, 1
    group = "ablation" if args.ablation else "frontier" if args.frontier else "quality"
    groups = {"quality": contestants, "ablation": ablation, "frontier": frontier}
    chosen = groups[group](args.steps)
    if args.only:
        known = {name: make for of in (*groups.values(), variants) for name, make in of(args.steps).items()}
        unknown = [pattern for pattern in args.only if not fnmatch.filter(known, pattern)]
        if unknown:
            raise SystemExit(f"--only {', '.join(unknown)}: not known; there are {', '.join(known)}.")
        names = {name for pattern in args.only for name in fnmatch.filter(known, pattern)}
        chosen = {name: make for name, make in known.items() if name in names}
    runs = Runs(args, chosen)
    if args.together:
        for name in chosen:
            runs.make_together(name)
        args.report, args.leaders = True, len(chosen)
    best = runs.grid()
    if not best:
        raise SystemExit(
            f"--report: {args.out / 'runs'} has no run of {', '.join(chosen)}; leave --report out to make them."
        )
    lines = summaries(runs, best, args.seeds, args.leaders, args.frontier)
    (args.out / f"{group}.json").write_text(json.dumps({"settings": runs.settings, "results": lines}, indent=2) + "\n")
    plot(runs, lines, args.out, group)
    if args.publish:
        publish(lines, chosen, args.steps, args.rank, args.publish)
    print(table(lines))


if __name__ == "__main__":
    main()
