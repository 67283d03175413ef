# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning loop: ``train(prepare(config))``, from a Hugging Face folder to others.

The loss of a batch is the mean over its targets, with no others beside them: each token of the responses and the end of the
document after it, each token of a text, or the label of each text,

    loss = -1/n sum_i log p(target_i | inputs) .

As in pre-training, a run is a function of its configuration, and one that was killed and resumed gives the same numbers, bit for
bit.  With LoRA the checkpoints hold the adapters only, and the model's own weights come from its folder again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from galore_jax.models import Llama, LlamaClassifier, LlamaConfig, add_lora, merge_lora
from galore_jax.training import checkpoint, device_use, finetune_config, report, run_folder
from galore_jax.training.chat import load_chat_template
from galore_jax.training.checkpoint import CheckpointWriter
from galore_jax.training.config import DTYPES
from galore_jax.training.examples import (
    NO_LOSS,
    Batch,
    Examples,
    TrainingBatches,
    label_counts,
    load_examples,
    num_labels,
)
from galore_jax.training.export import write_model
from galore_jax.training.finetune_config import LORA, FinetuneConfig
from galore_jax.training.loop import StopSignals, is_validated, learning_rates, take_steps, until_stopped
from galore_jax.training.metrics import Meter, MetricsLog, Record, rank, read_metrics
from galore_jax.training.optimizers import make_optimizer, make_schedule
from galore_jax.training.progress import Progress, clock, validation_words
from galore_jax.training.step import add_updates, optimizer_metrics
from galore_jax.training.tokenizer import Tokenizer
from galore_jax.training.trackers import Tracker, tracked
from galore_jax.training.trained import Trained, open_trained

BEST, LAST = "best", "last"
"""Folders with the weights that did best on the held-out examples, and with the last ones."""


@dataclasses.dataclass
class Run:
    """All that a run needs, with ``step`` optimizer steps completed."""

    config: FinetuneConfig
    folder: Path
    train: Examples
    validation: Examples
    tokenizer: Tokenizer
    eos: int
    model_config: LlamaConfig
    graphdef: nnx.GraphDef
    frozen: Any  # parameters that stay as they are
    batches: TrainingBatches
    params: Any
    opt_state: Any
    step: int
    losses: list[float]  # of the steps since the last line of metrics.jsonl
    resumed_from: int | None
    facts: dict[str, Any]  # for config.json
    sizes: dict[str, int]  # for summary.json
    description: str
    lock: contextlib.ExitStack  # of the folder, held until the end of the training
    trackers: list[Tracker] = dataclasses.field(default_factory=list)
    # Of the last validation: held-out examples by label and by likeliest label.
    confusion: list[list[int]] | None = None


def run_finetune(config: FinetuneConfig) -> Record:
    """Fine-tune from the start, or go on from the last checkpoint; returns what ``summary.json`` holds.

    Raises:
      ValueError, FileNotFoundError: a setting, the model, the examples, the run folder or a checkpoint cannot be used.
      CheckpointError: a checkpoint could not be written.
      Diverged: the loss or the parameters are not finite any more, or nothing is learned any more.

    SIGINT and SIGTERM do what they do to :func:`galore_jax.training.loop.run_pretrain`.
    """
    return train(prepare(config))


def prepare(config: FinetuneConfig) -> Run:
    """Check everything, and make or restore the state of a run; only a new run's folder is created."""
    with contextlib.ExitStack() as lock:
        if config.resume:
            folder = run_folder.to_resume(config)
            saved, facts = finetune_config.load_config(folder)
            lock.enter_context(run_folder.locked(folder))
            config = run_folder.as_started(config, saved)
            run_folder.check_same_run(config, saved, finetune_config.MAY_CHANGE)
            finetune_config.check(config)
            read_metrics(folder)  # a damaged line is found before anything is written
        else:
            finetune_config.check(config)
            named = dataclasses.replace(config.training, optimizer=config.optimizer)
            folder, facts = lock.enter_context(run_folder.new_folder(named)), None
        with clock("loading the model and the examples"):
            run = _load(config, folder, facts)
        if run.step < config.steps:
            run.trackers = lock.enter_context(tracked(config.track, folder, dataclasses.asdict(config.resolved)))
        run.lock = lock.pop_all()
    return run


