# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The LLaMA model against its equations in NumPy, its published sizes, and its contract with training."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galore_jax.layerwise import layerwise
from galore_jax.models import Llama, LlamaConfig, generate
from galore_jax.models.llama import block_stack
from galore_jax.training.step import make_train_step

TINY = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32,
}

CUDNN = {"attention": "cudnn", "dtype": "bfloat16"}


def tiny(**overrides) -> LlamaConfig:
    return LlamaConfig(**{**TINY, **overrides})


def random_model(config: LlamaConfig, scale: float = 0.4) -> Llama:
    """A model whose every parameter is random; the default scale keeps attention far from uniform."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, scale, leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


def forward(model: Llama, tokens: jax.Array) -> jax.Array:
    graphdef, state = nnx.split(model)
    return jitted_forward(graphdef, state, tokens)


@partial(jax.jit, static_argnums=0)
def jitted_forward(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def random_tokens(shape: tuple[int, ...], seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, TINY["vocab_size"], shape), jnp.int32)


def assert_pieces_are_the_whole(model: Llama) -> None:
    """A sequence in pieces, on a cache, has the residual stream of the whole sequence."""
    tokens = random_tokens((2, 11))
    expected = model.run_layers(model.embed(tokens))
    cache, pieces = model.empty_cache(2, 16), []
    for start, stop in ((0, 5), (5, 6), (6, 11)):
        piece, cache = model.extend(tokens[:, start:stop], cache, jnp.int32(start))
        pieces.append(piece)
    assert np.abs(jnp.concatenate(pieces, axis=1) - expected).max() < 1e-5 * np.abs(expected).max()


def shapes_by_path(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return {"/".join(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


# --- the equations, one token and one head at a time, in float64 ---


def reference_logits(model: Llama, tokens: np.ndarray) -> np.ndarray:
    """Logits [sequence, vocab] of one sequence, straight from the equations."""
    config = model.config
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    w = {"/".join(path): np.asarray(leaf[...], np.float64) for path, leaf in parameters}
    heads = config.num_attention_heads
    group = heads // (config.num_key_value_heads or heads)
    size = config.head_dim or config.hidden_size // heads

    def norm(x, scale):
        return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps)

    def rope(vector, position):
        turned = vector.copy()
        for i in range(size // 2):
            angle = position * config.rope_theta ** (-2 * i / size)
            rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            turned[[i, i + size // 2]] = rotation @ vector[[i, i + size // 2]]
        return turned

    def attention(x, wq, wk, wv, wo):
        mixed = np.zeros((len(x), heads * size))
        for n in range(heads):
            mine, shared = slice(n * size, (n + 1) * size), slice(n // group * size, (n // group + 1) * size)
            q = [rope(row @ wq[:, mine], t) for t, row in enumerate(x)]
            k = [rope(row @ wk[:, shared], t) for t, row in enumerate(x)]
            v = x @ wv[:, shared]
            for t in range(len(x)):
                weights = np.exp([q[t] @ k[s] / math.sqrt(size) for s in range(t + 1)])
                mixed[t, mine] = weights @ v[: t + 1] / weights.sum()
        return mixed @ wo

    def mlp(x, gate, up, down):
        gated = x @ gate
        return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down

    x = w["embed_tokens/embedding"][tokens]
    for layer in range(config.num_hidden_layers):
        mine = {path.removeprefix("layers/"): p[layer] for path, p in w.items() if path.startswith("layers/")}
        kernels = {path.split("/")[1]: p for path, p in mine.items() if path.endswith("/kernel")}
        normed = norm(x, mine["input_norm/scale"])
        x = x + attention(normed, *(kernels[f"{name}_proj"] for name in "qkvo"))
        normed = norm(x, mine["post_attention_norm/scale"])
        x = x + mlp(normed, kernels["gate_proj"], kernels["up_proj"], kernels["down_proj"])
    head = w["embed_tokens/embedding"].T if config.tie_word_embeddings else w["lm_head/kernel"]
    return norm(x, w["norm/scale"]) @ head


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "rope_theta": 500.0},
        {"tie_word_embeddings": True},
        {"head_dim": 6, "num_key_value_heads": 2, "rms_norm_eps": 0.1},
    ],
    ids=["multi-head", "grouped", "one-kv-head", "tied", "own-head-size"],
)
def test_forward_pass_follows_the_equations(overrides):
    model = random_model(tiny(**overrides))
    tokens = random_tokens((2, 11))
    logits = np.asarray(forward(model, tokens), np.float64)
    for row, sequence in zip(logits, np.asarray(tokens), strict=True):
        expected = reference_logits(model, sequence)
        assert np.abs(row - expected).max() < 1e-5 * np.abs(expected).max()


# --- sizes ---


@pytest.mark.parametrize("name", LlamaConfig.presets())
def test_closed_form_counts_the_parameters_of_every_preset(name):
    config = LlamaConfig.preset(name)
    assert config.num_params == sum(math.prod(shape) for shape in shapes_by_path(config).values())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("60m", 58.07), ("130m", 134.11), ("350m", 367.97), ("1b", 1339.08), ("7b", 6738.42)],
)
def test_presets_have_the_published_sizes(name, millions):
    assert round(LlamaConfig.preset(name).num_params / 1e6, 2) == millions


def test_llama3_8b_has_its_published_size():
    assert LlamaConfig.preset("llama3-8b").num_params == 8_030_261_248


@pytest.mark.parametrize("overrides", [{"tie_word_embeddings": True}, {"num_key_value_heads": 2, "head_dim": 6}])
def test_closed_form_counts_tied_and_grouped_models(overrides):
    config = tiny(**overrides)
    assert config.num_params == sum(math.prod(shape) for shape in shapes_by_path(config).values())


# --- parameters ---


def test_parameters_are_stacked_and_named_as_documented():
    config = tiny(num_key_value_heads=2, head_dim=6)
    expected = {
        "embed_tokens/embedding": (37, 16),
        "layers/attention/q_proj/kernel": (3, 16, 24),
        "layers/attention/k_proj/kernel": (3, 16, 12),
        "layers/attention/v_proj/kernel": (3, 16, 12),
        "layers/attention/o_proj/kernel": (3, 24, 16),
        "layers/mlp/gate_proj/kernel": (3, 16, 24),
        "layers/mlp/up_proj/kernel": (3, 16, 24),
        "layers/mlp/down_proj/kernel": (3, 24, 16),
        "layers/input_norm/scale": (3, 16),
        "layers/post_attention_norm/scale": (3, 16),
        "norm/scale": (16,),
        "lm_head/kernel": (16, 37),
    }
    assert shapes_by_path(config) == expected
    del expected["lm_head/kernel"]
    assert shapes_by_path(dataclasses.replace(config, tie_word_embeddings=True)) == expected


def test_initial_matrices_are_normal_and_differ_by_layer_and_seed():
    config = tiny(vocab_size=200, hidden_size=64, intermediate_size=96, initializer_range=0.05)
    initial = jax.jit(lambda key: nnx.state(Llama(config, rngs=nnx.Rngs(key)), nnx.Param))
    weights, others = (nnx.to_flat_state(initial(jax.random.key(seed))) for seed in (0, 1))
    for (path, leaf), (_, other) in zip(weights, others, strict=True):
        values = np.asarray(leaf[...])
        if path[-1] == "scale":
            assert (values == 1).all(), path
            continue
        assert not np.array_equal(values, other[...]), path
        assert abs(values.std() / 0.05 - 1) < 0.05, path
        assert abs(values.mean()) < 0.005, path
        if path[0] == "layers":
            assert np.abs(np.corrcoef(values.reshape(3, -1)) - np.eye(3)).max() < 0.1, path


# --- behaviour ---


def test_a_later_token_changes_no_earlier_logit():
    model = random_model(tiny(num_key_value_heads=2))
    tokens = random_tokens((1, 12))
    changed = tokens.at[0, 7].set((tokens[0, 7] + 1) % TINY["vocab_size"])
    before, after = forward(model, tokens), forward(model, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1) > 1e-3).all()


def loss_and_grads(model: Llama, tokens: jax.Array):
    """A jitted value_and_grad and its parameters, as training uses the model: split once, merge inside."""
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        log_probs = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[:, :-1]))
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()

    return loss, params


def test_gradients_reach_every_parameter():
    loss, params = loss_and_grads(random_model(tiny()), random_tokens((2, 9)))
    _, grads = loss(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for path, grad in nnx.to_flat_state(grads):
        assert np.isfinite(grad[...]).all(), path
        assert np.abs(grad[...]).max() > 0, path


def test_remat_saves_activations_and_keeps_the_gradients():
    tokens = random_tokens((2, 9))
    plain, params = loss_and_grads(random_model(tiny()), tokens)
    rematerialized, _ = loss_and_grads(random_model(tiny(remat=True)), tokens)
    plain, rematerialized = (loss.lower(params).compile() for loss in (plain, rematerialized))
    (plain_loss, plain_grads), (remat_loss, remat_grads) = plain(params), rematerialized(params)
    assert float(plain_loss) == pytest.approx(float(remat_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(remat_grads), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    temporary_bytes = [f.memory_analysis().temp_size_in_bytes for f in (plain, rematerialized)]
    assert temporary_bytes[1] < temporary_bytes[0]


@pytest.mark.parametrize("kind", ["plain", "layerwise"])
def test_no_step_has_the_logits_of_a_whole_sequence_at_once(kind):
    """A vocabulary of 128k and 1,024 tokens, traced: 501 MiB of logits, of which no array holds more than 64 MiB."""
    vocabulary, length = 128_256, 1024
    config = tiny(vocab_size=vocabulary, max_position_embeddings=length)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
    params, tx = nnx.to_pure_dict(params), optax.sgd(1e-3)
    if kind == "plain":
        step, state = make_train_step(graphdef, tx), jax.eval_shape(tx.init, params)
    else:
        init, step = layerwise(block_stack(config), tx)
        state = jax.eval_shape(init, params)
    jaxpr = jax.make_jaxpr(step)(params, state, jax.ShapeDtypeStruct((1, length + 1), jnp.int32))

    def shapes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (variable.aval.shape for variable in eqn.outvars)
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from shapes(getattr(inner, "jaxpr", inner))

    logits = {4 * math.prod(shape) for shape in shapes(jaxpr.jaxpr) if shape[-1:] == (vocabulary,) and len(shape) > 2}
    assert max(logits) <= 64 * 2**20


def test_one_compiled_block_whatever_the_depth():
    def products(layers):
        loss, params = loss_and_grads(random_model(tiny(num_hidden_layers=layers)), random_tokens((2, 9)))
        return loss.lower(params).as_text().count("dot_general")

    assert products(2) == products(6) > 0


def test_embed_blocks_and_head_compose_one_by_one():
    model = random_model(tiny())
    tokens = random_tokens((2, 9))
    graphdef, stacked = nnx.split(model.layers, nnx.Param)
    run_block = jax.jit(lambda layer, hidden: nnx.merge(graphdef, layer)(hidden))
    hidden = model.embed(tokens)
    for layer in range(model.config.num_hidden_layers):
        hidden = run_block(jax.tree.map(lambda p, layer=layer: p[layer], stacked), hidden)
    assert hidden.shape == (2, 9, 16)
    expected = forward(model, tokens)
    assert np.abs(model.head(hidden) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.fixture
def attention_promotes():
    """jax.nn.dot_product_attention itself mixes bfloat16 and float32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.covering(1)
