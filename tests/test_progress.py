# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it runs: a clock, one speed, its memory, its first lines; and the pictures of it."""

import io
import re
import sys
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from galore_jax import galore_adamw
from galore_jax.cli import _plain_warnings
from galore_jax.models import Llama, LlamaConfig
from galore_jax.planning.targets import TARGETS, peak_flops
from galore_jax.training import device_use, metrics, report
from galore_jax.training.config import PretrainConfig
from galore_jax.training.metrics import Meter
from galore_jax.training.progress import Progress
from galore_jax.training.step import galore_counts, token_losses


class Terminal(io.StringIO):
    def isatty(self):
        return True


RECORD = {
    "step": 10, "loss": 2.5, "learning_rate": 0.01, "tokens_per_second": 51234.5, "data_wait": 0.0, "peak_memory_bytes": 2**30,
}  # fmt: skip


def shown(monkeypatch, stream):
    """What a run of 20 steps shows of its first 10, which follow a compilation of a second and a bit."""
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(0, 20) as progress:
        with progress.compiling():
            time.sleep(1.2)
        for _ in range(10):
            progress.advance()
        progress.show(RECORD, 2.0)
        progress.show({"step": 10, "val_loss": 0.4, "val_perplexity": 1.5}, 2.0)
    return stream.getvalue()


def test_a_terminal_has_a_moving_clock_and_then_the_words_that_a_pipe_has(monkeypatch):
    terminal, pipe = shown(monkeypatch, Terminal()), shown(monkeypatch, io.StringIO())
    assert [int(n) for n in re.findall(r"\rcompiling the training step \.\.\. (\d+) s", terminal)] == [0, 1]
    assert "compiling" not in re.split(r"compiled in 1\.\d s", terminal)[1]
    words = "loss 2.5000, learning rate 1.00e-02, 51,234 tokens/s, 1.0 GiB, 00:20 left"
    assert pipe == (
        f"compiling the training step ...\ncompiled in {re.search(r'compiled in (.*) s', pipe)[1]} s\n"
        f"step 10/20: {words}\nstep 10: validation loss 0.4000, perplexity 1.50\n"
    )
    assert words in terminal
    assert "10/20" in terminal
    assert "it/s" not in terminal
    assert "step/s" not in terminal


def test_an_error_while_a_clock_runs_is_not_hidden_by_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(MemoryError), Progress(0, 1) as progress, progress.compiling():
        raise MemoryError
    assert terminal.getvalue().endswith("\r\033[K")
    assert "compiled" not in terminal.getvalue()


