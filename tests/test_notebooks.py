# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The notebooks run top to bottom with small parameters, say what they need, and hold clean outputs of a full run."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import galore_jax

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(
    r"(?<![\w./])/(?:bin|content|home|mnt|opt|root|tmp|usr|var|work|Users)/|site-packages|[A-Z]:\\\\"
)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What takes the place of the values in the cell with the tag "parameters", as in `papermill -p`.
SMALL = {
    "quickstart": {"STEPS": 3, "BATCH": 2, "LENGTH": 16, "RATES": (1e-3,)},
    "pretrain_llama": {
        "STEPS": 4,
        "BATCH": 2,
        "LENGTH": 64,
        "TURNS": 1,
        "RATES": {"galore_adamw": 0.01, "adamw": 0.001},
    },
    "finetune": {"MODEL": "model", "DATA": "reviews", "STEPS": 2, "BATCH": 8, "LENGTH": 32, "HELD_OUT": 12},
    "will_it_fit": {
        **{"MODEL": "demo", "RANK": 16, "CARD": "here", "TOKENS": 16},
        **{"LARGE_MODEL": "demo", "LARGE_RANK": 16, "LARGE_CARD": "here"},
    },
}


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def tagged(path, tag):
    """The one cell that has the tag."""
    [cell] = [cell for cell in cells(path, "code") if tag in cell["metadata"].get("tags", [])]
    return source(cell)


def assigned(code):
    """The names that the top level of some code assigns.

    >>> assigned("A, B = 1, 2\\nC = 3")
    ['A', 'B', 'C']
    """
    targets = [target for node in ast.parse(code).body if isinstance(node, ast.Assign) for target in node.targets]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def script(path):
    """The notebook as a program with its small parameters; it fails if it would install anything."""
    parts = []
    for cell in cells(path, "code"):
        tags = cell["metadata"].get("tags", [])
        code = source(cell)
        if "install" in tags:
            code = re.sub(r"%pip .*", 'raise SystemExit("the notebook installs what is there")', code)
        parts.append(code)
        if "parameters" in tags:
            parts.append("\n".join(f"{name} = {value!r}" for name, value in SMALL[path.stem].items()))
    return "\n\n".join(parts)


def test_every_notebook_has_small_parameters():
    assert {path.stem for path in NOTEBOOKS} == set(SMALL)


@each_notebook
def test_small_parameters_replace_some_that_are_there(path):
    assert set(SMALL[path.stem]) <= set(assigned(tagged(path, "parameters")))


@pytest.mark.pages
@each_notebook
def test_code_runs_with_warnings_as_errors(path, tmp_path):
    if path.stem == "finetune":
        write_model_and_reviews(tmp_path)
    (tmp_path / "notebook.py").write_text(script(path))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:FigureCanvasAgg is non-interactive", "notebook.py"],
        capture_output=True,
        text=True,
        timeout=480,
        cwd=tmp_path,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def write_model_and_reviews(folder):
    """A tiny LLaMA on bytes as a Hugging Face folder, and a few labelled sentences."""
    from flax import nnx

    from galore_jax.models import Llama, LlamaConfig, save_hf
    from galore_jax.training.tokenizer import ByteTokenizer

    shape = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=257,
        max_position_embeddings=128,
    )
    save_hf(Llama(shape, rngs=nnx.Rngs(0)), folder / "model")
    ByteTokenizer().save(folder / "model" / "tokenizer.json")
    (folder / "reviews").mkdir()
    for name in ("train", "test"):
        rows = [{"text": f"{word} film, number {n}", "label": n % 2} for n in range(12) for word in ("a", "the")]
        (folder / "reviews" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_plan_without_a_compile_is_drawn_as_weights_and_state_only():
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    namespace = {"Patch": Patch}
    exec(tagged(ROOT / "notebooks" / "will_it_fit.ipynb", "chart"), namespace)
    exact = {"params_bytes": 2**30, "optimizer_state_bytes": 2**31, "target": "rtx4090", "target_bytes": 24 * 2**30}
    axis = Figure().subplots()
    namespace["chart"](axis, [exact | {"peak_bytes": 2**32}, exact | {"peak_bytes": None}], ["planned", "exact"], "")
    assert [bar.get_hatch() for bar in axis.patches] == [None, None, None, "//", "//"]
    assert sum(bar.get_width() for bar in axis.patches[:3]) == 4
    assert [text.get_text() for text in axis.texts] == ["4.0", "3.0 + ?"]
    shown = [text.get_text() for text in axis.get_legend().get_texts()]
    assert shown[-2] == "weights + state only (not compiled)"


@each_notebook
def test_notebook_is_of_format_4_5(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
        assert set(cell["metadata"]) <= {"tags"}


@each_notebook
def test_outputs_are_committed_small_and_clean(path):
    assert path.stat().st_size < 200_000
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(len(picture["metadata"]["image/png"]["alt"]) > 40 for picture in pictures)
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data", "execute_result")
        assert output.get("name") != "stderr"
        shown = json.dumps(output | {"data": {"text/plain": output.get("data", {}).get("text/plain")}})
        assert not MACHINE_PATH.search(shown), shown
        assert "Warning" not in shown


@each_notebook
def test_outputs_are_of_one_run_from_the_top(path):
    assert [cell["execution_count"] for cell in cells(path, "code")] == list(range(1, 1 + len(cells(path, "code"))))


@each_notebook
def test_the_title_is_the_only_heading_of_its_level(path):
    title, *others = map(source, cells(path, "markdown"))
    assert title.startswith("# ")
    for text in (title[2:], *others):
        assert not re.search("^# ", re.sub("```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)


@each_notebook
def test_first_cell_says_what_it_needs(path):
    first = source(cells(path, "markdown")[0])
    [line] = re.findall(r"^\*\*Hardware and time:\*\* (.*(?:\n.+)*)", first, re.MULTILINE)
    assert "CPU" in line
    assert re.search(r"\b\d+ minutes", line)
    assert "estimate" in line


@each_notebook
def test_installs_what_is_missing_by_one_line_of_pip(path):
    install = tagged(path, "install")
    extra = "plan" if path.stem == "will_it_fit" else "train"
    [line] = re.findall(r"^ +%pip .*$", install, re.MULTILINE)
    assert re.fullmatch(rf' +%pip install -q "\{{SOURCE\}}\[{extra}(,hub)?\]"( "\{{JAX\}}")?', line)
    assert f"galore_jax-{galore_jax.__version__}.tar.gz" in install
    assert "subprocess" not in install
    assert re.search(r"^if .*find_spec\(\"galore_jax\"\).* is None:$", install, re.MULTILINE)


@each_notebook
def test_names_no_address_that_does_not_exist_yet(path):
    texts = [source(cell) for kind in ("markdown", "code") for cell in cells(path, kind)]
    assert not [text for text in texts if re.search(r"github\.com|colab\.research", text)]


@each_notebook
def test_cells_have_no_branches_for_tests(path):
    assert "GALORE_JAX_FAST" not in path.read_text()
