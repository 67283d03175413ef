# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The pre-training loop: ``train(prepare(config))``.

A run is a function of its configuration.  The weights, the subspaces, the order of the text and the sample derive
from the seed and the step, and a checkpoint holds all else (parameters, optimizer state, place in the data), so a run
that was killed and resumed gives the same numbers, bit for bit, as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.models import LlamaConfig, generate
from galore_jax.training import checkpoint, config as settings, device_use, processes, report, run_folder
from galore_jax.training.adapters import part
from galore_jax.training.checkpoint import Checkpoint, CheckpointWriter, saved_steps
from galore_jax.training.config import PROMPT_TOKENS, PretrainConfig
from galore_jax.training.data import TextData, load_data
from galore_jax.training.divergence import Diverged
from galore_jax.training.mesh import batch_parts, make_mesh
from galore_jax.training.metrics import Meter, MetricsLog, Record, rank, read_metrics
from galore_jax.training.optimizers import check_optimizer, make_schedule
from galore_jax.training.program import Program, full_rank, program
from galore_jax.training.progress import Progress, clock
from galore_jax.training.shares import train_batches
from galore_jax.training.step import make_eval_step
from galore_jax.training.subspace_plot import plot_subspace
from galore_jax.training.trackers import Tracker, tracked


@dataclasses.dataclass
class Run:
    """All that a run needs, with ``step`` optimizer steps completed."""

    config: PretrainConfig
    folder: Path
    model_config: LlamaConfig
    data: TextData
    batches: Any  # training batches, with get_state and set_state
    program: Program
    params: Any
    opt_state: Any
    step: int
    losses: list[float]  # of the steps since the last line of metrics.jsonl
    resumed_from: int | None
    lock: contextlib.ExitStack  # of the folder, held until the end of the training
    trackers: list[Tracker] = dataclasses.field(default_factory=list)


def run_pretrain(config: PretrainConfig, model_config: LlamaConfig | None = None) -> Record:
    """Train from the start, or go on from the last checkpoint; returns what ``summary.json`` holds.

    Args:
      config: the settings; with ``resume``, those of the run in ``config.out``.
      model_config: a model that is not a preset.  None: the preset with the tokenizer's vocabulary, or the run's own.

    Raises:
      ValueError, FileNotFoundError: a setting, the text, the run folder or a checkpoint cannot be used.
      CheckpointError: a checkpoint could not be written.
      Diverged: the loss or the parameters are not finite any more, or nothing is learned any more.

    SIGINT and SIGTERM end the run after the current step with a checkpoint, and ``stopped`` in what is returned names the signal;
    it is then passed on to the handler that there was before.  With ``config.distributed`` every process calls this, after
    :func:`galore_jax.training.processes.join`.
    """
    return train(prepare(config, model_config))


def prepare(config: PretrainConfig, model_config: LlamaConfig | None = None) -> Run:
    """Check everything, and make or restore the state of a run; only a new run's folder is created."""
    with contextlib.ExitStack() as lock:
        if config.resume:
            folder = run_folder.to_resume(config)
            saved, saved_model, fingerprints = run_folder.load_config(folder)
            lock.enter_context(run_folder.locked(folder))
            config, model_config = _as_saved(config, folder, saved, fingerprints), model_config or saved_model
        else:
            settings.check(config)
            folder, fingerprints = lock.enter_context(run_folder.new_folder(config)), None
        run = _load(config, folder, model_config, fingerprints)
        if run.step < config.steps:
            run.trackers = lock.enter_context(tracked(config.track, folder, dataclasses.asdict(config.resolved)))
        if config.data_workers:
            lock.callback(run.batches.close)
        run.lock = lock.pop_all()
    processes.wait_for_all("prepared")  # nobody writes into the folder before all have looked into it
    return run


def _load(
    config: PretrainConfig, folder: Path, model_config: LlamaConfig | None, fingerprints: dict[str, str] | None
) -> Run:
    """The data, the model and the optimizer; ``fingerprints`` are those of the run to resume."""
    # An unknown name is found before the text is read.
    settings.check_lengths(config, model_config or config.model_config(1))
    check_optimizer(config)
    with clock("reading the text"):
        data = load_data(
            config.data,
            tokenizer=config.tokenizer,
            sequence_length=config.seq,
            batch_size=config.batch,
            seed=config.seed,
            vocab_size=config.vocab_size,
            text_column=config.text_column,
            workers=config.data_workers,
            tokenizer_file=folder / "tokenizer.json" if config.resume else None,
        )
    if fingerprints is not None:
        run_folder.check_same_text(config.data, folder, data.fingerprint, fingerprints)
    model_config = model_config or config.model_config(data.tokenizer.vocab_size)
    if data.tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {data.tokenizer.vocab_size} ids, but the model's vocabulary has "
            f"{model_config.vocab_size}; use the tokenizer that the model was trained with."
        )
    with clock("restoring the checkpoint" if config.resume else "making the parameters"):
        return _with_state(config, folder, model_config, data)


