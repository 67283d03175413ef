# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The training step: loss, accumulation, counts and diagnostics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import needs_optax_galore
from runs import small_tree, state_of, tiny_model, tokens

from galore_jax.training.config import PretrainConfig
from galore_jax.training.optimizers import make_optimizer, make_schedule
from galore_jax.training.step import galore_counts, make_eval_step, make_train_step, subspace_metrics, token_losses


@pytest.mark.slow
def test_loss_is_the_mean_negative_log_likelihood_of_the_next_token():
    graphdef, params = tiny_model()
    batch = tokens(2)
    log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(batch[:, :-1]).astype(jnp.float32))
    expected = [-log_p[b, t, batch[b, t + 1]] for b in range(2) for t in range(8)]
    np.testing.assert_allclose(token_losses(graphdef, params, batch).ravel(), jnp.stack(expected), rtol=1e-5)
    total, count = make_eval_step(graphdef)(params, batch)
    assert int(count) == 16
    assert float(total) == pytest.approx(float(sum(expected)), rel=1e-5)


@pytest.mark.slow
def test_accumulated_micro_batches_give_the_step_of_the_whole_batch():
    graphdef, params = tiny_model()
    results = []
    for accumulate in (1, 4):
        tx = optax.sgd(1.0)
        step = make_train_step(graphdef, tx, accumulate)
        copy = jax.tree.map(jnp.copy, params)
        results.append(step(copy, tx.init(copy), tokens()))
    (whole, _, whole_metrics), (cut, _, cut_metrics) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, cut)
    for name in ("loss", "grad_norm"):
        assert float(cut_metrics[name]) == pytest.approx(float(whole_metrics[name]), rel=1e-5)


@pytest.mark.slow
def test_micro_batches_summed_in_random_subspaces_give_the_step_of_the_whole_batch():
    graphdef, params = tiny_model()
    config = PretrainConfig(
        rank=4, update_proj_gap=2, projector="random", transport="rotate", steps=20, learning_rate=0.05, clip=0
    )
    tx = make_optimizer(config, make_schedule(config))
    results = []
    for settings in ((1,), (4, True)):
        step = make_train_step(graphdef, tx, *settings)
        copy = jax.tree.map(jnp.copy, params)
        state = tx.init(copy)
        for _ in range(3):
            copy, state, metrics = step(copy, state, tokens())
        results.append((copy, metrics["loss"]))
    (whole, loss), (cut, cut_loss) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, cut)
    assert float(cut_loss) == pytest.approx(float(loss), rel=1e-4)


def test_the_step_donates_its_state_learns_counts_what_it_left_out_and_compiles_once():
    graphdef, params = tiny_model()
    config = PretrainConfig(rank=4, update_proj_gap=2, refresh="staggered", steps=20, learning_rate=0.05, clip=0)
    tx = make_optimizer(config, make_schedule(config))
    step = make_train_step(graphdef, tx)
    state = tx.init(params)
    first = params["norm"]["scale"]
    losses = []
    for _ in range(10):
        params, state, scalars = step(params, state, tokens())
        losses.append(float(scalars["loss"]))
    assert first.is_deleted()
    assert losses[-1] < losses[0] - 0.5
    assert [int(scalars[name]) for name in ("skipped", "kept_bases", "rejected_bases")] == [0, 0, 0]
    params["norm"]["scale"] = params["norm"]["scale"] * jnp.nan
    _, _, scalars = step(params, state, tokens())
    # Of the 7 kernels of 2 layers one half is due at an update with an even number.
    assert [int(scalars[name]) for name in ("skipped", "kept_bases", "rejected_bases")] == [1, 7, 0]
    assert step._cache_size() == 1


def test_the_counts_of_all_galore_states_are_added_up():
    _, _, first = state_of(0)
    first = optax.tree.set(first, skipped=jnp.int32(2), kept=jnp.int32(3), rejected=jnp.int32(5))
    second = optax.tree.set(first, skipped=jnp.int32(10), rejected=jnp.int32(0))
    counts = {name: int(count) for name, count in galore_counts({"a": first, "b": second}).items()}
    assert counts == {"skipped": 12, "kept_bases": 6, "rejected_bases": 5}


