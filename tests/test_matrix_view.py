# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Which leaves are projected, their views in whole trees and in parts, and the errors."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from hypothesis import given, settings, strategies as st
from problems import needs_optax_galore, normal

import galore_jax
from galore_jax.matrix_view import GaLoreDimensionNumbers, decisions, is_part, paths_of, select, taking_part, whole_tree


def abstract(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def selected(params, **kwargs):
    kwargs = {"rank": 4, **kwargs}
    return {view.path: view for view in select(params, **kwargs) if view is not None}


def reasons_of(params, **kwargs):
    """Why leaves are left whole, by path."""
    found = zip(paths_of(params), decisions(params, **kwargs), strict=True)
    return {path: reason for path, reason in found if isinstance(reason, str)}


def test_default_rule_projects_matrices_and_leaves_embeddings_head_and_norms():
    params = {
        "embed_tokens": abstract(embedding=(100, 32)),
        "layers": {
            "attention": {"q_proj": abstract(kernel=(3, 32, 32))},
            "multi_head_attention": abstract(kernel=(32, 32), bias=(32,)),
            "input_norm": abstract(scale=(24, 32)),
            "LayerNorm_0": abstract(scale=(24, 32)),
            "q_norm": abstract(weight=(24, 32)),
        },
        "Embed_0": abstract(embedding=(100, 32)),
        "wte": abstract(weight=(100, 32)),
        "lm_head": abstract(kernel=(32, 100)),
        "LMHead": abstract(kernel=(32, 100)),
        "head": abstract(kernel=(32, 100)),
        "normal_mlp": abstract(kernel=(32, 64)),
    }
    assert set(selected(params)) == {
        "layers/attention/q_proj/kernel",
        "layers/multi_head_attention/kernel",
        "normal_mlp/kernel",
    }


def test_a_rank_that_is_not_smaller_than_the_smaller_side_leaves_the_leaf_alone():
    params = abstract(a=(8, 20), b=(20, 9), row=(1, 50))
    assert set(selected(params, rank=8)) == {"b"}
    assert selected(params, rank=1.0) == {}


def test_explicit_dimension_numbers_clip_the_rank_to_the_smaller_side():
    params = abstract(a=(8, 20))
    assert selected(params, rank=999, weight_dimension_numbers={"a": GaLoreDimensionNumbers()})["a"].rank == 8


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (4, {"a": 4, "b": 4}),
        (0.25, {"a": 2, "b": 8}),
        (0.001, {"a": 1, "b": 1}),
        (lambda path, shape: 3 if path == "a" else None, {"a": 3}),
        (lambda path, shape: 0.5 if shape == (64, 32) else 2, {"a": 2, "b": 16}),
        (np.int64(4), {"a": 4, "b": 4}),
    ],
)
def test_rank_is_an_int_a_fraction_of_the_smaller_side_or_a_callable(rank, expected):
    views = selected(abstract(a=(8, 20), b=(64, 32)), rank=rank)
    assert {path: view.rank for path, view in views.items()} == expected


def test_mask_true_on_a_leaf_overrides_the_names_and_on_a_subtree_does_not():
    params = {
        "embed": abstract(table=(40, 16)),
        "block": {**abstract(kernel=(16, 16)), "norm": abstract(scale=(12, 16))},
    }
    assert set(selected(params, mask={"embed": {"table": True}, "block": True})) == {"embed/table", "block/kernel"}
    assert set(selected(params, mask=lambda p: jax.tree.map(lambda x: x.shape == (40, 16), p))) == {"embed/table"}


def test_integer_complex_and_empty_leaves_are_left_alone():
    params = {
        "int": jax.ShapeDtypeStruct((16, 16), jnp.int32),
        "complex": jax.ShapeDtypeStruct((16, 16), jnp.complex64),
        "empty": jax.ShapeDtypeStruct((0, 16, 16), jnp.float32),
    }
    assert selected(params) == {}


def test_the_side_follows_proj_type_and_squares_go_left_for_std():
    params = abstract(wide=(8, 20), tall=(20, 8), square=(9, 9))
    sides = {
        proj_type: {p: (v.left, v.right) for p, v in selected(params, proj_type=proj_type).items()}
        for proj_type in galore_jax.matrix_view.PROJ_TYPES
    }
    left, right, both = (True, False), (False, True), (True, True)
    assert sides["std"] == {"wide": left, "tall": right, "square": left}
    assert sides["reverse_std"] == {"wide": right, "tall": left, "square": right}
    assert sides["left"] == dict.fromkeys(params, left)
    assert sides["right"] == dict.fromkeys(params, right)
    assert sides["full"] == dict.fromkeys(params, both)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(data=st.data(), ndim=st.integers(2, 5))