def train(run: Run) -> Record:
    """Take the steps that are left, and write everything into the run folder; returns what ``summary.json`` holds."""
    return until_stopped(run, _train)


def _train(run: Run, signals: StopSignals) -> Record:
    config, folder = run.config, run.folder
    began = time.perf_counter()
    finished = _finished(run)
    if finished is not None:
        print(f"The run in {folder} already has its {config.steps} steps.")
        _say_goodbye(run, finished)
        return finished
    finetune_config.save_config(config, folder, run.facts)
    scores = make_scores(run.graphdef, run.train.task)
    jitted = jax.jit(scores)
    lengths, tokens = run.train.shapes(config.seed, config.steps)
    full_speed = None
    if config.optimizer != LORA:  # the frozen weights have no gradient
        sequence = float(tokens.mean()) / config.batch
        full_speed = device_use.full_speed(run.model_config, sequence, run.params)
    meter = Meter(learning_rates(config.training), tokens, config.log_every, run.losses, full_speed)
    with (
        signals,
        MetricsLog(folder, run.step, run.trackers) as log,
        Progress(run.step, config.steps) as progress,
        CheckpointWriter(folder / "checkpoints", config.keep, "finetune") as writer,
    ):
        progress.say(
            f"{config.model.name}, {run.model_config.num_params:,} parameters, on {device_use.names(run.params)}\n"
            f"{report.projection(config.training, run.params, run.sizes, config.optimizer)}\n{run.description}\n"
            f"run folder: {folder}, at step {run.step} of {config.steps}"
        )
        figures = take_steps(
            run, writer, log, progress, signals, meter, is_validated(run),
            compile_step=lambda: _compiled_step(run, scores, lengths[run.step :]),
            evaluate=lambda: _evaluated(run, jitted),
        )  # fmt: skip
    _export(run, LAST)
    summary = _summary(run, figures, int(tokens[: run.step].sum())) | {
        "stopped": signals.name if run.step < config.steps else None,
        "wall_seconds": time.perf_counter() - began,
    }
    run_folder.write_json(folder / "summary.json", summary)
    report.plot_loss(
        folder, f"{config.model.name}, {config.optimizer}", "text" if run.train.task == "label" else "token"
    )
    if run.step == config.steps:
        _say_goodbye(run, summary)
    else:
        print(f"Stopped after step {run.step}; continue with: {run_folder.resume_command(folder, 'finetune')}")
    return summary


def make_scores(graphdef: nnx.GraphDef, task: str) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
    """``scores(params, frozen, batch)``: the summed ``loss`` of ``count`` targets; of labels also ``confusion``,
    int32 [true label, likeliest label]."""

    def scores(params: Any, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, params, frozen)
        counted = batch.targets != NO_LOSS
        targets = jnp.where(counted, batch.targets, 0)
        right = {}
        if task == "label":
            logits = model(batch.tokens, batch.lengths)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            none = jnp.zeros((logits.shape[-1],) * 2, jnp.int32)
            right = {"confusion": none.at[targets, jnp.argmax(logits, axis=-1)].add(counted.astype(jnp.int32))}
        else:
            losses = model.losses(model.run_layers(model.embed(batch.tokens)), targets)
        return {"loss": jnp.sum(losses, where=counted), "count": jnp.sum(counted, dtype=jnp.int32)} | right

    return scores


