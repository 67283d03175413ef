# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The pages of the commands: what a command does, and its flags, both from the class of its settings.

They replace ``<!-- synopsis: galore_jax.training.plan.PlanConfig -->`` and ``<!-- flags: ... -->``.
"""

from __future__ import annotations

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

_MARKER = re.compile(r"<!-- (synopsis|flags): ([\w.]+)\.(\w+) -->")


class _Field(NamedTuple):
    """A field of the settings: a flag, or an argument without one."""

    name: str  # as it is written on the command line
    anchor: str
    value: str  # the name of its value in the synopsis
    facts: str
    required: bool
    text: str


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **kwargs: Any) -> str:
    root = Path(config.config_file_path).parent

    def generated(marker: re.Match[str]) -> str:
        kind, module, name = marker.groups()
        tree = ast.parse((root / (module.replace(".", "/") + ".py")).read_text())
        [settings] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        command = Path(page.file.src_uri).stem
        return (_synopsis if kind == "synopsis" else _flags)(command, settings, _fields(settings))

    return _MARKER.sub(generated, markdown)


def _fields(settings: ast.ClassDef) -> list[_Field]:
    found = []
    for field, text in pairwise(settings.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            annotation, flag = field.annotation, "--" + field.target.id.replace("_", "-")
            positional = ast.unparse(annotation).startswith("Annotated")
            if positional:
                annotation = annotation.slice.elts[0]
            name = field.target.id.upper() if positional else flag
            kind = ast.unparse(annotation)
            if kind == "bool":
                name = f"{flag}, --no-{flag[2:]}"
            kind = re.sub(r"Literal\[(.+?)\]", lambda match: match[1].replace("'", "").replace(", ", " | "), kind)
            required = field.value is None
            default = "required" if required else f"default `{ast.literal_eval(field.value)}`"
            found.append(
                _Field(name, flag, kind.upper(), f"`{kind}`, {default}", required, inspect.cleandoc(text.value.value))
            )
    return found


def _synopsis(command: str, settings: ast.ClassDef, fields: list[_Field]) -> str:
    needed = [f"{f.name} {f.value}" if f.name == f.anchor else f.name for f in fields if f.required]
    line = " ".join(["galore-jax", command, *needed, "[flags]"])
    return f"```text\n{line}\n```\n\n" + _linked(ast.get_docstring(settings), command, fields)


def _flags(command: str, settings: ast.ClassDef, fields: list[_Field]) -> str:
    return "\n\n".join(
        f"### `{f.name}` {{ #{f.anchor} }}\n\n{f.facts}\n\n{_linked(f.text, command, fields)}" for f in fields
    )


def _linked(text: str, command: str, fields: list[_Field]) -> str:
    """Flags become links to what is said of them, and other commands to their pages."""
    anchors = {field.anchor for field in fields}

    def link(match: re.Match[str]) -> str:
        other = match[1]
        target = f"#{match[0]}" if match[0] in anchors else f"{other}.md" if other and other != command else None
        return f"[`{match[0]}`]({target})" if target else f"`{match[0]}`"

    return re.sub(r"--[a-z][\w-]*|galore-jax (\w+)", link, text)