def train(run: Run) -> Record:
    """Take the steps that are left, and write everything into the run folder; returns what ``summary.json`` holds."""
    return until_stopped(run, _train)


def until_stopped(run: Any, train: Callable[[Any, StopSignals], Record]) -> Record:
    """``train(run, signals)`` with the run's folder locked; the signal that ended it then goes to whoever had it before."""
    signals = StopSignals()
    with run.lock:
        summary = train(run, signals)
    signals.pass_on()
    return summary


def _train(run: Run, signals: StopSignals) -> Record:
    config, folder = run.config, run.folder
    began = time.perf_counter()
    sizes = report.memory(config, run.params, run.opt_state, full_rank(config, run.model_config))
    summary_file = folder / "summary.json"
    finished = report.read_summary(summary_file) if run.resumed_from == config.steps else None
    if finished is not None and finished["steps"] == config.steps:
        if processes.first():
            print(f"The run in {folder} already has its {config.steps} steps.")
            _say_goodbye(run, finished, sizes)
        return finished

    first = processes.first()
    if first:
        if run.resumed_from is None:
            run.data.tokenizer.save(folder / "tokenizer.json")
        run_folder.save_config(config, run.model_config, folder, run.data.fingerprint)
    validated = bool(processes.largest(first and is_validated(run)))
    with (
        signals,
        MetricsLog(folder, run.step, run.trackers) if first else processes.Silent() as log,
        Progress(run.step, config.steps) if first else processes.Silent() as progress,
        CheckpointWriter(folder / "checkpoints", config.keep) as writer,
    ):
        progress.say(
            f"{config.model}, {run.model_config.num_params:,} parameters, on {device_use.names(run.params)}\n"
            f"{report.projection(config, part(run.params)[0], sizes)}\n"
            f"{run.data.description}\nrun folder: {folder}, at step {run.step} of {config.steps}"
        )
        eval_step = make_eval_step(run.program.graphdef)
        meter = Meter(
            learning_rates=learning_rates(config),
            tokens=config.batch * config.seq,
            every=config.log_every,
            losses=run.losses,
            full_speed=_full_speed(run),
        )
        with processes.until_the_dead_are_named():
            figures = take_steps(
                run, writer, log, progress, signals, meter, validated,
                compile_step=lambda: _compiled_step(run),
                evaluate=lambda: evaluate(run, eval_step),
            )  # fmt: skip

    if not first:
        return {}
    validation = [record for record in read_metrics(folder) if "val_loss" in record]
    last = validation[-1] if validation else {"val_loss": None, "val_perplexity": None}
    summary = {
        "steps": run.step,
        "stopped": signals.name if run.step < config.steps else None,
        "tokens": run.step * config.batch * config.seq,
        "final_val_loss": last["val_loss"],
        "final_val_perplexity": last["val_perplexity"],
        **sizes,
        **figures,
        "resumed_from_step": run.resumed_from,
        "wall_seconds": time.perf_counter() - began,
    }
    run_folder.write_json(summary_file, summary)
    title = f"{config.model}, {config.optimizer}"
    report.plot_loss(folder, title)
    plot_subspace(folder, title)
    if run.step == config.steps:
        _say_goodbye(run, summary, sizes)
    else:
        print(f"Stopped after step {run.step}; continue with: {run_folder.resume_command(folder)}")
    return summary


def _full_speed(run: Run) -> float | None:
    """For :class:`Meter`; of a model with low-rank weights it would be another than the model's."""
    if run.config.optimizer in settings.LOW_RANK_WEIGHTS:
        return None
    return device_use.full_speed(run.model_config, run.config.seq, run.params)


