# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A page for each notebook: its text, its code, and the outputs that are stored in it; and the notebook itself, to download."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_REMOTE_IMAGE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")
_TITLE = re.compile(r"^(# .+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted((Path(config.config_file_path).parent / "notebooks").glob("*.ipynb")):
        text = path.read_text()
        content: dict[str, str | bytes] = {path.name: text}
        content[f"{path.stem}.md"] = _page(path, json.loads(text), content)
        for name, data in content.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def _page(path: Path, notebook: dict[str, Any], images: dict[str, str | bytes]) -> str:
    """The notebook as Markdown; its pictures go to ``images``."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_text(source))
        elif cell["cell_type"] == "code" and source:
            parts.append(_fenced("python", source))
            parts += [_output(output, path.stem, images) for output in cell["outputs"]]
    before, title, rest = _TITLE.split("\n\n".join(parts), maxsplit=1)
    return f"{title}\n\n[Download {path.name}]({path.name}){{ download }}\n\n{before}\n\n{rest}"


def _text(source: str) -> str:
    """A cell of text: no picture is loaded from elsewhere, and links lead to pages of the site."""
    linked = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source).replace("](../docs/", "](../")
    return _REMOTE_IMAGE.sub(r"\1", linked)


def _output(output: dict[str, Any], stem: str, images: dict[str, str | bytes]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" not in data:
        return _fenced("text", "".join(data["text/plain"]))
    name = f"{stem}-{len(images)}.png"
    images[name] = base64.b64decode("".join(data["image/png"]))
    said = output.get("metadata", {}).get("image/png", {}).get("alt", "The picture that the code above draws")
    return f"![{said}]({name})"


def _fenced(language: str, text: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"
