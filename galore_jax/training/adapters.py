# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-training with low-rank weights: ``--optimizer lora``, ``relora`` and ``low_rank``, on AdamW.

What is low-rank here is the model (:mod:`galore_jax.models.lora`): every matrix of the blocks is W + s A B with a frozen random W
(lora, relora), or L R (low_rank).  Embeddings, head and norms are trained in full.  ReLoRA restarts before each step t, counted
from 0, that is a positive multiple of the restart period T:

    W <- W + s A B ,    A drawn anew ,    B <- 0 ,    and AdamW's moments of A and B <- 0

The count that AdamW corrects its bias by goes on, so the first updates of new adapters would be large, and the learning rate
rises from 0 once more (:func:`galore_jax.training.optimizers.make_schedule`).  The restart is part of the compiled step, and its
random numbers come from the seed and t.

ReLoRA's paper sets the 99 % of the moments' entries that are smallest to zero, its authors' code that, or all of them as here.
Dropout on the adapters' input, 0.05 in the GaLore paper's runs, is left out.

Sources: Hu et al. 2021, arXiv:2106.09685; Lialin et al. 2023, arXiv:2307.05695; Zhao et al. 2024, arXiv:2403.03507, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from galore_jax.models import Llama, add_lora
from galore_jax.models.lora import factorize, restart_lora
from galore_jax.training.config import PretrainConfig

Restart = Callable[[Any, Any], tuple[Any, Any]]


def adapt(model: Llama, config: PretrainConfig, key: jax.Array) -> None:
    """Make the matrices of the blocks what ``config.optimizer`` trains, in place; ValueError for a rank that cannot be.

    Args:
      model: with ordinary matrices; it stays so unless the optimizer is lora, relora or low_rank.
      config: of the run, its seed left out.
      key: of the run.
    """
    rank = config.resolved.rank
    assert rank is not None
    if config.optimizer == "low_rank":
        factorize(model, rank, key=_key(key, 0))
    elif config.optimizer in ("lora", "relora"):
        add_lora(model, rank, alpha=config.lora_alpha, key=_key(key, 0))


def part(params: Any) -> tuple[Any, Any]:
    """The parameters that are trained, and those that are frozen: the kernels that have an adapter.

    >>> params = {"norm": {"scale": 1}, "up_proj": {"base": {"kernel": 2}, "lora_a": 3, "lora_b": 4}}
    >>> part(params)
    ({'norm': {'scale': 1}, 'up_proj': {'lora_a': 3, 'lora_b': 4}}, {'up_proj': {'base': {'kernel': 2}}})
    """
    leaves = traverse_util.flatten_dict(params)
    frozen = {path: leaf for path, leaf in leaves.items() if "base" in path}
    trained = {path: leaf for path, leaf in leaves.items() if path not in frozen}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(trained: Any, frozen: Any) -> Any:
    """The inverse of :func:`part`."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen))


def make_restart(graphdef: nnx.GraphDef, config: PretrainConfig) -> Restart | None:
    """``restart(params, opt_state)`` of ReLoRA, to be traced at the start of every step; None for any other optimizer.

    Args:
      graphdef: of the adapted model.
      config: ``update_proj_gap`` is the period T.

    Returns:
      A function of the whole parameters and of the state of AdamW on those that are trained; when no restart is due it gives both
      back.
    """
    period = config.merge_period
    if period is None:
        return None

    def restarted(params: Any, moments: tuple[Any, Any], count: jax.Array) -> tuple[Any, tuple[Any, Any]]:
        model = nnx.merge(graphdef, params)
        restart_lora(model, key=_key(jax.random.key(config.seed), count))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), jax.tree_util.tree_map_with_path(_reset, moments)

    def restart(params: Any, opt_state: Any) -> tuple[Any, Any]:
        adam = optax.tree.get(opt_state, "ScaleByAdamState")
        due = (adam.count > 0) & (adam.count % period == 0)
        params, (mu, nu) = jax.lax.cond(
            due, restarted, lambda params, moments, _: (params, moments), params, (adam.mu, adam.nu), adam.count
        )
        return params, optax.tree.set(opt_state, mu=mu, nu=nu)

    return restart


def _reset(path: tuple, moment: jax.Array) -> jax.Array:
    return jnp.zeros_like(moment) if path[-1].key in ("lora_a", "lora_b") else moment


def _key(key: jax.Array, count: jax.Array | int) -> jax.Array:
    """Of the adapters that are drawn before step ``count``; the model's own weights come from ``key`` itself."""
    return jax.random.fold_in(jax.random.split(key)[1], count)