def make_step(scores: Callable[[Any, Any, Batch], dict[str, jax.Array]], tx: optax.GradientTransformation) -> Any:
    """A jitted ``step(params, opt_state, frozen, batch) -> (params, opt_state, metrics)``; the first two are donated."""

    def step(params: Any, opt_state: Any, frozen: Any, batch: Batch) -> tuple[Any, Any, dict[str, Any]]:
        def mean_loss(params: Any) -> jax.Array:
            found = scores(params, frozen, batch)
            return found["loss"] / jnp.maximum(found["count"], 1).astype(jnp.float32)

        loss, grads = jax.value_and_grad(mean_loss)(params)
        grads = optax.tree.cast(grads, jnp.float32)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)} | optimizer_metrics(opt_state)
        return add_updates(params, updates), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


class _Parts(NamedTuple):
    """A model, as a run needs it."""

    model_config: LlamaConfig
    graphdef: nnx.GraphDef
    params: Any
    frozen: Any
    whole: Any  # abstract, without adapters
    fingerprint: str  # of what was loaded


def _load(config: FinetuneConfig, folder: Path, facts: dict[str, Any] | None) -> Run:
    """The examples, the model and the optimizer; ``facts`` are those of the run to resume."""
    trained = open_trained(config.model)
    longest = trained.model_config.longest
    if config.seq > longest:
        raise ValueError(f"--seq {config.seq} is longer than the {longest} positions of --model {config.model}.")
    eos = trained.ends[0]
    sizes = {"batch": config.batch, "seq": config.seq, "seed": config.seed, "eos": eos}
    train, validation, description = load_examples(
        config.data,
        config.eval_data,
        trained.tokenizer,
        text_column=config.text_column,
        chat=load_chat_template(config.model),
        **sizes,
    )
    labels = num_labels(train, validation) if train.task == "label" else None
    fingerprint = f"{train.fingerprint} {validation.fingerprint}"
    if facts is not None:
        run_folder.check_same_text(config.data, folder, fingerprint, facts)
    parts = _model(config, trained, train, labels)
    if facts is not None and parts.fingerprint != facts["model_fingerprint"]:
        raise ValueError(
            f"--model {config.model} is not the model that the run in {folder} was started with; "
            "put that model back, or start a new run with another --out."
        )
    run = Run(
        config, folder, train, validation, trained.tokenizer, eos, parts.model_config, parts.graphdef, parts.frozen,
        train.training(config.seed),
        params=parts.params, opt_state=None, step=0, losses=[], resumed_from=None,
        facts={"task": train.task, "data_fingerprint": fingerprint, "model_fingerprint": parts.fingerprint},
        sizes={}, description=f"{config.steps:,} steps of {config.batch} examples, "
        f"{config.steps * config.batch / len(train.examples):.2f} epochs\n{description}"
        + ("\n" + _class_words(train, validation) if labels else ""),
        lock=contextlib.ExitStack(),
    )  # fmt: skip
    _make_state(run)
    run.sizes = report.memory(config.training, (run.params, run.frozen), run.opt_state, parts.whole) | {
        "trained_params": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
    }
    return run


def _model(config: FinetuneConfig, trained: Trained, train: Examples, labels: int | None) -> _Parts:
    body = trained.load(trained.dtype if config.dtype is None else DTYPES[config.dtype])
    largest = max(int(example.tokens.max()) for example in train.examples)
    if largest >= body.config.vocab_size:
        raise ValueError(
            f"{config.model / 'tokenizer.json'} has the id {largest}, but the model's vocabulary has "
            f"{body.config.vocab_size}; use the tokenizer that the model was trained with."
        )
    weights = checkpoint.checksums(nnx.to_pure_dict(nnx.state(body, nnx.Param)))
    fingerprint = f"{zlib.crc32(repr([body.config, *sorted(weights.items())]).encode()):08x}"
    head_key, adapter_key = jax.random.split(jax.random.key(config.seed))
    model: Llama | LlamaClassifier = body
    if labels is not None:
        model = LlamaClassifier(body, labels, rngs=nnx.Rngs(params=head_key))
    whole = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    learns: Any = nnx.Param
    if config.optimizer == LORA:
        add_lora(body, config.lora_rank, alpha=config.lora_alpha, key=adapter_key)
        learns = nnx.Any(nnx.LoRAParam, nnx.PathContains("classification_head"))
    graphdef, params, frozen = nnx.split(model, learns, ...)
    return _Parts(body.config, graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen), whole, fingerprint)


