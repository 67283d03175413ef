# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A training step that holds the gradient of one layer at a time.

For a stack of L identical blocks, x_0 = embed(rest, batch), x_(l+1) = block(W_l, x_l), loss(rest, x_L, batch), the forward pass
stores the blocks' inputs x_l, and the backward pass updates the stack in place:

    for l = L-1 .. 0:    recompute block l from x_l, compute its gradient G_l and that of its input,
                         W_l, s_l  <-  tx(G_l, s_l, W_l)                      and discard G_l

One ``fori_loop`` carries all weights and states and overwrites a slice of each.  A reverse ``scan`` would hold them twice, as
its inputs and as its outputs.  Each layer has its own optimizer state, so ``tx`` must not couple layers or parameters.  Then
the step equals one step on the whole tree.  LOMO (arXiv 2306.09782) and GaLore's per-layer updates do this in PyTorch.

Gradient accumulation is layer-wise too: all micro-batches pass through block l, and their mean gradient makes one update.  A
bound on the global norm takes a second backward pass, which computes the norm.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax._core.call import ARGUMENT, Action, Call
from galore_jax._core.trees import one_of, paths_of, squared_norm
from galore_jax.accumulate import AxisName, low_rank_of, mean_over_devices, update_from_low_rank
from galore_jax.execution.in_turn import update_in_turn
from galore_jax.execution.independence import check_independent
from galore_jax.matrix_view import whole_tree
from galore_jax.weights import apply_updates, dequantize

__all__ = ["BlockStack", "Layerwise", "LayerwiseMetrics", "LayerwiseState", "layerwise"]

Params = Any
Activations = Any


class BlockStack(NamedTuple):
    """A model as a stack of identical blocks.

    ``layers`` holds the parameters of the blocks, with leaves (L, ...), and ``rest`` holds all others.  Both keep the paths of
    the whole tree, as in {"layers": ...} and {"embed": ..., "head": ...}: paths decide which parameters are projected and when
    they are refreshed.

    Blocks of equal parameters that compute different things, such as local and global attention, are told apart by ``flags``:
    arrays (L, ...) that are not trained, of which each block is given its own as a third argument.
    """

    split: Callable[[Params], tuple[Params, Params]]  # params -> layers, rest
    join: Callable[[Params, Params], Params]  # its inverse
    embed: Callable[[Params, Any], Activations]  # rest, batch -> x
    block: Callable[..., Activations]  # one layer, leaves without the layer axis; x, and the layer's flags if any -> x
    loss: Callable[[Params, Activations, Any], jax.Array]  # rest, x, batch -> scalar, a mean over the batch
    flags: Any = None  # leaves (L, ...)


class LayerwiseState(NamedTuple):
    """The optimizer state of a layer-wise step."""

    count: jax.Array  # scalar, int32; steps taken
    layers: Any  # the state of each layer, leaves (L, ...)
    rest: Any


class LayerwiseMetrics(NamedTuple):
    """The measurements of a step."""

    loss: jax.Array  # scalar, float32
    grad_norm: jax.Array  # scalar, float32; of the whole gradient, before any bound


class Layerwise(NamedTuple):
    """``init(params) -> state`` and ``step(params, state, batch) -> params, state, metrics``; jit them with donation."""

    init: Callable[[Params], LayerwiseState]
    step: Callable[[Params, LayerwiseState, Any], tuple[Params, LayerwiseState, LayerwiseMetrics]]


