# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The data pipeline: packing, determinism, exact resume, shards, sources, and errors."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from galore_jax.training import data, sources
from galore_jax.training.data import cut_windows, encode_documents, load_data
from galore_jax.training.sources import read_documents, split_documents

SEQUENCE, BATCH = 16, 4


@pytest.fixture
def folder(tmp_path):
    """200 documents of about 30 characters, each with its own number, as files in two folders."""
    for i in range(200):
        path = tmp_path / "corpus" / ("ab"[i % 2]) / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i} " + "abcdefghij"[i % 10] * (i % 40))
    return tmp_path / "corpus"


@pytest.fixture
def hub(tmp_path):
    """A Hugging Face dataset in a local folder: two training shards, and a validation split."""
    path = tmp_path / "hub"
    path.mkdir()
    for name, numbers in (("train-0", range(20)), ("train-1", range(20, 37)), ("validation", range(100, 110))):
        rows = [{"text": f"row {i} " + "x" * (i % 7 * 5), "url": "-"} for i in numbers]
        rows.insert(3, {"text": "", "url": "an empty document is skipped"})
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(source, *, sequence_length=SEQUENCE, batch_size=BATCH, seed=0, tokenizer="bytes", **kwargs):
    return load_data(
        str(source),
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        **kwargs,
    )


def take(iterator, count):
    return np.stack(list(islice(iterator, count)))


def rows(batches):
    return sorted(map(tuple, np.concatenate(list(batches)).tolist()))


def train_windows(folder):
    train, _ = split_documents(read_documents(str(folder)).documents)
    return cut_windows(encode_documents(load(folder).tokenizer, train), SEQUENCE)


# Packing


def test_batches_have_the_promised_shape_and_type(folder):
    corpus = load(folder)
    for batch in (next(corpus.train_iterator()), next(corpus.validation_batches(None))):
        assert batch.shape == (BATCH, SEQUENCE + 1)
        assert batch.dtype == np.int32


def test_windows_are_contiguous_and_every_token_is_a_target_once():
    tokens = np.arange(100, dtype=np.int32)
    for length in (1, 7, 33, 99):
        windows = cut_windows(tokens, length)
        whole = (tokens.size - 1) // length
        assert windows.shape == (whole, length + 1)
        np.testing.assert_array_equal(windows[:, 1:].ravel(), tokens[1 : 1 + whole * length])
        np.testing.assert_array_equal(windows[:, :-1] + 1, windows[:, 1:])
    assert cut_windows(tokens, 100).shape == (0, 101)


def test_an_epoch_holds_every_training_window_once(folder):
    windows = train_windows(folder)
    assert len(windows) > 3 * BATCH
    epochs = np.concatenate(take(load(folder).train_iterator(), len(windows)))  # `BATCH` epochs
    for epoch in np.split(epochs, BATCH):
        assert rows([epoch]) == rows([windows])
    assert not np.array_equal(epochs[: len(windows)], epochs[len(windows) : 2 * len(windows)])  # shuffled anew


def test_documents_are_packed_whole_with_their_end_and_without_padding(folder):
    corpus = load(folder, batch_size=1)
    tokenizer = corpus.tokenizer
    windows = train_windows(folder)
    stream = np.concatenate([windows[0], windows[1:, 1:].ravel()])
    pieces = np.split(stream, np.flatnonzero(stream == tokenizer.eos_id) + 1)
    train, _ = split_documents(read_documents(str(folder)).documents)
    texts = [tokenizer.decode(piece) for piece in pieces[:-1]]  # the last may be cut
    assert texts == train[: len(texts)]
    assert len(texts) >= len(train) - 2