def _optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    return make_optimizer(config.training, make_schedule(config.training))


def _make_state(run: Run) -> None:
    """The optimizer state of a new run, or all of the last checkpoint's."""
    tx = _optimizer(run.config)
    if not run.config.resume:
        run.opt_state = jax.jit(tx.init)(run.params)
        return
    abstract = jax.eval_shape(lambda params: (params, tx.init(params)), run.params)
    run.params = None  # the checkpoint has others
    checkpoints = run.folder / "checkpoints"
    step = checkpoint.last_step(checkpoints)
    if run.config.steps < step:
        raise ValueError(
            f"--steps {run.config.steps} is less than the {step} steps that the run in {run.folder} has made; "
            "name a larger number, or leave it out to finish the run."
        )
    restored = checkpoint.restore(checkpoints, step, *abstract)
    run.batches.set_state(restored.data)
    run.params, run.opt_state, run.losses = restored.params, restored.opt_state, restored.losses
    run.step = run.resumed_from = step


def _compiled_step(run: Run, scores: Any, lengths: np.ndarray) -> Any:
    """The step, compiled ahead for every length of batch that is to come: no step compiles again."""
    step = make_step(scores, _optimizer(run.config))
    compiled, one = {}, run.train.batch([0])
    for length in np.unique(lengths).tolist():
        tokens = np.zeros((run.config.batch, length), np.int32)
        batch = Batch(tokens, one.lengths, one.targets if run.train.task == "label" else tokens)
        compiled[length] = step.lower(run.params, run.opt_state, run.frozen, batch).compile()

    def take(params: Any, opt_state: Any, batch: Batch) -> Any:
        return compiled[batch.tokens.shape[1]](params, opt_state, run.frozen, batch)

    return take


def _evaluated(run: Run, scores: Any) -> Record:
    """The record of a validation; weights that are better than all before are written into ``best``."""
    record = {"step": run.step} | evaluate(run, scores)
    before = [other for other in read_metrics(run.folder) if "val_loss" in other and other["step"] < run.step]
    if math.isfinite(record["val_loss"]) and all(rank(record) < rank(other) for other in before):
        _export(run, BEST)
    return record


def evaluate(run: Run, scores: Callable[[Any, Any, Batch], dict[str, jax.Array]]) -> Record:
    """Loss on the held-out examples, a target, and the perplexity; or the accuracy, where the targets are labels."""
    found = jax.device_get([scores(run.params, run.frozen, batch) for batch in run.validation.in_turn()])
    count = sum(int(part["count"]) for part in found)
    loss = math.fsum(float(part["loss"]) for part in found) / count
    if run.validation.task == "label":
        run.confusion = np.sum([part["confusion"] for part in found], axis=0).tolist()
        return {"val_loss": loss, "val_accuracy": int(np.trace(run.confusion)) / count}
    with np.errstate(over="ignore"):  # a diverged run has an infinite perplexity
        return {"val_loss": loss, "val_perplexity": float(np.exp(np.float64(loss)))}


def _export(run: Run, name: str) -> None:
    """Write the model, adapters merged, into the folder ``name``, in the place of the one before when it is complete."""
    model = nnx.merge(run.graphdef, run.params, run.frozen)
    merge_lora(model.body if isinstance(model, LlamaClassifier) else model)
    write_model(
        model,
        run.folder / name,
        origin=run.config.model,
        tokenizer=run.tokenizer,
        eos=run.eos,
        labels=run.train.labels,
    )


