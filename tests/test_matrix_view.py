# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Which leaves are projected, how they are seen, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import galore_jax
from galore_jax.matrix_view import GaLoreDimensionNumbers, select


def abstract(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def selected(params, **kwargs):
    kwargs = {"rank": 4, **kwargs}
    return {view.path: view for view in select(params, **kwargs) if view is not None}


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


def test_any_axis_that_is_not_named_is_a_batch_axis_wherever_it_stands():
    """MaxText stacks its layers on axis 1: a (hidden, layers, heads, head_dim) kernel."""
    numbers = GaLoreDimensionNumbers(reduction_axis=0, output_axis=(-2, -1))
    view = selected(abstract(q=(16, 3, 4, 8)), weight_dimension_numbers={"q": numbers})["q"]
    leaf = jax.random.normal(jax.random.key(0), (16, 3, 4, 8))
    matrices = view.to_matrices(leaf)
    for layer in range(3):
        np.testing.assert_array_equal(matrices[layer], leaf[:, layer].reshape(16, 32))


def test_a_spec_for_a_whole_tree_gives_the_axes_and_leaves_the_choice_to_the_rules():
    params = {"layers": {**abstract(kernel=(16, 3, 24), bias=(24,)), "norm": abstract(scale=(12, 3, 16))}}
    views = selected(params, weight_dimension_numbers=GaLoreDimensionNumbers(0, 2))
    assert {path: (view.batch_shape, view.matrix_shape) for path, view in views.items()} == {
        "layers/kernel": ((3,), (16, 24))
    }


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
        ({"rank": jnp.asarray(8)}, TypeError, r'static_args=\("rank", "update_proj_gap"\)'),
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


def test_a_traced_rank_under_inject_hyperparams_names_static_args():
    with pytest.raises(TypeError, match=r'static_args=\("rank"'):
        optax.inject_hyperparams(galore_jax.galore_adamw)(learning_rate=0.1, rank=4).init({"w": jnp.ones((8, 20))})
