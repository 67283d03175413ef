# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Which axes of a parameter are its matrix, in the models of JAX's libraries.

:func:`layouts` reads a whole tree of parameters and says of each leaf whether it is a weight matrix and along which axes.  It
takes, in this order, the first of these that tells:

1. the names of the axes, where the leaf is in a box that holds them (``nnx.Variable``, ``nn.LogicallyPartitioned``,
   ``haliax.NamedArray``);
2. the axis of the layers in a stack (``nn.scan``, ``nnx.vmap``, Haiku's ``layer_stack``): all leaves of a subtree have it, the
   norms and biases too;
3. the bias beside a kernel, whose shape is that of the outputs;
4. the name of the layer, for attention and convolutions;
5. the last two axes.

The tables below were read from Flax 0.12 (linen and nnx), Tunix 0.1.7, MaxText 0.2.5, Levanter 0.2.227 and haliax, gemma 4.0.1,
EasyDeL 0.3.0, Keras 3.15, Haiku 0.0.17 and Equinox 0.13.8.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax._core.trees import is_box, paths_of

__all__ = ["Layout", "layouts"]

# What an axis is, by its name.  The first match counts; names of the axes of a mesh ("tp", "fsdp") match nothing.
_AXES = (
    ("layer", r"(.*_)?layers?|stage"),  # MaxText, T5X, Levanter
    ("batch", r"exp(erts?)?(_.*)?|num_experts|qkv"),  # MaxText, Levanter
    ("heads", r"((q|kv)_)?heads?|q_heads_per_group|kv|(.*_)?head_(dim|size)|joined_kv"),  # MaxText, Levanter, T5X
    ("embed", r"embed(_.*)?|hidden|d_model"),
    ("mlp", r"mlp(_.*)?|intermediate|d_ff"),
    ("latent", r"(q|kv)_lora(_.*)?"),  # MaxText's multi-head latent attention
    ("vocabulary", r"vocab(_.*)?"),
    ("norm", r"norm"),
)

# The last part of a path where it says nothing of the layer: linen and nnx, Keras, Haiku, Equinox and Levanter, Tunix.
_KERNELS = {"kernel", "weight", "weights", "w"}
_VECTORS = {"scale", "offset", "gamma", "beta"}
_LEAF_NAMES = _KERNELS | _VECTORS | {"bias", "b", "embedding", "embeddings"}

LORA_FACTOR = "LoRA factor"

# Parts of a path in snake case.  A part anywhere in the path:
_ANYWHERE = (
    ("embedding", r"(^|_)(un)?embed|^(wte|wpe)$|(^|_)emb$"),
    (
        "head",
        r"^logit|(^|_)logits$|^(tied_)?(lm_?|language_model_)?head$|^(output|classifier|classification|prediction|mlm|lm)_head$",
    ),
    (LORA_FACTOR, r"(^|_)lora(_|$)"),
    ("router", r"(^|_)router(_|$)"),
)
# The name of the layer, or of a parameter without one:
_LAYER = (
    ("norm", r"(^|_)([a-z]*norm(alization)?|ln|bn)\d*(_(\d+|[a-z]|out|final|scale|weight))?$"),
    ("bias", r"(^|_)bias(_table)?$"),
    ("position table", r"^pos(itions?)?$|^pos_|(^|_)(rel_?pos|(relative_)?position(al)?)(_|$)"),
    ("head", r"^head_\d+$"),
    ("state-space parameter", r"^a_log$"),
)
# The name of a layer outside of blocks:
_OUTSIDE = r"^(outputs?|output_(layer|proj|projection)|decoder|predictions?|classifier|score|readout|fc)$"
# What a block or a part of one is called:
_BLOCK = r"(^|_)\d+$|^h\d+$|(^|_)(attention|attn|mlp|ffn|feed_forward|moe|experts?|blocks?|layers?)(_|$)"

_INTO_HEADS = (
    r"^(c_attn|(to_|w_?)?(query|key|value|q|k|v|qkv|kv)(_?(proj|projection|kernel|dense|linear|layer))?)(_\d+)?$"
)
_OUT_OF_HEADS = r"^(to_out|w_?o|c_proj|proj|post|(attention_|attn_)?(out|output|o)(_?(proj|projection|dense))?)(_\d+)?$"
_FUSED = r"qkv|kv|c_attn"
_WITHOUT_HEADS = r"(^|_)(mlp|ffn|feed_forward|moe|experts?)(_|$)"
_CONVOLUTION = r"(^|_)conv|^patch|(^|_)(stem|downsample)"


# Why a kernel of more than two axes is left whole that none of the rules knows.
UNKNOWN = "which of its axes are its matrix is unknown"


class Layout(NamedTuple):
    """The axes of a parameter, and why it is left whole by default."""

    kind: str  # what it is other than a weight matrix: "embedding", "norm", ...; empty for a weight matrix
    unclear: str  # why its axes form no matrix; empty if they do
    batch: tuple[int, ...] = ()
    reduction: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


@dataclasses.dataclass
class _Leaf:
    parts: tuple[str, ...]  # of the path, without the box's own key
    shape: tuple[int, ...] = ()
    axes: Sequence[str | None] = ()  # what each axis is, by its name
    kind: str = ""  # what the names in its path say that it is other than a weight matrix
    stack: int | None = None  # the axis of the layers
    bias: _Leaf | None = None  # the bias beside it

    @property
    def has_generic_name(self) -> bool:
        return len(self.parts) > 1 and self.parts[-1] in _LEAF_NAMES

    @property
    def layer(self) -> str:
        """The name of the layer that the parameter belongs to, or its own."""
        return self.parts[-2] if self.has_generic_name else self.parts[-1] if self.parts else ""

    @property
    def above(self) -> tuple[str, ...]:
        """The parts above the layer's name."""
        return self.parts[: -2 if self.has_generic_name else -1]

    @property
    def outputs_first(self) -> bool:
        """Whether a kernel is (outputs, inputs), as in torch, Equinox and Levanter."""
        return bool(self.parts) and self.parts[-1] == "weight"

    @property
    def rest(self) -> tuple[int, ...]:
        """The axes other than that of the layers."""
        return tuple(axis for axis in range(len(self.shape)) if axis != self.stack)

    def sizes(self, axes: Sequence[int] | None = None) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in (self.rest if axes is None else axes))


