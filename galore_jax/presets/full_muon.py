# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Muon with a momentum of full size, in float32 or in few bits (K. Jordan 2024).  For one m x n matrix:

    M <- β M + G,      ΔW = 0.2 √max(m, n) NS(G + β M)

NS, the root mean square of the step and NorMuon's division by neuron are those of :mod:`galore_jax.residual`.  In few bits, M is
decoded, updated and encoded again by :mod:`galore_jax.matrix_codec`, one matrix after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

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
from galore_jax.presets._arguments import CodedMuonArguments, FullMuonArguments, with_arguments_of
from galore_jax.presets._momentum import dither_seed, zero_momentum
from galore_jax.presets._partition import on_matrices
from galore_jax.presets.low_rank import decayed
from galore_jax.quantize import quantize_state
from galore_jax.residual import check_ns_coeffs, muon_step, neuron_squares


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.9,
    nesterov: bool = True,
    neuron_decay: float | jax.Array | None = 0.95,
    ns_coeffs: str = "standard",
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    mu_dtype: Any = None,
    adam_scale: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon (K. Jordan 2024) on matrices of any layout, and AdamW elsewhere.

    Muon orthogonalizes the momentum of each matrix, so all directions get steps of the same size.  An m x n matrix has m n + n
    numbers of state, half of AdamW's.  The matrices are those that the other presets project, such as d x (heads · head_dim) for
    a query kernel (d, heads, head_dim).  ``optax.contrib.muon`` takes every parameter with two axes by default, embeddings too.

    Args:
      learning_rate: A number or a schedule, for updates with the root mean square of AdamW's.
      momentum: The decay rate of the momentum.
      nesterov: If True, use Nesterov momentum.
      neuron_decay: The decay rate of NorMuon's mean squares, by which the step of each output neuron is divided (Li et al. 2025,
        arXiv 2510.05491), n more numbers of state.  None is Muon.  With it and a momentum of 0.9 the loss was lowest
        (docs/benchmarks.md, "What a byte of state buys").
      ns_coeffs: The coefficients of the orthogonalization, ``"standard"`` or ``"polar_express"``; see
        :func:`galore_jax.residual.newton_schulz`.
      b1, b2, eps: The decay rates and epsilon of Adam, which updates embeddings, the LM head, norms and everything else that is
        no matrix of a block.
      mu_dtype: The dtype of the momentum and of Adam's first moment.  None keeps both in float32, whatever the dtype of the
        parameters; the second moment is always in float32.
      adam_scale: A factor of the learning rate for Adam.
      weight_decay: The strength of decoupled weight decay, which is multiplied by the learning rate.
      weight_decay_mask: A tree of bools or a callable of the parameters that says which of them decay.
      mask, weight_dimension_numbers: The arguments of :func:`galore_jax.galore`, which choose the matrices.

    >>> params = {"kernel": jnp.ones((64, 256)), "norm": jnp.ones((64,))}
    >>> sorted(x.size for x in jax.tree.leaves(muon(0.01).init(params)) if x.size > 1)
    [64, 64, 256, 16384]
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)
    settings = {"momentum": momentum, "nesterov": nesterov, "neuron_decay": neuron_decay, "ns_coeffs": ns_coeffs}
    return decayed(
        _direction(
            settings | {"mu_dtype": mu_dtype},
            optax.chain(adam, optax.scale(adam_scale)),
            mask,
            weight_dimension_numbers,
        ),
        learning_rate,
        weight_decay,
        weight_decay_mask,
    )


@with_arguments_of(muon, without="mu_dtype")
def muon_8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    codec: MatrixCodec = MatrixCodec(bits=8, leading=0),  # noqa: B008
    seed: int | jax.Array = 0,
    **arguments: Unpack[FullMuonArguments],
) -> optax.GradientTransformationExtraArgs:
    """:func:`muon` with its momentum in 8 bits, and 8-bit moments elsewhere: one byte for each number of a matrix.

    The scale of an entry follows its row and its column, and subtractive dither keeps the rounding errors without bias; see
    :mod:`galore_jax.matrix_codec`.  The large moments of embeddings, the LM head and other parameters that Adam updates are in 8
    bits too; see :func:`galore_jax.quantize_state`.  A momentum below 4,096 numbers stays in float32.

    Args:
      learning_rate: A number or a schedule.
      codec: How the momentum is stored.
      seed: Seed for the dither.
      **arguments: The arguments of :func:`muon`.

    Raises:
      TypeError: ``codec`` is not a ``MatrixCodec``.

    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> optax.tree.get(muon_8bit(0.01).init(params), "momentum")["kernel"].rest.codes.shape
    (64, 256)
    """
    if not isinstance(codec, MatrixCodec):
        raise TypeError(
            f"codec is {codec!r}; expected a galore_jax.MatrixCodec. Write, for example, MatrixCodec(bits=4)."
        )
    seeds.check_seed(seed)
    adam = quantize_state(optax.scale_by_adam(b1=arguments["b1"], b2=arguments["b2"], eps=arguments["eps"]))
    settings = {"codec": codec, "seed": seed}
    settings |= {name: arguments[name] for name in ("momentum", "nesterov", "neuron_decay", "ns_coeffs")}
    return decayed(
        _direction(
            settings,
            optax.chain(adam, optax.scale(arguments["adam_scale"])),
            arguments["mask"],
            arguments["weight_dimension_numbers"],
        ),
        learning_rate,
        arguments["weight_decay"],
        arguments["weight_decay_mask"],
    )


