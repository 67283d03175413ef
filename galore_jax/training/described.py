# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What an optimizer does with each parameter of a model in a folder: what ``galore-jax describe`` prints.

Only shapes are read: those of a run from its settings, and those of a Hugging Face folder from the headers of its safetensors,
whatever the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from safetensors import SafetensorError, safe_open

from galore_jax.description import Description, describe
from galore_jax.training import run_folder
from galore_jax.training.adapters import part
from galore_jax.training.config import PretrainConfig
from galore_jax.training.optimizers import make_optimizer, make_schedule
from galore_jax.training.program import program
from galore_jax.weights import dequantize

# By their names in safetensors.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "BOOL": np.bool_,
} | {f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


@dataclasses.dataclass(frozen=True)
class DescribeConfig:
    """Say of every parameter of a model which matrices an optimizer projects, at what rank, and what state it keeps.

    The state's bytes are those of float32 or coded moments, as galore-jax pretrain has them.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Run folder of galore-jax pretrain, or a Hugging Face folder with safetensors, of any model."""
    optimizer: str | None = None
    """An optimizer of galore-jax pretrain. None: the run's own, or galore_adamw."""
    rank: int | float | None = None
    """Rank of the projected gradients, as in galore-jax pretrain. None: the run's own, or mostly 0.25."""
    proj_type: str | None = None
    """Side of each matrix that is projected, as in galore-jax pretrain."""
    json: bool = False
    """Print JSON: the totals, and a list of the parameters."""


def describe_folder(config: DescribeConfig) -> Description:
    """The description of a model in a folder.

    Raises:
      ValueError, FileNotFoundError: the folder or a setting cannot be used.
    """
    folder = config.folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; name a run folder of galore-jax pretrain or a Hugging Face folder."
        )
    run, params = PretrainConfig(optimizer="galore_adamw"), _shapes(folder)
    if not params:
        if run_folder.expect(str(folder), folder, "pretrained", "model", "classifier") != "pretrained":
            raise FileNotFoundError(f"{folder} holds a config.json and no safetensors; download its weights too.")
        run, model_config, _ = run_folder.load_config(folder)
        params = part(jax.eval_shape(dequantize, program(run, model_config).state[0]))[0]
    chosen = {name: getattr(config, name) for name in ("optimizer", "rank", "proj_type")}
    run = dataclasses.replace(run, **{name: value for name, value in chosen.items() if value is not None})
    return describe(make_optimizer(run, make_schedule(run)), params)


def _shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of all arrays in the safetensors of a folder."""
    shapes = {}
    with contextlib.ExitStack() as stack:
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = stack.enter_context(safe_open(path, "np"))
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); download it again.") from error
            for name in file.keys():  # noqa: SIM118  (not a dict)
                array = file.get_slice(name)
                shapes[name] = jax.ShapeDtypeStruct(tuple(array.get_shape()), _DTYPES[array.get_dtype()])
    return shapes