def take_steps(
    run: Any,
    writer: CheckpointWriter,
    log: MetricsLog | processes.Silent,
    progress: Progress | processes.Silent,
    signals: StopSignals,
    meter: Meter,
    validated: bool,
    *,
    compile_step: Callable[[], Any],
    evaluate: Callable[[], Record],
) -> Record:
    """Train until the last step or a signal; returns the figures of ``summary.json`` about time and memory.

    Args:
      run: has ``config`` (of which ``steps``, ``eval_every`` and ``save_every``), ``folder``, ``batches``, ``resumed_from``,
        ``losses``, and ``params``, ``opt_state`` and ``step``, which are replaced step by step.
      writer, log, progress, signals, meter: what a step is told to.
      validated: whether ``log`` has the validation of ``run`` as it is.
      compile_step: gives ``step(params, opt_state, batch) -> (params, opt_state, metrics)``; called once, after the checkpoint
        of step 0.
      evaluate: the record of a validation of ``run`` as it is now.

    Raises:
      CheckpointError: a checkpoint could not be written.
      Diverged: the run cannot go on; all checkpoints are from before, and finite.
    """
    config = run.config
    ranks = _ranks_of_checkpoints(run, writer)
    stalls: list[float] = []  # seconds that each save kept the next step waiting; the files are written meanwhile

    def note(record: Record | None) -> None:
        if record is not None:
            log.write(record)
            progress.show(record, meter.step_seconds)
            writer.check()

    def pause(*, validate: bool, save: bool) -> None:
        note(meter.finish())
        began = time.perf_counter()
        if validate or save:
            meter.watch.check_parameters(run.step, run.params)
        checked = time.perf_counter()
        if validate:
            note(record := evaluate())
            meter.watch.check_validation(run.step, record["val_loss"])
            if save:
                ranks[run.step] = rank(record)
                writer.kept.best = min(ranks, key=lambda step: ranks[step])
        if save and (not meter.watch.stuck or run.step == config.steps):
            validated_in = time.perf_counter() - checked
            state = run.batches.get_state()
            writer.save(Checkpoint(run.step, run.params, run.opt_state, state, list(meter.losses)), meter.watch.sound)
            stalls.append(time.perf_counter() - began - validated_in)
        meter.start()

    def stopped() -> bool:
        if not processes.several() or run.step % config.log_every == 0:  # all at the same step
            signals.received = processes.largest(signals.received)
            return signals.received != 0
        return False

    def steps() -> float:
        saved, validated_at = run.resumed_from, run.step if validated else None
        if saved is None:
            pause(validate=False, save=True)
            saved = 0
        began = time.perf_counter()
        with progress.compiling():
            train_step = compile_step()
        compile_seconds = time.perf_counter() - began
        meter.start()
        while run.step < config.steps and not stopped():
            run.params, run.opt_state, metrics = train_step(run.params, run.opt_state, meter.batch(run.batches))
            run.step += 1
            note(meter.add(run.step, metrics))
            progress.advance()
            last = run.step == config.steps
            validate, save = (last or run.step % every == 0 for every in (config.eval_every, config.save_every))
            if validate or save:
                pause(validate=validate, save=save)
                saved, validated_at = run.step if save else saved, run.step if validate else validated_at
        pause(validate=run.step == config.steps and validated_at != run.step, save=saved != run.step)
        return compile_seconds

    try:
        compile_seconds = steps()
    except Diverged as error:
        raise Diverged(f"{error}; {_way_back(run, writer, meter.watch.sound)}") from error
    return {
        "compile_seconds": compile_seconds,
        "step_seconds_median": statistics.median(meter.seconds) if meter.seconds else None,
        "step_seconds_max": max(meter.seconds, default=None),
        "save_seconds_median": statistics.median(stalls) if stalls else None,
        "save_seconds_max": max(stalls, default=None),
        **meter.speed(config.steps),
    }


def _ranks_of_checkpoints(run: Any, writer: CheckpointWriter) -> dict[int, tuple[float, float]]:
    """How good the validations were of the steps that have checkpoints."""
    saved = saved_steps(writer.folder)
    records = [record for record in read_metrics(run.folder) if record["step"] in saved and "val_loss" in record]
    ranks = {record["step"]: rank(record) for record in records}
    writer.kept.best = min(ranks, key=lambda step: ranks[step], default=None)
    return ranks


def _way_back(run: Any, writer: CheckpointWriter, sound: int) -> str:
    """What to do about a run that diverged after the step ``sound``."""
    step = writer.go_back(sound)
    if step is None or not sound:
        return "it started so, which no learning rate mends: check the model and the data"
    command = run_folder.resume_command(run.folder, writer.command)
    rate = run.config.learning_rate / 2
    return f"continue from the checkpoint of step {step} at a lower learning rate: {command} --learning-rate {rate:g}"


def learning_rates(config: PretrainConfig) -> np.ndarray:
    """That of each step, float32 [steps]."""
    return np.asarray(jax.vmap(make_schedule(config))(np.arange(config.steps, dtype=np.int32)))


def _compiled_step(run: Run) -> Any:
    """The training step, compiled ahead: no step can compile again, and the first is as fast as the others."""
    with run.program.on_mesh():
        compiled = run.program.step.lower(run.params, run.opt_state, run.program.batch).compile()

    def take(params: Any, opt_state: Any, tokens: np.ndarray) -> Any:
        return compiled(params, opt_state, processes.place(tokens, run.program.batch.sharding))

    return take


