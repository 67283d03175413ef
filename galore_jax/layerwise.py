# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A training step that never holds more than one layer's gradient.

For a stack of L identical blocks, x_0 = embed(rest, batch), x_(l+1) = block(W_l, x_l), loss(rest, x_L, batch), the step keeps
the blocks' inputs x_l and goes back through the stack in place:

    for l = L-1 .. 0:    recompute block l from x_l, take its gradient G_l and that of its input,
                         W_l, s_l  <-  tx(G_l, s_l, W_l)                      and forget G_l

One ``fori_loop`` carries all weights and states and overwrites a slice of each; as inputs and outputs of a reverse ``scan`` they
would be held twice.  Each layer has an optimizer state of its own, so what ``tx`` does must not couple layers or parameters;
it equals one step on the whole tree then.  (LOMO, arXiv 2306.09782, and GaLore's per-layer updates are this in PyTorch.)

Micro-batches are taken layer by layer too: block l goes through all of them, and their mean gradient makes one update.  A bound
on the global norm takes the backward pass twice, the first time for the norm alone.
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
from galore_jax.accumulate import AxisName, low_rank_of, mean_over_devices, update_from_low_rank
from galore_jax.execution.in_turn import update_in_turn
from galore_jax.execution.independence import check_independent
from galore_jax.weights import apply_updates, dequantize

Params = Any
Activations = Any


class BlockStack(NamedTuple):
    """A model as a stack of identical blocks: what a layer-wise step needs to know of it.

    ``layers`` are the parameters of the blocks, every leaf (L, ...); ``rest`` are all others.  Both are parts of the whole tree
    that keep its names, such as {"layers": ...} and {"embed": ..., "head": ...}, because names decide what is projected.
    """

    split: Callable[[Params], tuple[Params, Params]]  # params -> layers, rest
    join: Callable[[Params, Params], Params]  # its inverse
    embed: Callable[[Params, Any], Activations]  # rest, batch -> x
    block: Callable[[Params, Activations], Activations]  # one layer, leaves without their first axis; x -> x
    loss: Callable[[Params, Activations, Any], jax.Array]  # rest, x, batch -> scalar, a mean over the batch


class LayerwiseState(NamedTuple):
    """Optimizer state of a layer-wise step."""

    count: jax.Array  # scalar, int32; steps taken
    layers: Any  # the state of each layer, leaves (L, ...)
    rest: Any


class LayerwiseMetrics(NamedTuple):
    """What a step found out."""

    loss: jax.Array  # scalar, float32
    grad_norm: jax.Array  # scalar, float32; of the whole gradient, before any bound


class Layerwise(NamedTuple):
    """``init(params) -> state`` and ``step(params, state, batch) -> params, state, metrics``, to be jitted with donation."""

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
    """A step that updates one layer at a time.

    Args:
      model: the model.
      tx: any Optax transformation that treats parameters one by one: galore and its presets, AdamW, Adafactor, Lion, 8-bit
        states.  Schedules inside are followed: every layer has its own count.
      accumulate: micro-batches that a batch is cut into along the first axis of its arrays.
      max_norm: bound on the global norm of the gradient, as ``optax.clip_by_global_norm``; costs a second backward pass.
      max_layer_norm: bound on the norm of each layer's gradient and on that of the rest; costs nothing.
      seed: of the stochastic rounding of :class:`galore_jax.weights.Int8Weight`, which the parameters may hold.
      axis_name: of ``jax.shard_map`` with ``check_vma=False``, along which devices have other parts of the batch and equal
        parameters and state: what they send each other is the gradient in the subspaces of the galore in ``tx``, see
        :mod:`galore_jax.accumulate`.  ``grad_norm`` is that of it, and a bound on the norm is refused.

    Returns:
      The pair of functions.

    Raises:
      ValueError: at construction for bad arguments; at ``init`` for a model that is no stack of blocks, or a ``tx`` in which
        the update of one parameter depends on the gradient of another.

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
            f"axis_name={axis_name!r} leaves the norm of a gradient unknown, which max_norm and max_layer_norm bound: leave "
            "them out."
        )
    tx = optax.with_extra_args_support(tx)
    checked = []  # what tx has been tried on: init may be traced several times

    def init(params: Params) -> LayerwiseState:
        layers, rest = model.split(params)
        check_stack(layers)
        layers, rest = dequantize(layers), dequantize(rest)
        one = _one_layer(layers)
        if one not in checked:
            check_independent(tx, one)
            checked.append(one)
        return LayerwiseState(jnp.zeros([], jnp.int32), jax.vmap(tx.init)(layers), tx.init(rest))

    def step(params: Params, state: LayerwiseState, batch: Any) -> tuple[Params, LayerwiseState, LayerwiseMetrics]:
        layers, rest = model.split(params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        run = _Run(model, dequantize(rest), _micro_batches(batch, accumulate), check_stack(layers))
        inputs, last = run.forward(layers)
        loss, cotangent = run.loss(last)

        factor, norm = jnp.ones([]), None
        if max_norm is not None:

            def add(i: jax.Array, grads: Params, squares: jax.Array) -> jax.Array:
                return squares + _squares(grads)

            squares, first = run.backward(inputs, cotangent, lambda _, i: _at(layers, i), add, jnp.zeros([]))
            norm = jnp.sqrt(squares + _squares(run.rest_gradient(last, first, factor)))
            factor = jnp.where(norm < max_norm, 1, max_norm / norm)
            # Every gradient is linear in this: they come out bounded, and none has to be copied for it.
            cotangent = jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), cotangent)

        def bounded(grads: Params, squares: jax.Array) -> Params:
            if max_layer_norm is None:
                return grads
            own = jnp.sqrt(squares)
            scale = jnp.where(own < max_layer_norm, 1, max_layer_norm / own)
            return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), grads)

        def from_all_devices(grads: Params, state: Any, params: Params, layer: Any = None) -> tuple:
            grads, state = low_rank_of(tx, grads, state, params, axis_name, layer)
            return *update_from_low_rank(tx, grads, state, params, layer), _squares(grads)

        def update(i: jax.Array, grads: Params, carry: tuple) -> tuple:
            weights, states, squares = carry
            own = _squares(grads)
            # The weights are read once more when their gradient is there: the copies that made it are not kept for that.
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
            carry = _Stack.of(layers, flat), _Stack.of(states, flat), jnp.zeros([])
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
        grads = run.rest_gradient(last, first, factor)
        if axis_name is None:
            own = _squares(grads)
            grads = bounded(grads, own)
            rest, rest_state = update_in_turn(
                tx, grads, state.rest, run.rest, lambda updates: apply_updates(rest, updates, key)
            )
        else:
            updates, rest_state, own = from_all_devices(grads, state.rest, run.rest)
            rest, loss = apply_updates(rest, updates, key), mean_over_devices(loss, axis_name)
        return (
            model.join(layers, rest),
            LayerwiseState(state.count + 1, states, rest_state),
            LayerwiseMetrics(loss, jnp.sqrt(squares + own) if norm is None else norm),
        )

    return Layerwise(init, step)


def check_stack(layers: Params) -> int:
    """The number of layers.

    Raises:
      ValueError: the leaves have no first axis of one size.
    """
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(layers)
    }
    if len(set(sizes.values())) != 1 or () in sizes.values():
        found = ", ".join(f"{name} {list(size)}" for name, size in list(sizes.items())[:8]) or "no parameters"
        raise ValueError(
            "A layer-wise step needs a stack of identical blocks, whose parameters all have the layers as their first axis, "
            f"but the first axes are {found}: let split() return the stacked blocks, and keep everything else in the rest."
        )
    return next(iter(sizes.values()))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Stack:
    """What a loop overwrites layer by layer, each leaf (L, ...); if it is flat, as (L, elements).

    With their axes, XLA for GPUs would lay whole stacks out as the work on one layer likes it best, and copy them for it.  On a
    TPU arrays lie in tiles of their last two axes, and to flatten them is what would copy them; on a mesh they are cut along one.
    """

    tree: Any
    shapes: Any = dataclasses.field(metadata={"static": True})  # (L, ...), in the order of the leaves

    @classmethod
    def of(cls, tree: Any, flat: bool) -> _Stack:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(tree))
        return cls(jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1) if flat else leaf, tree), shapes)

    def at(self, i: Any) -> Any:
        """Layer i; ``i`` may be a tree of equal indices, one for each part of the tree."""
        return self._shaped(jax.tree.map(lambda i, part: _at(part, i), i, self.tree), 1)

    def put(self, i: Any, layer: Any) -> _Stack:
        """With another layer i."""

        def put(i: jax.Array, whole: Any, one: Any) -> Any:
            return jax.tree.map(
                lambda w, x: jax.lax.dynamic_update_index_in_dim(w, x.astype(w.dtype).reshape(w.shape[1:]), i, 0),
                whole,
                one,
            )

        return _Stack(jax.tree.map(put, i, self.tree, layer), self.shapes)

    def whole(self) -> Any:
        """The leaves as they were, (L, ...)."""
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
        """The inputs of all blocks, leaves (L, K, ...), and the output of the last, (K, ...)."""

        def through(x: Activations, layer: Params) -> tuple[Activations, Activations]:
            weights = dequantize(layer)
            return _each(lambda one: self.model.block(weights, one), x), x

        start = _each(lambda batch: self.model.embed(self.rest, batch), self.batches)
        last, inputs = jax.lax.scan(through, start, layers)
        return inputs, last

    def loss(self, last: Activations) -> tuple[jax.Array, Activations]:
        """The mean loss, and the gradient of each micro-batch's loss by its own activations, leaves (K, ...)."""

        def one(pair: tuple) -> tuple[jax.Array, Activations]:
            x, batch = pair
            return jax.value_and_grad(lambda x: self.model.loss(self.rest, x, batch))(x)

        losses, cotangent = _each(one, (last, self.batches))
        return jnp.mean(losses), cotangent

    def backward(
        self,
        inputs: Activations,
        cotangent: Activations,
        layer_of: Callable[[Any, jax.Array], Params],
        visit: Callable[[jax.Array, Params, Any], Any],
        carry: Any,
    ) -> tuple[Any, Activations]:
        """``carry <- visit(l, the mean gradient of layer l, carry)`` from the last layer to the first.

        Returns the last carry, and the cotangent of the first block's input.  ``layer_of(carry, l)`` is layer l.
        """

        def body(n: jax.Array, both: tuple) -> tuple:
            carry, cotangent = both
            i = self.number - 1 - n
            weights = dequantize(layer_of(carry, i))

            def one(pair: tuple) -> tuple[Params, Activations]:
                x, back = pair
                return jax.vjp(self.model.block, weights, x)[1](back)

            grads, cotangent = _mean_gradient(one, (_at(inputs, i), cotangent))
            return visit(i, grads, carry), cotangent

        return jax.lax.fori_loop(0, self.number, body, (carry, cotangent))

    def rest_gradient(self, last: Activations, cotangent: Activations, factor: jax.Array) -> Params:
        """The mean gradient of everything outside the blocks, by way of ``factor`` times the loss, and of the embedding.

        The loss is taken again: to keep its gradient over the backward pass would cost the memory of an LM head.
        """
        # Without a barrier XLA would see that it has that gradient from before, and keep it.
        rest, last, cotangent = jax.lax.optimization_barrier((self.rest, last, cotangent))

        def one(triple: tuple) -> tuple[Params, None]:
            x, back, batch = triple

            def ends(rest: Params) -> tuple[jax.Array, Activations]:
                return self.model.loss(rest, x, batch), self.model.embed(rest, batch)

            (value, _), pull = jax.vjp(ends, rest)
            return pull((factor.astype(value.dtype), back))[0], None

        return _mean_gradient(one, (last, cotangent, self.batches))[0]


def _mean_gradient(one: Callable[[Any], tuple[Params, Any]], xs: Any) -> tuple[Params, Any]:
    """The mean over K of the gradients that ``one`` returns first, summed in float32; and what else it returns, (K, ...)."""
    count = jax.tree.leaves(xs)[0].shape[0]
    if count == 1:
        grads, other = one(_at(xs, 0))
        return grads, jax.tree.map(lambda x: x[None], other)

    def add(total: Params, x: Any) -> tuple[Params, Any]:
        grads, other = one(x)
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), other

    shapes, _ = jax.eval_shape(one, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs))
    total, other = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes), xs)
    return jax.tree.map(lambda t: t / count, total), other


def _each(function: Callable[[Any], Any], xs: Any) -> Any:
    """``function`` of each micro-batch, one after the other."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return jax.tree.map(lambda y: y[None], function(_at(xs, 0)))
    return jax.lax.map(function, xs)


def _micro_batches(batch: Any, count: int) -> Any:
    """Every array (B, ...) -> (K, B / K, ...), every K-th example together: where B is sharded, B / K is so in place."""

    def cut(x: jax.Array) -> jax.Array:
        if x.shape[0] % count:
            raise ValueError(
                f"A batch of {x.shape[0]} cannot be cut into accumulate={count} micro-batches of equal size."
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def _squares(tree: Any) -> jax.Array:
    return sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)), start=jnp.zeros([]))


def _one_layer(layers: Params) -> Params:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers)


def _at(tree: Any, i: int | jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)
