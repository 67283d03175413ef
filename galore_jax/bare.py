# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``galore(rank=...)`` without an inner transformation: what it is, and the warning that it saves no memory by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import optax

from galore_jax._core.state import GaLoreState


class GaLoreMemoryWarning(UserWarning):
    """A bare ``galore(rank=...)`` stands in a plain ``optax.chain``, where what follows it keeps full-size state."""


class BareGaLore(optax.GradientTransformationExtraArgs):
    """``galore(rank=...)`` without an inner transformation; ``bind(inner)`` gives it one (see :func:`galore_jax.chain`)."""

    bind: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]

    def __new__(cls, init, update, bind):
        self = super().__new__(cls, init, update)
        self.bind = bind
        return self


def warned_once(init_fn: Callable) -> Callable:
    """Says, at the first ``init`` on real parameters, that a bare galore saves no memory."""
    warned = False

    def init(params: optax.Params) -> GaLoreState:
        nonlocal warned
        if not warned and jax.tree.leaves(params):
            warned = True
            warnings.warn(
                "galore(rank=...) without an inner transformation saves no memory: what follows it in a plain optax.chain keeps "
                "full-size state; write galore_jax.chain(galore(rank=...), inner) or galore(inner, rank=...).",
                GaLoreMemoryWarning,
                stacklevel=2,
            )
        return init_fn(params)

    return init
