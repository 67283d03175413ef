# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks of other libraries, in a layer-wise step, train as the libraries' own models do in a plain step."""

import importlib
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from galore_jax import galore_adamw
from galore_jax.layerwise import layerwise


@pytest.mark.slow
# Tunix 0.1.7 uses names that Flax has deprecated.
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize("library", ["flax", "tunix"])
def test_blocks_of_other_libraries_train_as_in_their_own_models(library, monkeypatch):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "examples"))
    example = importlib.import_module("own_blocks")
    # In float64, because Adam makes a step of full size from a gradient that is nothing but rounding.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        foreign = getattr(example, library)(large=False, dtype="float64")
        stack, loss, parameters = example.take_apart(foreign, foreign.make())
        start = example.stacked(foreign, *parameters)
        tx = galore_adamw(3e-3, rank=16, update_proj_gap=3, scale="rms")
        init, step = layerwise(stack, tx)
        ours, theirs = (start, init(start)), (start, tx.init(start))
        step, plain = jax.jit(step), jax.jit(example.plain(loss, tx))
        # Every basis is computed three times.
        for tokens, _ in zip(example.batches(foreign.vocab), range(9), strict=False):
            *ours, metrics = step(*ours, tokens)
            *theirs, value = plain(*theirs, tokens)
            np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    assert jax.tree.structure(ours[0]) == jax.tree.structure(theirs[0])
    for one, other, before in zip(*map(jax.tree.leaves, (ours[0], theirs[0], start)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        assert np.abs(other - before).max() > 3e-3
