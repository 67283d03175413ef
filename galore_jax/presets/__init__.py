# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""All presets, grouped by the part of the gradient that they need."""

from __future__ import annotations

from collections.abc import Callable

import optax

from galore_jax.presets.adam_4bit import adamw_4bit
from galore_jax.presets.full_muon import muon, muon_2bit, muon_4bit, muon_8bit
from galore_jax.presets.full_rank import apollo_adamw, apollo_mini, fira_adamw, q_apollo_mini
from galore_jax.presets.ldadam import ldadam
from galore_jax.presets.low_rank import (
    galore_adafactor,
    galore_adamw,
    galore_adamw_8bit,
    golore_adamw,
    grass_adamw,
    q_galore_adamw_8bit,
)
from galore_jax.presets.low_rank_muon import galore_muon

__all__ = [
    "FULL_RANK",
    "LOW_RANK",
    "PRESETS",
    "RANK_ONE",
    "WHOLE_GRADIENT",
    "adamw_4bit",
    "apollo_adamw",
    "apollo_mini",
    "fira_adamw",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_muon",
    "golore_adamw",
    "grass_adamw",
    "ldadam",
    "muon",
    "muon_2bit",
    "muon_4bit",
    "muon_8bit",
    "q_apollo_mini",
    "q_galore_adamw_8bit",
]

Preset = Callable[..., optax.GradientTransformationExtraArgs]


def _by_name(*presets: Preset) -> dict[str, Preset]:
    return {preset.__name__: preset for preset in presets}


LOW_RANK: dict[str, Preset] = _by_name(
    galore_adamw, galore_adafactor, galore_adamw_8bit, q_galore_adamw_8bit, grass_adamw, golore_adamw
)
"""Presets that need only the gradient in the subspaces, so micro-batches can be summed there."""

WHOLE_GRADIENT: dict[str, Preset] = _by_name(
    fira_adamw,
    apollo_adamw,
    apollo_mini,
    q_apollo_mini,
    ldadam,
    galore_muon,
    muon,
    muon_8bit,
    muon_4bit,
    muon_2bit,
    adamw_4bit,
)
"""Presets that need the whole gradient."""

PRESETS: dict[str, Preset] = LOW_RANK | WHOLE_GRADIENT
"""All presets by name."""

FULL_RANK = ("muon", "muon_8bit", "muon_4bit", "muon_2bit", "adamw_4bit")
"""Presets that have no subspaces, and no rank."""

RANK_ONE = ("apollo_mini", "q_apollo_mini")
"""Presets that are defined by their default rank, 1."""