def evaluate(run: Run, eval_step: Any) -> Record:
    """Loss and perplexity of the validation text, in pieces as large as a micro-batch of training."""
    piece = run.config.batch // run.config.accumulate
    pieces = [
        batch[start : start + piece]
        for batch in run.data.validation_batches(run.config.eval_tokens)
        for start in range(0, len(batch), piece)
    ]
    with run.program.on_mesh():
        results = [eval_step(run.params, _on_devices(run.program, tokens)) for tokens in pieces]
    totals, counts = zip(*jax.device_get(results), strict=True)
    loss = math.fsum(totals) / sum(int(count) for count in counts)
    with np.errstate(over="ignore"):  # a diverged run has an infinite perplexity
        perplexity = float(np.exp(np.float64(loss)))
    return {"step": run.step, "val_loss": loss, "val_perplexity": perplexity}


def _on_devices(built: Program, tokens: np.ndarray) -> Any:
    """A batch of any size where the parameters are, spread if it can be."""
    if built.mesh is None:
        return tokens
    if len(tokens) % batch_parts(built.mesh):
        return processes.place(tokens, NamedSharding(built.mesh, PartitionSpec()))
    return processes.place(tokens, built.batch.sharding)


class StopSignals:
    """While this context lasts, the first SIGINT or SIGTERM asks to stop after the current step; the next one kills."""

    def __init__(self) -> None:
        self.received = 0
        """The number of the signal."""
        self._previous: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """SIGINT or SIGTERM, if one was received."""
        return signal.Signals(self.received).name if self.received else None

    def pass_on(self) -> None:
        """After the context: give the signal that was received to the handler that there was before."""
        if self.received:
            signal.raise_signal(self.received)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        for other in self._previous:
            signal.signal(other, signal.SIG_DFL)
        os.write(2, b"\nStopping after this step, with a checkpoint; a second signal stops at once.\n")


def _as_saved(
    config: PretrainConfig, folder: Path, saved: PretrainConfig, fingerprints: dict[str, str]
) -> PretrainConfig:
    """The settings with which the run in ``folder`` goes on."""
    config = run_folder.as_started(config, saved)
    run_folder.check_same_run(config, saved)
    step = checkpoint.last_step(folder / "checkpoints")
    if config.steps < step:
        raise ValueError(
            f"--steps {config.steps} is less than the {step} steps that the run in {folder} has made; "
            "name a larger number, or leave it out to finish the run."
        )
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.exists():
        raise FileNotFoundError(f"{tokenizer_file} does not exist, and the run in {folder} needs it.")
    run_folder.check_same_tokenizer(folder, fingerprints)
    read_metrics(folder)  # a damaged line is found before anything is written
    settings.check(config)
    return config


def _with_state(config: PretrainConfig, folder: Path, model_config: LlamaConfig, data: TextData) -> Run:
    run = program(config, model_config, None if config.mesh is None else make_mesh(config.mesh))
    if config.resume:
        checkpoints = folder / "checkpoints"
        step = checkpoint.last_step(checkpoints)
        restored = checkpoint.restore(checkpoints, step, *run.state)
        batches = train_batches(data, run.batch, restored.data)
        params, opt_state, losses, resumed_from = restored.params, restored.opt_state, restored.losses, step
    else:
        batches = train_batches(data, run.batch, None)
        with run.on_mesh():
            params, opt_state = run.init(jax.random.key(config.seed))
        step, losses, resumed_from = 0, [], None
    return Run(
        config, folder, model_config, data, batches, run, params, opt_state, step, losses, resumed_from,
        lock=contextlib.ExitStack(),
    )  # fmt: skip


def is_validated(run: Any) -> bool:
    """Whether the log has the validation of a run as it is."""
    return any("val_loss" in record for record in read_metrics(run.folder) if record["step"] == run.step)


def _say_goodbye(run: Run, summary: Record, sizes: dict[str, int]) -> None:
    print(report.closing_words(run.config, run.folder, summary, sizes))
    if processes.several():
        print(f"\nFor a sample: {shlex.join(['galore-jax', 'generate', '--model', str(run.folder)])}")
    elif run.config.sample_tokens:
        prompt = next(iter(run.data.validation_batches(1)))[0, :PROMPT_TOKENS]
        key = jax.random.fold_in(jax.random.key(run.config.seed), run.step)
        model = nnx.merge(run.program.graphdef, run.params)
        sample = generate(model, prompt, run.config.sample_tokens, key=key, temperature=0.8)
        text = run.data.tokenizer.decode(np.concatenate([prompt, sample]))
        print(f"\nsample, from the first {PROMPT_TOKENS} tokens of the validation text:\n{text}")
