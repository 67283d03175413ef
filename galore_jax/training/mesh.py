# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Which device holds what of a run: a mesh with the axes data, fsdp and model, and the rules that name them.

    axis    a batch             a weight                                optimizer state
    data    is cut along it     is whole                                is whole
    fsdp    is cut along it     is cut along the hidden size            is cut along it
    model   is whole            is cut along heads, hidden units or     as its weight, see galore_jax.sharding
                                token ids

A dimension that an axis does not divide is not cut.  Of a basis and its moments one shares no dimension with the hidden size, so
that :func:`galore_jax.state_sharding` would have all of it on every device along fsdp: it is cut along its rows (the rank, of a
moment on the left), which costs no communication, because the sum over devices that makes a low-rank gradient is then left in
parts, and the parts are brought together after the optimizer instead of before.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

_Axis = str | tuple[str, ...] | None

_INWARD = ("fsdp", "model")  # (hidden, ...)
_OUTWARD = ("model", "fsdp")  # (..., hidden)
_RULES: dict[str, tuple[_Axis, _Axis]] = {
    "embed_tokens": (
        ("model", "fsdp"),
        None,
    ),  # looked up in parts, where rows cut along the hidden size would be gathered
    "lm_head": _INWARD,
    "q_proj": _INWARD,
    "k_proj": _INWARD,
    "v_proj": _INWARD,
    "o_proj": _OUTWARD,
    "gate_proj": _INWARD,
    "up_proj": _INWARD,
    "down_proj": _OUTWARD,
}
"""Part of a path -> the axes of its kernel's last two dimensions; what is not here is whole on every device."""


def axis_sizes(text: str) -> dict[str, int]:
    """The sizes of all axes from text such as "data=2,fsdp=4".

    Raises:
      ValueError: it names another axis, one twice, or a size that is no positive whole number.

    >>> axis_sizes("fsdp=4,data=2")
    {'data': 2, 'fsdp': 4, 'model': 1}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {text} cannot be read at {part.strip()!r}; write each of data, fsdp and model at most once, with a "
                "positive size: data=2,fsdp=4,model=1."
            )
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(text: str, devices: list[Any] | None = None) -> Mesh:
    """The mesh over ``devices``, all that there are by default; ValueError if it is for another number of them."""
    sizes = axis_sizes(text)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"--mesh {text} is for {math.prod(sizes.values())} devices, but there are {len(devices)}; choose sizes whose "
            "product is that number."
        )
    return Mesh(np.array(devices).reshape(*sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches, whose first axis is cut."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return _parts(mesh, BATCH_AXES)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """The sharding of each parameter of a LLaMA, arrays or ``jax.ShapeDtypeStruct``, weights in 8 bits included.

    >>> mesh = make_mesh("data=1", jax.devices()[:1])
    >>> params = {"layers": {"mlp": {"down_proj": {"kernel": jax.ShapeDtypeStruct((2, 32, 16), "float32")}}}}
    >>> param_shardings(mesh, params)["layers"]["mlp"]["down_proj"]["kernel"].spec
    P(None, 'model', 'fsdp')
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        rule = next((_RULES[part] for part in parts if part in _RULES), None)
        if rule is None:
            return NamedSharding(mesh, PartitionSpec())
        rule = rule[1:] if parts[-1] == "bias" else rule
        wanted = (*(None,) * (len(leaf.shape) - len(rule)), *rule)
        fitting = (
            axis if size % _parts(mesh, axis) == 0 else None for size, axis in zip(leaf.shape, wanted, strict=True)
        )
        return NamedSharding(mesh, PartitionSpec(*fitting))

    return jax.tree_util.tree_map_with_path(of, params)


def cut_along_fsdp(state: Any, shardings: Any) -> Any:
    """``shardings`` of an optimizer state, with the stacks of matrices that they leave whole along fsdp cut along their rows.

    Rows are the last axis but one: blocks of codes lie along the last one, and a loop goes through the first.

    >>> mesh = make_mesh("data=1", jax.devices()[:1])
    >>> state = jax.ShapeDtypeStruct((2, 8, 32), "float32")
    >>> cut_along_fsdp(state, NamedSharding(mesh, PartitionSpec(None, None, "model"))).spec
    P(None, 'fsdp', 'model')
    """

    def cut(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        entries = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in sharding.spec]
        if len(leaf.shape) < 3 or any("fsdp" in entry for entry in entries):
            return sharding
        entries += [()] * (len(leaf.shape) - len(entries))
        entries[-2] = (*entries[-2], "fsdp")
        if leaf.shape[-2] % _parts(sharding.mesh, entries[-2]):
            return sharding
        spec = (entry if len(entry) > 1 else entry[0] if entry else None for entry in entries)
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    return jax.tree.map(cut, state, shardings)


def _parts(mesh: Any, axis: _Axis) -> int:
    """Into how many parts an entry of a partition spec cuts its dimension."""
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return math.prod(mesh.shape[name] for name in names)