@pytest.mark.usefixtures("attention_promotes")
@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_model_gives_float32_logits_near_the_float32_model(tied):
    tokens = random_tokens((2, 9))
    # Weights of ordinary size: rounding errors of large ones grow through the layers.
    exact, half = (
        random_model(tiny(tie_word_embeddings=tied, dtype=name, param_dtype=name), scale=0.1)
        for name in ("float32", "bfloat16")
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(half))} == {"bfloat16"}
    assert half.embed(tokens).dtype == jnp.bfloat16
    logits, expected = forward(half, tokens), forward(exact, tokens)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 8 * jnp.finfo(jnp.bfloat16).eps * np.abs(expected).max()


@pytest.mark.usefixtures("attention_promotes")
def test_parameters_may_be_stored_more_precisely_than_they_are_used():
    loss, params = loss_and_grads(random_model(tiny(dtype="bfloat16")), random_tokens((2, 9)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    value, grads = loss(params)
    assert np.isfinite(value)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


# --- configurations ---


def test_config_is_json_and_back():
    config = LlamaConfig.preset("llama3-8b", dtype="bfloat16")
    assert LlamaConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_preset_overrides():
    config = LlamaConfig.preset("60m", vocab_size=300, num_hidden_layers=2)
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (300, 2, 512)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 18}, "hidden_size=18 is not a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 does not divide num_attention_heads=4"),
        ({"hidden_size": 12}, "head size 3 is odd"),
        ({"head_dim": 5}, "head size 5 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        ({"vocab_size": -1}, "vocab_size=-1 must be a positive integer"),
        ({"hidden_size": 16.0}, "hidden_size=16.0 must be a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a positive integer"),
        ({"head_dim": 0}, "head_dim=0 must be a positive integer"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be a positive finite number"),
        ({"rope_theta": math.nan}, "rope_theta=nan must be a positive finite number"),
        ({"dtype": "fp8"}, "dtype='fp8' is not known; choose one of float32, bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype='int8' is not known"),
        ({"attention": "flash"}, "attention='flash' is not known; choose one of xla, cudnn"),
        ({"attention": "cudnn"}, "attention='cudnn' computes in bfloat16, and dtype='float32'"),
        ({**CUDNN, "head_dim": 4}, "attention='cudnn' takes heads of a multiple of 8 up to 256, and these have 4"),
        ({**CUDNN, "head_dim": 264}, "attention='cudnn' takes heads of a multiple of 8 up to 256, and these have 264"),
        (
            {**CUDNN, "head_dim": 8, "sliding_window": 4, "local_layers": "010"},
            "attention='cudnn' has one window for all layers",
        ),
    ],
)
def test_bad_configurations_are_refused_in_one_sentence(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tiny(**overrides)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("attention_promotes")
@pytest.mark.parametrize("window", [None, 3, 9])
def test_cudnn_is_asked_for_the_attention_of_xla_where_there_is_a_gpu(monkeypatch, window):
    """Grouped heads, with and without a window; elsewhere XLA's kernel runs."""
    asked = []

    def recorded(q, k, v, **how):
        asked.append(how.get("implementation"))
        return attention(q, k, v, **(how | {"implementation": "xla"}))

    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    model = random_model(tiny(**CUDNN, head_dim=8, num_key_value_heads=2, sliding_window=window), 0.1)
    tokens = random_tokens((2, 7))
    expected = model(tokens)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(model(tokens), expected, atol=1e-2)
    assert asked == [None, "cudnn"]


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="Unknown model preset '8m'") as error:
        LlamaConfig.preset("8m")
    assert all(name in str(error.value) for name in LlamaConfig.presets())


