# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""LDAdam: Adam in a subspace that moves at every step, with error feedback (Robert et al. 2024, arXiv 2410.16103).

For one matrix, a basis on the left, G the gradient, e the error so far, m̂ and v̂ the bias-corrected moments:

    corrected    A   = G + e
    subspace     B   = ρ P m̂ + (1 - ρ) A;   P' = orth(B BᵀP)          one block power step from the basis in use
    transport    Q   = P'ᵀP;   m <- Q m;   v <- (1 - β₂^(t-1)) |(Q∘Q)(v̂ - m̂²) + (Q m̂)²|
    Adam         N   = Adam's answer to R = P'ᵀA from these moments;   ΔW = P' N
    error        e'  = A - P' R + β₁/(1 - β₁) (P m - P' Q m)

e' is what this step leaves out: the part of the corrected gradient outside the subspace, and the momentum that the new basis
cannot hold, in units of gradients.  Nothing is lost for good, which the proof of convergence needs, and e is as large as the
weight.

The new basis depends on the first moment, and the second moment on the new basis, so LDAdam is a transformation of its own
rather than a projector for :func:`galore_jax.galore`.  B is never formed: the products with it use P and m̂.

Parameters with equal matrices, ranks, dtypes and shardings go through one loop over their matrices, so a model compiles one
step per shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import sharding
from galore_jax._core import coordinates as subspace, ranks, seeds
from galore_jax._core.dtypes import promoted, state_dtype
from galore_jax._core.gradients import level_of
from galore_jax._core.orthonormal import defect, noise, orthonormal
from galore_jax._core.state_fields import Kind, kinds
from galore_jax.matrix_view import MatrixView, Rank, Views, check_proj_type, select
from galore_jax.presets._partition import on_matrices
from galore_jax.presets.low_rank import decayed

# Power steps from noise to the first basis.
_FIRST_STEPS = 5
# The largest max |PᵀP - I| of a new basis that is accepted.
_TOLERANCE = 1e-3
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
    """LDAdam (Robert et al. 2024, arXiv 2410.16103): a subspace that moves at every update, with error feedback.

    The state of a projected m x n matrix with k = min(m, n) and K = max(m, n) has r(k + 2K) numbers **plus m n for the error**,
    so it saves at most half of AdamW's state.  An update takes about 12 m n r operations, three times those of
    :func:`galore_adamw`.  Choose it when a small rank must lose nothing in the long run (it has a proof of convergence) and
    there is memory for one more copy of the gradients.  Otherwise :func:`fira_adamw` uses the whole gradient for one number per
    matrix.  LDAdam needs the whole gradient, so micro-batches cannot be summed in the subspaces.

    Args:
      learning_rate: A number or a schedule.  The paper's code uses 0.001.
      b1, b2, eps: The arguments of Adam, for all parameters.
      mu_dtype: The dtype of Adam's first moment of the parameters that are not projected.  None keeps it in float32.
      rho: The weight of the momentum beside the gradient when a subspace moves.
      weight_decay: Decoupled weight decay, multiplied by the learning rate.
      weight_decay_mask: A tree of bools or a callable that says which parameters decay.
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
    """State of :func:`scale_by_ldadam`.

    Each tree has one entry per parameter.  k is the side of the matrix that the basis is on, and K is the other side.
    """

    FIELD_KINDS = kinds("mu nu", step=Kind.COUNT, basis=Kind.KEPT, error=Kind.LINEAR)

    step: jax.Array  # shape=(), dtype=jnp.int32; number of updates
    basis: Any  # (*batch, k, r)
    mu: Any  # (*batch, r, K)
    nu: Any  # (*batch, r, K)
    error: Any  # (*batch, k, K)

    @property
    def count(self) -> jax.Array:  # pyrefly: ignore[bad-override]
        """The number of updates.

        This isn't a field, so ``optax.tree.get(state, "count")`` finds one value, that of the Adam beside this state.
        """
        return self.step


class _Memory(NamedTuple):
    """The state of one matrix or of a batch of matrices."""

    basis: jax.Array
    mu: jax.Array
    nu: jax.Array
    error: jax.Array


class _Leaf(NamedTuple):
    """One parameter before an update, with its gradient, or after it, with its direction."""

    matrices: jax.Array  # (*batch, m, n)
    memory: _Memory
    good: jax.Array  # [*batch] bool; whether the last gradient was finite and not zero


class _Settings(NamedTuple):
    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    rho: jax.Array


def scale_by_ldadam(
    views_of: Callable[[Any], list[MatrixView | None]],
    *,
    b1: float | jax.Array = 0.908,
    b2: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-8,
    rho: float | jax.Array = 0.908,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam's direction for parameters that are all projected, each from one side.

    If the gradient of a matrix is zero or not finite, or its new basis is not orthonormal, the matrix and its state stay as they
    are in that update.  To differentiation a new basis is a constant, as a refresh of :func:`galore` is.

    Args:
      views_of: A callable that returns the view of each leaf of a tree like the parameters.
      b1, b2, eps: The arguments of Adam.
      rho: ρ, the weight of the momentum beside the gradient when the subspace moves.
      seed: Seed for the noise that the first basis is found from.

    Returns:
      A transformation whose state is an :class:`LDAdamState`; ``init`` raises ValueError for ``proj_type="full"``.

    >>> from galore_jax.matrix_view import select
    >>> tx = scale_by_ldadam(lambda params: select(params, rank=4))
    >>> state = tx.init({"kernel": jnp.ones((3, 8, 16))})
    >>> state.basis["kernel"].shape, state.mu["kernel"].shape, state.error["kernel"].shape
    ((3, 8, 4), (3, 4, 16), (3, 8, 16))
    """
    seeds.check_seed(seed)

    def init(params: optax.Params) -> LDAdamState:
        leaves, treedef = jax.tree.flatten(params)
        fresh = [_fresh(*pair) for pair in zip(_views(views_of, params), leaves, strict=True)]
        return LDAdamState(jnp.zeros([], jnp.int32), *_trees(fresh, treedef))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LDAdamState]:
        gradients, treedef = jax.tree.flatten(updates)
        views = _views(views_of, updates)
        memories = zip(*(treedef.flatten_up_to(getattr(state, field)) for field in _Memory._fields), strict=True)
        leaves = [
            _Leaf(view.to_matrices(gradient), _Memory(*memory), jnp.zeros(view.batch_shape, bool))
            for view, gradient, memory in zip(views, gradients, memories, strict=True)
        ]
        common = _Settings(*map(jnp.asarray, (b1, b2, eps, rho))), state.step, jnp.asarray(seed)
        for indices in _groups(leaves):
            found = _update_group([views[i] for i in indices], [leaves[i] for i in indices], common)
            for i, leaf in zip(indices, found, strict=True):
                leaves[i] = leaf
        replies = [
            sharding.like(view.from_matrices(leaf.matrices), gradient)
            for view, leaf, gradient in zip(views, leaves, gradients, strict=True)
        ]
        any_good = jnp.array(False)
        for leaf in leaves:
            any_good |= jnp.any(leaf.good)
        step = state.step + any_good.astype(jnp.int32)
        return treedef.unflatten(replies), LDAdamState(step, *_trees([leaf.memory for leaf in leaves], treedef))

    return optax.GradientTransformationExtraArgs(init, update)


