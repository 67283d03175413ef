# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""``galore-jax generate`` and the sampler behind it: the cache, the restrictions, streaming, and every mistake."""

from __future__ import annotations

import io
import json
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import leniency, shared_programs  # noqa: F401
from test_llama import assert_pieces_are_the_whole, forward, random_model, random_tokens, tiny

from galore_jax.cli import main
from galore_jax.models import LlamaConfig, generate, load_hf, save_hf
from galore_jax.models.sampling import stream
from galore_jax.training import PretrainConfig, checkpoint, run_pretrain
from galore_jax.training.generation import GenerateConfig, generate_text, widened
from galore_jax.training.program import program
from galore_jax.training.run_folder import load_config, save_config
from galore_jax.training.tokenizer import ByteTokenizer, load_tokenizer
from galore_jax.weights import quantize_weights

BYTES = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=257,
    max_position_embeddings=64,
)  # fmt: skip
INT8 = {
    "seq": 16, "batch": 2, "sample_tokens": 0, "steps": 2, "warmup_steps": 0, "optimizer": "adamw", "layerwise": True,
    "weights": "int8", "clip": 0.0,
}  # fmt: skip
TEXT = "\n\n".join(f"Paragraph {n} of a text that is long enough for some batches of a tiny run." for n in range(100))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run with weights in 8 bits."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    with leniency():
        run_pretrain(PretrainConfig(**INT8, data=str(folder / "text.txt"), out=folder / "run"), BYTES)
    return folder / "run"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A tiny Hugging Face folder."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    save_hf(random_model(BYTES), folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    return folder


def refused(capsys, *arguments, says):
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


# The cache


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 2, "sliding_window": 5},
        {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_max_position_embeddings": 16},
    ],
    ids=["full", "window", "llama3"],
)
def test_greedy_with_a_cache_is_greedy_without_one(overrides):
    model = random_model(tiny(**overrides))
    prompt = random_tokens((5,), seed=3)
    tokens = prompt
    for _ in range(12):
        logits = forward(model, jnp.pad(tokens, (0, 17 - tokens.size))[None])
        tokens = jnp.append(tokens, jnp.argmax(logits[0, tokens.size - 1]).astype(jnp.int32))
    np.testing.assert_array_equal(generate(model, prompt, 12, key=jax.random.key(0), temperature=0), tokens[5:])


def test_a_sequence_in_pieces_has_the_residual_stream_of_the_whole():
    assert_pieces_are_the_whole(random_model(tiny(num_key_value_heads=2, sliding_window=4)))


@pytest.mark.slow
def test_weights_in_8_bits_generate():
    model = random_model(tiny())
    graphdef, params = nnx.split(model, nnx.Param)
    stored = nnx.merge(graphdef, quantize_weights(nnx.to_pure_dict(params)))
    tokens = jnp.concatenate(
        [jnp.asarray([1, 2], jnp.int32), generate(stored, [1, 2], 6, key=jax.random.key(0), temperature=0)]
    )
    np.testing.assert_array_equal(forward(stored, tokens[None])[0, 1:-1].argmax(axis=-1), tokens[2:])


@pytest.mark.covering(1)
@pytest.mark.parametrize("how", [{}, {"top_k": 5, "top_p": 0.8}])
def test_a_stream_is_what_one_call_gives(how):
    model, prompt = random_model(tiny()), random_tokens((4,))
    whole = generate(model, prompt, 9, key=jax.random.key(2), **how)
    assert list(stream(model, prompt, 9, key=jax.random.key(2), **how)) == whole.tolist()


# The restrictions


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        ({"top_k": 2}, lambda p: np.arange(p.size) < 2),
        ({"top_p": 0.6}, lambda p: np.cumsum(p) - p < 0.6),
        ({"top_k": 3, "top_p": 0.5}, lambda p: (np.cumsum(p) - p < 0.5 * p[:3].sum()) & (np.arange(p.size) < 3)),
        ({"top_k": 1}, lambda p: np.arange(p.size) < 1),
        ({"top_p": 1e-6}, lambda p: np.arange(p.size) < 1),
    ],
)
def test_only_the_likeliest_tokens_are_drawn_and_in_proportion(how, allowed):
    model = random_model(tiny(vocab_size=6), scale=0.3)
    prompt = jnp.asarray([2, 0], jnp.int32)
    draws = [int(generate(model, prompt, 1, key=jax.random.key(i), **how)[0]) for i in range(200)]
    p = np.asarray(jax.nn.softmax(forward(model, prompt[None])[0, -1]), np.float64)
    order = np.argsort(-p)
    kept = np.where(allowed(p[order]), p[order], 0)
    frequencies = np.bincount(draws, minlength=6)[order] / len(draws)
    assert ((frequencies > 0) <= (kept > 0)).all()
    assert np.abs(frequencies - kept / kept.sum()).max() < 4 * np.sqrt(0.25 / len(draws))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be greater than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be greater than 0 and at most 1"),
    ],
)
def test_restrictions_that_leave_nothing_or_mean_nothing_are_refused(how, message):
    for function in (generate, stream):
        with pytest.raises(ValueError, match=message):
            function(random_model(tiny()), [1], 3, key=jax.random.key(0), **how)


