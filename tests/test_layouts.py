# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The matrices of other libraries' parameters, on trees that were recorded from them (tests/data/trees).

A file has the path, the shape and the axis names of every parameter of a small model, the same sizes of a real one, and what is
right for it: the axes of its matrix, or that it is left whole.
"""

import collections
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from problems import normal

import galore_jax
from galore_jax.layouts import UNKNOWN, layouts
from galore_jax.matrix_view import decisions, paths_of, select

TREES = sorted((pathlib.Path(__file__).parent / "data" / "trees").glob("*.json"))
Axis = collections.namedtuple("Axis", "name size")


class NamedArray:
    """A stand-in for Haliax's."""

    def __init__(self, array, axes):
        self.array, self.axes = array, axes


jax.tree_util.register_pytree_node(
    NamedArray, lambda x: ((x.array,), x.axes), lambda axes, children: NamedArray(children[0], axes)
)


def boxed(array, leaf, tree, names):
    axes = leaf["names"] if names else None
    match tree["leaf_type"]:
        case "array":
            return array
        case "haliax.NamedArray":
            return NamedArray(array, tuple(map(Axis, axes, array.shape)) if axes else ())
        case "linen.LogicallyPartitioned":
            return nn.LogicallyPartitioned(array, tuple(axes) if axes else (None,) * array.ndim)
        case "nnx.Variable":
            return nnx.Param(array, eager_sharding=False, **({tree["names_in"]: tuple(axes)} if axes else {}))


def recorded(file, real=False, names=True):
    """(parameters as the library hands them to an optimizer, the record of each path, the shape of each path)"""
    tree = json.loads(file.read_text())
    params, leaves, shapes = {}, {}, {}
    for leaf in tree["leaves"]:
        path, sizes = leaf["path"], tree["real"] if real else tree["sizes"]
        shape = tuple(int(dim) if dim.isdigit() else sizes[dim] for dim in leaf["dims"])
        leaves[path], shapes[path] = leaf, shape
        value = boxed(jax.ShapeDtypeStruct(shape, jnp.float32), leaf, tree, names)
        outer = path if tree["leaf_type"] == "array" else path.rpartition("/")[0]
        keys = {"flat": [outer], "haiku": outer.rsplit("/", 1)}.get(tree["nesting"]) or outer.split("/")
        node = params
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return params, leaves, shapes


def right(leaf, shape, rank):
    """(reduction, output, batch), or None where it is left whole."""
    if leaf["right"]["kind"] == "whole":
        return None
    smaller = min(math.prod(shape[axis] for axis in leaf["right"][side]) for side in ("reduction", "output"))
    if (max(1, round(rank * smaller)) if isinstance(rank, float) else rank) >= smaller:
        return None
    return tuple(frozenset(leaf["right"][name]) for name in ("reduction", "output", "batch"))


@pytest.mark.parametrize("names", [True, False], ids=["names", "no names"])
@pytest.mark.parametrize("file", TREES, ids=lambda file: file.stem)
def test_the_matrices_of_recorded_models(file, names):
    for rank, real in ((0.25, False), (128, True)):
        params, leaves, shapes = recorded(file, real, names)
        paths = paths_of(params)
        assert sorted(paths) == sorted(leaves)
        for path, view in zip(paths, select(params, rank=rank), strict=True):
            axes = view and tuple(map(frozenset, (view.reduction_axes, view.output_axes, view.batch_axes)))
            assert axes == right(leaves[path], shapes[path], rank), path


@pytest.mark.parametrize("name", ["maxtext_llama_scan", "linen_transformer_scan", "levanter_llama", "gemma_gemma3"])
def test_the_state_of_a_real_model_is_small(name):
    """Of Llama 3 8B, .167 of AdamW's at rank 128, where the head and the embedding are whole."""
    [file] = [file for file in TREES if file.stem == name]
    params, leaves, shapes = recorded(file, real=True)
    found = galore_jax.describe(galore_jax.galore_adamw(1e-3, rank=128), params)
    assert found.state_bytes == galore_jax.state_bytes(galore_jax.galore_adamw(1e-3, rank=128), params)
    assert found.adamw_bytes == galore_jax.state_bytes(optax.adamw(1e-3), params)
    numbers = bases = whole = 0
    for path, leaf in leaves.items():
        axes = right(leaf, shapes[path], 128)
        if axes is None:
            whole += math.prod(shapes[path])
            continue
        m, n, batch = (math.prod(shapes[path][axis] for axis in part) for part in axes)
        numbers += batch * 128 * max(m, n)
        bases += batch * 128 * min(m, n)
    counters = found.state_bytes - 4 * (2 * numbers + bases + 2 * whole)
    assert 0 <= counters < 20_000


