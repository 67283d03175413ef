# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The state of :func:`galore_jax.galore`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class GaLoreState(NamedTuple):
    """State of :func:`galore_jax.galore`: plain arrays only.

    ``left`` and ``right`` have the structure of the parameters, with ``optax.MaskedNode()`` (no array) where a parameter has
    no basis on that side; as for ``optax.masked``, ``optax.tree.map_params`` with further trees wants
    ``is_leaf=lambda x: isinstance(x, optax.MaskedNode)``.
    """

    count: jax.Array  # shape=(), dtype=jnp.int32; updates done, those with no good gradient left out
    skipped: jax.Array  # shape=(), dtype=jnp.int32; updates in which some gradient was not finite
    kept: jax.Array  # shape=(), dtype=jnp.int32; bases kept when due, because their gradient was zero or not finite
    rejected: (
        jax.Array
    )  # shape=(), dtype=jnp.int32; new bases that were not orthonormal, for which the old one was kept
    left: Any  # (*batch, m, r), at least float32, for a dense basis that no codec stores; see galore_jax._core.basis
    right: Any  # (*batch, n, r), the same
    schedule: Any  # what the refresh policy remembers of each parameter, () for most policies
    diagnostics: Any  # galore_jax.diagnostics.Diagnostics, or () without them
    residual: Any  # what the rule for the gradient outside remembers of each parameter; () without a rule
    inner_state: Any


def galore_states_of(new: Any, old: Any) -> Any:
    """The state ``old`` of any transformation with the :class:`GaLoreState` nodes of ``new``."""

    def is_node(x: Any) -> bool:
        return isinstance(x, GaLoreState)

    return jax.tree.map(lambda old, new: new if is_node(old) else old, old, new, is_leaf=is_node)


def check_reached(reached: bool, who: str) -> None:
    """Raises a ValueError if a request that ``who`` sent through a transformation has met no galore."""
    if not reached:
        raise ValueError(
            f"{who} reached no galore in tx: give it a transformation that has one, without wrappers that keep extra "
            "arguments to themselves."
        )
