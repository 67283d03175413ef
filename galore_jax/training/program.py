# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The program of a run: how its state is made, and what one step does to it.

The training loop runs it, and the planner compiles it for hardware that is not there: both get it from :func:`program`, so
that what was planned is what is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galore_jax._core.trees import one_of
from galore_jax.layerwise import Layerwise, LayerwiseState, layerwise
from galore_jax.models import Llama, LlamaConfig
from galore_jax.models.llama import block_stack
from galore_jax.offload import HOST, offload_state, offloaded
from galore_jax.sharding import state_sharding
from galore_jax.training.adapters import adapt, make_restart, part
from galore_jax.training.config import PretrainConfig
from galore_jax.training.mesh import batch_sharding, cut_along_fsdp, param_shardings
from galore_jax.training.optimizers import make_optimizer, make_schedule
from galore_jax.training.step import DATA_AXIS, Metrics, make_train_step, on_parts, optimizer_metrics
from galore_jax.weights import is_int8, quantize_weights


class Program(NamedTuple):
    """What a run is made of."""

    graphdef: nnx.GraphDef  # of the model
    init: Any  # PRNG key -> (params, opt_state)
    step: Any  # jitted; params, opt_state (both donated), batch -> params, opt_state, metrics
    batch: jax.ShapeDtypeStruct  # int32 [batch, sequence + 1]
    mesh: Mesh | None
    shardings: tuple[Any, Any] | None  # of (params, opt_state), None without a mesh
    state_on_host: bool

    @property
    def state(self) -> tuple[Any, Any]:
        """The abstract (params, opt_state), with their shardings on a mesh, and of what is in the host's memory."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        if self.shardings is not None:
            return jax.tree.map(_placed, shapes, self.shardings)
        return (shapes[0], _on_host(shapes[1])) if self.state_on_host else shapes

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """In this context the functions have to be traced."""
        return (
            contextlib.nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        )


def program(config: PretrainConfig, model_config: LlamaConfig, mesh: Mesh | None = None) -> Program:
    """The program of a run, on a mesh of :mod:`galore_jax.training.mesh` or on one device.

    >>> config = PretrainConfig(layerwise=True, weights="int8")
    >>> params, opt_state = program(config, config.model_config(256)).state
    >>> params["layers"]["mlp"]["up_proj"]["kernel"].codes.shape, opt_state.layers[0].count.shape
    ((4, 128, 352), (4,))
    """

    weights = functools.partial(_weights, config, model_config)
    graphdef = nnx.eval_shape(functools.partial(_split, config, model_config), jax.random.key(0))[0]
    tx = make_optimizer(config, make_schedule(config), clip=not config.layerwise)
    state_on_host = config.state_memory == "host"
    if state_on_host:
        check_host_memory(jax.devices()[0])
        tx = offload_state(tx)
    by_layers = None
    if config.layerwise:
        by_layers = layerwise(
            block_stack(model_config),
            tx,
            accumulate=config.accumulate,
            max_norm=config.clip or None,
            seed=config.seed,
            axis_name=DATA_AXIS if config.reduce_low_rank else None,
        )
    optimizer = by_layers or tx

    data_parallel = mesh if config.reduce_low_rank else None
    batch = jax.ShapeDtypeStruct((config.batch, config.seq + 1), jnp.int32)
    shardings = out_shardings = None
    if mesh is not None:
        batch = jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=batch_sharding(mesh))
        shardings = _shardings(mesh, jax.eval_shape(weights, jax.random.key(0)), optimizer)
        out_shardings = (*shardings, NamedSharding(mesh, PartitionSpec()))
    draw = jax.jit(weights, out_shardings=shardings and shardings[0])
    start = jax.jit(lambda params: optimizer.init(part(params)[0]), out_shardings=shardings and shardings[1])

    def init(key: jax.Array) -> tuple[Any, Any]:
        # A program has memory for all of its results from the start.  With two of them, the room for the state is free for what
        # drawing the weights takes.
        params = draw(key)
        return params, start(params)

    if by_layers is None:
        restart = make_restart(graphdef, config)
        step = make_train_step(
            graphdef, tx, config.accumulate, config.accumulate_low_rank, out_shardings, data_parallel, restart
        )
    else:
        step = _layerwise_step(by_layers, out_shardings, data_parallel)
    return Program(graphdef, init, step, batch, mesh, shardings, state_on_host)


def full_rank(config: PretrainConfig, model_config: LlamaConfig) -> Any:
    """The abstract parameters that a run has if its optimizer is AdamW: all matrices of the blocks are ordinary ones.

    >>> config = PretrainConfig(optimizer="low_rank")
    >>> full_rank(config, config.model_config(256))["layers"]["mlp"]["up_proj"]["kernel"].shape
    (4, 128, 352)
    """
    adamw = dataclasses.replace(config, optimizer="adamw")
    return jax.eval_shape(functools.partial(_weights, adamw, model_config), jax.random.key(0))


def _split(config: PretrainConfig, model_config: LlamaConfig, key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    model = Llama(model_config, rngs=nnx.Rngs(key))
    adapt(model, config, key)
    return nnx.split(model, nnx.Param)


def _weights(config: PretrainConfig, model_config: LlamaConfig, key: jax.Array) -> Any:
    """The parameters of a new run, as it stores them."""

    @jax.jit
    def drawn(key: jax.Array) -> Any:
        params = nnx.to_pure_dict(_split(config, model_config, key)[1])
        return quantize_weights(params) if config.weights == "int8" else params

    if config.weights != "int8":
        return drawn(key)
    # One after the other: left to itself, XLA draws all matrices of a shape at once, which takes more than the int8 model.
    structure = jax.tree.structure(jax.eval_shape(drawn, key), is_leaf=is_int8)
    weights: list[Any] = []
    for index in range(structure.num_leaves):
        key, weights = jax.lax.optimization_barrier((key, weights))
        weights.append(jax.tree.leaves(drawn(key), is_leaf=is_int8)[index])
    return structure.unflatten(weights)


def _shardings(mesh: Mesh, params: Any, optimizer: Any) -> tuple[Any, Any]:
    """Of (params, opt_state)."""
    of_params = param_shardings(mesh, params)
    state = jax.eval_shape(optimizer.init, params)
    return of_params, cut_along_fsdp(state, state_sharding(optimizer, params, of_params))


def check_host_memory(device: Any) -> None:
    """Raises a ValueError if JAX does not let the device use memory of the host."""
    if all(memory.kind != HOST for memory in device.addressable_memories()):
        raise ValueError(
            f"--state-memory host needs the memory that JAX calls {HOST}, which {device.platform} has not; leave it out."
        )


def _on_host(state: LayerwiseState) -> LayerwiseState:
    """The abstract state of a layer-wise step with :func:`offload_state`, with the shardings of what is on the host."""
    # Of all shardings, only a NamedSharding makes an array's type say that it is on the host.
    mesh = Mesh(np.array(jax.devices()[:1]), ("one",))
    host = NamedSharding(mesh, PartitionSpec(), memory_kind=HOST)

    def place(leaf: jax.ShapeDtypeStruct, one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _placed(leaf, host) if offloaded(one) else leaf

    layers = jax.tree.map(place, state.layers, one_of(state.layers))
    return LayerwiseState(state.count, layers, jax.tree.map(place, state.rest, state.rest))


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)


def _layerwise_step(optimizer: Layerwise, out_shardings: Any, data_parallel: Mesh | None) -> Any:
    take = on_parts(optimizer.step, data_parallel)

    def step(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, Any, Metrics]:
        params, opt_state, found = take(params, opt_state, batch)
        return params, opt_state, found._asdict() | optimizer_metrics(opt_state)

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)
