# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The state of :func:`galore_jax.galore`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class GaLoreState(NamedTuple):
    """State of :func:`galore_jax.galore`: plain arrays only.

    ``left`` and ``right`` have the structure of the parameters, with ``optax.MaskedNode()`` (no array) where a parameter has
    no basis on that side.  As for ``optax.masked``, ``optax.tree.map_params`` with further trees needs
    ``is_leaf=lambda x: isinstance(x, optax.MaskedNode)``.
    """

    # Updates done, without those in which no gradient was good; shape=(), dtype=jnp.int32.
    step: jax.Array
    # Updates in which some gradient was not finite, or the inner transformation's answer to that of a projected parameter;
    # shape=(), dtype=jnp.int32.
    skipped: jax.Array
    # Bases that were due but kept, because their gradient was zero or not finite; shape=(), dtype=jnp.int32.
    kept: jax.Array
    # New bases that were not orthonormal, so that the old one was kept; shape=(), dtype=jnp.int32.
    rejected: jax.Array
    # (*batch, m, r), at least float32, for a dense basis that no codec stores; see galore_jax._core.basis.
    left: Any
    # (*batch, n, r), the same.
    right: Any
    # What the refresh policy remembers of each parameter; () for most policies.
    schedule: Any
    # galore_jax.diagnostics.Diagnostics, or () without them.
    diagnostics: Any
    # What the rule for the gradient outside the subspace remembers of each parameter; () without a rule.
    residual: Any
    # The state of the inner transformation.
    inner_state: Any

    @property
    def count(self) -> jax.Array:  # pyrefly: ignore[bad-override]
        """``step``.  It is no field, so that ``optax.tree.get(state, "count")`` finds the inner optimizer's count alone."""
        return self.step


def galore_states_of(new: Any, old: Any) -> Any:
    """The state ``old`` of any transformation, with its :class:`GaLoreState` nodes replaced by those of ``new``."""

    def is_node(x: Any) -> bool:
        return isinstance(x, GaLoreState)

    return jax.tree.map(lambda old, new: new if is_node(old) else old, old, new, is_leaf=is_node)
