# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run reports: metrics, the summary, and the plots."""

import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.training import metrics, report
from galore_jax.training.step import galore_counts
from galore_jax.training.subspace_plot import plot_subspace


def test_the_meter_averages_an_interval_and_goes_on_where_a_checkpoint_left_it():
    def run(meter, steps):
        meter.start()
        records = [
            meter.add(s, {"loss": jnp.float32(s), "grad_norm": jnp.float32(2), **galore_counts(()), "subspace": {}})
            for s in steps
        ]
        return [record for record in [*records, meter.finish()] if record is not None]

    rates = np.linspace(0.0, 0.9, 10)
    whole = run(metrics.Meter(rates, 100, 4, []), range(1, 11))
    assert [(r["step"], r["loss"], r["tokens"]) for r in whole] == [(4, 2.5, 400), (8, 6.5, 800), (10, 9.5, 1000)]
    assert [r["learning_rate"] for r in whole] == pytest.approx([0.3, 0.7, 0.9])
    first = metrics.Meter(rates, 100, 4, [])
    run(first, range(1, 7))
    resumed = run(metrics.Meter(rates, 100, 4, first.losses), range(7, 11))
    assert [r["loss"] for r in resumed] == [6.5, 9.5]
    assert [r["kept_bases"] for r in resumed] == [0, 0]
    assert "subspace" not in resumed[0]


def test_a_record_has_the_diagnostics_of_each_matrix_and_their_means():
    leaves = {
        "a": {"captured_energy": [0.5, 0.25], "overlap": [np.nan, 0.875], "update_rms": [0.1, np.inf]},
        "b": {"captured_energy": [0.75], "overlap": [np.nan], "update_rms": [0.3]},
    }
    subspace = {leaf: {name: jnp.float32(x) for name, x in numbers.items()} for leaf, numbers in leaves.items()}
    meter = metrics.Meter(np.ones(1), 100, 1, [])
    meter.start()
    meter.add(1, {"loss": jnp.float32(1), "grad_norm": jnp.float32(2), **galore_counts(()), "subspace": subspace})
    record = meter.finish()
    assert (record["captured_energy"], record["basis_overlap"], record["update_rms"]) == (0.5, 0.875, 0.2)
    np.testing.assert_equal(record["subspace"], leaves)  # the decimals of float32, not those of its float64
    undefined = metrics.subspace_fields({"b": {name: np.float32([np.nan]) for name in leaves["b"]}})
    assert undefined["basis_overlap"] is None


def test_metrics_after_the_checkpoint_and_a_line_cut_short_are_dropped_on_resume(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 8, "lo')
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [2, 4, 6]
    with metrics.MetricsLog(tmp_path, 4) as log:
        log.write({"step": 6, "loss": float("nan")})
    assert metrics.read_metrics(tmp_path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 1.0},
        {"step": 6, "loss": None},
    ]


@pytest.mark.parametrize("line", [b'{"step": 4, "lo', b"", b"\xff\x00", b"{}", b'{"step": "4"}', b"4"])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 2, "loss": 1.0}\n' + line + b'\n{"step": 6, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged at line 2; delete that line"):
        metrics.read_metrics(tmp_path)


def test_tensorboard_itself_writes_the_scalars_where_tensorboardx_is_absent(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder):
            self.folder, self.scalars, self.closed = folder, [], False

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", types.SimpleNamespace(Writer=Writer))
    with metrics.MetricsLog(tmp_path, 0) as log:
        overlaps = {"mlp/up_proj": {"overlap": [math.nan, 0.5, 1.0]}, "mlp/down_proj": {"overlap": [math.nan]}}
        log.write({"step": 3, "loss": 1.5, "skipped": 0, "basis_overlap": None, "subspace": overlaps})
        (tracker,) = log._trackers
        board = tracker._writer
    assert board.scalars == [("loss", 1.5, 3), ("skipped", 0, 3), ("subspace/overlap/mlp/up_proj", 0.75, 3)]
    (record,) = metrics.read_metrics(tmp_path)
    assert record["subspace"] == {"mlp/up_proj": {"overlap": [None, 0.5, 1.0]}, "mlp/down_proj": {"overlap": [None]}}
    assert record["basis_overlap"] is None
    assert (board.folder, board.closed) == (str(tmp_path / "tensorboard"), True)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with metrics.MetricsLog(tmp_path, 3) as log:
        log.write({"step": 4, "loss": 1.0})
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [3, 4]


@pytest.mark.parametrize("text", ["", '{"steps": 12, "fin', "[]", '{"steps": 12}', None])
def test_a_damaged_summary_counts_as_none(tmp_path, text):
    path = tmp_path / "summary.json"
    whole = {"steps": 12, "final_val_loss": 2.0, "final_val_perplexity": 7.4}
    path.write_text(json.dumps(whole))
    assert report.read_summary(path) == whole
    if text is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(text)
    assert report.read_summary(path) is None


def test_the_plot_is_drawn_from_any_metrics(tmp_path):
    report.plot_loss(tmp_path, "no records")
    with metrics.MetricsLog(tmp_path, 0) as log:
        for step in range(1, 30):
            log.write({"step": step, "loss": 5 / step})
        log.write({"step": 29, "val_loss": 1.0})
    empty = (tmp_path / "loss.png").read_bytes()
    report.plot_loss(tmp_path, "a run")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "loss.png").read_bytes() != empty


def write_subspaces(folder, *numbers):
    """One record for each dict of numbers: {quantity: [of each layer]}, the same for two parameters."""
    folder.mkdir()
    with metrics.MetricsLog(folder, 0) as log:
        log.write({"step": 1, "loss": 3.0})  # as an older version wrote it
        for step, quantities in enumerate(numbers, start=2):
            log.write({"step": step, "subspace": dict.fromkeys(("mlp/up_proj", "mlp/down_proj"), quantities)})
    plot_subspace(folder, "a run")
    return (folder / "subspace.png").read_bytes() if (folder / "subspace.png").exists() else None


@pytest.mark.slow
def test_the_subspaces_are_drawn_from_any_metrics_that_have_them(tmp_path):
    assert write_subspaces(tmp_path / "none") is None
    nan = {name: [math.nan, math.nan] for name in ("captured_energy", "overlap", "update_rms")}
    usual = {"captured_energy": [0.4, 0.6], "overlap": [math.nan, 0.5], "update_rms": [0.0, 0.01]}
    zeros = {name: [0.0, 0.0] for name in nan}
    large = {name: [3.0, 4.0] for name in nan}  # a Gaussian basis is not orthonormal
    cases = {"nan": [nan], "one": [usual], "zeros": [zeros] * 2, "many": [nan, usual, large, zeros] * 20}
    pictures = {name: write_subspaces(tmp_path / name, *numbers) for name, numbers in cases.items()}
    assert {picture[:4] for picture in pictures.values()} == {b"\x89PNG"}
    assert len(set(pictures.values())) == 4
