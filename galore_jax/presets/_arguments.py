# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The arguments that presets share, each declared once.

A preset names its own arguments and takes those of the function it calls as ``**arguments``.  Type checkers read the names
from the classes below; ``help`` and ``optax.inject_hyperparams`` read them from the signature that
:func:`with_arguments_of` adds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import jax
import optax

from galore_jax import projectors, refresh as policies, residual as residuals
from galore_jax.matrix_codec import MatrixCodec
from galore_jax.matrix_view import Rank

_Preset = TypeVar("_Preset", bound=Callable[..., optax.GradientTransformationExtraArgs])


class GaLoreArguments(TypedDict, total=False):
    """The keyword arguments of :func:`galore_jax.galore`."""

    rank: Rank
    update_proj_gap: int | jax.Array
    scale: float | jax.Array | str
    proj_type: str
    projector: str | projectors.Projector
    refresh: str | policies.RefreshPolicy | None
    transport: str | None
    basis_codec: str
    residual: str | residuals.Residual | None
    diagnostics: bool
    mask: Any
    weight_dimension_numbers: Any
    seed: int | jax.Array


class AdamW8bitArguments(GaLoreArguments, total=False):
    """The keyword arguments of :func:`galore_jax.galore_adamw_8bit`."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    weight_decay: float | jax.Array
    weight_decay_mask: Any


class AdamWArguments(AdamW8bitArguments, total=False):
    """The keyword arguments of :func:`galore_jax.galore_adamw`."""

    mu_dtype: Any


class FullMuonArguments(TypedDict, total=False):
    """The keyword arguments of :func:`galore_jax.muon`, without ``mu_dtype``."""

    momentum: float | jax.Array
    nesterov: bool
    neuron_decay: float | jax.Array | None
    ns_coeffs: str
    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    adam_scale: float | jax.Array
    weight_decay: float | jax.Array
    weight_decay_mask: Any
    mask: Any
    weight_dimension_numbers: Any


class CodedMuonArguments(FullMuonArguments, total=False):
    """The keyword arguments of :func:`galore_jax.muon_8bit`."""

    codec: MatrixCodec
    seed: int | jax.Array


def with_arguments_of(
    base: Callable, *, rank: Rank | None = None, without: str | None = None, **defaults: Any
) -> Callable[[_Preset], _Preset]:
    """Puts the keyword arguments of ``base`` into the signature of a preset, in place of its ``**arguments``.

    ``optax.inject_hyperparams`` makes an array of every numeric default, and a rank fixes the shapes of the state.  So ``rank``
    is None in the signature, and the number given here reaches the preset.

    Args:
      base: The function whose keyword arguments the preset takes.
      rank: The default rank.  None leaves the default to ``base``.
      without: An argument of ``base`` that the preset does not take.
      **defaults: Defaults that differ from those of ``base``.  All of them are passed to the preset.

    >>> import galore_jax
    >>> parameters = inspect.signature(galore_jax.fira_adamw).parameters
    >>> parameters["residual"].default, parameters["b1"].default, parameters["rank"].default
    ('fira', 0.9, None)
    """

    def decorate(preset: Any) -> Any:
        parameters = inspect.signature(preset).parameters.values()
        own = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {without, *(parameter.name for parameter in own)}
        shared = [
            parameter.replace(default=(defaults | {"rank": None}).get(name, parameter.default))
            for name, parameter in inspect.signature(base).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in names
        ]
        signature = inspect.Signature(own + shared)

        @functools.wraps(preset)
        def with_defaults(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if rank is not None and bound.arguments["rank"] is None:
                bound.arguments["rank"] = rank
            return preset(*bound.args, **bound.kwargs)

        with_defaults.__signature__ = signature  # type: ignore[attr-defined]
        return with_defaults

    return decorate