def layouts(params: Any, stacked: Collection[str] = ()) -> list[Layout]:
    """Returns the layout of each leaf of ``params``, in the order of ``jax.tree.leaves``.

    Args:
      params: The whole tree.  A part of it tells less.
      stacked: Paths of leaves whose first axis is that of the layers.

    >>> attention = {name: {"kernel": jnp.zeros((64, 4, 16))} for name in ("query", "key", "value")}
    >>> attention["out"] = {"kernel": jnp.zeros((4, 16, 64)), "bias": jnp.zeros((64,))}
    >>> [layout.reduction for layout in layouts(attention) if layout.output]
    [(0,), (0, 1), (0,), (0,)]
    """
    nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)[0]
    leaves, found = [], {}
    for (path, node), whole in zip(nodes, paths_of(params), strict=True):
        [array] = jax.tree.leaves(node)
        shape = jnp.shape(array)
        parts = _parts(jax.tree_util.keystr(path, simple=True, separator="/"))
        leaf = _Leaf(parts, shape, [_meaning(name) for name in _axis_names(node, len(shape))])
        leaf.kind = _named(leaf)
        if "layer" in leaf.axes:
            leaf.stack = leaf.axes.index("layer")
        elif whole in stacked:
            leaf.stack = 0
        leaves.append(leaf)
        found[leaf.parts] = leaf
    for leaf in leaves:
        if leaf.parts and leaf.parts[-1] in _KERNELS:
            beside = (found.get((*leaf.parts[:-1], name)) for name in ("bias", "b"))
            leaf.bias = next((other for other in beside if other is not None), None)
    _find_stacks(leaves, 0)
    _complete_kinds(leaves)
    # Blocks that are no stacks, since they have vectors.
    single = {leaf.parts[:k] for leaf in leaves if len(leaf.shape) == 1 for k in range(1, len(leaf.parts))}
    return [_layout(leaf, found, single) for leaf in leaves]