# The command


@pytest.mark.slow
def test_a_run_and_a_hugging_face_folder_generate(run, theirs, capsys):
    for folder in (run, theirs):
        texts = []
        for seed in (1, 1, 2):
            command = ["generate", "--model", folder, "--prompt", "A pär", "--max-new-tokens", 20, "--seed", seed]
            assert main(list(map(str, command))) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] != texts[2]
        assert all(text.startswith("A pär") and text.endswith("\n") for text in texts)


@pytest.mark.slow
def test_several_samples_are_those_of_the_seeds_and_the_prompt_may_be_empty_or_standard_input(
    theirs, capsys, monkeypatch
):
    def said(*flags):
        assert main(["generate", "--model", str(theirs), "--max-new-tokens", "20", *flags]) == 0
        return capsys.readouterr().out

    one, two = (said("--prompt", "A pär", "--seed", seed) for seed in "67")
    assert said("--prompt", "A pär", "--seed", "6", "--samples", "2") == f"--- seed 6\n{one}--- seed 7\n{two}"
    monkeypatch.setattr("sys.stdin", io.StringIO("A pär\n"))
    assert said("--prompt", "-", "--seed", "6") == one
    # An empty prompt is the end of the document before.
    tokens = generate(load_hf(theirs), [256], 20, key=jax.random.key(3), temperature=0.8).tolist()
    tokens = tokens[: tokens.index(256)] if 256 in tokens else tokens
    assert said("--prompt", "", "--seed", "3") == ByteTokenizer().decode(tokens) + "\n"


