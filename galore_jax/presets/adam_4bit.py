# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""AdamW with its moments in few bits.  For one m x n matrix, with means over rows and columns as in Adafactor:

    M <- b1 M + (1 - b1) G,   v_i <- b2 v_i + (1 - b2) mean_j G_ij²,   w_j <- b2 w_j + (1 - b2) mean_i G_ij²

    ΔW_ij = M_ij / (√(v_i w_j / mean(v)) + ε)          with the bias corrections of Adam

M is decoded, updated and encoded again by :mod:`galore_jax.matrix_codec`, one matrix after the other.  The factored second moment
is that of Shazeer and Stern 2018, arXiv 1804.04235.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import codecs, sharding
from galore_jax._core import seeds, trees
from galore_jax._core.dtypes import promoted, state_dtype
from galore_jax._core.gradients import is_sound
from galore_jax._core.matrix_loop import matrix_by_matrix_anywhere
from galore_jax._core.state_fields import Kind, kinds
from galore_jax.matrix_codec import CodedMatrix, MatrixCodec
from galore_jax.matrix_view import NO_BASIS, MatrixView, Views, select
from galore_jax.presets._momentum import dither_seed, zero_momentum
from galore_jax.presets._partition import on_matrices
from galore_jax.presets.low_rank import decayed
from galore_jax.quantize import quantize_state


def adamw_4bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    codec: MatrixCodec = MatrixCodec(),  # noqa: B008
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with its first moment in 4 bits and a factored second moment: 0.63 bytes for each number of a matrix, where it has 8.

    The first moment of an m x n matrix is stored as in :func:`galore_jax.muon_4bit`, and the second as m + n float32 means
    of its rows and columns, as Adafactor does.  The matrices are those that the other presets project.  The large moments of
    embeddings, the LM head and other parameters are in 8 bits; see :func:`galore_jax.quantize_state`.  A first moment below 4,096
    numbers stays in float32.

    Args:
      learning_rate: A number or a schedule; the best one is that of AdamW.
      b1, b2, eps: The decay rates and epsilon of Adam.
      weight_decay: The strength of decoupled weight decay, which is multiplied by the learning rate.
      weight_decay_mask: A tree of bools or a callable of the parameters that says which of them decay.
      mask, weight_dimension_numbers: The arguments of :func:`galore_jax.galore`, which choose the matrices.
      codec: How the first moment is stored.
      seed: Seed for the dither.

    >>> state = adamw_4bit(1e-3).init({"kernel": jnp.ones((64, 256))})
    >>> optax.tree.get(state, "momentum")["kernel"].rest.codes.shape, optax.tree.get(state, "v_row")["kernel"].shape
    ((64, 128), (64,))
    """
    seeds.check_seed(seed)
    if not isinstance(codec, MatrixCodec):
        raise ValueError(f"codec is {codec!r}: write a galore_jax.MatrixCodec.")

    def build(views: Views) -> optax.GradientTransformation:
        return scale_by_adam_4bit(
            lambda tree: select(tree, weight_dimension_numbers=views), b1=b1, b2=b2, eps=eps, codec=codec, seed=seed
        )

    rest = quantize_state(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
    direction = on_matrices(
        build, rest, rank=1, proj_type=NO_BASIS, mask=mask, weight_dimension_numbers=weight_dimension_numbers
    )
    return decayed(direction, learning_rate, weight_decay, weight_decay_mask)


class ScaleByAdam4bitState(NamedTuple):
    """State of :func:`scale_by_adam_4bit`.  Each tree has one entry per parameter, of matrices (*batch, m, n)."""

    FIELD_KINDS = kinds("", step=Kind.COUNT, momentum=Kind.LINEAR, v_row=Kind.ROW, v_col=Kind.COLUMN)

    step: jax.Array  # shape=(), dtype=jnp.int32; number of updates
    momentum: Any  # (*batch, m, n), the first moment, an array or a galore_jax.matrix_codec.CodedMatrix
    v_row: Any  # float32 (*batch, m), mean squares of each row
    v_col: Any  # float32 (*batch, n), mean squares of each column

    @property
    def count(self) -> jax.Array:  # pyrefly: ignore[bad-override]
        """The number of updates.

        This isn't a field, so ``optax.tree.get(state, "count")`` finds one value, that of the Adam beside this state.
        """
        return self.step


def scale_by_adam_4bit(
    views_of: Callable[[Any], list[MatrixView | None]],
    *,
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array,
    codec: MatrixCodec,
    seed: int | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`adamw_4bit` for parameters that are all matrices.

    If the gradient of a matrix, or its square, is not finite, its update is zero and its state stays.

    Args:
      views_of: A callable that returns the view of each leaf of a tree like the parameters.
      b1, b2, eps, codec, seed: The arguments of :func:`adamw_4bit`.

    >>> tx = scale_by_adam_4bit(lambda params: select(params, rank=1), b1=0.9, b2=0.999, eps=1e-8, codec=MatrixCodec(), seed=0)
    >>> tx.init({"kernel": jnp.ones((3, 8, 16))}).v_row["kernel"].shape
    (3, 8)
    """

    def views(tree: Any) -> list[MatrixView]:
        return [view for view in views_of(tree) if view is not None]

    def init(params: optax.Params) -> ScaleByAdam4bitState:
        leaves, treedef = trees.flatten(params)
        moments, rows, columns = [], [], []
        for view, array in zip(views(params), map(trees.array_of, leaves), strict=True):
            moments.append(zero_momentum(view, array, state_dtype(array), codec))
            m, n = view.matrix_shape
            rows.append(jnp.zeros((*view.batch_shape, m), jnp.float32))
            columns.append(jnp.zeros((*view.batch_shape, n), jnp.float32))
        return ScaleByAdam4bitState(jnp.zeros([], jnp.int32), *map(treedef.unflatten, (moments, rows, columns)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByAdam4bitState]:
        leaves, treedef = trees.flatten(updates)
        key, step = seeds.key_of(seed, state.step), state.step + 1
        corrections = [1 - jnp.asarray(decay) ** step.astype(jnp.float32) for decay in (b1, b2)]
        answers = []
        before = (treedef.flatten_up_to(tree) for tree in (state.momentum, state.v_row, state.v_col))
        for view, leaf, *old in zip(views(updates), leaves, *before, strict=True):
            gradient = trees.array_of(leaf)
            given = [
                dither_seed(key, view),
                *(jnp.asarray(x).astype(state_dtype(gradient)) for x in (b1, b2, eps, *corrections)),
            ]
            reply, *new = _updated((view.to_matrices(gradient), *old), given, view.batch_shape)
            reply = sharding.like(view.from_matrices(reply), gradient)
            answers.append((trees.boxed_like(reply, leaf), *new))
        replies, *states = (treedef.unflatten(answer[i] for answer in answers) for i in range(4))
        return replies, ScaleByAdam4bitState(step, *states)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnums=2)
