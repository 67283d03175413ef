# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a caller can ask of the galore inside a transformation, beyond an ordinary update.

``optax.chain`` and most wrappers hand extra arguments of ``update`` to every member, so a :class:`Call` reaches a galore
wherever it stands.  A call is a pytree, so it passes through a jitted ``update`` too; the reply does not come back from there,
and :meth:`Call.check_reached` refuses such a wrapper in one sentence.
"""

from __future__ import annotations

import enum
from typing import Any

import jax

ARGUMENT = "galore_call"
"""The name of the extra argument of ``update`` that holds a :class:`Call`."""

AxisName = str | tuple[str, ...] | None


class Action(enum.Enum):
    """What ``update`` is to do."""

    UPDATE = enum.auto()  # an ordinary update
    REFRESH = enum.auto()  # refresh all bases, and nothing else
    PROJECT = enum.auto()  # refresh the bases that are due, and reply with the projected gradients
    APPLY = enum.auto()  # an update from gradients that are projected already


@jax.tree_util.register_pytree_node_class
class Call:
    """One request to every galore in a transformation."""

    def __init__(
        self,
        action: Action,
        *,
        layer: int | jax.Array | None = None,
        may_refresh: bool | jax.Array = True,
        axis_name: AxisName = None,
    ) -> None:
        self.action = action
        self.layer = layer  # the index of the layer that a layer-wise step shows
        self.may_refresh = may_refresh  # whether bases that are due may be refreshed
        self.axis_name = axis_name  # the devices along this axis hold other parts of the batch
        self.reply: Any = None  # set by galore: the tree of projected gradients for PROJECT, True otherwise

    def tree_flatten(self) -> tuple[tuple, tuple]:
        return (self.layer, self.may_refresh), (self.action, self.axis_name)

    @classmethod
    def tree_unflatten(cls, static: tuple, arrays: tuple) -> Call:
        action, axis_name = static
        layer, may_refresh = arrays
        return cls(action, layer=layer, may_refresh=may_refresh, axis_name=axis_name)

    def answer(self, low_rank: Any = True) -> None:
        """Stores the reply of a galore.  Raises a ValueError if a second one replies with gradients."""
        if self.action is Action.PROJECT and self.reply is not None:
            raise ValueError(
                "Low-rank accumulation found two galore transformations in tx; write a tx with a single galore in it."
            )
        self.reply = low_rank

    def check_reached(self, who: str) -> None:
        """Raises a ValueError if no galore has replied; ``who`` names the caller."""
        if self.reply is None:
            raise ValueError(
                f"{who} reached no galore in tx: write a transformation that contains one, without wrappers such as "
                "optax.MultiSteps or a jitted update that keep extra arguments to themselves."
            )


def call_of(extra_args: dict[str, Any]) -> Call:
    """Takes the call out of the extra arguments of ``update``; an ordinary update without one."""
    return extra_args.pop(ARGUMENT, None) or Call(Action.UPDATE)
