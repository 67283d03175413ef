# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The page of the internals: an entry for everything that has a docstring and no entry on another page of the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.pages import Page

_MARKER = "<!-- internals -->"
# Separate signatures would be wrapped, each by a ruff of its own, and there are hundreds.
_OPTIONS = "heading_level: 2, separate_signature: false"
_ENTRY = re.compile(r"^::: ([\w.]+)$(?:\n    options: \{ members: (.+) \}$)?", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    if _MARKER not in markdown:
        return markdown
    source = Path(page.file.abs_src_path)
    package = griffe.load("galore_jax", search_paths=[source.parents[2]], resolve_aliases=True)
    public = set()
    for other in source.parent.glob("*.md"):
        for name, members in _ENTRY.findall(other.read_text()):
            public |= _shown(package, name.removeprefix("galore_jax."), members)
    return markdown.replace(_MARKER, "\n\n".join(_rest(package, public)))


def _shown(package: griffe.Module, name: str, members: str) -> set[str]:
    """The full names of what an entry shows: the object, and the members of a module."""
    shown = package[name]
    if members == "false" or not shown.is_module:
        return {shown.canonical_path}
    names = re.findall(r"\w+", members) or shown.exports
    return {shown.canonical_path, *(shown[member].canonical_path for member in names)}


def _rest(module: griffe.Module, public: set[str]) -> Iterator[str]:
    """The entries of what is documented nowhere else, in the order of the source."""
    for member in module.members.values():
        if not member.is_alias and member.is_module and not member.name.startswith("__"):
            own = [m for m in member.members.values() if not (m.is_alias or m.is_module or m.path in public)]
            names = [m.name for m in own if m.has_docstrings and not m.name.startswith("_")]
            if member.path in public:
                yield from (f"::: {member.path}.{name}\n    options: {{ {_OPTIONS} }}" for name in names)
            else:
                yield f"::: {member.path}\n    options: {{ {_OPTIONS}, members: [{', '.join(names)}] }}"
            yield from _rest(member, public)
