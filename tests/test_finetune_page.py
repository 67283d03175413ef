# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What docs/finetune.md tells people to type is what the programs take."""

import json
import pathlib
import re
import shlex
import sys

import pytest

from galore_jax.cli import parse
from galore_jax.training import FinetuneConfig, finetune_config
from galore_jax.training.classification import ClassifyConfig
from galore_jax.training.examples import task_of

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "finetune.md").read_text()
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def test_there_are_commands_of_every_kind():
    assert len(COMMANDS) == 9
    assert {line.split()[0] for line in COMMANDS} == {"galore-jax", "python"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_one_that_can_be_typed(line, monkeypatch):
    program, name, *arguments = shlex.split(line)
    if program == "python":
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        import finetune

        assert finetune.arguments().steps > 100
        return
    if name == "classify":
        parse(ClassifyConfig, arguments, name)
        return
    assert name == "finetune"
    if "--resume" in arguments:  # what it does not name is in the run's folder
        assert parse(FinetuneConfig, arguments, name, finetune_config.BLANK).out is not None
        return
    finetune_config.check(parse(FinetuneConfig, arguments, name))


def test_the_lines_of_examples_are_of_the_kinds_that_are_read(tmp_path):
    lines = re.findall(r"^\| `(\{.*?\})`", PAGE, re.MULTILINE)
    tasks = []
    for line in lines:
        (tmp_path / "a.jsonl").write_text(line + "\n")
        tasks.append(task_of(str(tmp_path / "a.jsonl")))
        assert isinstance(json.loads(line), dict)
    assert tasks == ["response", "response", "response", "label", "text"]
