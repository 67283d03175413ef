# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The loop in this process: a run that resumes.  How runs end: test_run_ends.py.  From outside: test_cli.py."""

import dataclasses
import json

import pytest
from problems import leniency
from runs import TINY

from galore_jax.training import metrics
from galore_jax.training.config import PretrainConfig
from galore_jax.training.loop import run_pretrain
from galore_jax.training.run_folder import load_config


@pytest.mark.slow
def test_a_run_of_adamw_has_no_subspaces_and_resumes_though_its_config_is_older_than_they_are(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the low rank gradient of a matrix\n\n" * 400)
    folder = tmp_path / "run"
    config = PretrainConfig(
        optimizer="adamw", data=str(tmp_path / "text.txt"), steps=4, batch=2, seq=16, log_every=1, warmup_steps=1,
        sample_tokens=0, out=folder,
    )  # fmt: skip
    with leniency():  # Optax's schedules mix dtypes
        run_pretrain(dataclasses.replace(config, steps=2), dataclasses.replace(TINY, vocab_size=257))
    assert (folder / "loss.png").exists()
    assert not (folder / "subspace.png").exists()
    assert "subspace" not in capsys.readouterr().out
    first = metrics.read_metrics(folder)[0]
    assert (first["skipped"], first["kept_bases"], first["rejected_bases"]) == (0, 0, 0)
    assert not {"captured_energy", "basis_overlap", "update_rms", "subspace"} & first.keys()

    fields = json.loads((folder / "config.json").read_text())
    older = {name: value for name, value in fields.items() if name not in ("refresh", "transport", "diagnostics")}
    (folder / "config.json").write_text(json.dumps(older))
    lines = [
        {k: v for k, v in r.items() if k not in ("kept_bases", "rejected_bases")} for r in metrics.read_metrics(folder)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with leniency():
        summary = run_pretrain(dataclasses.replace(load_config(folder)[0], steps=4))
    assert (summary["steps"], summary["resumed_from_step"]) == (4, 2)
    assert [record["step"] for record in metrics.read_metrics(folder) if "loss" in record] == [1, 2, 3, 4]