def test_validation_is_fixed_whole_and_limited(folder):
    corpus = load(folder, batch_size=2)
    everything = list(corpus.validation_batches(None))
    _, validation = split_documents(read_documents(str(folder)).documents)
    windows = cut_windows(encode_documents(corpus.tokenizer, validation), SEQUENCE)
    assert len(everything) == len(windows) // 2 > 3
    np.testing.assert_array_equal(np.concatenate(everything), windows[: 2 * len(everything)])
    np.testing.assert_array_equal(np.stack(everything), np.stack(list(corpus.validation_batches())))
    for max_tokens, count in (
        (1, 1),
        (2 * SEQUENCE, 1),
        (6 * SEQUENCE, 3),
        (7 * SEQUENCE, 3),
        (10**9, len(everything)),
    ):
        limited = list(corpus.validation_batches(max_tokens))
        assert len(limited) == count
        np.testing.assert_array_equal(np.stack(limited), np.stack(everything[:count]))


def test_a_small_validation_set_gives_one_smaller_batch(folder):
    corpus = load(folder, batch_size=100)
    (batch,) = corpus.validation_batches(None)
    assert 1 < len(batch) < 100


# Determinism, resume, shards


def test_the_seed_decides_the_batches_but_not_the_validation(folder):
    one, same, other = (load(folder, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(take(one.train_iterator(), 9), take(same.train_iterator(), 9))
    assert not np.array_equal(take(one.train_iterator(), 9), take(other.train_iterator(), 9))
    np.testing.assert_array_equal(take(one.validation_batches(), 2), take(other.validation_batches(), 2))


def test_resume_is_exact_within_and_across_epochs(folder):
    steps_per_epoch = len(train_windows(folder)) // BATCH
    for step in (0, 1, steps_per_epoch // 2, steps_per_epoch, 2 * steps_per_epoch + 3):
        iterator = load(folder).train_iterator()
        list(islice(iterator, step))
        state = json.loads(json.dumps(iterator.get_state()))
        expected = take(iterator, steps_per_epoch + 2)
        resumed = load(folder).train_iterator()
        resumed.set_state(state)
        np.testing.assert_array_equal(take(resumed, steps_per_epoch + 2), expected)
        iterator.set_state(state)  # the same iterator can go back
        np.testing.assert_array_equal(next(iterator), expected[0])


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_are_disjoint_and_together_the_whole_epoch(folder, shards):
    iterators = [load(folder, batch_size=1, shard_index=i, shard_count=shards).train_iterator() for i in range(shards)]
    count = len(train_windows(folder))
    windows = np.stack([np.concatenate([next(it) for _ in range(count)]) for it in iterators], axis=1)
    for epoch in np.split(windows.reshape(count * shards, -1), shards):
        assert rows([epoch]) == rows([train_windows(folder)])
    whole = take(load(folder, batch_size=1).train_iterator(), count * shards)
    np.testing.assert_array_equal(windows.reshape(whole.shape), whole)  # one shuffle, dealt out


# The division into training and validation


def test_training_and_validation_share_no_document_and_the_division_ignores_order(folder):
    documents = read_documents(str(folder)).documents
    train, validation = split_documents(documents)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents)
    assert 0.025 <= sum(map(len, validation)) / sum(map(len, documents)) <= 0.10
    _, backwards = split_documents(documents[::-1])
    assert sorted(backwards) == sorted(validation)


def test_equal_documents_stay_on_one_side():
    train, validation = split_documents([f"text {i % 50}" for i in range(500)])
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 500
    assert 10 <= len(validation) <= 50


def test_few_long_documents_are_divided_by_position():
    book = "".join(f"{i} " for i in range(1000))
    train, validation = split_documents([book, book.upper() + "!"])
    assert train[0] + validation[0] == book
    assert len(validation[0]) / len(book) == pytest.approx(0.05, abs=0.001)
    assert train[1] + validation[1] == book + "!"


# Fingerprints


def test_the_fingerprint_of_a_local_text_changes_with_any_token_and_with_nothing_else(folder):
    fingerprint = load(folder).fingerprint
    assert load(folder, seed=1, batch_size=2, sequence_length=8).fingerprint == fingerprint
    assert load(folder, tokenizer="bpe", vocab_size=300).fingerprint != fingerprint
    train, validation = split_documents(read_documents(str(folder)).documents)
    for documents in (train, validation):
        file = next(path for path in folder.rglob("*.txt") if path.read_text() == documents[0])
        file.write_text(documents[0] + "!")
        assert load(folder).fingerprint != fingerprint
        file.write_text(documents[0])
    assert load(folder).fingerprint == fingerprint


def test_the_fingerprint_of_a_stream_names_the_source(hub):
    corpus = load(f"hf:{hub}")
    assert f"hf:{hub}" in corpus.fingerprint
    assert load(f"hf:{hub}", seed=1, tokenizer="bpe", vocab_size=270).fingerprint == corpus.fingerprint


# Local sources


def test_the_standard_library_is_a_corpus():
    documents = read_documents("python").documents
    assert sum(map(len, documents)) > 3_000_000
    assert any("class JSONDecoder" in text for text in documents)
    assert read_documents("python").documents == documents
    train, validation = split_documents(documents)
    assert 0.04 < sum(map(len, validation)) / sum(map(len, documents)) < 0.06
    assert not set(train) & set(validation)


def test_bpe_trains_on_the_training_documents_and_its_file_is_reused(folder, tmp_path):
    file = tmp_path / "run" / "tokenizer.json"
    corpus = load(folder, tokenizer="bpe", vocab_size=290, tokenizer_file=file)
    assert corpus.tokenizer.vocab_size == 290
    assert next(corpus.train_iterator()).max() < 290
    saved = file.read_bytes()
    (folder / "a" / "new.txt").write_text("zzz qqq " * 40)  # other text would train another tokenizer
    again = load(folder, tokenizer="bpe", vocab_size=300, tokenizer_file=file)
    assert again.tokenizer.vocab_size == 290
    assert file.read_bytes() == saved
    load(folder, tokenizer_file=tmp_path / "other.json", shard_index=1, shard_count=2)
    assert not (tmp_path / "other.json").exists()  # only shard 0 writes


def test_a_file_is_divided_at_blank_lines_and_gzip_changes_nothing(tmp_path):
    text = "\n\n".join(f"paragraph {i}\nof two lines" for i in range(50)) + "\n \n\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    documents = read_documents(str(tmp_path / "a.txt")).documents
    assert documents == [f"paragraph {i}\nof two lines" for i in range(50)]
    assert read_documents(str(tmp_path / "a.txt.gz")).documents == documents
    plain, zipped = load(tmp_path / "a.txt"), load(tmp_path / "a.txt.gz")
    np.testing.assert_array_equal(take(plain.train_iterator(), 5), take(zipped.train_iterator(), 5))


def test_one_unbroken_text_trains_and_validates(tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(f"line {i}" for i in range(500)))
    corpus = load(tmp_path / "book.txt")
    assert next(corpus.train_iterator()).shape == (BATCH, SEQUENCE + 1)
    assert next(corpus.validation_batches()).shape == (BATCH, SEQUENCE + 1)
    assert "1 training and 1 validation documents" in corpus.description


def test_a_folder_takes_text_files_and_leaves_the_rest(tmp_path):
    for name in ("a.txt", "b.md", "c.rst", "d.py", "e.bin", ".hidden.txt", "sub/f.txt", ".git/g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "h.md.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfh.md.gz"))
    (tmp_path / "i.txt").write_text(" \n")
    assert read_documents(str(tmp_path)).documents == ["a.txt", "b.md", "c.rst", "d.py", "h.md.gz", "sub/f.txt"]


# Hugging Face streams


def stream_rows(path, split):
    lines = [line for file in sorted(path.glob(f"{split}*")) for line in file.read_text().splitlines()]
    return [text for text in (json.loads(line)["text"] for line in lines) if text]


def decoded(batches, tokenizer):
    windows = np.concatenate(list(batches))
    stream = np.concatenate([windows[0], windows[1:, 1:].ravel()])
    pieces = np.split(stream, np.flatnonzero(stream == tokenizer.eos_id) + 1)
    return [tokenizer.decode(piece) for piece in pieces[:-1]]


def test_a_stream_packs_every_document_once_an_epoch(hub):
    corpus = load(f"hf:{hub}", seed=5)
    texts = decoded(islice(corpus.train_iterator(), 40), corpus.tokenizer)
    documents = stream_rows(hub, "train")
    first, second = texts[: len(documents)], texts[len(documents) : 2 * len(documents)]
    assert sorted(first) == sorted(second) == sorted(documents)
    assert len({tuple(documents), tuple(first), tuple(second)}) == 3  # shuffled, and anew each epoch
    assert 'the "validation" split' in corpus.description


def test_a_stream_is_deterministic(hub):
    one, same, other = (load(f"hf:{hub}", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(take(one.train_iterator(), 5), take(same.train_iterator(), 5))
    assert not np.array_equal(take(one.train_iterator(), 5), take(other.train_iterator(), 5))


@pytest.mark.covering(1)
@pytest.mark.parametrize("shard_count", [1, 2, 3])  # 2 divides the files, 3 does not
def test_a_stream_resumes_exactly(hub, monkeypatch, shard_count):
    monkeypatch.setattr(data, "SHUFFLE_DOCUMENTS", 6)  # several blocks an epoch
    shard = {"shard_index": shard_count - 1, "shard_count": shard_count}
    iterator = load(f"hf:{hub}", batch_size=2, **shard).train_iterator()
    states, batches = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    assert states[-1]["epoch"] > 0
    for step in range(0, 55, 6):
        resumed = load(f"hf:{hub}", batch_size=2, **shard).train_iterator()
        resumed.set_state(states[step])
        np.testing.assert_array_equal(take(resumed, 5), np.stack(batches[step : step + 5]))
    iterator.set_state(states[7])
    np.testing.assert_array_equal(take(iterator, 50), np.stack(batches[7:57]))


@pytest.mark.covering(1)
@pytest.mark.parametrize("validation_split", [True, False])
@pytest.mark.parametrize("shard_count", [1, 3])  # 3 does not divide the files
def test_other_iterators_do_not_move_a_stream(hub, monkeypatch, validation_split, shard_count):
    monkeypatch.setattr(data, "SHUFFLE_DOCUMENTS", 6)
    monkeypatch.setattr(sources, "HELD_OUT_DOCUMENTS", 10)
    if not validation_split:  # then both streams read the same file
        (hub / "validation.jsonl").unlink()
    for i in range(2, 10):  # a stream's position moves from file to file
        (hub / f"train-{i}.jsonl").write_text(
            "".join(f'{{"text": "file {i} row {j}", "url": "-"}}\n' for j in range(5))
        )
    corpus = load(f"hf:{hub}", batch_size=2, shard_count=shard_count)
    expected = take(corpus.train_iterator(), 30)
    iterator, other = corpus.train_iterator(), corpus.train_iterator()
    for step in range(10):
        np.testing.assert_array_equal(next(iterator), expected[step])
        validation = corpus.validation_batches(None)
        next(validation)
        list(islice(other, step % 3))
        state = iterator.get_state()
        resumed = load(f"hf:{hub}", batch_size=2, shard_count=shard_count).train_iterator()
        resumed.set_state(state)
        np.testing.assert_array_equal(take(resumed, 10), expected[step + 1 : step + 11])
        next(validation)


@pytest.fixture
def ended(monkeypatch):
    """Collects iterators, whose worker processes end with the test."""
    iterators = []
    yield lambda iterator: iterators.append(iterator) or iterator
    for iterator in iterators:
        iterator.close()


@pytest.mark.slow
def test_worker_processes_read_a_stream_ahead_once_and_resume_exactly(hub, ended):
    workers = 2
    corpus = load(f"hf:{hub}", batch_size=1, workers=workers)
    iterator = ended(corpus.train_iterator())
    states, batches = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    alone = [
        load(f"hf:{hub}", batch_size=1, shard_index=i, shard_count=workers).train_iterator() for i in range(workers)
    ]
    np.testing.assert_array_equal(batches, [next(alone[step % workers]) for step in range(30)])
    for step in (0, 17):
        resumed = ended(load(f"hf:{hub}", batch_size=1, workers=workers).train_iterator())
        resumed.set_state(states[step])
        np.testing.assert_array_equal(take(resumed, 5), np.stack(batches[step : step + 5]))


@pytest.mark.slow
def test_worker_processes_end_with_the_process_that_started_them(hub):
    script = (
        "import multiprocessing, sys, time\n"
        "from galore_jax.training.data import load_data\n"
        "if __name__ == '__main__':\n"
        "    corpus = load_data(sys.argv[1], tokenizer='bytes', sequence_length=8, batch_size=1, seed=0, workers=1)\n"
        "    next(iterator := corpus.train_iterator())\n"
        "    print(*(process.pid for process in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    (hub.parent / "script.py").write_text(script)
    trainer = subprocess.Popen(
        [sys.executable, str(hub.parent / "script.py"), f"hf:{hub}"], stdout=subprocess.PIPE, text=True
    )
    workers = [int(word) for word in trainer.stdout.readline().split()]
    trainer.stdout.close()
    trainer.kill()
    trainer.wait()
    assert len(workers) == 1
    for _ in range(200):
        if not Path(f"/proc/{workers[0]}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{workers[0]}").exists()


def test_shards_of_a_stream_read_different_documents(hub):
    documents = stream_rows(hub, "train")
    seen = []
    for index in range(2):
        corpus = load(f"hf:{hub}", batch_size=1, shard_index=index, shard_count=2)
        texts = decoded(islice(corpus.train_iterator(), 60), corpus.tokenizer)
        seen.append(set(texts))
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(documents)


def test_validation_of_a_stream_is_in_order_limited_and_repeatable(hub):
    corpus = load(f"hf:{hub}", batch_size=2)
    batches = list(corpus.validation_batches(None))
    windows = cut_windows(encode_documents(corpus.tokenizer, stream_rows(hub, "validation")), SEQUENCE)
    assert len(batches) == len(windows) // 2 > 2
    np.testing.assert_array_equal(np.concatenate(batches), windows[: 2 * len(batches)])
    np.testing.assert_array_equal(np.stack(list(corpus.validation_batches(5 * SEQUENCE))), np.stack(batches[:2]))
    (small,) = load(f"hf:{hub}", batch_size=100).validation_batches(None)
    np.testing.assert_array_equal(small, windows)


def test_a_stream_without_validation_holds_out_its_first_documents(hub, monkeypatch):
    monkeypatch.setattr(sources, "HELD_OUT_DOCUMENTS", 10)  # with the empty row that is skipped
    (hub / "validation.jsonl").unlink()
    corpus = load(f"hf:{hub}", batch_size=2)
    documents = stream_rows(hub, "train")
    windows = cut_windows(encode_documents(corpus.tokenizer, documents[:9]), SEQUENCE)
    np.testing.assert_array_equal(next(corpus.validation_batches()), windows[:2])
    texts = decoded(islice(corpus.train_iterator(), 60), corpus.tokenizer)
    assert set(texts) == set(documents[9:])


def test_bpe_trains_on_a_stream(hub, tmp_path):
    corpus = load(f"hf:{hub}", tokenizer="bpe", vocab_size=270, tokenizer_file=tmp_path / "t.json")
    assert corpus.tokenizer.vocab_size == 270
    again = load(f"hf:{hub}", tokenizer="bpe", vocab_size=270, tokenizer_file=tmp_path / "t.json")
    np.testing.assert_array_equal(take(corpus.train_iterator(), 3), take(again.train_iterator(), 3))


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0 is too small: use 1 or more"),
        ({"batch_size": -3}, "batch_size=-3 is too small"),
        ({"seed": -1}, "seed=-1 is too small"),
        ({"shard_count": 0}, "shard_count=0 is too small"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index=2 is out of range: use 0 to 1"),
        (
            {"sequence_length": 2000},
            r"training text of '.*' is \d+ tokens, but 8001 are needed for .* smaller --seq or --batch",
        ),
        ({"batch_size": 100, "shard_count": 9}, r"training text .* but 14401 are needed"),
        ({"sequence_length": 500, "batch_size": 1}, r"validation text of '.*' is \d+ tokens, but 501 are needed"),
    ],
)
def test_impossible_settings_are_named(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **settings)


def test_missing_and_unknown_names(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'pyton' does not exist.*\"python\", a file"):
        load("pyton")
    with pytest.raises(FileNotFoundError, match="'bpee' is unknown"):
        load(folder, tokenizer="bpee")


def test_sources_without_text(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.txt.gz").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.bin").write_text("text")
    for name in ("empty.txt", "empty.txt.gz", "none"):
        with pytest.raises(ValueError, match=rf"{name}' holds no text"):
            load(tmp_path / name)


def test_files_that_are_not_text(folder, tmp_path):
    (folder / "a" / "bad.txt").write_bytes(b"ab\xff\xfecd")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 text \(byte 2 is 0xff\)"):
        load(folder)
    whole = gzip.compress(b"some text " * 1000)
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"cut\.txt\.gz is a truncated gzip file"):
        load(tmp_path / "cut.txt.gz")
    (tmp_path / "plain.txt.gz").write_bytes(b"not compressed")
    with pytest.raises(ValueError, match=r"plain\.txt\.gz is not a valid gzip file"):
        load(tmp_path / "plain.txt.gz")
    (tmp_path / "damaged.txt.gz").write_bytes(whole[:12] + b"\xff" * 8 + whole[20:])
    with pytest.raises(ValueError, match=r"damaged\.txt\.gz is not a valid gzip file"):
        load(tmp_path / "damaged.txt.gz")


def test_unusable_datasets(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    for name in ("/nowhere/at all", "./nowhere", "nowhere/train.JSONL.gz", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"data source 'hf:{name}' does not exist"):
            load(f"hf:{name}")
    for name in ("", ":en"):
        with pytest.raises(ValueError, match=f"data source 'hf:{name}' names no dataset: write hf:NAME"):
            load(f"hf:{name}")
    monkeypatch.undo()
    for file in hub.iterdir():
        file.write_text('{"body": "b", "url": "u"}\n')
    with pytest.raises(ValueError, match='no column "text", only body, url'):
        load(f"hf:{hub}")
    for file in hub.glob("train*"):
        file.unlink()
    with pytest.raises(ValueError, match='no "train" split, only validation'):
        load(f"hf:{hub}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load(f"hf:{hub}")


def test_the_hub_is_silent_while_it_tries_to_reach_a_dataset(monkeypatch, caplog):
    def unreachable(*_, **__):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'no/network' on the Hub")

    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    level = logger.level
    with pytest.raises(ValueError, match="cannot load data source 'hf:no/network': Couldn't reach"):
        load("hf:no/network")
    assert caplog.records == []
    assert logger.level == level
    with pytest.raises(ConnectionError):
        unreachable()
    assert len(caplog.records) == 1  # so the silence was ours


def test_streams_with_too_little_text(hub):
    corpus = load(f"hf:{hub}", sequence_length=5000)
    with pytest.raises(ValueError, match=r"validation text .* but 5001 are needed"):
        next(corpus.validation_batches())
    for file in hub.glob("train*"):
        file.write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="no training text for one of its shares"):
        load(f"hf:{hub}").train_iterator()
