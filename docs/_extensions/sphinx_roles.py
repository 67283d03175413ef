# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Docstrings as Markdown: :func:`galore` becomes a link into the reference, a doctest a block of code, and the comment behind a
field of a class, or above it, its docstring.

A name without a module is looked for in the class of the docstring, in its module, and in the packages around it.  A private one
stays plain code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth):`([\w.]+)`")
_ATTRIBUTE = re.compile(r":attr:(?=`)")
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class SphinxRoles(griffe.Extension):
    """Rewrites every docstring of a package once all of it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg, pkg)


def _rewrite(obj: griffe.Object, package: griffe.Module) -> None:
    if obj.docstring is None and obj.is_attribute and obj.parent.is_class and (comment := _comment(obj)):
        obj.docstring = griffe.Docstring(comment, parent=obj)
    elif obj.docstring is not None:
        linked = _ROLE.sub(lambda match: _link(match[1], obj, package), _ATTRIBUTE.sub("", obj.docstring.value))
        obj.docstring.value = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", linked)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member, package)


def _comment(field: griffe.Object) -> str:
    """The comment behind a field, or else the one on the lines above it."""
    if "  # " in field.source:
        return field.source.partition("  # ")[2].partition("\n")[0]
    above = []
    for line in reversed(field.filepath.read_text().splitlines()[: field.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    return " ".join(above)


def _link(name: str, obj: griffe.Object, package: griffe.Module) -> str:
    if any(part.startswith("_") for part in name.split(".")):
        return f"`{name}`"
    parts = name.removeprefix(f"{package.name}.").split(".")
    scope = package if name.startswith(f"{package.name}.") else obj
    while scope is not None:
        if parts[0] in scope.members:
            return f"[`{name}`][{_defined_at(scope, parts, package)}]"
        scope = scope.parent
    raise LookupError(f"{obj.path} has a link to {name}, which is nowhere in {package.name}")


def _defined_at(scope: griffe.Object, parts: list[str], package: griffe.Module) -> str:
    """The full name of a member of ``scope`` where it is defined."""
    member = scope.members[parts[0]]
    if member.is_alias:
        member = package[member.target_path.removeprefix(f"{package.name}.")]
    return member.path if len(parts) == 1 else _defined_at(member, parts[1:], package)