def _groups(leaves: list[_Leaf]) -> list[list[int]]:
    """Groups the indices of parameters with equal matrices, ranks, dtypes and shardings, which can share one loop."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        sides = leaf.memory.basis.shape[-2:], leaf.memory.error.shape[-2:]
        spec = sharding.spec_of(leaf.memory.error)
        varying = jax.typeof(sharding.varying_zero((leaf.matrices, leaf.memory)))
        groups.setdefault((sides, leaf.matrices.dtype, spec, varying), []).append(i)
    return list(groups.values())


def _update_group(
    views: list[MatrixView], leaves: list[_Leaf], common: tuple[_Settings, jax.Array, jax.Array]
) -> list[_Leaf]:
    """Updates the parameters of one group.

    Args:
      views: One for each parameter.
      leaves: One for each parameter.
      common: The settings, the number of updates so far and the seed.
    """
    function = functools.partial(_update_stack, [view.left for view in views])
    batch = len(views[0].batch_shape)
    if sharding.cut_by_stack(leaves[0].matrices, batch):
        return sharding.by_stack(function, common, tuple(leaves), leaves, batch)
    return sharding.by_partitioner(function, leaves)(*common, *leaves)


def _update_stack(
    lefts: list[bool], settings: _Settings, step: jax.Array, seed: jax.Array, *leaves: _Leaf
) -> list[_Leaf]:
    """Implements :func:`_update_group` by one loop over the matrices, with a fixed trip count.

    The loop overwrites each gradient with its direction and each error with the new one, so no other array is as large as the
    parameters.  A single parameter is its own stack.  Several are copied into one, with the side of the basis first.
    """
    alone = len(leaves) == 1

    def first(left: bool, matrices: jax.Array) -> jax.Array:
        return matrices if left or alone else jnp.swapaxes(matrices, -1, -2)

    def stacked(arrays: Iterable[jax.Array]) -> jax.Array:
        return jnp.concatenate([array.reshape(-1, *array.shape[-2:]) for array in arrays])

    gradients = stacked([first(left, leaf.matrices) for left, leaf in zip(lefts, leaves, strict=True)])
    basis, mu, nu, errors = map(stacked, zip(*(leaf.memory for leaf in leaves), strict=True))
    good = jnp.isfinite(level_of(gradients, 1, may_be_zero=False))

    def body(carry: tuple[jax.Array, jax.Array], xs: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        gradients, errors = carry
        i, usable, basis, mu, nu = xs
        gradient, error = (jax.lax.dynamic_index_in_dim(stack, i, keepdims=False) for stack in carry)
        matrix = promoted(jnp.where(usable, gradient, 0))
        transposed = alone and not lefts[0]
        old = _Memory(basis, mu, nu, error)
        direction, new = _step(settings, step, seed, matrix.T if transposed else matrix, usable, old)
        direction = (direction.T if transposed else direction).astype(gradient.dtype)
        directions = jax.lax.dynamic_update_index_in_dim(gradients, direction, i, 0)
        return (directions, jax.lax.dynamic_update_index_in_dim(errors, new.error, i, 0)), new[:-1]

    zero = sharding.varying_zero((settings, step, seed, leaves))
    start = gradients + zero.astype(gradients.dtype), errors + zero.astype(errors.dtype)
    xs = jnp.arange(len(good), dtype=jnp.uint32), good, basis, mu, nu
    (directions, errors), (basis, mu, nu) = jax.lax.scan(body, start, xs)

    parts = _split((directions, basis, mu, nu, errors, good), [leaf.good.size for leaf in leaves], step)
    results = []
    for left, leaf, (direction, *memory, flags) in zip(lefts, leaves, parts, strict=True):
        part = _Leaf(first(left, direction), _Memory(*memory), flags)
        results.append(jax.tree.map(lambda new, old: new.reshape(old.shape), part, leaf))
    return results


def _split(stacks: tuple[jax.Array, ...], sizes: list[int], step: jax.Array) -> list[list[jax.Array]]:
    """Cuts all stacks into consecutive parts of these sizes, and returns the parts of each size together.

    XLA compiles a kernel for every constant offset, which would be most of the compile time of a model with many layers.  It
    compiles one kernel for all offsets that it cannot know, so they come from a branch that is always taken.
    """
    if len(sizes) == 1:
        return [list(stacks)]
    offsets = np.cumsum([0, *sizes[:-1]]).astype(np.uint32)
    offsets = jax.lax.cond(step >= 0, lambda: [*map(jnp.asarray, offsets)], lambda: [*map(jnp.zeros_like, offsets)])
    return [
        [jax.lax.dynamic_slice_in_dim(stack, offset, size) for stack in stacks]
        for offset, size in zip(offsets, sizes, strict=True)
    ]


def _step(
    settings: _Settings, step: jax.Array, seed: jax.Array, gradient: jax.Array, good: jax.Array, old: _Memory
) -> tuple[jax.Array, _Memory]:
    """Returns the direction of one matrix (k, K) and its new memory."""
    b1, b2, eps, rho = (value.astype(gradient.dtype) for value in settings)
    done = step.astype(gradient.dtype)
    corrected = gradient + old.error
    mean, square = (_debiased(moment, b, done) for moment, b in ((old.mu, b1), (old.nu, b2)))
    # Differentiation treats the new basis as a constant.
    basis = _moved(seed, *jax.lax.stop_gradient((corrected, old.basis, mean, rho)))

    q = _product(basis.T, old.basis)
    mu = _product(q, old.mu)
    spread = jnp.abs(_product(jnp.square(q), square - jnp.square(mean)) + jnp.square(_product(q, mean)))
    nu = (1 - b2**done) * spread

    low_rank = basis.T @ corrected
    scale = b1 / (1 - b1)
    error = corrected + scale * (old.basis @ old.mu) - basis @ (low_rank + scale * mu)
    mu, nu = b1 * mu + (1 - b1) * low_rank, b2 * nu + (1 - b2) * jnp.square(low_rank)
    reply = _debiased(mu, b1, done + 1) / (jnp.sqrt(_debiased(nu, b2, done + 1)) + eps)

    usable = good & (defect(basis) <= _TOLERANCE)
    new = jax.tree.map(lambda new, old: jnp.where(usable, new, old), _Memory(basis, mu, nu, error), old)
    return jnp.where(usable, basis @ reply, 0), new


def _moved(seed: jax.Array, corrected: jax.Array, basis: jax.Array, mean: jax.Array, rho: jax.Array) -> jax.Array:
    """Returns orth(B BᵀP).  The first basis takes several such steps from noise, with B = (1 - ρ) A.

    The trip counts depend only on reductions over whole matrices, so they are equal on all devices that share a matrix.
    """
    warm = jnp.any(basis != 0)

    def step(_: Any, moved: jax.Array) -> jax.Array:
        coordinates = (1 - rho) * (moved.T @ corrected) + rho * ((moved.T @ basis) @ mean)
        peak = jnp.max(jnp.abs(coordinates))
        coordinates = coordinates / jnp.where(peak > 0, peak, 1)
        return orthonormal((1 - rho) * (corrected @ coordinates.T) + rho * (basis @ (mean @ coordinates.T)))

    start = jnp.where(warm, basis, noise(basis.shape, basis.dtype, seed))
    start += sharding.varying_zero((corrected, mean, rho)).astype(start.dtype)
    return jax.lax.fori_loop(0, jnp.where(warm, 1, _FIRST_STEPS), step, start)


def _debiased(moment: jax.Array, decay: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns m / (1 - β^t), or m, which is zero, before the first step."""
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


def _fresh(view: MatrixView, leaf: Any) -> _Memory:
    side, other = view.matrix_shape if view.left else view.matrix_shape[::-1]
    spec = subspace.matrix_spec(view, leaf)
    *batch, first, second = spec or (None,) * (len(view.batch_shape) + 2)
    if not view.left:
        first, second = second, first

    def zeros(shape: tuple[int, int], *sides: Any) -> jax.Array:
        return sharding.zeros((*view.batch_shape, *shape), state_dtype(leaf), spec and (*batch, *sides), leaf)

    mu, nu = (zeros((view.rank, other), None, second) for _ in range(2))
    return _Memory(zeros((side, view.rank), first, None), mu, nu, zeros((side, other), first, second))


def _trees(memories: list[_Memory], treedef: Any) -> list[Any]:
    return [treedef.unflatten(getattr(memory, field) for memory in memories) for field in _Memory._fields]