def abstract(shapes):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )


def kinds(shapes):
    params = abstract(shapes)
    return {path: layout.kind or layout.unclear for path, layout in zip(paths_of(params), layouts(params), strict=True)}


def matrices(shapes, **kwargs):
    params = abstract(shapes)
    views = zip(paths_of(params), select(params, **({"rank": 0.25} | kwargs)), strict=True)
    return {path: (view.batch_shape, *view.matrix_shape) for path, view in views if view is not None}


NOT_MATRICES = (
    "pos position relpos_bias relative_position_bias_table logits_dense emb tok_emb pos_emb language_model_head tied_lm_head "
    "to_logits router lora_a w_lora_b output output_layer output_projection decoder predictions classifier score readout fc "
    "lm_head head wte wpe embed_tokens token_embedder cls_embedding A_log"
)


@pytest.mark.parametrize("name", NOT_MATRICES.split())
def test_what_is_no_weight_matrix_of_a_block_is_left_whole(name):
    block = {"attn": {"query": {"kernel": (64, 64)}}, "mlp": {"up": {"kernel": (64, 128)}}}
    for shapes in ({"layers": {"0": block}, name: {"kernel": (64, 96)}}, {"layers": {"0": block}, name: (64, 96)}):
        assert set(matrices(shapes)) == {"layers/0/attn/query/kernel", "layers/0/mlp/up/kernel"}


@pytest.mark.parametrize(
    "path",
    [
        "head_0/query",
        "pre_norm_dense",
        "rms_norm_mlp",
        "preprocess_norm_dense",
        "blocks/0/output",
        "layer_0/output/dense",
    ],
)
def test_a_matrix_of_a_block_is_projected_whatever_its_name_resembles(path):
    shapes = {"kernel": (64, 96)}
    for part in reversed(path.split("/")):
        shapes = {part: shapes}
    assert matrices(shapes) == {f"{path}/kernel": ((), 64, 96)}


def test_a_head_without_a_name_is_told_by_the_vocabulary_or_its_place():
    blocks = {"block_0": {"mlp": {"kernel": (64, 96)}}, "wte": {"embedding": (101, 64)}}
    assert kinds(blocks | {"final": {"kernel": (64, 101)}})["final/kernel"] == "head"
    # A layer that is as large as the vocabulary, beside a head with a name or another of its size, is none.
    named = blocks | {"final": {"kernel": (64, 101)}, "lm_head": {"kernel": (64, 101)}}
    assert set(matrices(named)) == {"block_0/mlp/kernel", "final/kernel"}
    assert len(matrices(blocks | {"up": {"kernel": (64, 101)}, "down": {"kernel": (101, 64)}})) == 3
    pooled = {
        "block_0": {"mlp": {"kernel": (64, 96)}},
        "Dense_0": {"kernel": (96, 64)},
        "Dense_1": {"kernel": (64, 10)},
    }
    assert set(matrices(pooled)) == {"block_0/mlp/kernel", "Dense_0/kernel"}
    assert len(matrices({"Dense_0": {"kernel": (32, 64)}, "Dense_1": {"kernel": (64, 10)}})) == 2


def test_a_gate_is_a_router_unless_it_is_as_large_as_what_stands_beside_it():
    router = {
        "mlp": {
            "gate": {"kernel": (64, 8)},
            "experts": {"up": {"kernel": (8, 64, 96)}, "down": {"kernel": (8, 96, 64)}},
        }
    }
    assert kinds(router)["mlp/gate/kernel"] == "router"
    gated = {"mlp": {"gate": {"kernel": (64, 96)}, "up": {"kernel": (64, 96)}, "down": {"kernel": (96, 64)}}}
    assert len(matrices(gated)) == 3


