# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever the flags of a command say: it works, or ends with one sentence and exit code 2, and then nothing was written."""

import contextlib
import dataclasses
import io
from typing import get_args, get_type_hints

import pytest
from finetuning import write_lines, write_model
from hypothesis import HealthCheck, given, settings, strategies as st

from galore_jax.cli import main
from galore_jax.training import classification, described, export, finetune, generation, loop, tokenized, trained
from galore_jax.training.config import PretrainConfig
from galore_jax.training.finetune_config import FinetuneConfig

KINDS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "generate": generation.GenerateConfig,
    "tokenize": tokenized.TokenizeConfig,
    "classify": classification.ClassifyConfig,
    "export": export.ExportConfig,
    "describe": described.DescribeConfig,
}
NEEDED = {
    "pretrain": ["--data", "text.txt"],
    "finetune": ["--model", "model", "--data", "text.txt"],
    "generate": ["--model", "model", "--prompt", "a"],
    "tokenize": ["--data", "text.txt", "--out", "tokens"],
    "classify": ["--model", "model", "--text", "a"],
    "export": ["model", "exported"],
    "describe": ["model"],
}
ODD = [
    "", " ", "-", "x", "None", "nan", "inf", "-inf", "0", "-0", "-1", "1", "2", "3", "0.5", "1.5", "1e-400", "1e400", "4096",
    "2147483647", "2147483648", "9" * 40, "1_000", "rms", "None,None", "data=0", "data=2,data=2", "model=", "f32", "int8", "bpe",
    "adamw", "lora", "relora", "apollo_mini", "svd", "\u00e9\ud800", "a\x00b", "n" * 300, "hf:", "hf::", "hf:./gone", "gone",
    "text.txt", "text.txt/x", "rows.jsonl", "bytes.bin", "empty", "model", "..", "tokens.json", "demo", "60m",
    "model/config.json",
]  # fmt: skip
AS_IT_IS = {"distributed", "help"}  # the one waits for other processes, the other prints


class Reached(ValueError):
    """All that can be wrong with flags has been looked at; from here on it takes memory and time."""


def reached(*_, **__):
    raise Reached("everything was checked")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with something of each kind."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text("the low rank gradient of a matrix\n\n" * 100)
    write_lines(folder / "rows.jsonl", [{"text": f"row {i}", "label": i % 2} for i in range(40)])
    (folder / "bytes.bin").write_bytes(bytes(range(256)))
    (folder / "empty").mkdir()
    write_model(folder / "model")
    return folder


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def usual(kind):
    """Values of the type of a field, many of them in range."""
    names = [str(word) for part in get_args(kind) or (kind,) for word in get_args(part) or ()] + [
        *map(str, get_args(kind))
    ]
    text = str(kind)
    numbers = ["1", "2", "4", "8", "64"] if "int" in text else []
    numbers += ["0.25", "1.0", "1e-3"] if "float" in text else []
    return st.sampled_from([*numbers, *ODD[-13:], *(name for name in names if "<" not in name)])


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(list(KINDS)))
    fields = [field.name for field in dataclasses.fields(KINDS[command]) if field.name not in AS_IT_IS]
    types = get_type_hints(KINDS[command])
    flags = st.sampled_from([*fields, "stepz", "Model"]).map(lambda name: "--" + name.replace("_", "-"))
    words = st.one_of(
        *[st.tuples(st.just("--" + name.replace("_", "-")), usual(types[name])) for name in fields],
        st.tuples(flags, st.sampled_from(ODD)),
        st.tuples(flags, st.text(max_size=5)),
        st.tuples(flags),
        st.tuples(st.sampled_from(ODD)),
    )
    given_ = [word for group in draw(st.lists(words, min_size=1, max_size=4)) for word in group]
    return [command, *(draw(st.sampled_from([NEEDED[command], []]))), *given_]


def check(arguments, place):
    before, out, err = tree(place), io.StringIO(), io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    if code == 2:
        assert err.getvalue().startswith("error: ")
        assert err.getvalue().count("\n") == 1
        assert out.getvalue() == ""
        assert tree(place) == before
    else:
        assert code == 0
        for path in sorted(tree(place).keys() - before.keys(), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def patched(monkeypatch):
    monkeypatch.setattr(loop, "_with_state", reached)
    monkeypatch.setattr(finetune, "_model", reached)
    monkeypatch.setattr(trained, "load_hf", reached)
    monkeypatch.setattr(classification, "load_hf_classifier", reached, raising=False)


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=QUIET)
@given(arguments=command_lines())
def test_any_flags_are_carried_out_or_refused_with_one_sentence(place, monkeypatch, arguments):
    patched(monkeypatch)
    check(arguments, place)


@pytest.mark.slow
@settings(deadline=None, max_examples=600, suppress_health_check=QUIET)
@given(arguments=command_lines())
def test_many_more_flags_are_carried_out_or_refused_with_one_sentence(place, monkeypatch, arguments):
    patched(monkeypatch)
    check(arguments, place)