def test_bad_tokens_are_refused():
    model = random_model(tiny())
    with pytest.raises(ValueError, match="33 tokens is longer than max_position_embeddings=32"):
        model(jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ValueError, match=r"must be \[batch, sequence\], but their shape is \(5,\)"):
        model(jnp.zeros(5, jnp.int32))


def test_a_token_outside_the_vocabulary_shows_as_nan():
    logits = forward(random_model(tiny()), jnp.asarray([[1, TINY["vocab_size"]], [1, 2]], jnp.int32))
    assert np.isnan(logits[0, 1]).all()
    assert np.isfinite(logits[1]).all()


# --- sampling ---


def test_generate_depends_on_its_key_only():
    model = random_model(tiny())
    prompt = random_tokens((4,))
    first, again = (generate(model, prompt, 20, key=jax.random.key(0)) for _ in range(2))
    other = generate(model, prompt, 20, key=jax.random.key(1))
    assert first.dtype == jnp.int32
    assert first.shape == (20,)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_temperature_zero_takes_the_likeliest_token_of_each_prefix():
    model = random_model(tiny())
    for seed in (0, 1):
        sample = generate(model, np.array([3, 1, 4]), 6, key=jax.random.key(seed), temperature=0.0)
        tokens = jnp.concatenate([jnp.asarray([3, 1, 4], jnp.int32), sample])
        # The logits at position t, which see the tokens up to t only, name token t + 1.
        np.testing.assert_array_equal(forward(model, tokens[None])[0, 2:-1].argmax(axis=-1), sample)