@pytest.mark.parametrize("axis", [0, 1])
def test_vectors_of_a_stack_are_no_matrices(axis):
    def stacked(*shape):
        return (*shape[:axis], 6, *shape[axis:])

    shapes = {
        "blocks": {
            "attn": {
                "query": {"kernel": stacked(32, 4, 8), "bias": stacked(4, 8)},
                "out": {"kernel": stacked(4, 8, 32)},
            },
            "mlp": {
                "up": {"kernel": stacked(32, 96), "bias": stacked(96)},
                "dt_bias": stacked(96),
                "A_log": stacked(32),
            },
            "norm": {"scale": stacked(32)},
        }
    }
    assert matrices(shapes) == {
        "blocks/attn/out/kernel": ((6,), 32, 32),
        "blocks/attn/query/kernel": ((6,), 32, 32),
        "blocks/mlp/up/kernel": ((6,), 32, 96),
    }


def test_the_bias_beside_a_kernel_tells_its_outputs():
    shapes = {
        "split": {"kernel": (40, 6, 16), "bias": (6, 16)},
        "join": {"kernel": (6, 16, 40), "bias": (40,)},
        "experts": {"kernel": (6, 40, 16), "bias": (6, 16)},
        "linear": {"w": (40, 16), "b": (16,)},
        "torch": {"weight": (16, 3, 5), "bias": (16,)},
    }
    assert matrices(shapes) == {
        "experts/kernel": ((6,), 40, 16),
        "join/kernel": ((), 96, 40),
        "linear/w": ((), 40, 16),
        "split/kernel": ((), 40, 96),
        "torch/weight": ((), 15, 16),
    }


def test_an_unknown_kernel_of_many_axes_is_left_whole_and_its_reason_names_the_remedy():
    params = abstract({"mystery": {"kernel": (512, 8, 64)}})
    assert decisions(params, rank=4) == [UNKNOWN]
    # In a block that is no stack, as its norm tells.
    merge = {"block": {"merge": {"kernel": (4, 8, 24)}, "norm": {"scale": (24,)}, "up": {"kernel": (24, 48)}}}
    assert kinds(merge)["block/merge/kernel"] == UNKNOWN
    with pytest.warns(
        galore_jax.GaLoreMemoryWarning, match=r"leaves 1 of the 3 .* 'block/merge/kernel' of shape \(4, 8, 24\)"
    ):
        jax.eval_shape(galore_jax.galore_adamw(1e-3, rank=4).init, abstract(merge))
    numbers = galore_jax.GaLoreDimensionNumbers(0, (1, 2))
    [view] = select(params, rank=4, weight_dimension_numbers=numbers)
    assert view.matrix_shape == (512, 512)


def test_the_numbers_that_maxtext_makes_for_muon_are_taken_as_they_are():
    """The tree of its ``get_muon_weight_dimension_numbers``: Optax's numbers for matrices and None for the rest."""
    muon = optax.contrib.MuonDimensionNumbers
    shapes = {
        "decoder": {
            "layers": {"mlp": {"wi_0": {"kernel": (40, 5, 112)}}, "self_attention": {"out": {"kernel": (6, 5, 16, 40)}}}
        },
        "token_embedder": {"embedding": (101, 40)},
    }
    numbers = {
        "decoder": {
            "layers": {
                "mlp": {"wi_0": {"kernel": muon((0,), (-1,))}},
                "self_attention": {"out": {"kernel": muon((0, -2), (-1,))}},
            }
        },
        "token_embedder": {"embedding": None},
    }
    assert matrices(shapes, weight_dimension_numbers=numbers) == {
        "decoder/layers/mlp/wi_0/kernel": ((5,), 40, 112),
        "decoder/layers/self_attention/out/kernel": ((5,), 96, 40),
    }


SHAPES = {
    "attn": {"q": {"kernel": (32, 48)}, "norm": {"scale": (32,)}},
    "mlp": {"up": {"kernel": (32, 96)}},
    "lm_head": {"kernel": (32, 101)},
}


@pytest.mark.parametrize("mask", ["attn", ["attn"], re.compile("attn|head"), ("attn", "q/kernel$")])
def test_patterns_select_parameters_that_the_rules_allow(mask):
    assert set(matrices(SHAPES, mask=mask)) == {"attn/q/kernel"}


