# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Figures and pictures of the documentation are those of the results in the repository.

``QUOTED`` has, for each page, the figures that its prose quotes, computed from benchmarks/results and benchmarks/gpu.  Each has
to stand on the page.  In the prose of the pages in ``COMPLETE``, no loss, share or size may stand that is not in ``QUOTED``.
"""

import json
import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

pytestmark = pytest.mark.pages
ROOT = Path(__file__).parent.parent
BENCHMARKS, IMAGES = ROOT / "benchmarks", ROOT / "docs" / "images"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PICTURES = ("landing", "memory", "step", "refresh", "quality-state", "quality-rates", "quality-bytes", "finetune")


def read(name):
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def gib(size, digits=1):
    return f"{size / 2**30:.{digits}f} GiB"


def mib(size, digits=0):
    return f"{size / 2**20:,.{digits}f} MiB"


def loss(found, digits=4):
    return f"{found['loss']:.{digits}f} ± {found['deviation']:.{digits}f}"


def below(a, b, digits=0):
    """How far a is below b."""
    return f"{1 - a / b:.{digits}%}"


def above(a, b, digits=0):
    return f"{a / b - 1:.{digits}%}"


def times(a, b, digits=2):
    return f"{a / b:.{digits}f} times"


def median(steps):
    return statistics.median(steps["steps_seconds"])


gpu = read("gpu/gpu")["rows"]
memory, step, single = read("results/memory"), read("results/step"), read("results/single")
large, small = gpu["a: 7b bf16, galore_adamw_8bit, 1 x 256"], gpu["a: 7b int8, q_galore_adamw_8bit, 1 x 256"]
adamw_gpu, galore_gpu, torch_gpu = (
    gpu[f"d: 130m, {name}"] for name in ("optax.adamw", "galore_jax.galore_adamw", "galore_torch")
)
planned = {row["name"]: row for row in memory.values() if row["model"] == "7b" and row["target"] == "rtx4090"}
quality = {line["optimizer"]: line for line in read("results/quality")["results"]}
adamw, galore = quality["adamw"], quality["galore_adamw"]
muon = {(found["optimizer"], found["momentum"], found["normuon"]): found["losses"] for found in read("results/bytes")}
optax_muon, muon_8bit = muon["optax.contrib.muon", 0.9, False], muon["muon_8bit", 0.9, True]
plain_8bit = muon["muon_8bit", 0.9, False]
on_cpu = {
    (found["optimizer"], found["momentum"]): {steps: x["loss"] for steps, x in found["losses"].items()}
    for found in read("results/bytes-cpu")
}
muon_cpu, optax_cpu = on_cpu["muon", 0.9], on_cpu["optax.contrib.muon", 0.9]
four_bits, two_bits = on_cpu["muon_4bit", 0.9], on_cpu["muon_2bit", 0.8]
elsewhere = {
    found["optimizer"]: [x["loss"] for x in found["losses"].values()] for found in read("results/bytes-elsewhere")
}
tuned, shorter = read("results/finetune"), read("results/finetune-short")
generated = [  # the faster one first
    tuple(read("results/generate")["results"].values()),
    tuple(read("results/generate-bfloat16")["results"].values())[::-1],
]
accuracy = {name: f"{found['accuracy']:.3f}" for name, found in tuned["results"].items()}
transport = {}
for record in read("results/transport"):
    transport.setdefault((record["data"], record["transport"]), []).append(record["final_val_loss"])
transport = {key: statistics.fmean(losses) for key, losses in transport.items()}
refreshes = {(found["preset"], found["projector"]): found for found in read("results/refresh")["refreshes"]}
launches = read("results/step-gpu")


def moved(name):
    """Bytes of the launches of an update, of the least."""
    found = launches[name]
    return f"{found['launches']['always']['bytes'] / found['least_bytes']:.1f} times"


README_PRESETS = ("galore_adamw", "galore_adamw_8bit", "q_galore_adamw_8bit", "apollo_mini")
CARD = gib(planned["adamw"]["target_bytes"])
LARGE, SMALL = (gib(row["allocator"]["peak_bytes_in_use"]) for row in (large, small))

QUOTED = {
    "README.md": [
        LARGE, loss(galore, 3), loss(adamw, 3), loss(muon_8bit["1200"], 3), loss(optax_muon["1200"], 3),
        *(f"{quality[name]['share']:.1%}" for name in README_PRESETS),
        f"{accuracy['GaLore r=8']} ± {tuned['results']['GaLore r=8']['error']:.3f}", accuracy["AdamW"], accuracy["LoRA r=8"],
    ],
    "docs/troubleshooting.md": [f"| {gib(row['peak_bytes'])} |" for row in planned.values()],
    "docs/benchmarks.md": [
        # memory
        CARD, LARGE, SMALL, "11.75 GiB", gib(planned["adamw"]["peak_bytes"]),
        # on a GPU
        above(large["allocator"]["peak_bytes_in_use"], large["plan_bytes"], 1),
        times(median(galore_gpu), median(adamw_gpu)), times(max(galore_gpu["steps_seconds"]), median(galore_gpu)),
        times(median(torch_gpu), median(galore_gpu), 1),
        times(torch_gpu["peak_bytes"], galore_gpu["allocator"]["peak_bytes_in_use"], 1),
        f"{1e3 * median(large):.0f} ms", f"{large['profile']['kernels']:,} kernels",
        f"{large['profile']['busy_seconds'] / large['profile']['span_seconds']:.0%}",
        f"{1e3 * single['7b step']['copies, seconds']:.0f} ms", f"{1e3 * single['7b step']['refresh, seconds']:.0f} ms",
        f"{large['first_step_seconds']:.1f} s", f"{1e3 * large['first_step_seconds'] / 224:.0f} ms",
        gib(128256 * 1024 * 4, 2), gib(128256 * 4096 * 4, 2), "64 MiB",
        gib(16.5 * 2**30),  # of the command below it
        moved("galore_jax.galore_adamw"), moved("galore_jax.galore_adamw_8bit"),
        mib(single["step-gpu"]["counted twice, bytes"]), mib(single["step-gpu"]["copies of codes, bytes"]),
        # a training step
        f"{step['side_by_side']:.3f} times", f"{step['side_by_side']:.2f} times",
        *(
            times(found["refresh_median"], found["plain_median"])
            for name, found in step["medians"].items() if name != "optax.adamw"
        ),
        *(f"{found['plain_median']:.2f}" for found in step["medians"].values()),
        *(f"{found['refresh_median']:.2f}" for found in step["medians"].values() if found["refresh_median"]),
        mib(read("results/step-tpu")["tpu_code_bytes"], 1),
        # a refresh
        *(f"{1e3 * refreshes['350m', name]['seconds'][0]:.0f} ms" for name in ("power (default)", "svd")),
        f"{refreshes['350m', 'power (default)']['times_faster_than_svd']:.1f} times",
        f"{int(100 * min(min(r['captured_energy']) for (_, name), r in refreshes.items() if name == 'power (default)'))}%",
        # the moments
        *(below(transport[data, "keep"], transport[data, "rotate"], 1) for data in ("python", "enwik8_clean")),
        *(f"{found:.3f}" for found in read("results/learns")["best"].values()),
        # what learns best
        below(galore["loss"], adamw["loss"]), below(quality["galore_muon"]["loss"], adamw["loss"]),
        below(quality["galore_muon"]["loss"], quality["muon"]["loss"]),
        above(quality["galore_muon, power"]["loss"], quality["galore_muon"]["loss"]),
        above(quality["galore_muon, power, c = 30, T = 200"]["loss"], quality["galore_muon"]["loss"]),
        f"{quality['galore_muon, 8-bit']['share']:.0%}",
        *(f"{found:.3f}" for found in single["quality"]["1,200 steps"].values()),
        *(f"{found:.3f}" for found in single["quality"].values() if isinstance(found, float)),
        # what a byte of state buys
        below(muon_8bit["1200"]["loss"], optax_muon["1200"]["loss"], 1),
        below(muon_8bit["4000"]["loss"], optax_muon["4000"]["loss"], 2),
        below(muon_8bit["1200"]["loss"], plain_8bit["1200"]["loss"], 1),
        below(muon["muon", 0.9, True]["1200"]["loss"], muon["muon", 0.9, False]["1200"]["loss"], 1),
        below(muon_8bit["400"]["loss"], plain_8bit["400"]["loss"], 1),
        above(muon["optax.contrib.muon", 0.95, False]["1200"]["loss"], optax_muon["1200"]["loss"]),
        above(muon["muon_4bit", 0.9, False]["400"]["loss"], optax_muon["400"]["loss"], 1),
        *(above(four_bits[steps], muon_cpu[steps], 1) for steps in ("1200", "4000")),
        below(four_bits["1200"], optax_cpu["1200"], 1),
        *(f"{found:.2f} times" for found in single["muon step, of optax.contrib.muon's"].values()),
        *(above(two_bits[steps], optax_cpu[steps], 1) for steps in ("1200", "4000")),
        below(on_cpu["muon_4bit", 0.8]["400"], on_cpu["optax.contrib.muon", 0.8]["400"], 1),
        *(below(*pair, 1) for pair in zip(elsewhere["muon_4bit"], elsewhere["optax.contrib.muon"], strict=True)),
        *(above(*pair, 1) for pair in zip(elsewhere["muon_2bit"], elsewhere["optax.contrib.muon"], strict=True)),
        *(below(muon_cpu[steps], optax_cpu[steps], 1) for steps in ("1200", "4000")),
        # fine-tuning
        *(f"{100 * found['accuracy']:.1f}%" for found in tuned["results"].values()), f"{tuned['baseline']:.1%}",
        f"{tuned['baseline']:.3f}",
        *(f"{tuned['results'][name]['test_loss']:.3f}" for name in ("GaLore r=8", "AdamW")),
        *(mib(tuned["results"][name]["optimizer_state_bytes"]) for name in ("AdamW", "GaLore r=8", "LoRA r=8")),
        f"{2 * 4 * 49152 * 576 / 2**20:.0f} of 232 MiB",  # two float32 moments of the embeddings of SmolLM2-135M
        "{accuracy:.3f} ± {error:.3f} (loss {test_loss:.3f}".format(**single["finetune"]["GaLore r=8, scale 2"]),
        *(f"{single['finetune'][f'tuning loss of GaLore r=8, scale {scale}']:.3f}" for scale in (8, 16)),
        *(f"{seconds:.2f} s" for seconds in single["finetune"]["shorter, seconds a step"].values()),
        # generating text
        *(times(first["tokens_per_second"], second["tokens_per_second"]) for first, second in generated),
        *(
            below(first["processor_seconds_per_token"], second["processor_seconds_per_token"])
            for first, second in generated
        ),
        # steps on a mesh
        *(f"{found:.1e}".replace("e-0", "e-").replace(".0e", "e" if found < 1e-5 or found > 2e-5 else ".0e")
          for found in single["sharded_steps"].values()),
        f"{max(max(r['parameters'].values()) for r in read('results/sharded_steps')):.1e}".replace("e-0", "e-"),
    ],
}  # fmt: skip
COMPLETE = ("README.md", "docs/benchmarks.md")
FIGURE = re.compile(
    r"\d\.\d+ ± \d\.\d+|\d[\d,.]* ?(?:GiB|MiB|%)|(?<![\d.])(?!0\.00)\d\.\d{3,}"
)  # 0.003 is a learning rate


def flowing(text):
    """Line breaks as spaces."""
    return re.sub(r"\s+", " ", text)


def prose(page):
    """Without code, tables, comments and addresses."""
    text = re.sub(r"```.*?```|<!--.*?-->|`[^`]*`|\]\([^)]*\)|<picture>.*?</picture>", "", page, flags=re.DOTALL)
    return flowing("\n".join(line for line in text.splitlines() if not line.startswith(("|", "Planned: by", "* a: "))))


@pytest.mark.parametrize(("page", "figure"), [(page, figure) for page, found in QUOTED.items() for figure in found])
def test_a_figure_stands_on_the_pages_that_quote_it(page, figure):
    assert figure in flowing((ROOT / page).read_text())


@pytest.mark.parametrize("page", COMPLETE)
def test_every_figure_of_the_prose_has_a_source(page):
    known = set(FIGURE.findall(" ".join(QUOTED[page])))
    found = FIGURE.findall(prose((ROOT / page).read_text()))
    assert len(found) > 5
    assert {figure.rstrip(".,") for figure in found} <= known


def test_a_figure_without_a_source_is_found():
    assert FIGURE.findall(prose("It took 3.2 GiB, 5% more (1.234 ± 0.005).\n| 7 GiB |\n`9%`")) == [
        "3.2 GiB", "5%", "1.234 ± 0.005",
    ]  # fmt: skip


@pytest.fixture
def report(script):
    return script("report")


def test_the_tables_of_the_benchmarks_page_are_those_of_the_results(report, script):
    page = report.PAGE.read_text()
    for name, table in report.TABLES.items():
        assert f"<!-- {name}: begin -->\n\n{table()}\n\n<!-- {name}: end -->" in page, name
    gpu_script = script("gpu")
    text = gpu_script.tables(read("gpu/gpu"), gpu_script.plans(BENCHMARKS / "gpu"))
    assert gpu_script.BEGIN + text + gpu_script.END in page


def test_the_pictures_are_those_of_the_results(report, tmp_path):
    """To the byte, if the same version of Matplotlib drew them."""
    report.draw(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in IMAGES.iterdir()} - {"logo.svg", "favicon.svg"}
    assert drawn == {f"{name}-{theme}.svg" for name in PICTURES for theme in ("light", "dark")}
    for name in drawn:
        committed = (IMAGES / name).read_text()
        assert len(committed) < 150_000
        assert "<dc:date>" not in committed
        root = ElementTree.fromstring(committed)
        background = root.find(".//{*}g[@id='patch_1']/{*}path")
        assert "fill: none" in background.get("style") or "opacity: 0" in background.get("style")
        if f"Matplotlib v{matplotlib.__version__}," in committed:
            assert committed == (tmp_path / name).read_text(), f"{name}: run python benchmarks/report.py"


def test_the_landing_picture_says_what_was_measured_and_what_planned(script):
    landing = script("landing")
    bars, card = landing.found(memory, read("gpu/gpu"))
    assert [(gib(bar.bytes), bar.how) for bar in bars] == [
        (gib(planned["adamw"]["peak_bytes"]), "planned"), (LARGE, "measured"),
        (gib(planned["q_apollo_mini (int8 weights), layer-wise"]["peak_bytes"]), "planned"),
    ]  # fmt: skip
    assert gib(card) == CARD


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_have_words_and_two_versions(page):
    text = page.read_text()
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)
    for words, address in shown:
        assert len(words) > 20, address
        if not address.startswith("https:"):
            assert (page.parent / address.partition("#")[0]).exists()
    for theme, other in (("light", "dark"), ("dark", "light")):
        only = {(words, address) for words, address in shown if address.endswith(f"-{theme}.svg#only-{theme}")}
        assert {(words, address.replace(theme, other)) for words, address in only} <= set(shown)
