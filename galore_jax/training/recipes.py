# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The pre-training settings of the GaLore paper by name: ``galore-jax pretrain --recipe galore-60m``.

From arXiv 2403.03507, appendix C.1, and the scripts published with it: C4, sequences of 256 tokens, 512 of them a step, bfloat16,
a warm-up over a tenth of the steps and a cosine to a tenth of the rate, bases by exact SVD of all matrices on one step.  The
tokenizer differs: the paper's is T5's, and here, unless ``--tokenizer`` names a file, one of 32,000 tokens is trained on the
text.  Beside them are the other rows of the paper's table 2, ``adamw-...`` (full rank), ``lora-...``, ``relora-...`` and
``low-rank-...``, and ``scale-...``.  The paper tried five learning rates for each and does not say which was best; here it is
0.001, one of them.  Of LoRA it gives the ranks and an alpha of 32; its dropout of 0.05 is left out.  ReLoRA merges after every
tenth of the steps, as in its authors' scripts for 60M and 130M.  SCALE has the learning rates of its authors' scripts (arXiv
2506.16659); in that for 1B the norms have one of their own, which is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from galore_jax._core.names import did_you_mean
from galore_jax.training.config import PretrainConfig

_COMMON: dict[str, Any] = {
    "data": "hf:allenai/c4:en", "tokenizer": "bpe", "vocab_size": 32000, "seq": 256, "batch": 512, "dtype": "bf16", "clip": 0.0,
    "eval_every": 1000, "save_every": 1000, "eval_tokens": 10_000_000,
}  # fmt: skip
_SIZES: dict[str, dict[str, Any]] = {
    "60m": {"steps": 10_000, "accumulate": 2},
    "130m": {"steps": 20_000, "accumulate": 2},
    "350m": {"steps": 60_000, "accumulate": 4},
    "1b": {"steps": 100_000, "accumulate": 32},
}
_RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512}
_GALORE: dict[str, Any] = {"projector": "svd", "scale": 0.25}
_BESIDE: dict[str, dict[str, Any]] = {
    size: _COMMON | {"model": size, "learning_rate": 0.001} | settings for size, settings in _SIZES.items()
}

RECIPES: dict[str, dict[str, Any]] = {
    **{
        f"galore-{size}": _COMMON
        | {
            "model": size,
            "optimizer": "galore_adamw",
            "learning_rate": 0.01,
            "rank": _RANKS[size],
            "update_proj_gap": 200,
        }
        | _GALORE
        | settings
        for size, settings in _SIZES.items()
    },
    "galore-7b": _COMMON
    | {"model": "7b", "optimizer": "galore_adamw_8bit", "learning_rate": 0.005, "rank": 1024, "update_proj_gap": 500}
    | _GALORE
    | {"steps": 150_000, "accumulate": 32, "layerwise": True},
    **{f"adamw-{size}": settings | {"optimizer": "adamw"} for size, settings in _BESIDE.items()},
    **{
        f"lora-{size}": settings | {"optimizer": "lora", "rank": _RANKS[size], "lora_alpha": 32.0}
        for size, settings in _BESIDE.items()
    },
    **{
        f"relora-{size}": settings
        | {
            "optimizer": "relora",
            "rank": _RANKS[size],
            "lora_alpha": 32.0,
            "update_proj_gap": settings["steps"] // 10,
        }
        for size, settings in _BESIDE.items()
    },
    **{
        f"low-rank-{size}": settings | {"optimizer": "low_rank", "rank": _RANKS[size]}
        for size, settings in _BESIDE.items()
    },
    **{f"scale-{size}": settings | {"optimizer": "scale"} for size, settings in _BESIDE.items() if size != "1b"},
    "scale-1b": _BESIDE["1b"] | {"optimizer": "scale", "learning_rate": 0.0002},
}
"""Name -> fields of :class:`PretrainConfig`."""


def recipe(name: str) -> PretrainConfig:
    """The settings of a recipe, whose name may be in any case; ValueError if there is none of that name.

    >>> settings = recipe("galore-60m")
    >>> settings.model, settings.rank, settings.steps, settings.batch * settings.seq
    ('60m', 128, 10000, 131072)
    """
    if name.lower() not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise ValueError(f"--recipe {name} is not known{hint}; choose one of {', '.join(RECIPES)}.")
    return PretrainConfig(**RECIPES[name.lower()])


def without_recipe(arguments: Sequence[str]) -> tuple[list[str], PretrainConfig | None]:
    """A command line without ``--recipe NAME``, and that recipe's settings, which the flags that are left change.

    >>> rest, settings = without_recipe(["--recipe", "galore-60m", "--rank", "64"])
    >>> rest, settings.rank
    (['--rank', '64'], 128)
    """
    rest, settings = [], None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--recipe":
            rest.append(word)
            continue
        value = value if equals else next(words, None)
        if value is None or settings is not None:
            raise ValueError("--recipe needs one name, and once; choose one of " + ", ".join(RECIPES) + ".")
        settings = recipe(value)
    return rest, settings