@pytest.mark.slow
def test_the_run_continues_with_the_parameters_of_its_last_checkpoint(run, tmp_path):
    """As a Hugging Face folder the same model says the same."""
    config, model_config, _ = load_config(run)
    built = program(config, model_config)
    params = checkpoint.restore_params(run / "checkpoints", 2, built.state[0])
    save_hf(nnx.merge(built.graphdef, params), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    texts = [
        "".join(generate_text(GenerateConfig(folder, "A pär", max_new_tokens=20, seed=5)))
        for folder in (run, tmp_path / "model")
    ]
    assert texts[0] == texts[1]


def test_weights_of_16_bits_are_widened_once_and_others_stay_as_they_are():
    """On a CPU, where these tests run: one that is widened says what its weights say in float32."""
    stored = random_model(tiny(param_dtype="bfloat16", dtype="bfloat16"))
    wide = widened(stored)
    assert (wide.config.dtype, wide.config.param_dtype) == ("float32", "float32")
    for leaf, other in zip(*(jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (wide, stored)), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, other.astype(jnp.float32))
    assert widened(wide) is wide
    graphdef, params = nnx.split(random_model(tiny(dtype="bfloat16")), nnx.Param)
    codes = nnx.merge(graphdef, quantize_weights(nnx.to_pure_dict(params)))
    assert widened(codes) is codes


def test_text_comes_in_pieces_of_whole_characters_and_stops_at_the_end(theirs, monkeypatch):
    ids = [*"nä€𝄞".encode(), 0xFF, *b"a", 256, *b"never"]
    monkeypatch.setattr("galore_jax.training.generation.stream", lambda *_, **__: iter(ids))
    pieces = list(generate_text(GenerateConfig(theirs, "é ", max_new_tokens=20)))
    assert pieces == ["é ", "n", "ä", "€", "𝄞", "\ufffda"]
    monkeypatch.setattr("galore_jax.training.generation.stream", lambda *_, **__: iter(ids[:5]))
    assert "".join(generate_text(GenerateConfig(theirs, "é ", max_new_tokens=20))) == "é nä\ufffd"


def test_a_tokenizers_special_token_stands_before_the_prompt_and_none_after_it(tmp_path):
    tokenizer = load_tokenizer("bpe", [TEXT], vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer.json")
    plain = tokenizer.encode("a text")
    np.testing.assert_array_equal(load_tokenizer(str(tmp_path / "tokenizer.json")).encode_prompt("a text"), plain)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, {"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(tokenizer.encode_prompt("a text"), [0, *plain])
    np.testing.assert_array_equal(tokenizer.encode_prompt(""), [0])
    np.testing.assert_array_equal(tokenizer.encode("a text"), plain)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--top-p", "1.5"], "--top-p 1.5 must be greater than 0 and at most 1."),
        (["--top-p", "0"], "--top-p 0.0 must be greater than 0 and at most 1."),
        (["--top-k", "0"], "--top-k 0 must be at least 1."),
        (["--temperature", "-1"], "--temperature -1.0 must be a finite number of at least 0."),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1."),
        (["--seed", "-1"], "--seed -1 must be at least 0."),
        (["--max-new-tokens", "62"], "--prompt has 3 tokens, and with --max-new-tokens 62 they are more than the 64 positions"),
        (["--max-new-tokens", "5", "--prompt", "x" * 64], "--prompt has 64 tokens, and with --max-new-tokens 5"),
        (["--samples", "0"], "--samples 0 must be at least 1."),
        (["--samples", "2", "--temperature", "0"], "--samples 2 are all the same at --temperature 0"),
        (["--samples", "2", "--seed", str(2**31 - 1)], "--seed 2147483647 + --samples 2 must be at most 2**31."),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_weights_are_read(theirs, capsys, monkeypatch, flags, says):
    monkeypatch.setattr("galore_jax.training.trained.load_hf", lambda *_: pytest.fail("the weights were read"))
    refused(capsys, "--model", theirs, "--prompt", "abc", *flags, says=says)


def test_a_folder_that_is_no_model_is_named(theirs, tmp_path, capsys):
    refused(capsys, "--prompt", "a", says="--model")
    refused(
        capsys, "--model", tmp_path / "no", "--prompt", "a", says=f"--model {tmp_path / 'no'} is no folder; name a run"
    )
    for text in (None, "{}", "[]"):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        refused(
            capsys, "--model", tmp_path, "--prompt", "a", says=f"--model {tmp_path} holds no config.json of a model"
        )
    (tmp_path / "config.json").write_text("{")
    refused(capsys, "--model", tmp_path, "--prompt", "a", says=f"{tmp_path / 'config.json'} is damaged")
    (tmp_path / "config.json").write_text((theirs / "config.json").read_text())
    refused(capsys, "--model", tmp_path, "--prompt", "a", says="tokenizer.json does not exist")
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    save_config(PretrainConfig(**INT8), BYTES, tmp_path, "fingerprint")
    refused(capsys, "--model", tmp_path, "--prompt", "a", says="There is no checkpoint in")


def test_the_benchmark_prints_a_continuation_and_the_loss_of_a_text(theirs, tmp_path, monkeypatch, capsys):
    benchmark = pathlib.Path(__file__).parent.parent / "benchmarks" / "huggingface.py"
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--sequences", "2", "--seq", "16", "--length", "4"]
    monkeypatch.setattr(sys, "argv", [str(benchmark), str(theirs), str(tmp_path / "text.txt"), *flags])
    runpy.run_path(str(benchmark), run_name="__main__")
    out = capsys.readouterr().out
    assert "parameters, float32" in out
    assert "greedy: 'The capital of France is' -> " in out
    loss = float(re.search(r"loss: ([0-9.]+) nats/token over 2 x 16 tokens of text.txt", out)[1])
    batches = np.stack([list(TEXT.encode())[start : start + 17] for start in (0, len(TEXT) // 2)])
    log_p = jax.nn.log_softmax(forward(load_hf(theirs), jnp.asarray(batches[:, :-1], jnp.int32)))
    expected = -np.take_along_axis(np.asarray(log_p), batches[:, 1:, None], axis=-1).mean()
    assert loss == pytest.approx(expected, abs=1e-3)


def test_the_benchmark_of_speed_has_a_result_only_where_the_tokens_are_the_same(theirs, script, monkeypatch):
    """Here in the place of transformers stands the model itself, or one that says something else."""
    benchmark = script("generate")
    config = GenerateConfig(theirs, "A pär", max_new_tokens=6, temperature=0)
    monkeypatch.setattr(
        benchmark, "their_tokens", lambda source, config, _: lambda: benchmark.our_tokens(source, config)
    )
    results = benchmark.measure(config, rounds=3, threads=1)
    for result in results.values():
        assert len(result["turns"]) == 3
        seconds, processor = (
            np.median([turn[key] for turn in result["turns"]]) for key in ("seconds", "processor_seconds")
        )
        assert result["tokens_per_second"] == pytest.approx(6 / seconds)
        assert result["processor_seconds_per_token"] == pytest.approx(processor / 6)
    assert [line.split(" |")[0] for line in benchmark.table(results).splitlines()[2:]] == [
        f"| {name}" for name in results
    ]
    monkeypatch.setattr(benchmark, "their_tokens", lambda source, *_: lambda: [*source.encode("A pär"), *b"nonsen"])
    with pytest.raises(SystemExit, match="The tokens differ"):
        benchmark.measure(config, rounds=1, threads=1)


@pytest.mark.slow
def test_the_benchmark_of_speed_compares_with_transformers(theirs, tmp_path):
    for package in ("torch", "transformers"):
        pytest.importorskip(package)
    benchmark = pathlib.Path(__file__).parent.parent / "benchmarks" / "generate.py"
    flags = ["--model", str(theirs), "--prompt", "A pär", "--length", "8", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(benchmark), str(tmp_path), *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "generate.json").read_text())
    assert (written["length"], written["threads"]) == (8, 1)
    assert list(written["results"]) == ["galore-jax generate", "transformers"]
    assert all(f"| {name} |" in done.stdout for name in written["results"])
