# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact, few, and never trusted when they are damaged."""

import collections
import functools
import gc
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_trees_equal, normal
from runs import small_tree, state_of, tiny_model, tokens

import galore_jax
from galore_jax.training import checkpoint
from galore_jax.training.checkpoint import Checkpoint, CheckpointWriter
from galore_jax.training.config import PretrainConfig
from galore_jax.training.optimizers import make_optimizer
from galore_jax.training.step import make_train_step


def write_checkpoints(folder, steps, keep=2):
    with CheckpointWriter(folder, keep) as writer:
        for step in steps:
            _, params, opt_state = state_of(step)
            writer.save(Checkpoint(step, params, opt_state, {"next": step}, [0.1 * step]))


def test_checkpoints_come_back_exactly_and_only_the_newest_are_kept(tmp_path):
    write_checkpoints(tmp_path / "checkpoints", [0, 3, 7])
    assert checkpoint.saved_steps(tmp_path / "checkpoints") == [3, 7]
    _, params, opt_state = state_of(7)
    restored = checkpoint.restore(tmp_path / "checkpoints", 7, params, opt_state)
    assert (restored.step, restored.data, restored.losses) == (7, {"next": 7}, [0.1 * 7])
    for found, saved in ((restored.params, params), (restored.opt_state, opt_state)):
        assert jax.tree.structure(found) == jax.tree.structure(saved)
        assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(saved)]
        jax.tree.map(np.testing.assert_array_equal, found, saved)


@pytest.mark.slow
def test_a_checkpoint_is_what_was_saved_though_the_next_step_overwrites_its_buffers(tmp_path):
    graphdef, params = tiny_model()
    tx = make_optimizer(PretrainConfig(optimizer="adamw"), optax.constant_schedule(1e-2))
    step = make_train_step(graphdef, tx)
    state = tx.init(params)
    saved = jax.tree.map(lambda leaf: np.array(leaf, copy=True), params)
    with CheckpointWriter(tmp_path / "checkpoints", 1) as writer:
        writer.save(Checkpoint(0, params, state, {}, []))
        for _ in range(5):
            params, state, _ = step(params, state, tokens())
    restored = checkpoint.restore(tmp_path / "checkpoints", 0, params, state)
    jax.tree.map(np.testing.assert_array_equal, restored.params, saved)


