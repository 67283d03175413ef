# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How much of its devices a run uses: their names, their peak memory, and the share of their peak speed (MFU).

The floating-point operations of a token, forward and backward, are those of the matrix products of the model (PaLM, arXiv
2204.02311, appendix B), whatever the optimizer or rematerialization adds:

    6 N + 12 L H d S ,

N parameters but for the embedding table, L layers, H heads of size d, S tokens of a sequence.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import jax

from galore_jax.models import LlamaConfig
from galore_jax.planning.targets import peak_flops


def names(params: Any) -> str:
    """The devices that the parameters are on.

    >>> import jax.numpy as jnp
    >>> names({"kernel": jnp.ones(3)})
    'cpu'
    """
    devices = jax.tree.leaves(params)[0].devices()
    kind = next(iter(devices)).device_kind
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def peak_memory_bytes() -> int:
    """The most that a device of this process has had in use; on a CPU, the most that the process has had."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if known:
        return max(known)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def flops_per_token(model: LlamaConfig, sequence: float) -> float:
    """Floating-point operations of a step for one token, in sequences of so many.

    >>> f"{flops_per_token(LlamaConfig.preset('60m'), 256):.3g}"
    '2.63e+08'
    """
    table = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    attention = model.num_hidden_layers * model.num_attention_heads * model.head_size * sequence
    return 6 * (model.num_params - table) + 12 * attention


def full_speed(model: LlamaConfig, sequence: float, params: Any) -> float | None:
    """Tokens a second at the peak of the devices that the parameters are on; None if their peak is not known."""
    devices = jax.tree.leaves(params)[0].devices()
    peak = peak_flops(next(iter(devices)).device_kind)
    return None if peak is None else len(devices) * peak / flops_per_token(model, sequence)