@pytest.mark.slow
def test_the_diagnostics_of_a_step_are_those_of_its_gradient_bases_and_update():
    graphdef, params = tiny_model()
    config = PretrainConfig(rank=4, refresh="every_step", clip=0)
    tx = make_optimizer(config, optax.constant_schedule(0.5))
    step, state = make_train_step(graphdef, tx), tx.init(params)
    loss = jax.jit(jax.grad(lambda params: jnp.mean(token_losses(graphdef, params, tokens()))))

    def up_proj(tree):  # [2, 16, 32], with its basis on the left
        return np.array(tree["layers"]["mlp"]["up_proj"]["kernel"], np.float64)

    gradients, weights, bases, found = [], [up_proj(params)], [], []
    for _ in range(2):
        gradients.append(up_proj(loss(params)))
        params, state, scalars = step(params, state, tokens())
        found.append(scalars["subspace"])
        weights.append(up_proj(params))
        bases.append(up_proj(optax.tree.get(state, "left")))
    # Read when the next step has taken the buffers of the state, as in a run.
    assert found[0].keys() == {
        *(f"layers/attention/{name}_proj" for name in "qkvo"),
        *(f"layers/mlp/{name}_proj" for name in ("gate", "up", "down")),
    }
    for number, leaves in enumerate(found):
        inside = np.sum(np.square(bases[number].swapaxes(1, 2) @ gradients[number]), axis=(1, 2))
        share = inside / np.sum(np.square(gradients[number]), axis=(1, 2))
        np.testing.assert_allclose(leaves["layers/mlp/up_proj"]["captured_energy"], share, rtol=1e-4)
        change = (weights[number + 1] - weights[number]) / 0.5
        rms = np.sqrt(np.mean(np.square(change), axis=(1, 2)))
        np.testing.assert_allclose(leaves["layers/mlp/up_proj"]["update_rms"], rms, rtol=1e-4)
    assert all(np.all(np.isnan(leaf["overlap"])) for leaf in found[0].values())
    overlap = np.sum(np.square(bases[1].swapaxes(1, 2) @ bases[0]), axis=(1, 2)) / 4
    np.testing.assert_allclose(found[1]["layers/mlp/up_proj"]["overlap"], overlap, rtol=1e-4)


def test_without_diagnostics_or_without_galore_there_is_no_subspace_to_report():
    params = small_tree()
    for config in (PretrainConfig(rank=4, diagnostics=False), PretrainConfig(optimizer="adamw")):
        state = make_optimizer(config, optax.constant_schedule(1e-3)).init(params)
        assert subspace_metrics(state) == {}
        assert {int(count) for count in galore_counts(state).values()} == {0}


@pytest.mark.slow
def test_bfloat16_parameters_stay_bfloat16():
    graphdef, params = tiny_model(dtype="bfloat16", param_dtype="bfloat16")
    tx = make_optimizer(PretrainConfig(optimizer="adamw"), optax.constant_schedule(1e-2))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention mixes dtypes inside
        params, _, scalars = make_train_step(graphdef, tx)(params, tx.init(params), tokens())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert {value.dtype.name for value in jax.tree.leaves(scalars)} == {"float32", "int32"}


@needs_optax_galore
def test_the_state_of_the_optax_transformation_with_our_name_is_not_counted():
    theirs = optax.contrib.galore(0.1, rank=2, weight_dimension_numbers=optax.contrib.GaLoreDimensionNumbers())
    state = theirs.init({"w": jnp.ones((4, 8))})
    assert galore_counts(state).keys() == {"skipped", "kept_bases", "rejected_bases"}
    assert {int(count) for count in galore_counts(state).values()} == {0}
    assert subspace_metrics(state) == {}
