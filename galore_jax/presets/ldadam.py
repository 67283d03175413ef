# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""LDAdam: Adam in a subspace that moves at every step, with error feedback (Robert et al. 2024, arXiv 2410.16103).

For one matrix, a basis on the left, G the gradient, e the error so far, m̂ and v̂ the bias-corrected moments:

    corrected    A   = G + e
    subspace     B   = ρ P m̂ + (1 - ρ) A;   P' = orth(B BᵀP)          one block power step from the basis in use
    transport    Q   = P'ᵀP;   m <- Q m;   v <- (1 - β₂^(t-1)) |(Q∘Q)(v̂ - m̂²) + (Q m̂)²|
    Adam         N   = Adam's answer to R = P'ᵀA from these moments;   ΔW = P' N
    error        e'  = A - P' R + β₁/(1 - β₁) (P m - P' Q m)

e' is what this step has left out: the corrected gradient outside the subspace, and the momentum that the new basis cannot hold,
in units of gradients.  Nothing is lost for good, which is what the proof of convergence needs, and e is as large as the weight.

The basis looks at the momentum and the second moment at the first, so this is no choice on galore's axes but a transformation
of its own.  B is never made: P enters it by its coordinates alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import sharding
from galore_jax._core import coordinates as subspace, ranks, seeds
from galore_jax._core.dtypes import promoted, state_dtype
from galore_jax._core.gradients import level_of, masked
from galore_jax._core.orthonormal import defect, orthonormal
from galore_jax._core.state_fields import Kind, kinds
from galore_jax.matrix_view import MatrixView, Rank, Views, check_proj_type, select
from galore_jax.presets._partition import on_matrices
from galore_jax.presets.low_rank import decayed

_FIRST_STEPS = 5  # of the power iteration, from a sketch
_TOLERANCE = 1e-3  # of max |PᵀP - I|
_HIGHEST = jax.lax.Precision.HIGHEST


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.908,
    b2: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-8,
    mu_dtype: Any = None,
    rho: float | jax.Array = 0.908,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    rank: Rank | None = None,
    proj_type: str = "std",
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam (Robert et al. 2024, arXiv 2410.16103): a subspace that moves at every update, and feedback of what it left out.

    State of a projected m x n matrix with k = min(m, n) and K = max(m, n): r(k + 2K) numbers **and m n for the error**, so it
    saves at most half of AdamW's state, and about 12 m n r operations an update, three times those of :func:`galore_adamw`.
    Choose it where a small rank must lose nothing in the long run (it has a proof of convergence) and the memory for one more
    copy of the gradients is there; else :func:`fira_adamw` uses the whole gradient for one number a matrix.  It needs the whole
    gradient, so micro-batches cannot be summed in the subspaces.

    Args:
      learning_rate: a number or a schedule.  The paper's code has 0.001.
      b1, b2, eps: of Adam, on all parameters.
      mu_dtype: The dtype of Adam's first moment of the parameters that are not projected.  None keeps it in float32.
      rho: weight of the momentum beside the gradient when a subspace moves.
      weight_decay: decoupled, multiplied by the learning rate.
      weight_decay_mask: tree of bools or callable: which parameters decay.
      rank, proj_type, mask, weight_dimension_numbers, seed: The arguments of :func:`galore`.  The default rank is 16.
        ``proj_type`` cannot be ``"full"``.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> sorted(x.size for x in jax.tree.leaves(ldadam(0.001, rank=8).init(params)) if x.size > 1)
    [512, 2048, 2048, 16384]
    """
    rank = 16 if rank is None else rank
    ranks.checked(rank)
    check_proj_type(proj_type)

    def build(views: Views) -> optax.GradientTransformation:
        def views_of(tree: Any) -> list[MatrixView | None]:
            return select(tree, weight_dimension_numbers=views)

        return scale_by_ldadam(views_of, b1=b1, b2=b2, eps=eps, rho=rho, seed=seed)

    direction = on_matrices(
        build,
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype),
        rank=rank,
        proj_type=proj_type,
        mask=mask,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    return decayed(direction, learning_rate, weight_decay, weight_decay_mask)


class LDAdamState(NamedTuple):
    """State of :func:`scale_by_ldadam`; each tree has one entry a parameter, with k the side of the basis and K the other."""

    FIELD_KINDS = kinds("mu nu", step=Kind.COUNT, basis=Kind.KEPT, error=Kind.LINEAR)

    count: jax.Array  # shape=(), dtype=jnp.int32; updates done
    basis: Any  # (*batch, k, r)
    mu: Any  # (*batch, r, K)
    nu: Any  # (*batch, r, K)
    error: Any  # (*batch, k, K)


class _Matrix(NamedTuple):
    """What is remembered of one matrix, or of a batch of them."""

    basis: jax.Array
    mu: jax.Array
    nu: jax.Array
    error: jax.Array


class _Settings(NamedTuple):
    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    rho: float | jax.Array


def scale_by_ldadam(
    views_of: Callable[[Any], list[MatrixView | None]],
    *,
    b1: float | jax.Array = 0.908,
    b2: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-8,
    rho: float | jax.Array = 0.908,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam's direction for parameters that all are projected, from one side each.

    A matrix whose gradient is zero or not finite, or whose new basis is not orthonormal, is left alone in that update.

    Args:
      views_of: the view of each leaf of the parameters.
      b1, b2, eps: of Adam.
      rho: ρ, the weight of the momentum beside the gradient when the subspace moves.
      seed: of the sketch that a first basis is found from.

    Returns:
      A transformation whose state is an :class:`LDAdamState`; ``init`` raises ValueError for ``proj_type="full"``.

    >>> from galore_jax.matrix_view import select
    >>> tx = scale_by_ldadam(lambda params: select(params, rank=4))
    >>> state = tx.init({"kernel": jnp.ones((3, 8, 16))})
    >>> state.basis["kernel"].shape, state.mu["kernel"].shape, state.error["kernel"].shape
    ((3, 8, 4), (3, 4, 16), (3, 8, 16))
    """
    seeds.check_seed(seed)
    settings = _Settings(b1, b2, eps, rho)

    def init(params: optax.Params) -> LDAdamState:
        leaves, treedef = jax.tree.flatten(params)
        fresh = [_fresh(*pair) for pair in zip(_views(views_of, params), leaves, strict=True)]
        return LDAdamState(jnp.zeros([], jnp.int32), *_trees(fresh, treedef))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LDAdamState]:
        gradients, treedef = jax.tree.flatten(updates)
        key = seeds.key_of(seed, state.count)
        remembered = zip(*(treedef.flatten_up_to(getattr(state, field)) for field in _Matrix._fields), strict=True)
        replies, new, any_good = [], [], jnp.array(False)
        for view, gradient, old in zip(_views(views_of, updates), gradients, remembered, strict=True):
            matrices = promoted(view.to_matrices(gradient))
            good = jnp.isfinite(level_of(matrices, view.batch, may_be_zero=False))
            matrices = sharding.gather(masked(good, matrices))
            step = functools.partial(_step, settings, state.count, key)
            for _ in view.batch_shape:
                step = jax.vmap(step)
            gathered = _Matrix(*map(sharding.gather, old))
            direction, remember = step(_basis_first(view, matrices), sharding.gather(good), gathered)
            direction = _basis_first(view, direction).astype(gradient.dtype)
            replies.append(sharding.like(view.from_matrices(direction), gradient))
            new.append(_Matrix(*map(sharding.like, remember, old)))
            any_good |= jnp.any(good)
        count = state.count + any_good.astype(jnp.int32)
        return treedef.unflatten(replies), LDAdamState(count, *_trees(new, treedef))

    return optax.GradientTransformationExtraArgs(init, update)