def test_a_speed_is_that_of_the_steps_alone_and_over_enough_of_them(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(device_use, "peak_memory_bytes", lambda: 7)
    durations = np.where(np.arange(100) % 2, 1.0, 3.0)  # which no reader wants to see
    meter, records = Meter(np.ones(100), 10, 1, [], full_speed=20.0), []
    for step, seconds in enumerate(durations, start=1):
        clock[0] += 1000.0  # compilation, a validation, a checkpoint
        meter.start()
        meter.add(step, {"loss": np.float32(1), "grad_norm": np.float32(1), **galore_counts({}), "subspace": {}})
        clock[0] += seconds
        records.append(meter.finish())
    speeds = [record["tokens_per_second"] for record in records]
    assert speeds[0] == pytest.approx(10 / 3)
    assert speeds[19:] == pytest.approx([5.0] * 81)
    assert [record["mfu"] for record in records[19:]] == pytest.approx([0.25] * 81)
    assert records[0]["peak_memory_bytes"] == 7
    assert meter.speed(100) == {"tokens_per_second": 5.0, "mfu": 0.25, "data_wait": 0.0, "peak_memory_bytes": 7}
    assert meter.step_seconds == 2.0


def test_the_share_of_the_time_that_goes_into_waiting_for_data(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def batches():
        for number in range(40):
            clock[0] += 0.5 if number < 20 else 3.0
            yield number

    meter, texts = Meter(np.ones(40), 10, 1, []), batches()
    meter.start()
    for step in range(1, 41):
        assert meter.batch(texts) == step - 1
        clock[0] += 1.5 if step <= 20 else 1.0
        meter.add(step, {"loss": np.float32(1), "grad_norm": np.float32(1), **galore_counts({}), "subspace": {}})
        if step == 20:
            meter.finish()
            assert meter.speed(20)["data_wait"] == pytest.approx(0.25)
    meter.finish()
    assert meter.speed(20)["data_wait"] == pytest.approx(0.75)
    assert meter.speed(40)["data_wait"] == pytest.approx(70 / 120)


def test_the_operations_of_a_token_are_those_that_the_compiler_counts():
    model = LlamaConfig(
        hidden_size=128, intermediate_size=320, num_attention_heads=4, num_hidden_layers=1, vocab_size=512
    )
    graphdef, params = nnx.split(Llama(model, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = jax.ShapeDtypeStruct((2, 65), jnp.int32)

    def loss(params, tokens):
        return jnp.mean(token_losses(graphdef, params, tokens))

    forward = jax.jit(loss).lower(nnx.to_pure_dict(params), tokens).cost_analysis()["flops"] / (2 * 64)
    assert device_use.flops_per_token(model, 64) / 3 == pytest.approx(forward, rel=0.05)


def test_the_share_of_the_peak_is_that_of_all_devices_and_left_out_where_the_peak_is_not_known():
    model, cpu = LlamaConfig.preset("60m"), {"w": jnp.ones(3)}
    assert device_use.full_speed(model, 256, cpu) is None
    cards = [types.SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB")] * 2
    params = {"w": types.SimpleNamespace(devices=lambda: cards)}
    assert device_use.full_speed(model, 256, params) == 2 * 312e12 / device_use.flops_per_token(model, 256)
    assert device_use.names(params) == "2 x NVIDIA A100-SXM4-80GB"
    assert all(peak_flops(kind) for kind in ("TPU v4", "TPU v5p", "TPU v6 lite", "Tesla T4"))
    for target in TARGETS.values():
        assert 10 < target.hardware.tflops < 1000
    assert 10**7 < device_use.peak_memory_bytes() < 10**12


def test_the_first_lines_say_what_is_projected_and_a_warning_where_nothing_is(capsys):
    params = {
        "wide": {"kernel": jax.ShapeDtypeStruct((3, 64, 128), "float32")},
        "narrow": {"kernel": jax.ShapeDtypeStruct((16, 128), "float32")},
        "scale": jax.ShapeDtypeStruct((128,), "float32"),
    }
    config = PretrainConfig(rank=0.25)
    sizes = {"optimizer_state_bytes": 1024, "adamw_state_bytes": 4096}
    assert report.projection(config, params, sizes) == (
        "galore_adamw trains 26,752 parameters, projects 4 matrices (2 of 3 parameters) at ranks 4, 16; state 1.0 KiB, "
        "25.0% of AdamW's"
    )
    whole = PretrainConfig(optimizer="adamw")
    assert "adamw trains 26,752 parameters, projects no matrix; " in report.projection(whole, params, sizes)
    of_matrices = "muon_4bit trains 26,752 parameters, updates 4 matrices (2 of 3 parameters) as matrices; "
    assert of_matrices in report.projection(PretrainConfig(optimizer="muon_4bit"), params, sizes)
    with _plain_warnings():
        warnings.simplefilter("default")
        galore_adamw(0.01, rank=500).init({"kernel": jnp.ones((8, 16))})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: galore projects none of the 1 parameters")


def test_the_smoothed_loss_begins_and_ends_where_the_loss_does():
    steps = np.arange(200.0)
    falling = np.column_stack([steps, 10 * np.exp(-steps / 30)])
    smoothed = report.smooth(falling)
    np.testing.assert_array_equal(smoothed[[0, -1]], falling[[0, -1]])
    assert np.all(np.diff(smoothed[:, 1]) < 0)
    noisy = np.column_stack([steps, np.random.default_rng(0).normal(size=200)])
    assert np.std(report.smooth(noisy)[10:-10, 1]) < 0.4


@pytest.mark.parametrize("quantity", ["val_perplexity", "val_accuracy"])
def test_validations_are_marked_and_the_best_with_a_star(quantity, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    with metrics.MetricsLog(tmp_path, 0) as log:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
            log.write({"step": step, "loss": loss})
            log.write({"step": step, "val_loss": loss, quantity: 1 / loss})
    report.plot_loss(tmp_path, "a run")
    lines = figures[0].axes[0].get_lines()
    marks = {line.get_marker(): line.get_xydata().tolist() for line in lines}
    assert marks["o"] == [[10, 3.0], [20, 1.0], [30, 2.0]]
    assert marks["*"] == [[20, 1.0]]
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert labels == ["training (smoothed)", "validation", "best validation, step 20"]