def test_matrices_round_trip_whatever_the_axes(data, ndim):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    axes = data.draw(st.permutations(range(ndim)))
    cut, end = sorted(data.draw(st.lists(st.integers(1, ndim), min_size=2, max_size=2, unique=True)))
    numbers = GaLoreDimensionNumbers(tuple(axes[:cut]), tuple(axes[cut:end]))
    view = selected({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, weight_dimension_numbers={"w": numbers})["w"]
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrices = view.to_matrices(jnp.asarray(leaf))
    assert matrices.shape == (*view.batch_shape, *view.matrix_shape)
    np.testing.assert_array_equal(view.from_matrices(matrices), leaf)


@pytest.mark.slow
def test_any_axis_that_is_not_named_is_a_batch_axis_wherever_it_stands():
    """MaxText stacks its layers on axis 1: a (hidden, layers, heads, head_dim) kernel."""
    numbers = GaLoreDimensionNumbers(reduction_axis=0, output_axis=(-2, -1))
    view = selected(abstract(q=(16, 3, 4, 8)), weight_dimension_numbers={"q": numbers})["q"]
    leaf = normal(0, (16, 3, 4, 8))
    matrices = view.to_matrices(leaf)
    for layer in range(3):
        np.testing.assert_array_equal(matrices[layer], leaf[:, layer].reshape(16, 32))


def test_a_spec_for_a_whole_tree_gives_the_axes_and_leaves_the_choice_to_the_rules():
    params = {"layers": {**abstract(kernel=(16, 3, 24), bias=(24,)), "norm": abstract(scale=(12, 3, 16))}}
    views = selected(params, weight_dimension_numbers=GaLoreDimensionNumbers(0, 2))
    assert {path: (view.batch_shape, view.matrix_shape) for path, view in views.items()} == {
        "layers/kernel": ((3,), (16, 24))
    }


@needs_optax_galore
def test_optax_dimension_numbers_are_understood():
    numbers = optax.contrib.GaLoreDimensionNumbers(reduction_axis=1, output_axis=0)
    assert selected(abstract(w=(8, 20)), weight_dimension_numbers={"w": numbers})["w"].matrix_shape == (20, 8)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rank": 0}, ValueError, r"rank is 0: write a positive int"),
        ({"rank": -3}, ValueError, r"rank is -3: write a positive int"),
        ({"rank": 1.5}, ValueError, r"rank is 1.5: .* in \(0, 1\]"),
        ({"rank": float("nan")}, ValueError, r"rank is nan"),
        ({"rank": True}, TypeError, r"rank is True of type bool"),
        ({"rank": "128"}, TypeError, r"rank is '128' of type str"),
        ({"proj_type": "both"}, ValueError, r"proj_type is 'both': write one of std, reverse_std, left, right, full"),
        ({"projector": "sdv"}, ValueError, r"projector is 'sdv': write one of power, randomized, svd"),
        ({"scale": "root"}, ValueError, r"scale is 'root'"),
        ({"update_proj_gap": 0}, ValueError, r"update_proj_gap is 0: write a positive int"),
        ({"update_proj_gap": 2.5}, ValueError, r"update_proj_gap is 2.5"),
        ({"scale": None}, ValueError, r"scale is None: write a finite number"),
        ({"scale": float("nan")}, ValueError, r"scale is nan: write a finite number"),
        ({"seed": "a"}, ValueError, r"seed is 'a': write an int"),
        ({"seed": 2**40}, ValueError, r"seed is 1099511627776: write an int"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs, error, message):
    with pytest.raises(error, match=message) as raised:
        galore_jax.galore(optax.sgd(1.0), **kwargs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": {"w": False, "b": False}}, r"mask selects none of the 2 parameters \(b, w\)"),
        ({"mask": {"w": False, "b": True}}, r"mask selects none"),
        ({"mask": {"v": True}}, r"mask must have the structure of the parameters .* it does not at 'b'\.$"),
        ({"mask": {"w": True}}, r"it does not at 'b'\.$"),
        ({"weight_dimension_numbers": {"w": None}}, r"weight_dimension_numbers must have .* at 'b'\.$"),
        (
            {"weight_dimension_numbers": {"w": GaLoreDimensionNumbers(0, (0, 1)), "b": None}},
            r"'w' with shape \(8, 20\) has reduction_axis=0 and output_axis=\(0, 1\): .* no axis twice",
        ),
        (
            {"weight_dimension_numbers": {"w": GaLoreDimensionNumbers(0, 2), "b": None}},
            r"'w' names axis 2, but its shape is \(8, 20\)",
        ),
        ({"rank": lambda path, shape: -1}, r"rank of 'w' with shape \(8, 20\) is -1"),
    ],
)
def test_bad_choices_are_refused_at_init_with_the_path(kwargs, message):
    with pytest.raises(ValueError, match=message):
        galore_jax.galore(optax.sgd(1.0), **{"rank": 4, **kwargs}).init({"w": jnp.ones((8, 20)), "b": jnp.ones((20,))})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": {"w": "yes", "b": False}}, r"mask holds 'yes': write True or False"),
        ({"mask": 3}, r"mask holds 3: write True or False"),
        (
            {"weight_dimension_numbers": {"w": 1, "b": None}},
            r"weight_dimension_numbers holds 1: write GaLoreDimensionNumbers",
        ),
    ],
)
def test_choices_of_the_wrong_type_are_refused_at_init(kwargs, message):
    with pytest.raises(TypeError, match=message):
        galore_jax.galore(optax.sgd(1.0), rank=4, **kwargs).init({"w": jnp.ones((8, 20)), "b": jnp.ones((20,))})