def _summary(run: Run, figures: Record, tokens: int) -> Record:
    validations = [record for record in read_metrics(run.folder) if "val_loss" in record]
    quantities = ("val_loss", "val_accuracy" if run.train.task == "label" else "val_perplexity")
    last = validations[-1] if validations else {}
    best = min(validations, key=rank, default={})
    return {
        "steps": run.step,
        "tokens": tokens,
        **{f"final_{name}": last.get(name) for name in quantities},
        "best_step": best.get("step"),
        **{f"best_{name}": best.get(name) for name in quantities},
        "training_examples": len(run.train.examples),
        "validation_examples": len(run.validation.examples),
        "cut_examples": run.train.cut + run.validation.cut,
        **_label_facts(run),
        **run.sizes,
        **figures,
        "resumed_from_step": run.resumed_from,
    }


def _label_facts(run: Run) -> Record:
    """Of a classifier, for ``summary.json``."""
    if run.train.task != "label":
        return {}
    names, counts, majority = _classes(run.train, run.validation)
    return {
        "labels": names,
        "label_counts": counts,
        "majority_val_accuracy": majority,
        "confusion": run.confusion,
    }


def _classes(train: Examples, validation: Examples) -> tuple[list[str | int], list[int], float]:
    """The labels, how many training examples each has, and the accuracy of always saying the most frequent one."""
    counts = label_counts(train)
    names: list[str | int] = [*train.labels] if train.labels else [*sorted(counts)]
    most = max(counts, key=lambda label: (counts[label], -label))
    share = label_counts(validation)[most] / len(validation.examples)
    return names, [counts[label] for label in range(len(names))], share


def _class_words(train: Examples, validation: Examples) -> str:
    """A line on the labels."""
    names, counts, share = _classes(train, validation)
    shown = ", ".join(f"{name}: {count:,}" for name, count in zip(names[:20], counts, strict=False))
    more = f", and {len(names) - 20:,} others" if len(names) > 20 else ""
    return f"labels: {shown}{more}; the most frequent one is right on {share:.1%} of the held-out texts"


def confusion_table(names: Sequence[str | int], confusion: list[list[int]]) -> str:
    """A table for people: a row for each label, a column for each answer.

    >>> print(confusion_table(["bad", "good"], [[7, 1], [0, 12]]))
    held-out texts, by label (rows) and by answer (columns):
           bad  good
     bad     7     1
    good     0    12
    """
    cells = [["", *map(str, names)], *([str(name), *map(str, row)] for name, row in zip(names, confusion, strict=True))]
    width = max(len(cell) for row in cells for cell in row)
    rows = ("  ".join(cell.rjust(width) for cell in row) for row in cells)
    return "held-out texts, by label (rows) and by answer (columns):\n" + "\n".join(rows)


def _finished(run: Run) -> Record | None:
    """The summary of a run that has nothing left to do."""
    if run.resumed_from != run.config.steps or not (run.folder / LAST).is_dir():
        return None
    try:
        summary = run_folder.read_json(run.folder / "summary.json")
    except (OSError, ValueError):
        return None
    return summary if summary.get("steps") == run.config.steps else None


def _say_goodbye(run: Run, summary: Record) -> None:
    final = {name.removeprefix("final_"): value for name, value in summary.items() if name.startswith("final_val")}
    best = {name.removeprefix("best_"): value for name, value in summary.items() if name.startswith("best_val")}
    if summary.get("confusion") and len(summary["labels"]) <= 20:
        print(f"\n{confusion_table(summary['labels'], summary['confusion'])}")
    print(
        f"\n{report.memory_table(run.config.optimizer, run.sizes)}\n\n"
        f"{run.folder / LAST}: after {summary['steps']} steps, held-out {validation_words(final)}\n"
        f"{run.folder / BEST}: after {summary['best_step']} steps, held-out {validation_words(best)}\n"
        f"loss curve: {run.folder / 'loss.png'}"
    )
