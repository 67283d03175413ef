# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The built site: its reference has every public name, its commands every flag, and a browser finds no fault in any page."""

import dataclasses
import html
import importlib
import inspect
import json
import pathlib
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys

import browse_site
import browser
import pytest
from run_pages import blocks
from test_docs import SETTINGS

import galore_jax
from galore_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
HEADING = re.compile(r'<h\d id="[\w.]+" class="doc doc-heading">(.*?)</h\d>', re.DOTALL)
COMMANDS = ROOT / "docs" / "reference" / "commands"
pytestmark = pytest.mark.pages


def modules():
    """The modules of the package by name, itself left out."""
    found = pkgutil.walk_packages(galore_jax.__path__, "galore_jax.")
    return {module.name: importlib.import_module(module.name) for module in found if "__main__" not in module.name}


def public_names():
    """What galore_jax imports, and what is in the __all__ of its modules; of several names of an object the shortest."""
    names = {f"galore_jax.{name}": value for name, value in vars(galore_jax).items() if not name.startswith("_")}
    for path, module in modules().items():
        names |= {f"{path}.{name}": getattr(module, name) for name in getattr(module, "__all__", ())}
    shortest = {}
    for name in sorted((name for name in names if not inspect.ismodule(names[name])), key=len):
        shortest.setdefault(id(names[name]), name)
    return set(shortest.values())


def entries(site, *pages):
    """The names in the headings of the reference on these pages."""
    texts = [(site / "reference" / page / "index.html").read_text() for page in pages]
    headings = [re.sub("<[^>]+>", " ", heading) for text in texts for heading in HEADING.findall(text)]
    return {re.search(r"galore_jax[\w.]*", heading)[0] for heading in headings}


def test_every_public_name_has_an_entry_and_no_other_has_one_outside_the_internals(site):
    shown = entries(site, "optimizers", "subspaces", "memory", "models", "training")
    public = public_names()
    assert public - shown == set()
    members = {name for name in shown if name.rpartition(".")[0] in public}
    assert shown - public - members - modules().keys() == set()


def test_every_module_has_an_entry(site):
    shown = entries(site, "optimizers", "subspaces", "memory", "models", "training", "internals")
    assert modules().keys() - shown == set()


def test_signatures_are_wrapped_and_axes_keep_their_asterisk(site):
    for page in (site / "reference").rglob("index.html"):
        text = page.read_text()
        for block in re.findall(r'<div class="doc-signature.*?</div>', text, re.DOTALL):
            signature = html.unescape(re.sub("<[^>]+>", "", block))
            assert max(map(len, signature.splitlines())) <= 120, signature
        assert "<em>batch" not in text
        assert "<em>lead" not in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_page_of_a_command_has_its_flags_with_their_defaults(command, site, capsys):
    text = (site / "reference" / "commands" / command / "index.html").read_text()
    headings = dict(re.findall(r'<h3 id="(--[\w-]+)"><code>(.*?)</code>', text))
    with pytest.raises(SystemExit):
        cli.parse(SETTINGS[command], ["--help"], command)
    helped = re.findall(r"^(?:│ |  )(--[\w-]+(?:, --no-[\w-]+)?)", capsys.readouterr().out, re.MULTILINE)
    listed = [heading for heading in headings.values() if heading.startswith("--")]
    assert [flag for flag in listed if flag != "--recipe"] == helped
    for field in dataclasses.fields(SETTINGS[command]):
        anchor = "--" + field.name.replace("_", "-")
        facts = re.search(rf'<h3 id="{anchor}".*?<p>(.*?)</p>', text, re.DOTALL)[1]
        needed = field.default is dataclasses.MISSING
        assert facts.endswith("required" if needed else f"default <code>{field.default}</code>"), anchor


