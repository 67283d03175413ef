# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore: any Optax transformation, run on low-rank gradients (Zhao et al. 2024, arXiv 2403.03507, Algorithm 2).

For a weight W in R^(m x n) with gradient G_t and, say, a basis P in R^(m x r) on the left:

    every T updates   P     <- a basis of the leading left singular directions of G_t      galore_jax.projectors, .refresh
                      state <- the inner state, carried from the old basis to P            galore_jax.transport
    project           R_t   =  Pᵀ G_t                      the inner transformation and its state see r x n
    inner             N_t   =  inner(R_t), with params PᵀW if it asks for them
    lift              ΔW_t  =  α P N_t                     and the gradient outside: galore_jax.residual

The update number 0 refreshes and projects with that same gradient.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_jax import projectors, refresh as policies, residual as residuals
from galore_jax._core import basis_codecs, ranks
from galore_jax._core.seeds import check_seed
from galore_jax._core.state import GaLoreState as GaLoreState
from galore_jax._core.step import GaLoreMemoryWarning as GaLoreMemoryWarning, Step
from galore_jax.matrix_view import Rank, check_proj_type, decisions
from galore_jax.transport import check_transport


def galore(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: Rank = 128,
    update_proj_gap: int | jax.Array = 200,
    scale: float | jax.Array | str = 0.25,
    proj_type: str = "std",
    projector: str | projectors.Projector = "power",
    refresh: str | policies.RefreshPolicy | None = None,
    transport: str | None = None,
    basis_codec: str = "float32",
    residual: str | residuals.Residual | None = None,
    diagnostics: bool = False,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on gradients projected to rank r, so that its state is low-rank too.

    Leaves that are not projected (see :func:`galore_jax.matrix_view.select`) go to ``inner`` whole.  If nothing is projected,
    the result is bit-identical to ``inner``.  Gradients are cast to at least float32 before they reach ``inner``.  A gradient
    matrix that is not finite, or that is zero in its subspace, reaches no moment: its update is zero.

    Put decoupled weight decay outside, after this transformation.

    A stack of matrices is one leaf to ``inner``.  Elementwise transformations (Adam, Lion, momentum) treat each matrix
    independently.  A norm over a leaf (LAMB's trust ratio, Adafactor's clipping) covers the whole stack.

    Args:
      inner: Any Optax transformation.  If None, the transformation only projects the gradient onto its subspace and back
        (α P Pᵀ G), which saves no memory.  :func:`galore_jax.chain` uses the transformations that follow as ``inner``.
      rank: Rank r: an int, a fraction in (0, 1] of each matrix's smaller side, a dict from patterns of paths to either, or a
        ``callable(path, shape)`` that returns either, or None to leave a parameter unprojected.
      update_proj_gap: Number T of updates between two refreshes of a basis.
      scale: Factor α on the lifted update.  ``"rms"`` sets it so that the update keeps the root mean square of the inner
        update: √(m/r) for a basis on the left.  A learning rate then carries over between ranks and sides.
      proj_type: Side of the basis: ``"std"`` (the smaller side), ``"reverse_std"``, ``"left"``, ``"right"`` or ``"full"``
        (both sides).
      projector: Method that computes a basis: ``"power"``, ``"randomized"``, ``"svd"``, ``"eigh"``, ``"random"``,
        ``"gaussian"``, ``"rows"``, ``"sampled"`` or an object from :mod:`galore_jax.projectors`.
      refresh: Policy that decides when to refresh a basis: ``"staggered"``, ``"together"``, ``"lazy"``, ``"every_step"``,
        ``"manual"`` or an object from :mod:`galore_jax.refresh`.  None means ``"staggered"``, except that it means
        ``"together"`` for the projector ``"svd"``, as in the published GaLore.
      transport: Method that carries over the moments into the new basis at a refresh: ``"keep"``, ``"rotate"`` or
        ``"reset"``; see :mod:`galore_jax.transport`.  None means ``"keep"``.
      basis_codec: Storage format of dense bases: ``"float32"``, ``"bfloat16"`` or ``"int4"``.
      residual: Rule for the gradient outside the subspace: ``"fira"``, ``"sgd"``, ``"sign"``, ``"channel"``, ``"tensor"``,
        ``"orthogonal"`` or an object from :mod:`galore_jax.residual`.  None drops it, as GaLore does.
      diagnostics: If True, record :class:`galore_jax.diagnostics.Diagnostics` in the state.
      mask: Tree of bools, a prefix of one, or a callable of the parameters that returns one.  Only parameters with True are
        projected.  A regular expression, or a list of them, selects the matrices in whose path one of them is found.
      weight_dimension_numbers: Tree of :class:`GaLoreDimensionNumbers` or None, a prefix of one, or a callable of the
        parameters that returns one.  It names the axes that form the matrix; every other axis is a batch axis.
      seed: Seed for the random projectors.

    Returns:
      A transformation whose state is a :class:`GaLoreState`.

    Raises:
      TypeError, ValueError: An argument is invalid (at construction), or the mask or the dimension numbers do not match the
        parameters (at ``init``).

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.ones((256,))}
    >>> tx = galore(optax.adam(1e-3), rank=8)
    >>> state = tx.init(params)
    >>> state.inner_state[0].mu["kernel"].shape, state.left["kernel"].shape
    ((8, 256), (64, 8))
    >>> updates, state = tx.update(params, state, params)
    >>> updates["kernel"].shape
    (64, 256)
    """
    ranks.checked(rank)
    check_proj_type(proj_type)
    residuals.check_scale(scale)
    check_seed(seed)
    projector = projectors.get(projector)
    projector = projector._replace(storage=basis_codecs.stored(projector.storage, basis_codec, projector.name))
    if refresh is None:
        refresh = "together" if projector.name == "svd" else "staggered"
    refresh = policies.get(refresh, update_proj_gap)
    transport = "keep" if transport is None else transport
    check_transport(transport)
    residual = residuals.get(residual)
    if residual is not None and proj_type == "full":
        raise ValueError(
            f'residual={residual.name!r} scales the channels of a basis on one side, but proj_type is "full": write "std", '
            '"reverse_std", "left" or "right".'
        )
    choices = {"proj_type": proj_type, "mask": mask, "weight_dimension_numbers": weight_dimension_numbers}

    def bind(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        if not isinstance(inner, optax.GradientTransformation):
            raise TypeError(
                f"inner is {inner!r}: write an Optax transformation, for example galore(optax.adam(1e-3), rank=8)."
            )
        step = Step(
            optax.with_extra_args_support(inner),
            rank,
            functools.partial(decisions, **choices),
            projector,
            refresh,
            transport,
            residual,
            diagnostics,
            scale,
            seed,
        )
        return optax.GradientTransformationExtraArgs(step.init, step.update)

    if inner is not None:
        return bind(inner)
    alone = bind(optax.identity())
    return BareGaLore(_warned_once(alone.init), alone.update, bind)


class BareGaLore(optax.GradientTransformationExtraArgs):
    """``galore(rank=...)`` without an inner transformation; ``bind(inner)`` gives it one (see :func:`galore_jax.chain`)."""

    bind: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]

    def __new__(cls, init: Callable, update: Callable, bind: Callable) -> BareGaLore:
        self = super().__new__(cls, init, update)
        self.bind = bind
        return self

    def __getnewargs__(self) -> tuple:
        """The arguments that ``copy`` makes another one with."""
        return self.init, self.update, self.bind


def _warned_once(init_fn: Callable) -> Callable:
    """``init_fn`` with a warning, at the first call on real parameters, that a bare galore saves no memory."""
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


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Chains transformations, and runs those that follow a bare ``galore(rank=...)`` inside it.

    ``optax.chain`` passes full-size parameters to the ``init`` of every member, so an optimizer after a projection keeps
    full-size moments there.

    ``chain(a, galore(rank=8), b, c)`` is equivalent to ``optax.chain(a, galore(optax.chain(b, c), rank=8))``: b and c receive
    the low-rank gradient, and PᵀW as their ``params``.  Decoupled weight decay in b or c therefore decays only the part of the
    weight inside the subspace, scaled by α.  To decay the whole weight, use ``optax.chain`` to put
    ``optax.add_decayed_weights`` after ``galore(inner, rank=...)``.

    Args:
      *transforms: Optax transformations, with at most one bare galore.

    Returns:
      The chained transformation.

    Raises:
      ValueError: There is more than one bare galore, or no transformation follows it.

    >>> import jax.numpy as jnp
    >>> tx = chain(galore(rank=8), optax.adam(1e-3))
    >>> tx.init({"kernel": jnp.ones((64, 256))})[0].inner_state[0][0].mu["kernel"].shape
    (8, 256)
    """
    bare = [(index, transform) for index, transform in enumerate(transforms) if isinstance(transform, BareGaLore)]
    if not bare:
        return optax.with_extra_args_support(optax.chain(*transforms))
    first, projection = bare[0]
    if len(bare) > 1 or first == len(transforms) - 1:
        raise ValueError(
            f"galore_jax.chain got {len(bare)} bare galore(rank=...) in {len(transforms)} transformations, the first at "
            f"position {first}: write one, with the transformation it is to hold behind it."
        )
    bound = projection.bind(optax.chain(*transforms[first + 1 :]))
    return optax.with_extra_args_support(optax.chain(*transforms[:first], bound))
