# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""When a run has diverged: a loss or parameters that are not finite, or updates that are all skipped.

GaLore skips an update whose gradient is not finite, and a zero gradient changes nothing, so a model with a broken layer can stay
at the loss of a uniform guess forever.  A zero gradient at a loss of zero is no trouble: that model has learned everything.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

STUCK_STEPS = 20
"""So many skipped updates in a row end a run; one bad batch does not."""


class Diverged(Exception):
    """Training cannot go on; the message names the step, the last finite loss and the way back."""


@dataclasses.dataclass
class Watch:
    """Looks at every step of a run.

    Args:
      last: the last step of the run, at which a shorter row of skipped updates is enough.

    >>> watch = Watch(last=100)
    >>> watch.see(1, 5.5, grad_norm=0.25, skipped=0)
    >>> watch.see(2, math.nan, grad_norm=0.25, skipped=0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    galore_jax...Diverged: The run diverged: the loss of step 2 is nan; the last finite loss was 5.5000, of step 1
    """

    last: int
    stuck: int = 0
    """Skipped updates since the last one that was made."""
    sound: int = 0
    """The last step that was as it should be: so the parameters before it were, and a checkpoint of an earlier step is."""
    _finite: tuple[int, float] | None = None  # the last step with a finite loss, and that loss
    _skipped: int | None = None  # what GaLore had counted after the step before

    def see(self, step: int, loss: float, grad_norm: float, skipped: int) -> None:
        """Look at the metrics of a step; Diverged if they show that the run cannot go on."""
        self.sound = self.sound or step - 1
        if not math.isfinite(loss):
            raise self._diverged(f"the loss of step {step} is {loss}")
        self._finite = step, loss
        idle = not math.isfinite(grad_norm) or (grad_norm == 0 and loss != 0)
        idle = idle or (self._skipped is not None and skipped > self._skipped)
        self.stuck, self._skipped = self.stuck + 1 if idle else 0, skipped
        self.sound = self.sound if idle else step
        if self.stuck >= STUCK_STEPS or (step == self.last and self.stuck > 1):
            raise self._diverged(
                f"the {self.stuck} updates to step {step} were skipped, because their gradients were zero or not finite"
            )

    def check_parameters(self, step: int, params: Any) -> None:
        """Diverged unless every parameter is finite after so many steps; waits for them."""
        if not all(jax.device_get(_finite_leaves(jax.tree.leaves(params)))):
            raise self._diverged(f"after step {step} the parameters are not finite")

    def check_validation(self, step: int, loss: float) -> None:
        """Diverged unless the validation loss after so many steps is finite."""
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss after step {step} is {loss}")

    def _diverged(self, reason: str) -> Diverged:
        last = "" if self._finite is None else "; the last finite loss was {1:.4f}, of step {0}".format(*self._finite)
        return Diverged(f"The run diverged: {reason}{last}")


@jax.jit
def _finite_leaves(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