def test_the_examples_of_the_commands_work(tmp_path):
    """In the order in which each finds what those before it have written."""
    rows = [
        {"text": f"{word} {number}", "label": label}
        for number in range(40)
        for label, word in enumerate(("bad", "a gem"))
    ]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for command in ("pretrain", "export", "finetune", "classify", "generate", "describe", "tokenize", "plan"):
        [example] = [block for block in blocks((COMMANDS / f"{command}.md").read_text()) if block.language == "console"]
        for line in example.body.splitlines():
            words = [sys.executable, "-m", "galore_jax", *shlex.split(line)[1:]]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_a_page_with_its_pictures_and_can_be_downloaded(path, site):
    folder = site / "notebooks"
    text = (folder / path.stem / "index.html").read_text()
    assert (folder / path.name).read_bytes() == path.read_bytes()
    assert f'href="../{path.name}"' in text
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", ())]
    pictures = re.findall(r'<img alt="[^"]+" src="\.\./([\w-]+\.png)"', text)
    assert len(pictures) == sum("image/png" in output.get("data", {}) for output in outputs)
    assert all((folder / picture).is_file() for picture in pictures)


def test_the_frame_has_the_version_and_the_pages_beside(site):
    text = (site / "tutorial" / "index.html").read_text()
    assert f"galore_jax {galore_jax.__version__}" in text
    assert {"prev", "next"} <= set(re.findall(r'class="md-footer__link md-footer__link--(\w+)"', text))
    assert 'rel="icon" href="../images/favicon.svg"' in text


@pytest.fixture(scope="module")
def tab():
    if browser.find() is None:
        pytest.skip(f"The site is not opened in a browser: none of {', '.join(browser.PROGRAMS)} is installed.")
    with browse_site.started() as one:
        yield one


def test_a_browser_finds_no_fault_in_any_page(site, tab):
    with browse_site.served(site) as base:
        faults = browse_site.faults_of_pages(tab, base, browse_site.pages_of(site))
    assert not faults, "\n".join(["", *faults])


def test_the_search_finds_what_readers_look_for(site, tab):
    with browse_site.served(site) as base:
        assert browse_site.faults_of_search(tab, base, ["xylophonist", *browse_site.TERMS]) == [
            "The search for 'xylophonist' has 0 results, and the term is in none of them."
        ]


FAULTS = """
<p><img src="nowhere.png"> <img src="https://example.com/badge.svg" alt="A badge"></p>
<p><img src="../images/logo.svg#only-light" alt="A logo" style="display: inline"></p>
<div class="highlight" style="width: 3000px"><pre>code</pre></div>
<table><tr><td style="width: 2em; display: block; word-break: break-all">incomprehensibilities</td></tr></table>
<script>console.error("a report"); throw new Error("a mistake")</script>
"""


def test_every_fault_is_found(site, tab, tmp_path):
    folder = shutil.copytree(site, tmp_path / "site")
    page = folder / "tutorial" / "index.html"
    page.write_text(page.read_text().replace("</article>", f"{FAULTS}</article>"))
    with browse_site.served(folder) as base:
        found = "\n".join(browse_site.faults_of_pages(tab, base, ["tutorial/"]))
    for fault in (
        "/tutorial/ at 400 px, light: it scrolls sideways",
        "/tutorial/ at 1400 px, dark: an image without alt text: .*nowhere.png",
        "/tutorial/ at 1400 px, dark: an image that does not load: .*nowhere.png",
        "/tutorial/ at 400 px, dark: an image for the other colors: .*logo.svg#only-light",
        r"/tutorial/ at 1400 px, light: \d+ px wider than its column: <pre> code",
        "/tutorial/ at 1400 px, light: a table breaks the word incomprehensibilities",
        "/tutorial/: it asks another host for https://example.com/badge.svg",
        "/tutorial/: the console has an error: Failed to load resource.*404",
        "/tutorial/: a script reports an error: .*a report",
        "/tutorial/: a script fails: Error: a mistake",
    ):
        assert re.search(f"^{fault}", found, re.MULTILINE), found
