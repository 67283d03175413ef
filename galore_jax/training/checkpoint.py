# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, with Orbax: parameters, optimizer state, position in the data, and the step.

A checkpoint is written in the background under a temporary name, and appears under its step's number when it is
complete; only then is an old one deleted.  So whatever interrupts a run, the checkpoints that are there are whole.
Every random number of training is a function of the seed and the step, so there is no generator state to save.

The files protect their index but not the numbers in them, so a checkpoint also holds a checksum of each array x,

    sum_i (2 i + 1) bits(x_i)  mod 2^32,

which any one changed bit alters; it is computed on the device, and compared when the checkpoint is read.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts

from galore_jax.offload import HOST
from galore_jax.training.run_folder import resume_command

FORMAT = 1
"""Version of what a checkpoint holds; a change that older code cannot read increases it."""

_KINDS = {"params": "parameter", "opt_state": "optimizer state"}
"""What messages call an array of each item."""


class CheckpointError(Exception):
    """A checkpoint could not be written; the message says how to go on."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds."""

    step: int  # optimizer steps completed
    params: Any
    opt_state: Any
    data: dict[str, Any]  # position in the training data
    losses: list[float]  # of the steps since the last line of metrics.jsonl


@dataclasses.dataclass
class Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Which checkpoints are kept: the newest ones, and two however old they are.

    They are the one that did best on held-out text, and the last one from which training is known to go on well.
    """

    newest: int
    best: int | None = None
    sound: int | None = None

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        del context
        newest = {info.step for info in checkpoints[-self.newest :]}
        return [info.step in newest or info.step in (self.best, self.sound) for info in checkpoints]


class CheckpointWriter:
    """Writes checkpoints into ``folder``, a context manager; at its end the last one is complete.

    Args:
      folder: made if it does not exist; unfinished checkpoints that an interrupted run left there are removed.
      keep: the newest ones to keep; for the others see :attr:`kept`.
      command: that continues the run, for messages.
    """

    def __init__(self, folder: Path, keep: int, command: str = "pretrain"):
        self.folder, self.command = folder, command
        self.kept = Kept(keep)
        self._manager = _manager(folder, self.kept, create=True)
        self._saving: int | None = None

    def save(self, checkpoint: Checkpoint, sound: int = 0) -> None:
        """Start to write a checkpoint, after the one before it is complete; CheckpointError if either fails.

        Of the checkpoints of steps before ``sound`` the last one is kept, too.
        """
        self.wait()
        self.kept.sound = max((step for step in saved_steps(self.folder) if step < sound), default=None)
        meta = {
            "format": FORMAT,
            "step": checkpoint.step,
            "losses": checkpoint.losses,
            "checksums": _all_checksums(checkpoint),
        }
        self._saving = checkpoint.step
        self._attempt(
            lambda: self._manager.save(
                checkpoint.step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(checkpoint.params),
                    opt_state=ocp.args.StandardSave(checkpoint.opt_state),
                    data=ocp.args.JsonSave(checkpoint.data),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        )

    def go_back(self, sound: int) -> int | None:
        """Delete the checkpoints from the step ``sound`` on, but leave one; returns the step of the last one that is left."""
        self.wait()
        steps = saved_steps(self.folder)
        for step in steps[1:]:
            if step >= sound:
                self._manager.delete(step)
        return max((step for step in steps if step < sound), default=next(iter(steps), None))

    def check(self) -> None:
        """CheckpointError if the checkpoint being written has failed already; does not wait."""
        self._attempt(self._manager.check_for_errors)

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete; CheckpointError if it failed."""
        self._attempt(self._manager.wait_until_finished)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, CheckpointError):
            return  # closing would wait for the write that failed, and raise its error a second time
        self.wait()
        self._manager.close()

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a full disk is an OSError, a ValueError or a RuntimeError
            raise CheckpointError(self._failure(error)) from error

    def _failure(self, error: Exception) -> str:
        good = saved_steps(self.folder)
        start = f"The checkpoint of step {self._saving} could not be written ({_first_line(error)})"
        if not good:
            return f"{start}, and there is no earlier one; make room in {self.folder} and start again with a new --out."
        run = self.folder.parent
        return (
            f"{start}; the last good one is of step {good[-1]}: make room in {self.folder} and continue with "
            f"`{resume_command(run, self.command)}`."
        )


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in order; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit())


