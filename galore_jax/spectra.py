# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A rank for each parameter, from the spectra of gradients and a number of bytes.

Of a gradient with singular values σ_1 >= σ_2 >= ..., a subspace of rank r holds at most the share

    e(r) = (σ_1² + ... + σ_r²) / (σ_1² + ... + σ_k²) ,    k the smaller side,

of its energy.  One more rank costs b_i bytes for parameter i, which has N_i matrices.  The ranks maximize

    sum_i N_i e_i(r_i)    subject to    bytes of the optimizer state <= max_bytes .

e is concave, so the best ranks come from spending bytes where N_i σ_i² / (‖G_i‖² b_i) is largest.  A parameter is not projected
if its full-rank optimizer state would take no more bytes than its low-rank state.

Jaiswal et al. 2024 (WeLore, arXiv:2407.11239) and Refael et al. 2024 (AdaRankGrad, arXiv:2410.17881) choose ranks from spectra.
The allocation of bytes is ours.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax._core.step import GaLoreMemoryWarning
from galore_jax.matrix_view import MatrixView, paths_of, select
from galore_jax.memory import state_bytes

__all__ = ["Ranks", "ranks_from_gradients"]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A rank for each parameter, to pass as ``rank=``.

    Attributes:
      by_path: Rank of each parameter path; None for a parameter that is not projected.
      captured_energy: Mean of e(rank) over the matrices of each projected parameter path.
    """

    by_path: dict[str, int | None]
    captured_energy: dict[str, float]

    def __call__(self, path: str, shape: tuple[int, ...]) -> int | None:
        if path not in self.by_path:
            raise ValueError(
                f"ranks_from_gradients was given no gradient of {path!r} with shape {shape}. Pass it a tree of gradients with "
                "the structure of the parameters."
            )
        return self.by_path[path]


def ranks_from_gradients(
    gradients: Any,
    max_bytes: int,
    optimizer: Callable[..., optax.GradientTransformation],
    *,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
) -> Ranks:
    """The ranks that capture the most energy of ``gradients`` in at most ``max_bytes`` of optimizer state.

    Call it once, before training.  It computes every singular value on the host, in float64 from the Gram matrix of the smaller
    side.  A stack of matrices has one rank.  The spectrum of a single batch is noisy.  The mean gradient of a few batches, after
    some hundred steps, gives better ranks than the first gradient.

    Args:
      gradients: Tree of gradients like the parameters.
      max_bytes: Upper bound on the bytes of the whole optimizer state, including that of parameters that are not projected.
      optimizer: Callable that makes the transformation from ``rank=``, such as ``functools.partial(galore_adamw, 0.01)``.
      mask: The mask of ``optimizer``.  With a mask, every selected parameter is projected.
      weight_dimension_numbers: The dimension numbers of ``optimizer``.

    Returns:
      The ranks, at least 1, to pass to ``optimizer`` as ``rank=``.

    Raises:
      ValueError: A gradient is zero or not finite, no parameter is selected, or rank 1 takes more than ``max_bytes``.

    >>> import functools
    >>> from galore_jax import galore_adamw
    >>> optimizer = functools.partial(galore_adamw, 0.01)
    >>> gradients = {"flat": jnp.eye(16), "steep": jnp.diag(0.5 ** jnp.arange(16.0))}
    >>> ranks = ranks_from_gradients(gradients, 2000, optimizer)
    >>> ranks.by_path, state_bytes(optimizer(rank=ranks), gradients)
    ({'flat': 8, 'steep': 2}, 1940)
    """
    views = select(gradients, rank=1, mask=mask, weight_dimension_numbers=weight_dimension_numbers)
    paths = paths_of(gradients)
    matrices = {
        view.path: (view, _energies(view, leaf))
        for leaf, view in zip(jax.tree.leaves(gradients), views, strict=True)
        if view is not None
    }
    if not matrices:
        raise ValueError(
            f"ranks_from_gradients found no matrix to project among {', '.join(paths[:8])}. Select one with mask or "
            "weight_dimension_numbers."
        )
    abstract = jax.eval_shape(lambda: gradients)

    def bytes_at(ranks: dict[str, int | None]) -> int:
        with warnings.catch_warnings():  # a trial may project nothing
            warnings.simplefilter("ignore", GaLoreMemoryWarning)
            return state_bytes(optimizer(rank=lambda path, shape: ranks.get(path)), abstract)

    ranks = _Allocation(matrices, bytes_at, may_be_whole=mask is None).within(max_bytes)
    return Ranks(
        dict.fromkeys(paths) | ranks,
        {path: float(matrices[path][1][:rank].sum()) for path, rank in ranks.items() if rank is not None},
    )


def _energies(view: MatrixView, gradient: jax.Array) -> np.ndarray:
    """Returns [k]: σ_i² / (σ_1² + ... + σ_k²), sorted, largest first; the mean over the matrices of a parameter."""
    m, n = view.matrix_shape
    matrices = np.asarray(jax.device_get(view.to_matrices(jnp.asarray(gradient, jnp.float32))), np.float64)
    shares = []
    for matrix in matrices.reshape(-1, m, n):
        peak = np.abs(matrix).max()
        if not (0 < peak < np.inf):
            raise ValueError(
                f"The gradient of {view.path!r} with shape {view.shape} has a matrix whose largest magnitude is {peak}, so it "
                "has no spectrum. Pass ranks_from_gradients the gradients of another batch, or leave the parameter out with mask."
            )
        scaled = matrix / peak
        gram = scaled @ scaled.T if m <= n else scaled.T @ scaled
        energies = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
        shares.append(energies / energies.sum())
    return np.mean(shares, axis=0)


class _Allocation:
    """The order in which ranks grow by one, and the bytes that they cost."""

    def __init__(
        self,
        matrices: dict[str, tuple[MatrixView, np.ndarray]],
        bytes_at: Callable[[dict[str, int | None]], int],
        may_be_whole: bool,
    ):
        self.bytes_at = bytes_at
        self.paths = list(matrices)
        ones: dict[str, int | None] = dict.fromkeys(self.paths, 1)
        least = bytes_at(ones)
        owners, gains, self.most = [], [], {}
        for i, (path, (view, energies)) in enumerate(matrices.items()):
            highest = len(energies) - 1
            one_more = (bytes_at(ones | {path: highest}) - least) / max(highest - 1, 1)
            raises, self.most[path] = energies[1:highest], highest
            if may_be_whole:
                whole = bytes_at(ones | {path: None})
                raises = energies[1:]
                self.most[path] = _largest(
                    highest, lambda rank, path=path, whole=whole: bytes_at(ones | {path: rank}) <= whole
                )
            owners.append(np.full(len(raises), i))
            gains.append(math.prod(view.batch_shape) * raises / max(one_more, 1))
        self.order = np.concatenate(owners)[np.argsort(-np.concatenate(gains), kind="stable")]

    def ranks(self, raises: int) -> dict[str, int | None]:
        """The ranks after a number of raises; None where the full-rank state costs no more."""
        counts = 1 + np.bincount(self.order[:raises], minlength=len(self.paths))
        return {
            path: int(rank) if rank <= self.most[path] else None for path, rank in zip(self.paths, counts, strict=True)
        }

    def within(self, max_bytes: int) -> dict[str, int | None]:
        """The ranks after the largest number of raises whose state fits."""
        least = self.bytes_at(self.ranks(0))
        if least > max_bytes:
            raise ValueError(
                f"max_bytes is {max_bytes}, but the optimizer state takes {least} bytes at rank 1. Pass at least {least}."
            )
        return self.ranks(_largest(len(self.order), lambda raises: self.bytes_at(self.ranks(raises)) <= max_bytes))


def _largest(high: int, fits: Callable[[int], bool]) -> int:
    """The largest of 0 .. ``high`` that fits, by bisection; 0 if none fits."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
