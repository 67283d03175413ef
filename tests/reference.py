# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore straight from its formulas: NumPy, float64, exact SVD, one matrix at a time.  Slow and obviously right.

Zhao et al. 2024 (arXiv 2403.03507), Algorithm 2, with the reference implementation's semantics: call 0 refreshes and projects
with that same gradient, refreshes follow at calls T, 2T, ..., moments are untouched by a refresh, α acts on the way back only.
"""

import numpy as np


class Adam:
    """t starts at 1; eps is added after bias correction (Optax) or before it (galore_torch)."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8, eps_before_correction=False):
        self.b1, self.b2, self.eps, self.before = b1, b2, eps, eps_before_correction
        self.t, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, r):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * r
        self.v = self.b2 * self.v + (1 - self.b2) * r * r
        c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        if self.before:
            return np.sqrt(c2) / c1 * self.m / (np.sqrt(self.v) + self.eps)
        return (self.m / c1) / (np.sqrt(self.v / c2) + self.eps)


def sides(proj_type, m, n):
    """(basis on the left?, basis on the right?) for a kernel stored (in, out) = (m, n)."""
    if proj_type == "full":
        return True, True
    if proj_type == "std":
        proj_type = "left" if m <= n else "right"
    if proj_type == "reverse_std":
        proj_type = "right" if m <= n else "left"
    return proj_type == "left", proj_type == "right"


class GaLore:
    """One matrix.  ``signs_of(left, right)`` may hand in bases whose column signs are to be taken over: an SVD leaves them
    open, and with moments kept over a refresh the trajectory depends on them."""

    def __init__(self, inner, *, rank, update_proj_gap, scale, proj_type="std"):
        self.inner, self.rank, self.gap, self.scale, self.proj_type = inner, rank, update_proj_gap, scale, proj_type
        self.calls = 0

    def update(self, g, signs_of=None):
        g = np.asarray(g, np.float64)
        m, n = g.shape
        left, right = sides(self.proj_type, m, n)
        r = min(self.rank, m, n)
        if self.calls % self.gap == 0:
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            self.p, self.q = u[:, :r], vt[:r].T
            if signs_of is not None:
                self.p = align_signs(self.p, signs_of[0]) if left else self.p
                self.q = align_signs(self.q, signs_of[1]) if right else self.q
        self.calls += 1
        low = g
        low = self.p.T @ low if left else low
        low = low @ self.q if right else low
        low = self.scale * self.inner(low)
        low = self.p @ low if left else low
        return low @ self.q.T if right else low


def unfolding(tensor, axis):
    """(d, product of the other sizes)"""
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def mode_product(tensor, axis, matrix):
    """``tensor`` with its unfolding along ``axis`` multiplied by ``matrix`` from the left."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)


class Tucker:
    """One kernel, with ``ranks`` {axis: r}: HOSVD of the gradient, the inner optimizer on its core, Tucker product of the answer.

    ``carry(inner, {axis: P_newᵀ P_old})`` is what becomes of the moments; ``signs_of`` as in :class:`GaLore`, bases by axis."""

    def __init__(self, inner, *, ranks, update_proj_gap, scale, carry=None):
        self.inner, self.ranks, self.gap, self.scale, self.carry = inner, ranks, update_proj_gap, scale, carry
        self.calls, self.bases = 0, {}

    def update(self, g, signs_of=None):
        g = np.asarray(g, np.float64)
        if self.calls % self.gap == 0:
            new = {k: np.linalg.svd(unfolding(g, k), full_matrices=False)[0][:, :r] for k, r in self.ranks.items()}
            if signs_of is not None:
                new = {k: align_signs(basis, signs_of[k]) for k, basis in new.items()}
            if self.carry is not None and self.bases:
                self.carry(self.inner, {k: new[k].T @ self.bases[k] for k in new})
            self.bases = new
        self.calls += 1
        core = g
        for k, basis in self.bases.items():
            core = mode_product(core, k, basis.T)
        answer = self.scale * self.inner(core)
        for k, basis in self.bases.items():
            answer = mode_product(answer, k, basis)
        return answer


def align_signs(basis, other):
    """``basis`` with each column's sign chosen to agree with ``other``, which must hold the same columns up to sign."""
    cosines = np.sum(basis * np.asarray(other, np.float64), axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)
    return basis * np.sign(cosines)