def _step(
    settings: _Settings, count: jax.Array, key: jax.Array, gradient: jax.Array, good: jax.Array, old: _Matrix
) -> tuple[jax.Array, _Matrix]:
    """One matrix (k, K): the direction, and what is remembered of it."""
    b1, b2, eps, rho = (jnp.asarray(value).astype(gradient.dtype) for value in settings)
    done = count.astype(gradient.dtype)
    corrected = gradient + old.error
    mean, square = (_debiased(moment, b, done) for moment, b in ((old.mu, b1), (old.nu, b2)))
    basis = _moved(key, corrected, old.basis, mean, rho)

    q = _product(basis.T, old.basis)
    mu = _product(q, old.mu)
    spread = jnp.abs(_product(jnp.square(q), square - jnp.square(mean)) + jnp.square(_product(q, mean)))
    nu = (1 - b2**done) * spread

    low_rank = basis.T @ corrected
    lost = b1 / (1 - b1) * (old.basis @ old.mu - basis @ mu)
    error = corrected - basis @ low_rank + lost
    mu, nu = b1 * mu + (1 - b1) * low_rank, b2 * nu + (1 - b2) * jnp.square(low_rank)
    reply = _debiased(mu, b1, done + 1) / (jnp.sqrt(_debiased(nu, b2, done + 1)) + eps)

    usable = good & (defect(basis) <= _TOLERANCE)
    new = jax.tree.map(lambda new, old: jnp.where(usable, new, old), _Matrix(basis, mu, nu, error), old)
    return jnp.where(usable, basis @ reply, 0), new


