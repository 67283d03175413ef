# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Every preset by its name, for programs in which a user names one."""

from __future__ import annotations

from collections.abc import Callable

import optax

from galore_jax import presets, whole_gradient

Preset = Callable[..., optax.GradientTransformationExtraArgs]

LOW_RANK: dict[str, Preset] = {
    preset.__name__: preset
    for preset in (
        presets.galore_adamw,
        presets.galore_adafactor,
        presets.galore_adamw_8bit,
        presets.q_galore_adamw_8bit,
        presets.grass_adamw,
        presets.golore_adamw,
    )
}
"""Presets that the gradient in the subspaces is enough for."""

WHOLE_GRADIENT: dict[str, Preset] = {
    preset.__name__: preset
    for preset in (
        whole_gradient.fira_adamw,
        whole_gradient.apollo_adamw,
        whole_gradient.apollo_mini,
        whole_gradient.q_apollo_mini,
        whole_gradient.ldadam,
        whole_gradient.galore_muon,
    )
}
"""Presets that need all of it."""

PRESETS: dict[str, Preset] = LOW_RANK | WHOLE_GRADIENT
