# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A stream that several processes read in shares: which documents, which rows, and the same batches after a resume."""

import json
import shutil
from itertools import islice

import jax
import numpy as np
import pytest
from test_processes import FLAGS, finish, losses, start

from galore_jax.training import data
from galore_jax.training.checkpoint import saved_steps
from galore_jax.training.data import load_data
from galore_jax.training.mesh import batch_sharding, make_mesh
from galore_jax.training.shares import Shares, train_batches

SEQ, ROWS = 16, 4
BATCH = jax.ShapeDtypeStruct((ROWS, SEQ + 1), np.int32)


def write(folder, files, documents):
    """So many files with so many documents each, and validation text; returns the training documents."""
    folder.mkdir()
    names = {f"train-{i}": [f"document {i}.{j} " + "x" * (j % 7 * 5) for j in range(documents)] for i in range(files)}
    for name, texts in (names | {"validation": ["held out " * 9] * 9}).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [text for texts in names.values() for text in texts]


def load(folder, batch_size=ROWS, **shard):
    return load_data(
        f"hf:{folder}", tokenizer="bytes", sequence_length=SEQ, batch_size=batch_size, seed=0, **shard
    )  # fmt: skip


def decoded(rows, tokenizer):
    """The documents that batches of one share end, [number of batches, rows, SEQ + 1]."""
    windows = np.concatenate(rows)
    tokens = np.append(windows[0, :1], windows[:, 1:])
    pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)
    return [tokenizer.decode(piece) for piece in pieces[:-1]]


@pytest.mark.parametrize("files", [2, 3])  # whole files for each share; and every other document
def test_shares_have_their_rows_and_each_document_once_an_epoch(tmp_path, files):
    documents = write(tmp_path / "corpus", files, 12 // files)
    text = load(tmp_path / "corpus")
    iterator = Shares(text, BATCH, 2)
    batches = [next(iterator) for _ in range(30)]
    seen = []
    for number in range(2):
        alone = load(tmp_path / "corpus", batch_size=ROWS // 2, shard_index=number, shard_count=2).train_iterator()
        rows = [batch[2 * number : 2 * number + 2] for batch in batches]
        np.testing.assert_array_equal(rows, list(islice(alone, 30)))
        seen.append(decoded(rows, text.tokenizer))
    for epoch in range(2):
        assert sorted(text for share in seen for text in share[6 * epoch : 6 * epoch + 6]) == sorted(documents)


def test_shares_go_on_from_any_checkpoint_with_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_DOCUMENTS", 3)
    write(tmp_path / "corpus", 3, 8)
    text = load(tmp_path / "corpus")
    iterator = Shares(text, BATCH, 2)
    states, batches = [], []
    for _ in range(24):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for step in (0, 5, 17):
        resumed = train_batches(load(tmp_path / "corpus"), BATCH, states[step])
        np.testing.assert_array_equal([next(resumed) for _ in range(5)], batches[step : step + 5])


def test_one_process_reads_the_stream_whole_as_it_did_before_there_were_shares(tmp_path):
    write(tmp_path / "corpus", 2, 8)
    on_mesh = jax.ShapeDtypeStruct(
        BATCH.shape, BATCH.dtype, sharding=batch_sharding(make_mesh("data=2,fsdp=2,model=2"))
    )
    text = load(tmp_path / "corpus")
    expected = list(islice(text.train_iterator(), 9))
    for batch in (BATCH, on_mesh):
        iterator = train_batches(text, batch, None)
        for number in range(3):
            np.testing.assert_array_equal(next(iterator), expected[number])
        state = iterator.get_state()
        assert "shares" not in state
        again = train_batches(load(tmp_path / "corpus"), batch, state)
        np.testing.assert_array_equal([next(again) for _ in range(6)], expected[3:])


def test_a_share_without_text_is_one_sentence(tmp_path):
    write(tmp_path / "corpus", 1, 1)
    text = load(tmp_path / "corpus")
    with pytest.raises(ValueError, match="no training text for one of its shares: use more text, or fewer processes"):
        Shares(text, BATCH, 2)


# Real processes

READ = """
import sys
import jax, numpy as np
from galore_jax.training import processes
processes.join()
from galore_jax.training.data import load_data
from galore_jax.training.mesh import batch_sharding, make_mesh
from galore_jax.training.shares import train_batches
text = load_data("hf:" + sys.argv[2], tokenizer="bytes", sequence_length=16, batch_size=4, seed=0)
sharding = batch_sharding(make_mesh("data=4"))
try:
    batches = train_batches(text, jax.ShapeDtypeStruct((4, 17), np.int32, sharding=sharding), None)
except ValueError as error:
    sys.exit(str(error))
found = [processes.place(next(batches), sharding).addressable_shards for _ in range(30)]
np.save(f"rows-{jax.process_index()}.npy", [np.concatenate([shard.data for shard in shards]) for shards in found])
"""


@pytest.mark.slow
def test_two_processes_together_read_each_document_once_an_epoch(tmp_path):
    documents = write(tmp_path / "corpus", 2, 6)
    codes, printed = finish(start(tmp_path, 2, "corpus", script=READ))
    assert codes == [0, 0], printed
    tokenizer = load(tmp_path / "corpus").tokenizer
    seen = [decoded(np.load(tmp_path / f"rows-{number}.npy"), tokenizer) for number in range(2)]
    for epoch in range(2):
        assert sorted(text for share in seen for text in share[6 * epoch : 6 * epoch + 6]) == sorted(documents)


@pytest.mark.slow
def test_all_processes_end_where_one_of_them_has_no_text(tmp_path):
    write(tmp_path / "corpus", 1, 1)
    codes, printed = finish(start(tmp_path, 2, "corpus", script=READ))
    assert codes == [1, 1], printed
    assert all("no training text for one of its shares" in text for text in printed)


@pytest.mark.slow
def test_a_run_in_two_processes_goes_on_exactly_in_two_and_in_one(tmp_path):
    write(tmp_path / "corpus", 2, 40)
    flags = ["--data=hf:corpus", *(flag for flag in FLAGS if not flag.startswith(("--data", "--steps")))]
    codes, printed = finish(start(tmp_path, 2, *flags, "--steps=8", "--mesh=data=2,fsdp=2", "--out=run"))
    assert codes == [0, 0], printed
    whole = losses(tmp_path / "run")
    for number, step in ((2, 4), (1, 0)):
        again = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "run", again)
        for later in saved_steps(again / "checkpoints"):
            if later > step:
                shutil.rmtree(again / "checkpoints" / str(later))
        codes, printed = finish(start(tmp_path, number, "--resume", "--out", again.name))
        assert codes == [0] * number, printed
        assert json.loads((again / "summary.json").read_text())["resumed_from_step"] == step
        if number == 2:
            assert losses(again) == whole
        np.testing.assert_allclose(losses(again), whole, rtol=0, atol=1e-5)