@pytest.mark.slow
def test_samples_follow_the_softmax_of_the_logits_over_the_temperature():
    model = random_model(tiny(vocab_size=4))
    prompt = jnp.asarray([2, 0], jnp.int32)
    draws = [int(generate(model, prompt, 1, key=jax.random.key(i), temperature=2.0)[0]) for i in range(600)]
    expected = np.asarray(jax.nn.softmax(forward(model, prompt[None])[0, -1] / 2.0))
    assert np.ptp(expected) > 0.1  # far enough from uniform for the test to tell
    frequencies = np.bincount(draws, minlength=4) / len(draws)
    # Four standard deviations of a frequency over 600 draws are at most 4 sqrt(0.25 / 600) = 0.08.
    assert np.abs(frequencies - expected).max() < 0.08


@pytest.mark.parametrize(
    ("prompt", "length", "temperature", "message"),
    [
        ([], 3, 1.0, "non-empty sequence of integers"),
        ([[1, 2]], 3, 1.0, "non-empty sequence of integers"),
        ([1.5], 3, 1.0, "non-empty sequence of integers"),
        ([1, 37], 3, 1.0, "token ids, 1 to 37, must lie in 0 to 36"),
        ([-1, 2], 3, 1.0, "token ids, -1 to 2, must lie in 0 to 36"),
        ([1], 0, 1.0, "length=0 must be at least 1"),
        ([1], 3, -1.0, "temperature=-1.0 must be finite and not negative"),
        ([1], 3, math.nan, "temperature=nan must be finite"),
        ([1] * 30, 3, 1.0, "A prompt of 30 tokens and 3 new ones exceed max_position_embeddings=32"),
    ],
)
def test_bad_requests_for_text_are_refused(prompt, length, temperature, message):
    model = random_model(tiny())
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, length, key=jax.random.key(0), temperature=temperature)