def test_another_model_or_optimizer_is_refused_by_the_first_parameter_that_differs(tmp_path):
    folder = tmp_path / "checkpoints"
    write_checkpoints(folder, [3])
    _, params, opt_state = state_of(3)
    wide = {**params, "layers": {"kernel": jnp.zeros((64, 65), jnp.bfloat16)}}
    with pytest.raises(ValueError, match=r"parameter layers/kernel is bfloat16\[64, 64\] .* bfloat16\[64, 65\]"):
        checkpoint.restore(folder, 3, wide, opt_state)
    with pytest.raises(ValueError, match=r"parameter norm is float32\[8\] there, and absent in this run"):
        checkpoint.restore(folder, 3, {"layers": params["layers"]}, opt_state)
    with pytest.raises(ValueError, match=r"parameter norm is float32\[8\] there, and bfloat16\[8\] in this run"):
        checkpoint.restore(folder, 3, optax.tree.cast(params, jnp.bfloat16), opt_state)
    remedy = "continue it with the settings and the versions that config.json names, or start a new run with another"
    with pytest.raises(ValueError, match=rf"optimizer state \S+ is .* there, and .* in this run; {remedy}"):
        checkpoint.restore(folder, 3, params, optax.adamw(1e-3).init(params))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"refresh": "staggered", "transport": "rotate"},
        {"refresh": "lazy", "transport": "reset", "projector": "rows"},
    ],
)
def test_an_optimizer_that_comes_back_from_a_checkpoint_goes_on_bit_for_bit(tmp_path, settings):
    params = small_tree()
    tx = make_optimizer(PretrainConfig(rank=4, update_proj_gap=3, **settings), optax.constant_schedule(1e-2))

    @jax.jit
    def step(params, state, number):
        gradient = optax.tree.random_like(jax.random.fold_in(jax.random.key(7), number), params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for number in range(8):
        if number == 4:
            with CheckpointWriter(tmp_path, 1) as writer:
                writer.save(Checkpoint(4, params, state, {}, []))
        params, state = step(params, state, number)
    restored = checkpoint.restore(tmp_path, 4, params, state)
    other, other_state = restored.params, restored.opt_state
    for number in range(4, 8):
        other, other_state = step(other, other_state, number)
    jax.tree.map(np.testing.assert_array_equal, (other, other_state), (params, state))


def damage_flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.covering(4)
@pytest.mark.parametrize("item", ["params", "opt_state", "data", "meta"])
@pytest.mark.parametrize("damage", [damage_flip, lambda file: file.write_bytes(b""), lambda file: file.unlink()])
def test_damage_is_named_with_the_checkpoint_to_go_back_to(tmp_path, item, damage):
    folder = tmp_path / "checkpoints"
    write_checkpoints(folder, [3, 7])
    _, params, opt_state = state_of(7)
    damage(folder / "7" / item / ("metadata" if item in ("data", "meta") else "manifest.ocdbt"))
    with pytest.raises(ValueError, match=r"Checkpoint \S+7 is damaged \(.*\); move it away to resume from step 3\."):
        checkpoint.restore(folder, 7, params, opt_state)
    _, params, opt_state = state_of(3)
    assert checkpoint.restore(folder, 3, params, opt_state).step == 3


# Orbax abandons the coroutines of the other arrays when one fails; the command line is silent about it, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("flips", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_any_file_is_named_or_changes_nothing(tmp_path, flips):
    """In every file of a checkpoint: arrays, their index and shapes, the position in the data, and what Orbax notes beside."""
    folder, rng = tmp_path / "checkpoints", random.Random(flips)
    write_checkpoints(folder, [7])
    _, params, opt_state = state_of(7)
    files = sorted(path for path in (folder / "7").rglob("*") if path.is_file())
    assert len(files) > 10
    refused = []
    for file in files:
        data = file.read_bytes()
        for place in rng.sample(range(len(data)), min(flips, len(data))):
            flipped = bytearray(data)
            flipped[place] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            try:
                restored = checkpoint.restore(folder, 7, params, opt_state)
            except ValueError as error:
                refused.append(str(error))
            else:
                assert (restored.step, restored.data, restored.losses) == (7, {"next": 7}, [0.1 * 7])
                assert_trees_equal((restored.params, restored.opt_state), (params, opt_state))
        file.write_bytes(data)
    gc.collect()
    assert len(refused) > len(files) // 4
    assert all(str(folder / "7") in message for message in refused)


def test_one_flipped_bit_in_a_weight_is_noticed():
    leaf = normal(0, (40, 30))
    before = checkpoint.checksums({"w": leaf})
    for index in (0, 617, 1199):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        flipped = jax.lax.bitcast_convert_type(bits.at[index].set(bits[index] ^ 1), jnp.float32).reshape(40, 30)
        assert checkpoint.checksums({"w": flipped}) != before


def test_the_checksum_is_the_same_in_either_memory_and_that_of_its_definition():
    tree = {
        "stack": normal(0, (3, 5, 7), jnp.bfloat16),
        "matrix": normal(1, (5, 7)),
        "codes": jnp.arange(24, dtype=jnp.uint8).reshape(2, 3, 4),
    }
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    expected = {}
    for path, leaf in tree.items():
        words = np.asarray(leaf).view(f"u{leaf.dtype.itemsize}").ravel().astype(object)
        expected[path] = sum(int(word) * (2 * place + 1) for place, word in enumerate(words)) % 2**32
    assert checkpoint.checksums(tree) == expected
    assert checkpoint.checksums(jax.device_put(tree, host)) == expected


def test_no_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint in .*checkpoints; start a new run"):
        checkpoint.last_step(tmp_path / "checkpoints")


@pytest.mark.covering(1)
@pytest.mark.parametrize("optimizer", ["galore_adamw", "galore_adamw_8bit", "ldadam"])
def test_a_checkpoint_from_before_the_field_step_was_named_so_is_read(tmp_path, optimizer):
    """States had ``count`` where they now have ``step``."""
    params = {"w": jnp.ones((8, 16))}
    tx = make_optimizer(PretrainConfig(optimizer=optimizer, rank=2), optax.constant_schedule(1e-2))
    _, state = tx.update(params, tx.init(params), params)

    def as_before(tree):
        def node(x):
            if "step" not in getattr(x, "_fields", ()):
                return x
            fields = ["count" if name == "step" else name for name in x._fields]
            return collections.namedtuple(type(x).__name__, fields)(*map(as_before, x))

        return jax.tree.map(node, tree, is_leaf=lambda x: "step" in getattr(x, "_fields", ()))

    assert not optax.tree.get_all_with_path(as_before(state), "step")
    with CheckpointWriter(tmp_path / "checkpoints", 1) as writer:
        writer.save(Checkpoint(1, params, as_before(state), {}, []))
    restored = checkpoint.restore(tmp_path / "checkpoints", 1, params, state)
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state)


# The optimizer state of the first runs: galore_adamw of a parameter "w" of shape (8, 16) at rank 2, without the counters of
# bases that were kept and rejected.
EARLIEST = {
    "count": (), "skipped": (), "left/w": (8, 2), "inner_state/0/count": (), "inner_state/0/mu/w": (2, 16),
    "inner_state/0/nu/w": (2, 16),
}  # fmt: skip


def test_a_state_without_todays_counters_is_refused_with_what_to_do(tmp_path):
    params = {"w": jnp.ones((8, 16))}
    saved = {}
    for path, shape in EARLIEST.items():
        *parents, name = path.split("/")
        node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, saved)
        node[name] = jnp.zeros(shape, jnp.float32 if shape else jnp.int32)
    with CheckpointWriter(tmp_path / "checkpoints", 1) as writer:
        writer.save(Checkpoint(1, params, saved, {}, []))
    state = galore_jax.galore(optax.scale_by_adam(), rank=2).init(params)
    says = r"optimizer state kept is absent there, and int32\[\] in this run; continue it with the settings and the versions"
    with pytest.raises(ValueError, match=says):
        checkpoint.restore(tmp_path / "checkpoints", 1, params, state)
