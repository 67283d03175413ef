# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of the pages on choosing an optimizer, memory and hyperparameters are what the commands print that make them."""

import importlib
import importlib.resources
import json
import pathlib
import re
import shlex

import pytest

from galore_jax import cli
from galore_jax.training.plan import PlanConfig, prepare
from galore_jax.training.recipes import RECIPES

pytestmark = pytest.mark.pages
ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def on_page(page, name):
    """The text between a page's markers of that name."""
    text = page.read_text()
    assert text.count(f"<!-- {name}: begin -->\n\n") == 1
    return text.split(f"<!-- {name}: begin -->\n\n")[1].split(f"\n<!-- {name}: end -->")[0]


def test_the_pages_have_the_tables_of_measurements_and_recipes(script):
    for page, tables in script("tables").TABLES.items():
        for name, table in tables.items():
            assert on_page(DOCS / page, name) == table(), name


def test_the_pages_have_the_planned_and_measured_memory(script):
    plans, runs = (
        json.loads((ROOT / "benchmarks" / name).read_text()) for name in ("results/cards.json", "gpu/gpu.json")
    )
    tables = script("memory").tables(plans, runs["rows"])
    assert {page.name for page, _ in tables} == {"memory.md", "seven-billion.md"}
    for (page, name), text in tables.items():
        assert on_page(page, name) == text, name


def test_a_table_is_put_between_its_markers_alone(script, tmp_path):
    put_between, page = script("_common").put_between, tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y: end -->\n")
    put_between(page, "x", "new\n")
    put_between(page, "x", "newer\n")
    assert on_page(page, "x") == "newer\n"
    assert page.read_text().startswith("a\n<!-- x: begin -->\n\nnewer\n\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y")


def test_plans_on_cards_are_kept_under_the_flags_that_make_them(script):
    cases = script("memory").CASES + script("memory").HOST_CASES
    plans = json.loads((ROOT / "benchmarks" / "results" / "cards.json").read_text())
    assert plans
    assert plans.keys() <= {case.key for case in cases}
    for case in cases:
        assert cli.parse(PlanConfig, shlex.split(case.key), "plan") == case.config


@pytest.mark.slow
def test_the_exact_bytes_of_every_plan_are_those_of_today(script):
    plans = json.loads((ROOT / "benchmarks" / "results" / "cards.json").read_text())
    exact = ("params_bytes", "optimizer_state_bytes", "optimizer_state", "gradient_bytes", "target_bytes")
    for case in script("memory").CASES + script("memory").HOST_CASES:
        if case.key in plans:
            today = prepare(case.config).exact_bytes()
            assert plans[case.key].get("host_bytes", 0) == today["optimizer_state_bytes_on_host"]
            assert {name: today[name] for name in exact} == {name: plans[case.key][name] for name in exact}, case.key


def test_a_plan_is_called_a_fit_only_with_room_for_the_driver(script):
    memory = script("memory")
    plans = {case.key: {"params_bytes": 1, "optimizer_state_bytes": 1, "target_bytes": 1000} for case in memory.CASES}
    peaks = dict(zip(plans, [950, 951, 1000, 1001] * 10, strict=False))
    for key, peak in peaks.items():
        plans[key]["peak_bytes"] = peak
    rows = [[cell.strip() for cell in line.split("|")] for line in memory.cards(plans, {}).splitlines()[2:]]
    assert {row[7] for row in rows} == {"yes", "barely", "no"}
    assert [row[7] for row in rows].count("barely") == sum(950 < peak <= 1000 for peak in peaks.values())
    assert {row[8] for row in rows} == {""}


def test_the_time_on_the_bus_is_that_of_its_bytes(script):
    """At 31.5 GB/s in each direction, as published for PCI Express 4.0 with 16 lanes."""
    memory = script("memory")
    moved = {"to_device": 63 * 10**9, "to_host": 31.5 * 10**9}
    row = {"target_bytes": 10, "peak_bytes": 9, "params_bytes": 1, "host_bytes": 1, "host_traffic": moved}
    row["host_seconds"] = 63e9 / memory.TARGETS["rtx4090"].hardware.bus_bandwidth
    lines = memory.on_host({case.key: row for case in memory.HOST_CASES}).splitlines()[2:]
    assert [line.split(" | ")[-2:] for line in lines] == [["2.0 s", "3.0 s |"]] * len(memory.HOST_CASES)


def test_the_losses_that_recommend_knows_are_those_of_the_page():
    points = json.loads(
        (importlib.resources.files("galore_jax.presets") / "frontier.json").read_text()
    )["points"]  # fmt: skip
    table = on_page(DOCS / "choose.md", "what a byte of state buys")
    for point in points:
        rows = [line for line in table.splitlines() if line.startswith(f"| `{point['preset']}`")]
        assert any(f" {point['loss']:g}" in row for row in rows), point
    assert f"{len(points)} measurements".replace("10", "ten") in (DOCS / "choose.md").read_text()


@pytest.mark.parametrize("page", ["choose.md", "hyperparameters.md"])
def test_every_loss_in_the_prose_has_been_measured(page):
    measured = set(re.findall(r"\b[12]\.\d{3,4}\b", (DOCS / "benchmarks.md").read_text()))
    prose = re.sub(r"^\|.*", "", (DOCS / page).read_text(), flags=re.MULTILINE)
    prose = re.sub(r"```.*?```", "", prose, flags=re.DOTALL)
    said = set(re.findall(r"\b[12]\.\d{3,4}\b", prose))
    assert said
    assert said <= measured


def test_the_recipes_have_what_the_page_says_of_all_of_them():
    for name, fields in RECIPES.items():
        assert not {"warmup_steps", "weight_decay"} & fields.keys(), name
        assert (fields["clip"], fields["dtype"], fields["batch"], fields["seq"]) == (0.0, "bf16", 512, 256)