def _updated(carried: tuple, given: list[jax.Array], batch_shape: tuple[int, ...]) -> tuple:
    """The steps of a parameter's matrices in the place of their gradients, and the new state.

    Args:
      carried: The gradients (*batch, m, n), the first moment, and the mean squares of rows and columns.
      given: Scalars: the seed of the dither, b1, b2, eps, and the bias corrections of both moments.
      batch_shape: The shape of the batch axes.
    """
    given = [jnp.broadcast_to(x, batch_shape) for x in given]
    return matrix_by_matrix_anywhere(_step, carried, given, len(batch_shape))


def _step(carried: tuple, given: list[jax.Array]) -> tuple:
    """:func:`_updated` for one matrix."""
    matrix, stored, *squares = carried
    seed, b1, b2, eps, correction, correction_2 = given
    sound = is_sound(matrix)
    gradient = jnp.where(sound, promoted(matrix), 0)
    mu = b1 * promoted(codecs.decoded(stored)) + (1 - b1) * gradient
    rows, columns = (
        b2 * old.astype(gradient.dtype) + (1 - b2) * jnp.mean(jnp.square(gradient), axis=axis)
        for old, axis in zip(squares, (1, 0), strict=True)
    )
    mean = jnp.mean(rows)
    shares = rows / jnp.where(mean > 0, mean, 1)
    deviation = jnp.sqrt(shares / correction_2)[:, None] * jnp.sqrt(columns)[None, :]
    direction = mu / correction / (deviation + eps)
    usable = sound & jnp.isfinite(mean) & is_sound(direction)
    update = jnp.where(usable, direction, 0).astype(matrix.dtype)
    kept = stored.renewed(mu, seed) if isinstance(stored, CodedMatrix) else mu.astype(stored.dtype)
    new = kept, *(x.astype(old.dtype) for x, old in zip((rows, columns), squares, strict=True))
    return update, *jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, (stored, *squares))