def test_ranks_by_patterns():
    params = abstract(SHAPES)
    views = select(params, rank={"attn": 8, "mlp/up": 0.25, "lm_head": None})
    assert [view and (view.path, view.rank) for view in views] == [
        None,
        ("attn/q/kernel", 8),
        None,
        ("mlp/up/kernel", 8),
    ]
    # In one group of a partition, the pattern of another group is found nowhere.
    part = {"attn": params["attn"], "mlp": optax.MaskedNode(), "lm_head": optax.MaskedNode()}
    assert [view and view.rank for view in select(part, rank={"attn": 8, "mlp": 4})] == [None, 8]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": ["attn", "moe"]}, "mask has the pattern 'moe', which is in none of the 4 paths of parameters"),
        ({"mask": "("}, r"mask has the pattern '\(', which is no regular expression"),
        ({"rank": {"attn": 4, "moe": 4}}, "rank has the pattern 'moe', which is in none of the 4 paths"),
        ({"rank": {"attn": 4, "kernel": 8}}, "rank has patterns that disagree on 'attn/q/kernel'"),
    ],
)
def test_patterns_that_match_nothing_or_disagree_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        select(abstract(SHAPES), **kwargs)


@pytest.mark.parametrize("rank", [{"attn": 0}, {"attn": 1.5}, {"(": 4}])
def test_bad_ranks_by_patterns_are_refused_at_construction(rank):
    with pytest.raises(ValueError, match="rank"):
        galore_jax.galore_adamw(1e-3, rank=rank)


WIDTH, HEADS, HEAD_DIM, LAYERS = 24, 4, 8, 2


def block(seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / math.sqrt(WIDTH), jnp.float32)

    into = {
        name: {"kernel": normal(WIDTH, HEADS, HEAD_DIM), "bias": normal(HEADS, HEAD_DIM)}
        for name in ("query", "key", "value")
    }
    return {
        "attn": into | {"out": {"kernel": normal(HEADS, HEAD_DIM, WIDTH)}},
        "mlp": {"up": {"kernel": normal(WIDTH, 40), "bias": normal(40)}, "down": {"kernel": normal(40, WIDTH)}},
        "norm": {"scale": jnp.ones(WIDTH)},
    }


def apply(block, x):
    attn, mlp = block["attn"], block["mlp"]
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * block["norm"]["scale"][None, None]
    q, k, v = (
        h @ attn[name]["kernel"].reshape(WIDTH, -1) + attn[name]["bias"].reshape(1, 1, -1)
        for name in ("query", "key", "value")
    )
    q, k, v = (y.reshape(*y.shape[:2], HEADS, HEAD_DIM) for y in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    heads = jnp.einsum("bhts,bshk->bthk", weights, v).reshape(*x.shape[:2], -1)
    x = x + heads @ attn["out"]["kernel"].reshape(-1, WIDTH)
    return x + jnp.tanh(x @ mlp["up"]["kernel"] + mlp["up"]["bias"][None, None]) @ mlp["down"]["kernel"]


def losses(params, blocks_of, steps=50):
    tx = galore_jax.galore_adamw(0.01, rank=4, update_proj_gap=10, projector="svd")
    x, y = (normal(seed, (4, 6, WIDTH)) for seed in (1, 2))

    def loss(params):
        h = x
        for block in blocks_of(params):
            h = apply(block, h)
        return jnp.mean((h - y) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return values


def as_dense(block):
    """The same block with kernels of two axes and biases of one."""
    attn = block["attn"]
    dense = {
        name: {"kernel": attn[name]["kernel"].reshape(WIDTH, -1), "bias": attn[name]["bias"].reshape(-1)}
        for name in ("query", "key", "value")
    }
    return block | {"attn": dense | {"out": {"kernel": attn["out"]["kernel"].reshape(-1, WIDTH)}}}


@pytest.mark.slow
def test_a_stack_and_heads_apart_train_as_the_same_layers_one_by_one_with_dense_kernels():
    blocks = {str(i): block(i) for i in range(LAYERS)}
    dense = {name: as_dense(block) for name, block in blocks.items()}
    expected = losses({"layers": dense}, lambda params: params["layers"].values())
    assert expected[-1] < 0.7 * expected[0]
    heads = losses({"layers": blocks}, lambda params: params["layers"].values())
    np.testing.assert_allclose(heads, expected, rtol=1e-5)

    def layer(stack, i):
        return jax.tree.map(lambda x: x[i], stack)

    stacked = {"layers": jax.tree.map(lambda *layers: jnp.stack(layers), *blocks.values())}
    scanned = losses(stacked, lambda params: [layer(params["layers"], i) for i in range(LAYERS)])
    np.testing.assert_allclose(scanned, expected, rtol=1e-5)