def kind_of(path: str) -> str:
    """What the name of a parameter says that it is other than a weight matrix; empty if nothing.

    >>> kind_of("lm_head/kernel"), kind_of("layers/attn/q_proj/kernel")
    ('head', '')
    """
    return _named(_Leaf(_parts(path)))


def _parts(path: str) -> tuple[str, ...]:
    """The parts of a path in snake case."""
    parts = (part for part in re.split(r"[/.]", path) if part not in ("", "~"))
    return tuple(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", part).lower() for part in parts)


def _axis_names(node: Any, ndim: int) -> Sequence[str | None]:
    """The names of the axes that a box holds; None for those it doesn't."""
    nothing = (None,) * ndim
    if not is_box(node):
        return nothing
    # haliax, linen, and nnx, whose attributes warn where they are of an earlier version.
    metadata = node.get_metadata() if hasattr(node, "get_metadata") else {}
    keys = ("out_sharding", "sharding_names", "sharding")
    for names in (getattr(node, "axes", None), getattr(node, "names", None), *map(metadata.get, keys)):
        if isinstance(names, (tuple, list, jax.sharding.PartitionSpec)) and len(names) == ndim:
            return [getattr(name, "name", name) for name in names]
    return nothing


def _meaning(name: Any) -> str | None:
    if not isinstance(name, str):
        return None
    return next((meaning for meaning, pattern in _AXES if re.fullmatch(pattern, name.lower())), None)


def _named(leaf: _Leaf) -> str:
    """What the names in a path say that a leaf is, wherever it stands."""
    for kind, pattern in _ANYWHERE:
        if any(re.search(pattern, part) for part in leaf.parts):
            return kind
    if leaf.parts and leaf.parts[-1] in _VECTORS:
        return "norm"
    names = {leaf.layer, leaf.parts[-1]} if leaf.parts else set()
    return next((kind for kind, pattern in _LAYER if any(re.search(pattern, name) for name in names)), "")


def _find_stacks(leaves: list[_Leaf], depth: int) -> None:
    """Sets the axis of the layers in the largest subtrees whose leaves all have it."""
    for axis in (0, 1):
        if _is_stack(leaves, axis):
            for leaf in leaves:
                leaf.stack = axis if leaf.stack is None else leaf.stack
            return
    children = collections.defaultdict(list)
    for leaf in leaves:
        if len(leaf.parts) > depth + 1:
            children[leaf.parts[depth]].append(leaf)
    for child in children.values():
        if len(child) > 1:
            _find_stacks(child, depth + 1)


def _is_stack(leaves: list[_Leaf], axis: int) -> bool:
    """Whether all leaves of a subtree share an axis of layers: one size, and something that has an axis more than it needs."""
    if len(leaves) < 2 or any(len(leaf.shape) <= axis for leaf in leaves):
        return False
    if len({leaf.shape[axis] for leaf in leaves}) > 1:
        return False
    deep = [leaf.layer for leaf in leaves if len(leaf.shape) > 2]
    if not deep:
        return False
    if any(len(leaf.shape) > 1 and leaf.kind == "norm" for leaf in leaves):
        return True
    if any(leaf.bias is not None and _has_layers(leaf, leaf.bias, axis) for leaf in leaves):
        return True
    # The first axis of a kernel into the heads is the width; of one out of them, the heads.
    return axis == 0 and any(map(_is_into_heads, deep)) and any(map(_is_out_of_heads, deep))


def _has_layers(kernel: _Leaf, bias: _Leaf, axis: int) -> bool:
    """Whether a bias is (layers, outputs), and not the outputs alone."""
    if len(bias.shape) < 2 or kernel.shape[-len(bias.shape) :] == bias.shape or bias.shape[-1] == 1:
        return False
    outputs = tuple(size for i, size in enumerate(bias.shape) if i != axis)
    inner = tuple(size for i, size in enumerate(kernel.shape) if i != axis)
    return outputs in (inner[-len(outputs) :], inner[: len(outputs)])


def _is_into_heads(name: str) -> bool:
    return bool(re.search(_INTO_HEADS, name))


def _is_out_of_heads(name: str) -> bool:
    return bool(re.search(_OUT_OF_HEADS, name))


def _in_block(leaf: _Leaf) -> bool:
    return leaf.stack is not None or any(re.search(_BLOCK, part) for part in leaf.above)


def _complete_kinds(leaves: list[_Leaf]) -> None:
    """Sets the kinds that the rest of the tree tells."""
    shapes = collections.Counter((leaf.above, leaf.shape) for leaf in leaves)
    biases = {id(leaf.bias) for leaf in leaves if leaf.bias is not None}
    for leaf in leaves:
        if leaf.kind:
            continue
        if id(leaf) in biases:
            leaf.kind = "bias"
        elif "vocabulary" in leaf.axes or (not _in_block(leaf) and re.search(_OUTSIDE, leaf.layer)):
            leaf.kind = "head"
        elif "norm" in leaf.axes:
            leaf.kind = "norm"
        elif leaf.layer == "gate" and shapes[leaf.above, leaf.shape] < 2:
            leaf.kind = "router"
    if not any(leaf.kind == "head" for leaf in leaves):
        for leaf in _unnamed_head(leaves):
            leaf.kind = "head"


def _unnamed_head(leaves: list[_Leaf]) -> list[_Leaf]:
    """The head of a model that calls none so; empty if it can't be told."""
    outside = [leaf for leaf in leaves if not leaf.kind and len(leaf.shape) == 2 and not _in_block(leaf)]
    # From the width to the vocabulary.
    embeddings = {frozenset(leaf.shape) for leaf in leaves if leaf.kind == "embedding" and len(leaf.shape) == 2}
    heads = [leaf for leaf in outside if frozenset(leaf.shape) in embeddings]
    if len(heads) == 1:
        return heads
    # The last dense layer at the root of a model of blocks, in the order in which linen and Keras number them.
    dense = [leaf for leaf in outside if re.fullmatch(r"dense_\d+", leaf.layer) and not set(leaf.above) - {"params"}]
    if not dense or not any(map(_in_block, leaves)):
        return []
    return [max(dense, key=lambda leaf: int(leaf.layer.rpartition("_")[2]))]


def _layout(leaf: _Leaf, found: dict[tuple[str, ...], _Leaf], single: set[tuple[str, ...]]) -> Layout:
    if len(leaf.shape) < 2:
        return Layout(leaf.kind, "one axis" if leaf.shape else "no axes")
    if len(leaf.rest) < 2:
        return Layout(leaf.kind, "one axis in each layer")
    sides = _by_names(leaf) or _by_bias(leaf) or _by_layer(leaf, found)
    if isinstance(sides, str):
        return Layout(leaf.kind, sides)
    if sides is None:
        *batch, first, second = leaf.rest
        counts = [leaf.shape[axis] for axis in batch if leaf.axes[axis] != "batch"]
        experts = any(re.search(_WITHOUT_HEADS, part) for part in leaf.parts)
        alone = leaf.stack is None and leaf.has_generic_name and leaf.above in single and not experts
        if max(counts, default=0) > min(leaf.shape[first], leaf.shape[second]) or (counts and alone):
            return Layout(leaf.kind, UNKNOWN)
        sides = ((second,), (first,)) if leaf.outputs_first else ((first,), (second,))
    reduction, output = sides
    batch = tuple(axis for axis in range(len(leaf.shape)) if axis not in reduction + output)
    return Layout(leaf.kind, "", batch, reduction, output)


_Sides = tuple[tuple[int, ...], tuple[int, ...]]


def _by_names(leaf: _Leaf) -> _Sides | str | None:
    """The two sides by what the axes are called."""
    if any(leaf.axes[axis] is None for axis in leaf.rest):
        return None
    groups: dict[str | None, tuple[int, ...]] = {}
    for axis in leaf.rest:
        if leaf.axes[axis] != "batch":
            groups[leaf.axes[axis]] = (*groups.get(leaf.axes[axis], ()), axis)
    if len(groups) == 1 and (len(leaf.rest) == 1 or "heads" in groups):
        return "one axis in each layer" if leaf.stack is not None else "one axis"
    if len(groups) != 2:
        return None
    first, second = groups.values()
    if "embed" in groups and (_is_into_heads(leaf.layer) or _is_out_of_heads(leaf.layer)):
        embed = groups.pop("embed")
        [other] = groups.values()
        return (embed, other) if _is_into_heads(leaf.layer) else (other, embed)
    return (second, first) if leaf.outputs_first else (first, second)


def _by_bias(leaf: _Leaf) -> _Sides | None:
    """The output side by the shape of the bias beside the kernel."""
    if leaf.bias is None:
        return None
    rest, sizes, outputs = leaf.rest, leaf.sizes(), leaf.bias.sizes()
    while len(outputs) > 1 and outputs[-1] == 1:  # an Equinox convolution: (outputs, 1, 1)
        outputs = outputs[:-1]
    if not 0 < len(outputs) < len(sizes):
        return None
    k, n = len(outputs), len(rest)
    if leaf.outputs_first and sizes[:k] == outputs:
        return rest[k:], rest[:k]
    return (rest[: n - k], rest[n - k :]) if sizes[-k:] == outputs else None


def _by_layer(leaf: _Leaf, found: dict[tuple[str, ...], _Leaf]) -> _Sides | str | None:
    """The two sides by the name of the layer, where there are more than two axes."""
    rest, name = leaf.rest, leaf.layer
    if len(rest) < 3:
        return None
    *_, third, second, last = rest
    match name:
        case "q_einsum" | "kv_einsum" | "qkv_einsum":  # (..., heads, width, head_dim)
            return (second,), (third, last)
        case "attn_vec_einsum":  # (heads, head_dim, width)
            return (third, second), (last,)
        case "gating_einsum":  # (2, width, hidden) or (2, hidden, width), beside linear: (hidden, width)
            linear = found.get((*leaf.above, "linear")) or found.get((*leaf.above, "linear", "w"))
            width = linear.shape[-1] if linear else leaf.shape[second]
            return ((second,), (last,)) if leaf.shape[second] == width else ((last,), (second,))
    if re.search(_CONVOLUTION, name):
        inputs = leaf.shape[rest[1] if leaf.outputs_first else second]
        if inputs == 1:
            return "each output has one input"
        return (rest[1:], rest[:1]) if leaf.outputs_first else (rest[:-1], rest[-1:])
    if any(re.search(_WITHOUT_HEADS, part) for part in leaf.above):
        return None
    if _is_into_heads(name):
        width, heads = _heads_of(leaf)
        # No model is narrower than its heads: those are the matrices of a stack.
        return None if leaf.shape[width] < min(leaf.sizes(heads)) else ((width,), heads)
    if _is_out_of_heads(name):
        width, heads = _heads_of(leaf)
        number = math.prod(leaf.sizes(heads))
        into = [
            other
            for other in found.values()
            if other.above == leaf.above and _is_into_heads(other.layer) and other.parts[-1] in _KERNELS | {other.layer}
        ]
        known = any(len(other.rest) > 2 and math.prod(other.sizes(_heads_of(other)[1])) == number for other in into)
        return (heads, (width,)) if known else None
    return None


def _heads_of(leaf: _Leaf) -> tuple[int, tuple[int, ...]]:
    """The axis of the width and those of the heads, of a kernel into or out of heads."""
    rest = leaf.rest
    if len(rest) > 3 and re.search(_FUSED, leaf.layer):  # the queries, keys and values are matrices of their own
        fused = next((axis for axis in rest if leaf.shape[axis] in (2, 3)), rest[0])
        rest = tuple(axis for axis in rest if axis != fused)
    if _is_into_heads(leaf.layer) == leaf.outputs_first:
        return rest[-1], rest[:-1] if leaf.outputs_first else rest[-3:-1]
    return (rest[0], rest[1:]) if leaf.outputs_first else (rest[-3], rest[-2:])
