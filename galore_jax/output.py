# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How the inner update N becomes an update of the parameter.

    lift     ΔW = α P N        α a number, or "rms": α = √(m n / (elements of N)), √(m/r) for a basis on the left

For orthonormal P the lift keeps the Frobenius norm of N, so "rms" keeps its root mean square.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.matrix_view import MatrixView


def check_scale(scale: Any) -> None:
    """Raises unless ``scale`` is a finite number, "rms" or an injected hyperparameter."""
    if isinstance(scale, jax.Array) or (isinstance(scale, str) and scale == "rms"):
        return
    if isinstance(scale, (bool, str)) or not isinstance(scale, (int, float, np.number)) or not math.isfinite(scale):
        raise ValueError(f'scale is {scale!r}: write a finite number or "rms".')


def alpha(view: MatrixView, scale: Any, dtype: Any) -> jax.Array | float:
    """α of a parameter."""
    return rms_scale(view) if isinstance(scale, str) else jnp.asarray(scale).astype(dtype)


def rms_scale(view: MatrixView) -> float:
    """The α that keeps the root mean square of the inner update.

    >>> from galore_jax.matrix_view import select
    >>> [view] = select({"w": jnp.zeros((64, 256))}, rank=16)
    >>> rms_scale(view)
    2.0
    """
    return math.sqrt(math.prod(view.matrix_shape) / math.prod(view.low_rank_shape[-2:]))