@with_arguments_of(muon_8bit, codec=MatrixCodec())
def muon_4bit(
    learning_rate: optax.ScalarOrSchedule, **arguments: Unpack[CodedMuonArguments]
) -> optax.GradientTransformationExtraArgs:
    """:func:`muon_8bit` with its momentum in 4 bits and its leading directions in 8: 0.63 bytes for each number of a matrix.

    A subspace of a sixteenth of the smaller side holds the leading directions of the momentum, which follow it by one power step
    an update.  ``codec=MatrixCodec(bits=4, leading_bits=4)`` takes 0.56 bytes, and ``bits=3`` an eighth less than 4.

    Args:
      learning_rate: A number or a schedule.
      **arguments: The arguments of :func:`muon_8bit`.

    >>> momentum = optax.tree.get(muon_4bit(0.01).init({"kernel": jnp.ones((64, 256))}), "momentum")["kernel"]
    >>> momentum.rest.codes.shape, momentum.left.shape, momentum.right.shape
    ((64, 128), (4, 64), (4, 256))
    """
    return muon_8bit(learning_rate, **arguments)


@with_arguments_of(muon_8bit, codec=MatrixCodec(bits=2), momentum=0.8)
def muon_2bit(
    learning_rate: optax.ScalarOrSchedule, **arguments: Unpack[CodedMuonArguments]
) -> optax.GradientTransformationExtraArgs:
    """:func:`muon_8bit` with its momentum in 2 bits and its leading directions in 8: 0.38 bytes for each number of a matrix.

    The momentum is 0.8 by default, because the rounding errors of a longer one add up to more (docs/benchmarks.md, "What a byte
    of state buys").  ``codec=MatrixCodec(bits=3)`` takes 0.50 bytes.

    Args:
      learning_rate: A number or a schedule.
      **arguments: The arguments of :func:`muon_8bit`.

    >>> momentum = optax.tree.get(muon_2bit(0.01).init({"kernel": jnp.ones((64, 256))}), "momentum")["kernel"]
    >>> momentum.rest.codes.shape, momentum.left.shape, momentum.right.shape
    ((64, 64), (4, 64), (4, 256))
    """
    return muon_8bit(learning_rate, **arguments)


class ScaleByMuonState(NamedTuple):
    """State of :func:`scale_by_muon`.  Each tree has one entry per parameter, of matrices (*batch, m, n)."""

    FIELD_KINDS = kinds("", step=Kind.COUNT, momentum=Kind.LINEAR, squares=Kind.KEPT)

    step: jax.Array  # shape=(), dtype=jnp.int32; number of updates
    momentum: Any  # (*batch, m, n), an array or a galore_jax.matrix_codec.CodedMatrix
    squares: Any  # float32 (*batch, n), NorMuon's mean squares of each output neuron; () without

    @property
    def count(self) -> jax.Array:  # pyrefly: ignore[bad-override]
        """The number of updates.

        This isn't a field, so ``optax.tree.get(state, "count")`` finds one value, that of the Adam beside this state.
        """
        return self.step