def last_step(folder: Path) -> int:
    """Step of the newest complete checkpoint; FileNotFoundError if there is none."""
    steps = saved_steps(folder)
    if not steps:
        raise FileNotFoundError(f"There is no checkpoint in {folder}; start a new run with another --out.")
    return steps[-1]


def restore(folder: Path, step: int, abstract_params: Any, abstract_opt_state: Any) -> Checkpoint:
    """Read a checkpoint exactly as it was saved, whatever devices it was saved from.

    Args:
      folder: holds the checkpoints.
      step: of the one to read.
      abstract_params, abstract_opt_state: trees of ``jax.ShapeDtypeStruct`` that it must match, whose shardings the arrays get;
        those without one go to the first device.

    Raises:
      ValueError: it cannot be read, or is of another model, optimizer or format.
    """
    saved, data, losses = _restore(folder, step, {"params": abstract_params, "opt_state": abstract_opt_state})
    return Checkpoint(step, saved["params"], saved["opt_state"], data, losses)


def restore_params(folder: Path, step: int, abstract_params: Any) -> Any:
    """Read only the parameters of a checkpoint, as :func:`restore` does."""
    return _restore(folder, step, {"params": abstract_params})[0]["params"]


def _restore(folder: Path, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    """The items of a checkpoint that ``abstract`` has, checked; the position in the data, and the losses."""
    place = folder / str(step)
    manager = _manager(folder)
    try:
        # Orbax reads many arrays at once, and prints a traceback for each one that still waits when one has failed.
        _attempt_read(folder, step, lambda: [_read_all(place / item) for item in abstract])
        saved = _attempt_read(folder, step, lambda: manager.item_metadata(step))
        meta_args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = _attempt_read(folder, step, lambda: manager.restore(step, args=meta_args)).meta
        if meta.get("format") != FORMAT:
            raise ValueError(
                f"Checkpoint {place} has format {meta.get('format')!r}, but this version reads {FORMAT}; "
                "resume it with the version that config.json names."
            )
        if not {"losses", "checksums"} <= meta.keys():
            raise ValueError(_damaged(folder, step, "its meta is not what was saved"))
        named = {item: _named_as_saved(tree, saved[item]) for item, tree in abstract.items()}
        # Orbax would cast a dtype silently and report a shape at length, so both are compared first.
        for item, tree in named.items():
            _check_matches(folder, step, _KINDS[item], saved[item], tree)
        trees = {item: ocp.args.StandardRestore(_placed(tree)) for item, tree in named.items()}
        args = ocp.args.Composite(data=ocp.args.JsonRestore(), **trees)
        items = _attempt_read(folder, step, lambda: manager.restore(step, args=args))
    finally:
        manager.close()
    restored = {item: items[item] for item in abstract}
    found = checksums(restored) | {"data": _data_checksum(step, items.data, meta["losses"])}
    for path, value in found.items():
        if value != meta["checksums"].get(path):
            raise ValueError(_damaged(folder, step, f"{path} is not what was saved"))
    same = {
        item: jax.tree.unflatten(jax.tree.structure(abstract[item]), jax.tree.leaves(tree))
        for item, tree in restored.items()
    }
    return same, items.data, meta["losses"]


def _named_as_saved(tree: Any, saved: Any) -> Any:
    """``tree`` with the field ``step`` of optimizer states under its earlier name ``count``, if ``saved`` has that."""

    def is_renamed(node: Any) -> bool:
        return "step" in getattr(node, "_fields", ()) and isinstance(getattr(type(node), "count", None), property)

    def old(node: Any) -> Any:
        if not is_renamed(node):
            return node
        # In the order of the fields, which jax.tree would sort in a dict.
        fields = ["count" if name == "step" else name for name in node._fields]
        return collections.namedtuple(type(node).__name__, fields)(*(renamed(value) for value in node))

    def renamed(tree: Any) -> Any:
        return jax.tree.map(old, tree, is_leaf=is_renamed)

    return tree if saved is None or set(_leaves(tree)) <= set(_leaves(saved)) else renamed(tree)


def checksums(tree: Any) -> dict[str, int]:
    """Path -> checksum of every array of a tree, which waits for them.

    >>> checksums({"a": jnp.array([1, 0, 0]), "b": jnp.array([0, 1, 0])})
    {'a': 1, 'b': 3}
    """
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    on_host = {path: leaf for path, leaf in leaves.items() if leaf.sharding.memory_kind == HOST}
    found = _checksums({path: leaf for path, leaf in leaves.items() if path not in on_host})
    found |= {path: _checksum_on_host(leaf) for path, leaf in on_host.items()}
    return {path: int(value) for path, value in jax.device_get(found).items()}


def _all_checksums(saved: Checkpoint) -> dict[str, int]:
    arrays = checksums({"params": saved.params, "opt_state": saved.opt_state})
    return arrays | {"data": _data_checksum(saved.step, saved.data, saved.losses)}


def _data_checksum(step: int, data: dict[str, Any], losses: list[float]) -> int:
    return zlib.crc32(json.dumps([step, data, losses], sort_keys=True).encode())


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(_checksum, leaves)


@jax.jit
def _checksum_on_host(leaf: jax.Array) -> jax.Array:
    """The same of an array in the host's memory; of a stack the device gets one layer at a time."""

    def of_layer(layer: jax.Array, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(leaf, layer, 1)
        return total + _checksum(jax.device_put(part, jax.memory.Space.Device), layer)

    if leaf.ndim < 3:
        return _checksum(jax.device_put(leaf, jax.memory.Space.Device))
    return jax.lax.fori_loop(0, leaf.shape[0], of_layer, jnp.zeros([], jnp.uint32))


def _checksum(leaf: jax.Array, start: jax.typing.ArrayLike = 0) -> jax.Array:
    """Of an array, or of its part from ``start`` on along the first axis."""
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)  # in row-major order; to flatten a sharded array would gather it
    for axis, size in enumerate(words.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        if axis == 0:
            place += jnp.asarray(start, jnp.uint32)
    return jnp.sum(words * (2 * place + 1))


def _manager(folder: Path, kept: Kept | None = None, *, create: bool = False) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(preservation_policy=kept, create=create, cleanup_tmp_directories=create),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "opt_state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    )


def _placed(tree: Any) -> Any:
    """Where arrays are to go: as their abstract ones are sharded, else to the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device)

    return jax.tree.map(place, tree)


def _read_all(item: Path) -> None:
    """Read and decode every array of a saved tree, one at a time, and drop it."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item.absolute()}/"}}
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    arrays = sorted({key.rpartition("/")[0] for key in keys})
    if not arrays:
        raise ValueError(f"{item} holds no arrays")
    for path in arrays:
        ts.open({"driver": "auto", "kvstore": {**store, "path": f"{path}/"}}).result().read().result()


def _attempt_read(folder: Path, step: int, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # what a damaged file raises depends on which one it is
        raise ValueError(_damaged(folder, step, _first_line(error))) from error


def _damaged(folder: Path, step: int, reason: str) -> str:
    earlier = [other for other in saved_steps(folder) if other < step]
    remedy = f"move it away to resume from step {earlier[-1]}" if earlier else "start a new run"
    return f"Checkpoint {folder / str(step)} is damaged ({reason}); {remedy}."


def _check_matches(folder: Path, step: int, kind: str, saved: Any, expected: Any) -> None:
    if saved is None:
        raise ValueError(_damaged(folder, step, f"no {kind} can be read"))
    found, wanted = _leaves(saved), _leaves(expected)
    for path in [*wanted, *found]:
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"Checkpoint {folder / str(step)} is of another model, optimizer or version of galore_jax: {kind} {path} is "
                f"{found.get(path, 'absent')} there, and {wanted.get(path, 'absent')} in this run; continue it with the "
                "settings and the versions that config.json names, or start a new run with another --out."
            )


def _leaves(tree: Any) -> dict[str, str]:
    """Path -> dtype[shape] of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
