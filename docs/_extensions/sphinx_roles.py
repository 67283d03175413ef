# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Docstrings as Markdown: :func:`galore` becomes a link into the reference, a doctest a block of code, and ``(*batch, m, n)``
keeps its asterisk.  The fields of a class become a list in its docstring: what is said under a field, behind it, or above it.

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
_AXES = re.compile(r"(?<=[(\[])\*(?=\w+[,)\]])")


class SphinxRoles(griffe.Extension):
    """Rewrites every docstring of a package once all of it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg, pkg)


def _rewrite(obj: griffe.Object, package: griffe.Module) -> None:
    if obj.is_class:
        _list_fields(obj)
    if obj.docstring is not None:
        linked = _ROLE.sub(lambda match: _link(match[1], obj, package), _ATTRIBUTE.sub("", obj.docstring.value))
        escaped = _AXES.sub(r"\\*", linked)
        obj.docstring.value = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", escaped)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member, package)


def _list_fields(kind: griffe.Class) -> None:
    """Moves what is said of the fields of a class into its docstring, and gives a NamedTuple its signature."""
    fields = [member for member in kind.members.values() if member.is_attribute and "property" not in member.labels]
    lines = []
    for field in fields:
        said = _comment(field) if field.docstring is None else field.docstring.value
        if said and not field.name.startswith("_"):
            lines.append(f"  {field.name}: " + said.replace("\n", "\n    "))
        field.docstring = None
    if lines and kind.docstring is not None:
        kind.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
    if fields and any(str(base) == "NamedTuple" for base in kind.bases):
        positional = griffe.ParameterKind.positional_or_keyword
        parameters = [
            griffe.Parameter(field.name, annotation=field.annotation, kind=positional, default=field.value)
            for field in fields
            if field.annotation is not None
        ]
        kind.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


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