def layerwise(
    model: BlockStack,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    max_layer_norm: float | None = None,
    seed: int = 0,
    axis_name: AxisName = None,
) -> Layerwise:
    """Builds a training step that updates one layer at a time.

    A mask and dimension numbers in ``tx`` are those of the whole tree, with the layers as the first axis of stacked leaves.
    A stacked leaf whose matrix contains that axis is not projected.

    Args:
      model: The model as a stack of blocks.
      tx: Any Optax transformation that treats parameters one by one: galore and its presets, AdamW, Adafactor, Lion, 8-bit
        states.  Every layer has its own step count, so schedules work.
      accumulate: Number of micro-batches, cut from the first axis of the batch.
      max_norm: Bound on the global norm of the gradient, as in ``optax.clip_by_global_norm``.  It costs a second backward
        pass.
      max_layer_norm: Bound on the norm of each layer's gradient, and on that of the rest.  It costs nothing.
      seed: Seed for the stochastic rounding of :class:`galore_jax.weights.Int8Weight` parameters.
      axis_name: Axis of a ``jax.shard_map`` with ``check_vma=False``, along which the batch is split while parameters and
        state are replicated.  The devices exchange gradients in the subspaces of the galore in ``tx`` (see
        :mod:`galore_jax.accumulate`), ``grad_norm`` is the norm of those, and both bounds are refused.

    Returns:
      The pair ``init`` and ``step``.

    Raises:
      ValueError: At construction for a bad argument, and at ``init`` if the model is not a stack of blocks or if ``tx``
        makes the update of one parameter depend on the gradient of another.

    >>> params = {"blocks": {"w": jnp.full((3, 4, 4), 0.1)}, "head": jnp.ones((4,))}
    >>> model = BlockStack(
    ...     split=lambda p: ({"blocks": p["blocks"]}, {"head": p["head"]}),
    ...     join=lambda layers, rest: layers | rest,
    ...     embed=lambda rest, batch: batch["x"],
    ...     block=lambda layer, x: x + jnp.tanh(x @ layer["blocks"]["w"]),
    ...     loss=lambda rest, x, batch: jnp.mean((x @ rest["head"] - batch["y"]) ** 2),
    ... )
    >>> init, step = layerwise(model, optax.adam(1e-2))
    >>> state, batch = init(params), {"x": jnp.ones((8, 4)), "y": jnp.zeros((8,))}
    >>> params, state, first = step(params, state, batch)
    >>> params, state, second = step(params, state, batch)
    >>> bool(second.loss < first.loss)
    True
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}: write the number of micro-batches, at least 1.")
    for name, bound in {"max_norm": max_norm, "max_layer_norm": max_layer_norm}.items():
        if bound is not None and not bound > 0:
            raise ValueError(f"{name} is {bound}: write a positive number, or None for no bound.")
    if axis_name is not None and (max_norm or max_layer_norm):
        raise ValueError(
            f"axis_name={axis_name!r} exchanges low-rank gradients, whose norm max_norm and max_layer_norm cannot bound: leave "
            "them out."
        )
    tx = optax.with_extra_args_support(tx)
    # The layers that tx is known to treat one by one: init may be traced several times.
    checked = []

    def in_whole_tree(function: Callable) -> Callable:
        """``function(params, ...)`` with ``params`` as the tree that masks and refresh schedules refer to."""

        @functools.wraps(function)
        def wrapped(params: Params, *args: Any, **kwargs: Any) -> Any:
            whole = dequantize(params)
            with whole_tree(whole, stacked=paths_of(model.split(whole)[0])):
                return function(params, *args, **kwargs)

        return wrapped

    @in_whole_tree
    def init(params: Params) -> LayerwiseState:
        layers, rest = model.split(params)
        _check_flags(model.flags, check_stack(layers))
        one = one_of(jax.eval_shape(dequantize, layers))
        if one not in checked:
            # A layer of one parameter shows a coupling only beside the rest.
            alone = len(jax.tree.leaves(one)) == 1
            check_independent(tx, jax.eval_shape(model.join, one, dequantize(rest)) if alone else one)
            checked.append(one)

        def init_one(layer: Params) -> Any:
            return tx.init(dequantize(layer))

        # One by one, so that a state that is kept on the host is never on the device as a whole.  A mesh may cut the layers.
        on_mesh = not jax.sharding.get_abstract_mesh().empty
        states = jax.vmap(init_one)(layers) if on_mesh else jax.lax.map(init_one, layers)
        return LayerwiseState(jnp.zeros([], jnp.int32), states, tx.init(dequantize(rest)))

    @in_whole_tree
    def step(params: Params, state: LayerwiseState, batch: Any) -> tuple[Params, LayerwiseState, LayerwiseMetrics]:
        layers, rest = model.split(params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        run = _Run(model, dequantize(rest), _micro_batches(batch, accumulate), check_stack(layers))
        inputs, last = run.forward(layers)
        # Together, because XLA would put off the loss and keep a copy of the LM head for it, from before the update.
        loss, cotangent = jax.lax.optimization_barrier(run.loss(last))

        factor, norm = jnp.ones([], jnp.float32), None
        if max_norm is not None:

            def add(i: jax.Array, grads: Params, squares: jax.Array) -> jax.Array:
                return squares + squared_norm(grads)

            squares, first = run.backward(
                inputs, cotangent, lambda _, i: _at(layers, i), add, jnp.zeros([], jnp.float32)
            )
            # In a branch, because otherwise XLA would make the zeros that this gradient and that of the update are summed into
            # together, and the second ones would take the memory of an LM head from then on.
            squares += jax.lax.cond(
                jnp.isfinite(squares),
                lambda *of_rest: squared_norm(run.rest_gradient(*of_rest)),
                lambda *_: jnp.zeros([], jnp.float32),
                *run.of_rest(last, first, factor),
            )
            norm = jnp.sqrt(squares)
            factor = jnp.where(norm < max_norm, 1, max_norm / norm)
            # Every gradient is linear in the cotangent, so this bounds them all without copying any.
            cotangent = jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), cotangent)

        def bounded(grads: Params, squares: jax.Array) -> Params:
            if max_layer_norm is None:
                return grads
            own = jnp.sqrt(squares)
            scale = jnp.where(own < max_layer_norm, 1, max_layer_norm / own)
            return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), grads)

        def from_all_devices(grads: Params, state: Any, params: Params, layer: Any = None) -> tuple:
            grads, state = low_rank_of(tx, grads, state, params, axis_name, layer)
            return *update_from_low_rank(tx, grads, state, params, layer), squared_norm(grads)

        def update(i: jax.Array, grads: Params, carry: tuple) -> tuple:
            weights, states, squares = carry
            own = squared_norm(grads)
            # The barrier makes the weights be read again once their gradient exists, instead of keeping copies until then.
            read = jax.tree.map(lambda g: jax.lax.optimization_barrier((g, i)), grads)
            grads, places = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0)), read)
            layer = weights.at(places)
            if axis_name is None:
                grads = bounded(grads, own)
                call = Call(Action.UPDATE, layer=i)
                updates, new_state = tx.update(grads, states.at(i), dequantize(layer), **{ARGUMENT: call})
            else:
                updates, new_state, own = from_all_devices(grads, states.at(i), dequantize(layer), i)
            layer = apply_updates(layer, updates, key, layer=i)
            return weights.put(places, layer), states.put(i, new_state), squares + own

        def update_all(layers: Params, states: Any, inputs: Any, cotangent: Any, *, flat: bool) -> tuple:
            carry = _Stack.of(layers, flat), _Stack.of(states, flat), jnp.zeros([], jnp.float32)
            (weights, states, squares), first = run.backward(
                inputs, cotangent, lambda carry, i: carry[0].at(i), update, carry
            )
            return weights.whole(), states.whole(), squares, first

        layers, states, squares, first = jax.lax.platform_dependent(
            layers,
            state.layers,
            inputs,
            cotangent,
            tpu=functools.partial(update_all, flat=False),
            default=functools.partial(update_all, flat=jax.sharding.get_abstract_mesh().empty),
        )
        of_rest = run.of_rest(last, first, factor)
        if axis_name is not None:
            updates, rest_state, own = from_all_devices(run.rest_gradient(*of_rest), state.rest, run.rest)
            rest, loss = apply_updates(rest, updates, key), mean_over_devices(loss, axis_name)
        elif max_layer_norm is None:
            rest, rest_state, own = update_in_turn(
                tx,
                run.rest_gradient,
                *of_rest,
                state.rest,
                lambda updates: apply_updates(rest, updates, key),
                apart=run.not_in_loss(last),
            )
        else:
            grads = run.rest_gradient(*of_rest)
            own = squared_norm(grads)
            rest, rest_state, _ = update_in_turn(
                tx,
                lambda _, grads: grads,
                run.rest,
                bounded(grads, own),
                state.rest,
                lambda updates: apply_updates(rest, updates, key),
            )
        return (
            model.join(layers, rest),
            LayerwiseState(state.count + 1, states, rest_state),
            LayerwiseMetrics(loss, jnp.sqrt(squares + own) if norm is None else norm),
        )

    return Layerwise(init, step)


def check_stack(layers: Params) -> int:
    """Returns the number of layers.

    Raises:
      ValueError: The first axes of the leaves differ in size, or there are no leaves.
    """
    sizes = {path: jnp.shape(leaf)[:1] for path, leaf in zip(paths_of(layers), jax.tree.leaves(layers), strict=True)}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        found = ", ".join(f"{name} {list(size)}" for name, size in list(sizes.items())[:8]) or "no parameters"
        raise ValueError(
            "A layer-wise step needs a stack of identical blocks, whose parameters all have the layers as their first axis, "
            f"but the first axes are {found}: let split() return the stacked blocks, and everything else as the rest."
        )
    return next(iter(sizes.values()))[0]


def _check_flags(flags: Any, number: int) -> None:
    for path, leaf in zip(paths_of(flags), jax.tree.leaves(flags), strict=True):
        if jnp.shape(leaf)[:1] != (number,):
            raise ValueError(
                f"flags[{path!r}] has the shape {jnp.shape(leaf)}, but the stack has {number} layers: give it that first axis."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Stack:
    """A tree that a loop overwrites layer by layer, with leaves (L, ...), or (L, elements) if it is flat.

    On a GPU, XLA would copy a stack that isn't flat into the layout that suits the work on one layer.  A TPU stores arrays in
    tiles of their last two axes, so there flattening would copy them.  On a mesh, flattening could lose a sharding.
    """

    tree: Any
    shapes: Any = dataclasses.field(metadata={"static": True})  # (L, ...), in the order of the leaves

    @classmethod
    def of(cls, tree: Any, flat: bool) -> _Stack:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(tree))
        return cls(jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1) if flat else leaf, tree), shapes)

    def at(self, i: Any) -> Any:
        """Returns layer i.  ``i`` may be a tree of equal indices, one for each part of the tree."""
        return self._shaped(jax.tree.map(lambda i, part: _at(part, i), i, self.tree), 1)

    def put(self, i: Any, layer: Any) -> _Stack:
        """Returns the stack with layer i replaced."""

        def put(i: jax.Array, whole: Any, one: Any) -> Any:
            return jax.tree.map(
                lambda w, x: jax.lax.dynamic_update_index_in_dim(w, x.astype(w.dtype).reshape(w.shape[1:]), i, 0),
                whole,
                one,
            )

        return _Stack(jax.tree.map(put, i, self.tree, layer), self.shapes)

    def whole(self) -> Any:
        """Returns the tree with its original shapes, (L, ...)."""
        return self._shaped(self.tree, 0)

    def _shaped(self, tree: Any, first: int) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten(leaf.reshape(shape[first:]) for leaf, shape in zip(leaves, self.shapes, strict=True))


class _Run(NamedTuple):
    """One pass of a batch, in K micro-batches, through a stack of ``number`` blocks."""

    model: BlockStack
    rest: Params
    batches: Any  # leaves (K, ...)
    number: int

    def forward(self, layers: Params) -> tuple[Activations, Activations]:
        """Returns the inputs of all blocks, with leaves (L, K, ...), and the output of the last, (K, ...)."""

        def through(x: Activations, layer: tuple[Params, Any]) -> tuple[Activations, Activations]:
            weights, block = dequantize(layer[0]), self._block(layer[1])
            return _each(lambda one: block(weights, one), x), x

        start = _each(lambda batch: self.model.embed(self.rest, batch), self.batches)
        last, inputs = jax.lax.scan(through, start, (layers, self.model.flags))
        return inputs, last

    def _block(self, flags: Any) -> Callable[[Params, Activations], Activations]:
        """The block of one layer."""
        return self.model.block if flags is None else lambda weights, x: self.model.block(weights, x, flags)

    def loss(self, last: Activations) -> tuple[jax.Array, Activations]:
        """Returns the mean loss, float32, and the gradients of each micro-batch's loss in its activations, leaves (K, ...)."""

        def one(pair: tuple) -> tuple[jax.Array, Activations]:
            x, batch = pair
            return jax.value_and_grad(lambda x: self.model.loss(self.rest, x, batch))(x)

        losses, cotangent = _each(one, (last, self.batches))
        return jnp.mean(losses.astype(jnp.float32)), cotangent

    def backward(
        self,
        inputs: Activations,
        cotangent: Activations,
        layer_of: Callable[[Any, jax.Array], Params],
        visit: Callable[[jax.Array, Params, Any], Any],
        carry: Any,
    ) -> tuple[Any, Activations]:
        """Applies ``carry = visit(l, mean gradient of layer l, carry)`` from the last layer to the first.

        ``layer_of(carry, l)`` is layer l.  Returns the last carry and the cotangent of the first block's input.
        """

        def body(n: jax.Array, both: tuple) -> tuple:
            carry, cotangent = both
            i = self.number - 1 - n
            weights, block = dequantize(layer_of(carry, i)), self._block(_at(self.model.flags, i))

            def one(pair: tuple) -> tuple[Params, Activations]:
                x, back = pair
                return jax.vjp(block, weights, x)[1](back)

            grads, cotangent = _mean_gradient(one, (_at(inputs, i), cotangent))
            return visit(i, grads, carry), cotangent

        return jax.lax.fori_loop(0, self.number, body, (carry, cotangent))

    def of_rest(self, *inputs: Any) -> tuple[Params, tuple]:
        """Returns the arguments of :meth:`rest_gradient` for a computation of its own.

        Without the barrier, XLA would merge it with that of :meth:`loss`, and keep the gradient of an LM head until then.
        """
        return jax.lax.optimization_barrier((self.rest, inputs))

    def rest_gradient(self, rest: Params, inputs: tuple[Activations, Activations, jax.Array]) -> Params:
        """Returns the mean gradient of the rest, through ``factor`` times the loss and through the embedding.

        ``inputs`` are the last block's output, the cotangent of the first block's input, and ``factor``.
        """
        last, cotangent, factor = inputs

        def one(triple: tuple) -> tuple[Params, None]:
            x, back, batch = triple

            def ends(rest: Params) -> tuple[jax.Array, Activations]:
                return self.model.loss(rest, x, batch), self.model.embed(rest, batch)

            (value, _), pull = jax.vjp(ends, rest)
            return pull((factor.astype(value.dtype), back))[0], None

        return _mean_gradient(one, (last, cotangent, self.batches))[0]

    def not_in_loss(self, last: Activations) -> frozenset[int]:
        """Returns the indices of the rest's leaves that the loss does not read: they only embed the batch."""

        def loss(rest: Params, last: Activations, batches: Any) -> jax.Array:
            return self.model.loss(rest, _at(last, 0), _at(batches, 0))

        # Of the arrays themselves, because their types have a sharding that the loss may rely on.
        jaxpr = jax.make_jaxpr(loss)(self.rest, last, self.batches).jaxpr
        read = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
        leaves = jaxpr.invars[: len(jax.tree.leaves(self.rest))]
        return frozenset(i for i, var in enumerate(leaves) if id(var) not in read)


