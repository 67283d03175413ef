# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The program of a run: how its state is made, and what one step does to it.

The training loop runs it, and the planner compiles it for hardware that is not there: both get it from :func:`program`, so
that what was planned is what is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from galore_jax.layerwise import layerwise
from galore_jax.models import Llama, LlamaConfig
from galore_jax.models.llama import block_stack
from galore_jax.training.config import PretrainConfig
from galore_jax.training.optimizers import make_optimizer, make_schedule
from galore_jax.training.step import Metrics, make_train_step, optimizer_metrics
from galore_jax.weights import quantize_weights


class Program(NamedTuple):
    """What a run is made of."""

    graphdef: nnx.GraphDef  # of the model
    init: Callable[[jax.Array], tuple[Any, Any]]  # PRNG key -> (params, opt_state)
    step: Any  # jitted; params, opt_state (both donated), batch -> params, opt_state, metrics
    batch: jax.ShapeDtypeStruct  # int32 [batch, sequence + 1]

    @property
    def state(self) -> tuple[Any, Any]:
        """The abstract (params, opt_state)."""
        return jax.eval_shape(self.init, jax.random.key(0))


def program(config: PretrainConfig, model_config: LlamaConfig) -> Program:
    """The program of a run.

    >>> config = PretrainConfig(layerwise=True, weights="int8")
    >>> params, opt_state = program(config, config.model_config(256)).state
    >>> params["layers"]["mlp"]["up_proj"]["kernel"].codes.shape, opt_state.layers[0].count.shape
    ((4, 128, 352), (4,))
    """

    def weights(key: jax.Array) -> tuple[nnx.GraphDef, Any]:
        return nnx.split(Llama(model_config, rngs=nnx.Rngs(key)), nnx.Param)

    graphdef = nnx.eval_shape(weights, jax.random.key(0))[0]
    schedule = make_schedule(config)
    if config.layerwise:
        init_state, step = _layerwise(config, model_config, make_optimizer(config, schedule, clip=False))
    else:
        tx = make_optimizer(config, schedule)
        init_state, step = tx.init, make_train_step(graphdef, tx, config.accumulate, config.accumulate_low_rank)

    def init(key: jax.Array) -> tuple[Any, Any]:
        params = nnx.to_pure_dict(weights(key)[1])
        if config.weights == "int8":
            params = quantize_weights(params)
        return params, init_state(params)

    return Program(graphdef, init, step, jax.ShapeDtypeStruct((config.batch, config.seq + 1), jnp.int32))


def _layerwise(
    config: PretrainConfig, model_config: LlamaConfig, tx: optax.GradientTransformation
) -> tuple[Callable[[Any], Any], Any]:
    """``init`` of the optimizer state, and the step."""
    init, layerwise_step = layerwise(
        block_stack(model_config),
        tx,
        accumulate=config.accumulate,
        max_norm=config.clip or None,
        seed=config.seed,
    )

    def step(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, Any, Metrics]:
        params, opt_state, found = layerwise_step(params, opt_state, batch)
        return params, opt_state, found._asdict() | optimizer_metrics(opt_state)

    return init, jax.jit(step, donate_argnums=(0, 1))
