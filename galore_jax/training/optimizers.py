# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The optimizers that a pre-training run can name, and its learning-rate schedule.

Every name gives the same chain, clip by global norm -> optimizer -> decoupled weight decay times the learning rate, so
that two runs with different names differ in the optimizer alone.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax
from galore_jax._core.names import did_you_mean
from galore_jax.presets import PRESETS
from galore_jax.training import column_normalized
from galore_jax.training.config import LOW_RANK_WEIGHTS, PretrainConfig


def make_schedule(config: PretrainConfig) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then a cosine to a tenth of it at the last step.

    With relora it rises linearly from 0 to the cosine once more after each merge (arXiv 2307.05695, section 3), over a tenth of
    the steps between two merges, at most 100.

    >>> schedule = make_schedule(PretrainConfig(learning_rate=1.0, steps=100))
    >>> [round(float(schedule(step)), 2) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
    >>> jagged = make_schedule(PretrainConfig(optimizer="relora", update_proj_gap=50, learning_rate=1.0, steps=100))
    >>> [round(float(jagged(step)), 2) for step in (5, 10, 49, 50, 52, 55)]
    [0.5, 1.0, 0.64, 0.0, 0.24, 0.55]
    """
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.resolved_warmup_steps,
        decay_steps=config.steps,
        end_value=0.1 * config.learning_rate,
    )
    period = config.merge_period
    if period is None:
        return cosine
    rising = min(100, max(1, period // 10))

    def jagged(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        risen = jnp.minimum((count % period).astype(jnp.float32) / rising, 1.0)
        return jnp.asarray(cosine(count)) * jnp.where(count < period, 1.0, risen)

    return jagged


def make_optimizer(
    config: PretrainConfig, schedule: optax.Schedule, *, clip: bool = True
) -> optax.GradientTransformationExtraArgs:
    """The optimizer called ``config.optimizer``; its state is float32, or coded, whatever the dtype of the parameters.

    Without ``clip`` it leaves out the bound on the global norm, which a layer-wise step has to put on by itself.

    Raises:
      ValueError: no optimizer has that name, or one of its settings is out of range.

    >>> tx = make_optimizer(PretrainConfig(optimizer="adamw"), optax.constant_schedule(1e-3))
    >>> state = tx.init({"kernel": jnp.ones((4, 4), jnp.bfloat16)})
    >>> optax.tree.get(state, "nu")["kernel"].dtype
    dtype('float32')
    """
    check_optimizer(config)
    tx = OPTIMIZERS[config.optimizer](config, schedule)
    if clip and config.clip > 0:
        tx = optax.chain(optax.clip_by_global_norm(config.clip), tx)
    return optax.with_extra_args_support(tx)


def check_optimizer(config: PretrainConfig) -> None:
    """Raises a ValueError if no optimizer has that name."""
    if config.optimizer not in OPTIMIZERS:
        hint = did_you_mean(config.optimizer, OPTIMIZERS)
        raise ValueError(f"--optimizer {config.optimizer!r} is not known{hint}; choose one of {', '.join(OPTIMIZERS)}.")


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner`` on float32 copies of the parameters and gradients.

    Optax gives a second moment the dtype of the parameters; in bfloat16 it stops moving, because 0.999 rounds to 1.
    The copies are made inside the compiled step, where XLA fuses them into their uses.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> Any:
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update_fn(updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any) -> Any:
        wide_params = None if params is None else optax.tree.cast(params, jnp.float32)
        return inner.update(optax.tree.cast(updates, jnp.float32), state, wide_params, **extra)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _galore(make: Callable[..., optax.GradientTransformation]) -> Callable:
    def build(config: PretrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
        settings = dataclasses.asdict(config.resolved)
        settings["random_from"] = round(0.8 * config.steps)
        taken = inspect.signature(make).parameters
        return make(
            schedule, **{name: value for name, value in settings.items() if name in taken and name != "learning_rate"}
        )

    return build


def _adamw(config: PretrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return in_float32(optax.adamw(schedule, weight_decay=config.weight_decay))


def _adamw_8bit(config: PretrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    adamw = optax.chain(
        galore_jax.quantize_state(optax.scale_by_adam()),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return adamw


def _adafactor(config: PretrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    # optax.adafactor does not multiply its weight decay by the learning rate, and by default scales updates by the
    # size of the parameters, which galore_adafactor does not.
    adafactor = optax.adafactor(
        schedule,
        multiply_by_parameter_scale=False,
        weight_decay_rate=lambda count: config.weight_decay * schedule(count),
    )
    return in_float32(adafactor)


def _scale(config: PretrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return in_float32(column_normalized.scale(schedule, weight_decay=config.weight_decay))


OPTIMIZERS: dict[str, Callable[[PretrainConfig, optax.Schedule], optax.GradientTransformation]] = {
    **{name: _galore(preset) for name, preset in PRESETS.items()},
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "scale": _scale,
    **dict.fromkeys(LOW_RANK_WEIGHTS, _adamw),
}