@pytest.mark.parametrize("inner", [3, optax.sgd])
def test_an_inner_that_is_no_transformation_is_refused(inner):
    with pytest.raises(TypeError, match=r"write an Optax transformation, for example galore\(optax.adam"):
        galore_jax.galore(inner, rank=4)


def test_a_rank_that_is_traced_in_init_names_static_args():
    tx = galore_jax.galore(optax.sgd(0.1), rank=jnp.asarray(4))
    assert tx.init({"w": jnp.ones((8, 20))}).left["w"].shape == (8, 4)
    with pytest.raises(TypeError, match=r'static_args=\("rank"'):
        jax.jit(lambda rank: galore_jax.galore(optax.sgd(0.1), rank=rank).init({"w": jnp.ones((8, 20))}))(4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A module that is a tree and has ``__call__``, as in Equinox."""

    a: Any
    b: Any

    def __call__(self, x):
        raise AssertionError("called as a function of the parameters")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"mask": Model(a=True, b=False)},
        {"weight_dimension_numbers": Model(a=GaLoreDimensionNumbers(), b=None)},
        {"mask": lambda model: Model(a=True, b=False)},
    ],
)
def test_a_module_with_a_call_method_is_a_tree_and_only_a_function_is_called(kwargs):
    assert set(selected(Model(**abstract(a=(8, 20), b=(8, 20))), **kwargs)) == {"a"}


BOXES = {
    "nnx.Param": nnx.Param,
    "nn.Partitioned": lambda array: nn.Partitioned(array, names=(None,) * array.ndim),
}


@pytest.mark.parametrize("box", BOXES)
def test_a_choice_on_a_box_is_a_choice_on_its_array(box):
    shapes = {"embed": (8, 20), "kernel": (8, 20), "other": (8, 20)}
    params = {name: BOXES[box](jnp.ones(shape)) for name, shape in shapes.items()}
    masks = [
        {"embed": True, "kernel": True, "other": False},
        jax.tree.map(lambda _: True, params) | {"other": False},
        lambda p: {"embed": True, "kernel": True, "other": False},
    ]
    for mask in masks:
        assert [view is not None for view in select(params, rank=4, mask=mask)] == [True, True, False]
    numbers = {"embed": GaLoreDimensionNumbers(), "kernel": None, "other": GaLoreDimensionNumbers(1, 0)}
    embed, kernel, other = select(params, rank=99, weight_dimension_numbers=numbers)
    assert (embed.rank, kernel, other.matrix_shape) == (8, None, (20, 8))


def test_a_part_of_a_partition_takes_its_own_from_choices_for_the_whole_tree():
    masked = optax.MaskedNode()
    whole = {"a": {"x": True, "y": False}, "b": True, "embed": False}
    parts = {
        "a": {"a": abstract(x=(8, 20), y=(8, 20)), "b": masked, "embed": masked},
        "a/x": {"a": abstract(x=(8, 20)) | {"y": masked}, "b": masked, "embed": masked},
        "b": {"a": masked} | abstract(b=(8, 20)) | {"embed": masked},
        "none": {"a": masked, "b": masked} | abstract(embed=(8, 20)),
    }
    expected = {"a": {"a/x"}, "a/x": {"a/x"}, "b": {"b"}, "none": set()}
    numbers = jax.tree.map(lambda choice: GaLoreDimensionNumbers() if choice else None, whole)
    for name, part in parts.items():
        assert is_part(part)
        assert set(selected(part, mask=whole)) == expected[name]
        assert set(selected(part, weight_dimension_numbers=numbers)) == expected[name]
        assert set(selected(part, mask=lambda p: jax.tree.map(lambda leaf: False, p))) == set()
    with pytest.raises(ValueError, match=r"mask must have .* it does not at 'b'"):
        select(parts["b"], mask={"a": True})


def test_choices_for_leaves_that_a_whole_tree_does_not_have_are_refused():
    params = abstract(a=(8, 20)) | {"none": None, "empty": {}}
    assert set(selected(params, mask={"a": True, "none": False, "empty": True})) == {"a"}
    with pytest.raises(ValueError, match="it does not at 'b'"):
        select(params, mask={"a": True, "b": True, "none": False, "empty": True})
    with pytest.raises(ValueError, match="it does not at 'empty/x'"):
        select(params, mask={"a": True, "empty": {"x": True}})


LAYERS = 3
WHOLE = {
    "aaa": (8, 12),
    "blocks": {"down": (LAYERS, 2, 8, 12), "embed": (LAYERS, 8, 12), "up": (LAYERS, 12, 2, 8)},
    "zzz": (12, 8),
}
N = GaLoreDimensionNumbers
CHOICES = {
    "none": ({}, "aaa blocks/down zzz"),
    "mask, tree": (
        {"mask": {"aaa": True, "blocks": {"down": False, "embed": True, "up": False}, "zzz": True}},
        "aaa blocks/embed zzz",
    ),
    "mask, prefix": ({"mask": {"aaa": False, "blocks": True, "zzz": True}}, "blocks/down zzz"),
    "mask, function": (
        {"mask": lambda params: jax.tree.map(lambda leaf: leaf.shape[0] in (LAYERS, 8), params)},
        "aaa blocks/down blocks/embed",
    ),
    "numbers, tree": (
        {
            "weight_dimension_numbers": {
                "aaa": N(1, 0),
                "blocks": {"down": N((1, 2), 3), "embed": None, "up": N(1, (-2, -1))},
                "zzz": N(),
            }
        },
        "aaa blocks/down blocks/up zzz",
    ),
    "numbers, prefix": ({"weight_dimension_numbers": {"aaa": N(), "blocks": N(-1, 1), "zzz": None}}, "aaa blocks/up"),
    "numbers, function": (
        {
            "weight_dimension_numbers": lambda params: {
                "aaa": None,
                "blocks": jax.tree.map(lambda leaf: N(1, (2, 3)) if leaf.ndim == 4 else None, params["blocks"]),
                "zzz": N(),
            }
        },
        "blocks/down blocks/up zzz",
    ),
    "rank": ({"rank": lambda path, shape: 0.4 if shape[:2] in ((LAYERS, 2), (12, 8)) else None}, "blocks/down zzz"),
}
STACKED = ["blocks/down", "blocks/embed", "blocks/up"]


def whole_params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape)), WHOLE, is_leaf=lambda x: isinstance(x, tuple)
    )


def parts(params):
    """The index and the parameters of each layer, and None with the rest."""
    for i in range(LAYERS):
        yield i, {"blocks": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])}
    yield None, {"aaa": params["aaa"], "zzz": params["zzz"]}


def numbered_matrices(views, leaves, layer=0):
    """Each matrix with its number, its rank and its sides."""
    found = {}
    for view, leaf in zip(views, leaves, strict=True):
        if view is not None:
            number = view.first + view.layers * layer * math.prod(view.batch_shape)
            for matrix in view.to_matrices(leaf).reshape(-1, *view.matrix_shape):
                assert number not in found
                found[number] = matrix, (view.path, view.rank, view.left, view.right, view.total)
                number += 1
    return found


@pytest.mark.covering(4)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_layer_and_the_rest_have_the_matrices_and_the_numbers_of_the_whole_tree(choice):
    kwargs, projected = CHOICES[choice]
    kwargs, params = {"rank": 3} | kwargs, whole_params()
    expected = numbered_matrices(select(params, **kwargs), jax.tree.leaves(params))
    found = {}
    with whole_tree(params, STACKED):
        for layer, part in parts(params):
            views = select(part, **kwargs)
            assert all(view is None or view.layers == (layer is not None) for view in views)
            new = numbered_matrices(views, jax.tree.leaves(part), layer or 0)
            assert not found.keys() & new.keys()
            found |= new
    assert sorted(found) == sorted(expected) == list(range(len(expected)))
    for number, (matrix, view) in expected.items():
        np.testing.assert_array_equal(found[number][0], matrix)
        assert found[number][1] == view
        assert view[-1] == len(expected)
    assert {view[0] for _, view in expected.values()} == set(projected.split())


def test_a_stacked_leaf_is_left_whole_if_the_layers_are_an_axis_of_its_matrix():
    params, numbers = whole_params(), {"weight_dimension_numbers": GaLoreDimensionNumbers(0, -1), "rank": 2}
    assert set(selected(params, **numbers)) == {"aaa", "blocks/down", "blocks/up", "zzz"}
    with whole_tree(params, STACKED):
        (_, layer), *_, (_, rest) = parts(params)
        assert selected(layer, **numbers) == {}
        assert {path: (view.first, view.total) for path, view in selected(rest, **numbers).items()} == {
            "aaa": (0, 2),
            "zzz": (1, 2),
        }
        reasons = reasons_of(layer, **numbers)
        assert reasons["blocks/down"] == reasons["blocks/up"] == "the layers are an axis of its matrix"


def test_a_mask_that_selects_nothing_in_a_whole_tree_is_refused_and_in_a_part_it_is_not():
    params = whole_params()
    (_, layer), *_, (_, rest) = parts(params)
    with whole_tree(params, STACKED):
        assert selected(rest, mask={"aaa": False, "blocks": True, "zzz": False}) == {}
        with pytest.raises(ValueError, match=r"mask selects none of the 5 parameters \(aaa, blocks/down"):
            select(layer, mask=False)
        with pytest.raises(ValueError, match=r"mask must have .* it does not at 'zzz'"):
            select(layer, mask={"aaa": False, "blocks": True})
        assert taking_part(layer, {"aaa": False, "blocks": True, "zzz": False}) == [
            ("blocks/down", True),
            ("blocks/embed", False),
            ("blocks/up", True),
        ]


def test_a_part_with_paths_that_the_whole_tree_does_not_have_is_its_own_whole_tree():
    params = whole_params()
    # The last one has the paths, but its stacks are no single layers.
    for other in ({"renamed": params["aaa"], "zzz": params["zzz"]}, params):
        expected = select(other, rank=3)
        with whole_tree(params, STACKED):
            assert select(other, rank=3) == expected


@pytest.mark.parametrize(("rank", "projected"), [(3, {"blocks/down", "blocks/up"}), (5, {"blocks/down"}), (8, set())])
def test_smaller_arrays_in_the_place_of_a_layer_have_its_axes_and_sides(rank, projected):
    params, numbers = abstract(down=(LAYERS, 2, 9, 12), up=(LAYERS, 20, 2, 8)), N(1, (2, 3))
    kwargs = {"rank": rank, "weight_dimension_numbers": {"blocks": {"down": N((1, 2), 3), "up": numbers}}}
    with whole_tree({"blocks": params}, STACKED):
        views = selected({"blocks": abstract(down=(2, 5, 8), up=(4, 2, 8))}, **kwargs)
    assert set(views) == projected
    for path, shape, side in (("blocks/down", (10, 8), (False, True)), ("blocks/up", (4, 16), (False, True))):
        if path in projected:
            assert (views[path].matrix_shape, (views[path].left, views[path].right)) == (shape, side)


def test_every_leaf_that_is_left_whole_has_a_reason():
    params = abstract(
        bias=(64,),
        embed=(100, 32),
        masked=(32, 64),
        named=(32, 64),
        narrow=(4, 64),
        out=(32, 64),
        scalar=(),
        void=(0, 9),
    ) | {"int": jax.ShapeDtypeStruct((32, 64), jnp.int32)}
    kwargs = {
        "rank": lambda path, shape: None if path == "named" else 4,
        "mask": {name: name != "masked" for name in params},
    }
    expected = {
        "bias": "one axis",
        "int": "dtype int32",
        "masked": "mask",
        "named": "rank is None",
        "narrow": "rank 4 is not below its smaller side 4",
        "scalar": "no axes",
        "void": "no elements",
    }
    assert reasons_of(params, **kwargs) == expected
    assert set(selected(params, **kwargs)) == params.keys() - expected.keys()
    numbers = {"embed": N(), "w": None}
    assert reasons_of(abstract(embed=(100, 32), w=(32, 64)), rank=4, weight_dimension_numbers=numbers) == {
        "w": "dimension numbers are None"
    }
    assert reasons_of(abstract(embed=(100, 32)), rank=4) == {"embed": "embedding"}