def _moved(key: jax.Array, corrected: jax.Array, basis: jax.Array, mean: jax.Array, rho: jax.Array) -> jax.Array:
    """orth(B BᵀP); of a first basis, which has no momentum yet, a sketch of A and more such steps."""
    warm = jnp.any(basis != 0)
    inside = rho * mean + (1 - rho) * (basis.T @ corrected)  # PᵀB
    start = jnp.where(warm, inside, jax.random.normal(key, mean.shape, mean.dtype))

    def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        peak = jnp.max(jnp.abs(carry[1]))
        coordinates = carry[1] / jnp.where(peak > 0, peak, 1)
        moved = orthonormal((1 - rho) * (corrected @ coordinates.T) + rho * (basis @ (mean @ coordinates.T)))
        return moved, (1 - rho) * (moved.T @ corrected) + rho * ((moved.T @ basis) @ mean)

    return jax.lax.fori_loop(0, jnp.where(warm, 1, _FIRST_STEPS), step, (basis, start))[0]


def _debiased(moment: jax.Array, decay: jax.Array, steps: jax.Array) -> jax.Array:
    """m / (1 - β^t), and m itself, which is zero, before the first step."""
    return moment / jnp.where(steps > 0, 1 - decay**steps, 1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _views(views_of: Callable[[Any], list[MatrixView | None]], tree: Any) -> list[MatrixView]:
    views = [view for view in views_of(tree) if view is not None]
    for view in views:
        if view.left and view.right:
            raise ValueError(
                f'proj_type is "full", which would project {view.path!r} from both sides, but LDAdam has one basis: '
                'write "std" or another side.'
            )
    return views


def _basis_first(view: MatrixView, matrices: jax.Array) -> jax.Array:
    """(*batch, m, n) with the side of the basis first, and back: its own inverse."""
    return matrices if view.left else jnp.swapaxes(matrices, -1, -2)


def _fresh(view: MatrixView, leaf: Any) -> _Matrix:
    side, other = view.matrix_shape if view.left else view.matrix_shape[::-1]
    spec = subspace.matrix_spec(view, leaf)
    *batch, first, second = spec or (None,) * (len(view.batch_shape) + 2)
    if not view.left:
        first, second = second, first

    def zeros(shape: tuple[int, int], *sides: Any) -> jax.Array:
        return sharding.zeros((*view.batch_shape, *shape), state_dtype(leaf), spec and (*batch, *sides), leaf)

    mu, nu = (zeros((view.rank, other), None, second) for _ in range(2))
    return _Matrix(zeros((side, view.rank), first, None), mu, nu, zeros((side, other), first, second))


def _trees(matrices: list[_Matrix], treedef: Any) -> list[Any]:
    return [treedef.unflatten(getattr(matrix, field) for matrix in matrices) for field in _Matrix._fields]