def _mean_gradient(one: Callable[[Any], tuple[Params, Any]], xs: Any) -> tuple[Params, Any]:
    """Returns the mean over K of the gradients from ``one``, summed in float32, and its other results, (K, ...)."""
    count = jax.tree.leaves(xs)[0].shape[0]
    if count == 1:
        grads, other = one(_at(xs, 0))
        return grads, jax.tree.map(lambda x: x[None], other)

    def add(total: Params, x: Any) -> tuple[Params, Any]:
        grads, other = one(x)
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), other

    shapes, _ = jax.eval_shape(one, one_of(xs))
    total, other = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes), xs)
    return jax.tree.map(lambda t: t / count, total), other


def _each(function: Callable[[Any], Any], xs: Any) -> Any:
    """Applies ``function`` to the micro-batches one after the other."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return jax.tree.map(lambda y: y[None], function(_at(xs, 0)))
    return jax.lax.map(function, xs)


def _micro_batches(batch: Any, count: int) -> Any:
    """Cuts every array (B, ...) into (K, B / K, ...).  Every K-th example goes together, so a sharded B stays in place."""

    def cut(x: jax.Array) -> jax.Array:
        if x.shape[0] % count:
            raise ValueError(
                f"A batch of {x.shape[0]} cannot be cut into accumulate={count} micro-batches of equal size."
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def _at(tree: Any, i: int | jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)
