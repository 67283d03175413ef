# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Will a training run fit?  The memory of one step of ``galore-jax pretrain``, before there is any hardware.

Parameters and optimizer state are counted exactly, from shapes alone.  The rest is the compiler's answer: the very step
that a run executes is compiled for the target (see :mod:`galore_jax.planning.targets`), and nothing is run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from galore_jax.execution.in_turn import LARGE
from galore_jax.memory import device_bytes, state_bytes_by_kind, tree_bytes
from galore_jax.models import LlamaConfig
from galore_jax.models.huggingface_config import config_from_huggingface
from galore_jax.models.llama import block_stack
from galore_jax.offload import HOST
from galore_jax.planning.targets import MissingPackagesError, Plan, Target, compile_for, devices_of, target
from galore_jax.training import config as settings
from galore_jax.training.adapters import part
from galore_jax.training.config import PretrainConfig
from galore_jax.training.mesh import axis_sizes, make_mesh
from galore_jax.training.program import Program, program
from galore_jax.weights import dequantize

__all__ = ["PlanConfig", "plan"]

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Say whether a training step fits a GPU or TPU: it is compiled for that hardware, which need not be there.

    Without any flag: a 7B LLaMA in bfloat16 on one RTX 4090.
    """

    model: str = "7b"
    """Model size, as in galore-jax pretrain, or the path of a config.json from Hugging Face."""
    vocab_size: int | None = None
    """Number of token ids. None: the model's own."""
    optimizer: str = "galore_adamw"
    """An optimizer of galore-jax pretrain."""
    compare: str | None = None
    """Several optimizers, separated by commas, instead of --optimizer: one row each."""
    rank: int | float | None = None
    """GaLore: rank of the projected gradients, as in galore-jax pretrain."""
    update_proj_gap: int | None = None
    """GaLore: steps between two refreshes of the subspaces; the refresh is part of the step."""
    proj_type: str | None = None
    """GaLore: side of each matrix that is projected: std (the smaller), reverse_std, left, right or full."""
    projector: str | None = None
    """GaLore: how subspaces are found, as in galore-jax pretrain."""
    refresh: str | None = None
    """GaLore: when subspaces are refreshed, as in galore-jax pretrain."""
    transport: str | None = None
    """GaLore: what becomes of the moments then, as in galore-jax pretrain."""
    diagnostics: bool = True
    """GaLore: measure how well the subspaces do, as galore-jax pretrain does."""
    dtype: Literal["bf16", "f32"] = "bf16"
    """Precision of the computation and, unless --weights says otherwise, of the parameters."""
    weights: Literal["bf16", "f32", "int8"] | None = None
    """Precision of the parameters. None: as --dtype. int8 (needs --layerwise): 8 bits for the matrices of the blocks."""
    layerwise: bool = False
    """Update layer by layer during the backward pass, as in galore-jax pretrain."""
    state_memory: Literal["device", "host"] = "device"
    """Where the optimizer state is. host (needs --layerwise): in the host's memory, as in galore-jax pretrain."""
    clip: float = 1.0
    """Largest global norm of a gradient. 0: no clipping."""
    batch: int = 1
    """Sequences of an optimizer step."""
    accumulate: int = 1
    """Micro-batches that --batch is cut into."""
    accumulate_low_rank: bool = False
    """GaLore: sum the gradients of micro-batches in the subspaces."""
    reduce_low_rank: bool = False
    """GaLore: along the axis data of --mesh, send gradients between devices in the subspaces."""
    seq: int = 256
    """Tokens of a sequence."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    target: str = "rtx4090"
    """rtx5090, rtx4090, rtx3090, rtx4060ti-16gb, rtx4060, rtx3060-12gb, t4, l4, a100-40, a100-80, h100, tpu-v4, tpu-v5e,
    tpu-v5p, tpu-v6e, or here: the machine this runs on."""
    mesh: str | None = None
    """Devices of the target to spread over, as in galore-jax pretrain: data=2,fsdp=4,model=1. None: one device."""
    json: bool = False
    """Print JSON: an object, or with --compare a list of them."""
    plot: Path | None = None
    """Draw a bar for each optimizer into this PNG."""

    @property
    def optimizers(self) -> list[str]:
        """The names of one plan each.

        >>> PlanConfig(compare="adamw, galore_adamw").optimizers
        ['adamw', 'galore_adamw']
        """
        return [self.optimizer] if self.compare is None else [name.strip() for name in self.compare.split(",")]

    def pretrain_config(self) -> PretrainConfig:
        """The settings of the run that is planned."""
        names = {field.name for field in dataclasses.fields(PretrainConfig)} & {
            field.name for field in dataclasses.fields(self)
        }
        return PretrainConfig(**{name: getattr(self, name) for name in names - {"vocab_size"}})

    def model_config(self) -> LlamaConfig:
        """The shape of the model that is planned; ValueError if there is none of that name.

        >>> PlanConfig(model="demo", vocab_size=257).model_config().vocab_size
        257
        """
        run = self.pretrain_config()
        path = Path(self.model)
        if path.suffix == ".json":
            model = config_from_huggingface(path, **run.numerics)
        else:
            model = LlamaConfig.preset(self.model, **run.numerics)
        return model if self.vocab_size is None else dataclasses.replace(model, vocab_size=self.vocab_size)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step that can be compiled: the functions of the run, and the shapes of its parameters and state."""

    config: PlanConfig
    target: Target
    model: LlamaConfig
    program: Program
    params: Any
    opt_state: Any

    def exact_bytes(self) -> Row:
        """What needs no compiler."""
        leaves = [leaf for leaf in jax.tree.leaves(self.opt_state) if leaf.sharding is not None]
        on_host = tree_bytes([leaf for leaf in leaves if leaf.sharding.memory_kind == HOST])
        return {
            "model": self.config.model,
            "optimizer": self.config.optimizer,
            "target": self.config.target,
            "platform": self.target.platform,
            "target_bytes": self.target.memory,
            "params_bytes": tree_bytes(self.params),
            "optimizer_state_bytes": tree_bytes(self.opt_state),
            "optimizer_state_bytes_on_host": on_host,
            "optimizer_state": state_bytes_by_kind(self.opt_state),
            "gradient_bytes": self._gradient_bytes(),
            "devices": 1 if self.program.mesh is None else self.program.mesh.size,
            "params_bytes_a_device": device_bytes(self.params),
            "optimizer_state_bytes_a_device": device_bytes(self.opt_state),
        }

    def compile(self) -> Row:
        """All of it."""
        try:
            with self.program.on_mesh():
                compiled = compile_for(self.target, self.program.step, self.params, self.opt_state, self.program.batch)
        except MissingPackagesError as error:
            nothing = dict.fromkeys(field.name for field in dataclasses.fields(Plan))
            return self.exact_bytes() | nothing | {"missing": str(error)}
        moved = {"traffic": compiled.traffic, "host_traffic": compiled.host_traffic}
        named = {name: None if found is None else found._asdict() for name, found in moved.items()}
        return self.exact_bytes() | dataclasses.asdict(compiled) | named | {"missing": None}

    def _gradient_bytes(self) -> int:
        dense = jax.eval_shape(dequantize, part(self.params)[0])
        low_rank = self.config.accumulate_low_rank or self.config.reduce_low_rank
        if self.config.accumulate > 1 and (self.config.layerwise or not low_rank):  # a sum, in float32
            dense = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32"), dense)
        if not self.config.layerwise:
            return tree_bytes(dense)
        layers, rest = block_stack(self.model).split(dense)
        if self.model.tie_word_embeddings or rest["embed_tokens"]["embedding"].size < LARGE:
            apart = {}
        else:
            apart = rest.pop("embed_tokens")
        return max(tree_bytes(layers) // self.model.num_hidden_layers, tree_bytes(apart), tree_bytes(rest))


def prepare(config: PlanConfig) -> Planned:
    """Check the settings of a plan of ``config.optimizer``, and trace what it starts from.

    Raises:
      ValueError: a setting is wrong.
      OSError: the model's ``config.json`` cannot be read.
      MissingPackagesError: a mesh is asked for, and the target's compiler is not installed.
    """
    hardware, model = target(config.target), config.model_config()
    run = config.pretrain_config()
    settings.check(run)
    settings.check_lengths(dataclasses.replace(run, sample_tokens=0), model)
    mesh = None
    if config.mesh is not None:
        mesh = make_mesh(config.mesh, devices_of(hardware, math.prod(axis_sizes(config.mesh).values())))
    built = program(run, model, mesh)
    return Planned(config, hardware, model, built, *built.state)


def plan(config: PlanConfig) -> Row:
    """One plan, of ``config.optimizer``: what ``--json`` prints.

    On a mesh all sizes that the compiler gives are of one device, and ``traffic`` has the bytes that each sends in a step,
    outside and inside branches (:mod:`galore_jax.planning.traffic`). With the state in the host's memory, ``peak_bytes`` and its
    parts leave it out, ``host_bytes`` is its size, ``host_traffic`` has the bytes that a step moves in each direction, and
    ``host_seconds`` what that takes at least on the bus of a GPU. ``optimizer_state`` has the bytes of
    :func:`galore_jax.memory.state_bytes_by_kind`. ``gradient_bytes`` is one gradient of all parameters, or layer-wise the
    largest that exists at a time, that of one layer, of an untied embedding, or of all else that is outside the layers; it is
    part of ``temporary_bytes``.
    What could not be compiled is null: with ``missing``, a compiler that is not installed; with ``refusal``, what the
    compiler said of a program that does not fit.

    Raises:
      ValueError: a setting is wrong.

    >>> row = plan(PlanConfig(model="demo", optimizer="adamw", dtype="f32", batch=2, seq=16, target="here"))
    >>> row["params_bytes"], row["optimizer_state_bytes"], row["fits"]
    (3478016, 6956040, True)
    """
    return prepare(config).compile()


def plan_all(config: PlanConfig, progress: Callable[[str], None] = lambda message: None) -> list[Row]:
    """A plan for each of ``config.optimizers``; a wrong setting is found before anything is compiled.

    Args:
      config: the settings.
      progress: told what is being compiled.
    """
    if config.plot is not None and (config.plot.suffix != ".png" or not config.plot.parent.is_dir()):
        raise ValueError(f"--plot {config.plot} must be a .png in a folder that exists.")
    rows = []
    for planned in [prepare(dataclasses.replace(config, optimizer=name)) for name in config.optimizers]:
        chosen = planned.config
        progress(f"compiling {chosen.model} with {chosen.optimizer} for {chosen.target} ...")
        rows.append(planned.compile())
    return rows