def scale_by_muon(
    views_of: Callable[[Any], list[MatrixView | None]],
    *,
    momentum: float | jax.Array = 0.9,
    nesterov: bool = True,
    neuron_decay: float | jax.Array | None = 0.95,
    ns_coeffs: str = "standard",
    mu_dtype: Any = None,
    codec: MatrixCodec | None = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Muon's direction for parameters that are all matrices.

    If the gradient of a matrix or the answer to it is not finite, its update is zero and its state stays.

    Args:
      views_of: A callable that returns the view of each leaf of a tree like the parameters.
      momentum, nesterov, neuron_decay, ns_coeffs, mu_dtype: The arguments of :func:`muon`.
      codec: How the momentum of large matrices is stored; None stores arrays of ``mu_dtype``.
      seed: Seed for the dither of the codec.

    Returns:
      A transformation whose state is a :class:`ScaleByMuonState`.

    >>> tx = scale_by_muon(lambda params: select(params, rank=1))
    >>> tx.init({"kernel": jnp.ones((3, 8, 16))}).momentum["kernel"].shape
    (3, 8, 16)
    """

    check_ns_coeffs(ns_coeffs)

    def views(tree: Any) -> list[MatrixView]:
        return [view for view in views_of(tree) if view is not None]

    def init(params: optax.Params) -> ScaleByMuonState:
        leaves, treedef = trees.flatten(params)
        arrays = list(map(trees.array_of, leaves))
        momenta, squares = [], []
        for view, array in zip(views(params), arrays, strict=True):
            dtype = state_dtype(array) if mu_dtype is None or codec else mu_dtype
            momenta.append(zero_momentum(view, array, dtype, codec))
            squares.append(neuron_squares(view, neuron_decay))
        return ScaleByMuonState(jnp.zeros([], jnp.int32), treedef.unflatten(momenta), treedef.unflatten(squares))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        leaves, treedef = trees.flatten(updates)
        key = seeds.key_of(seed, state.step)
        replies, momenta, squares = [], [], []
        momenta_before, squares_before = map(treedef.flatten_up_to, (state.momentum, state.squares))
        for view, leaf, *old in zip(views(updates), leaves, momenta_before, squares_before, strict=True):
            gradient = trees.array_of(leaf)
            decays = (momentum, neuron_decay) if neuron_decay is not None else (momentum,)
            given = [dither_seed(key, view), *(jnp.asarray(x).astype(state_dtype(gradient)) for x in decays)]
            carried = (view.to_matrices(gradient), *old)
            reply, mu, square = _updated(carried, given, view.batch_shape, nesterov, ns_coeffs)
            replies.append(trees.boxed_like(sharding.like(view.from_matrices(reply), gradient), leaf))
            momenta.append(mu)
            squares.append(square)
        state = ScaleByMuonState(state.step + 1, treedef.unflatten(momenta), treedef.unflatten(squares))
        return treedef.unflatten(replies), state

    return optax.GradientTransformationExtraArgs(init, update)


def _direction(
    settings: dict[str, Any], adam: optax.GradientTransformation, mask: Any, weight_dimension_numbers: Any
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_muon` with ``settings`` on the matrices, and ``adam`` on the others."""

    def build(views: Views) -> optax.GradientTransformation:
        return scale_by_muon(lambda tree: select(tree, weight_dimension_numbers=views), **settings)

    # Raises an error for a bad argument.
    build(Views(()))
    return on_matrices(
        build, adam, rank=1, proj_type=NO_BASIS, mask=mask, weight_dimension_numbers=weight_dimension_numbers
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _updated(
    carried: tuple, given: list[jax.Array], batch_shape: tuple[int, ...], nesterov: bool, ns_coeffs: str
) -> tuple:
    """The steps of a parameter's matrices in the place of their gradients, and the new momentum and mean squares.

    Args:
      carried: The gradients (*batch, m, n), the momentum and the mean squares.
      given: Scalars: the seed of the dither, the decay rate of the momentum, and that of the mean squares if they exist.
      batch_shape: The shape of the batch axes.
      nesterov, ns_coeffs: The arguments of :func:`muon`.
    """
    # A jitted function is traced and lowered once for all parameters of one shape.
    one = functools.partial(_step, nesterov, ns_coeffs)
    given = [jnp.broadcast_to(x, batch_shape) for x in given]
    return matrix_by_matrix_anywhere(one, carried, given, len(batch_shape))


def _step(nesterov: bool, ns_coeffs: str, carried: tuple, given: list[jax.Array]) -> tuple:
    """:func:`_updated` for one matrix."""
    matrix, stored, squares = carried
    seed, momentum, *decay = given
    sound = is_sound(matrix)

    def gradient_and_momentum(matrix: jax.Array, stored: Any) -> tuple[jax.Array, jax.Array]:
        gradient = jnp.where(sound, promoted(matrix), 0)
        return gradient, momentum * promoted(codecs.decoded(stored)) + gradient

    gradient, mu = gradient_and_momentum(matrix, stored)
    ahead = gradient + momentum * mu if nesterov else mu
    direction, new_squares = muon_step(ahead, squares, decay[0] if decay else None, ns_coeffs)
    usable = sound & is_sound(direction)
    update = jnp.where(usable, direction, 0).astype(matrix.dtype)
    if isinstance(stored, CodedMatrix):

        def at_once(update: jax.Array, mu: jax.Array, matrix: jax.Array, stored: CodedMatrix) -> tuple:
            return update, stored.renewed(mu, seed)

        def in_turn(update: jax.Array, mu: jax.Array, matrix: jax.Array, stored: CodedMatrix) -> tuple:
            # Behind the barrier, the momentum is computed again, instead of kept in float32 until the update is there.
            update, matrix, stored = jax.lax.optimization_barrier((update, matrix, stored))
            return update, stored.renewed(gradient_and_momentum(matrix, stored)[1], seed)

        # XLA drops barriers on CPU before it fuses, and would copy the whole stack there to read a matrix twice.
        update, kept = jax.lax.platform_dependent(update, mu, matrix, stored, cpu=at_once, default=in_turn)
    else:
        kept = mu.astype(stored.dtype)
    new = jax.tree.map(lambda new, old: jnp.where(usable, new, old), (kept, new_squares), (stored, squares))
    return update, *new
