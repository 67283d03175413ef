# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps sharding types stable on meshes with explicit axes; does nothing elsewhere.

On an explicit mesh the sharding is part of an array's type, and ``update`` must hand back the types it was given.  A basis and
a low-rank gradient keep the sharding of the dimensions they share with the parameter and replicate the rank dimension.
Factorisations accept no sharded matrix dimension, so the refresh gathers its matrices.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def spec_of(array: Any) -> tuple | None:
    """The partition spec in the array's type, one entry a dimension; None when it has no explicitly sharded mesh."""
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return (*sharding.spec, *(None,) * (jnp.ndim(array) - len(sharding.spec)))


def named(spec: tuple | None, array: Any) -> NamedSharding | None:
    """``spec`` on the mesh of ``array``; None stays None."""
    return None if spec is None else NamedSharding(jax.typeof(array).sharding.mesh, PartitionSpec(*spec))


def like(array: jax.Array, reference: jax.Array) -> jax.Array:
    """``array`` with the sharding type of ``reference``."""
    spec = spec_of(reference)
    return array if spec is None else jax.sharding.reshard(array, named(spec, reference))


def gather(array: jax.Array, dimensions: Collection[int] | None = None) -> jax.Array:
    """``array`` replicated over the explicit axes of its mesh, along ``dimensions`` (all of them when None)."""
    spec = spec_of(array)
    if spec is None:
        return array
    kept = tuple(None if dimensions is None or i in dimensions else entry for i, entry in enumerate(spec))
    return jax.sharding.reshard(array, named(kept, array))


def zeros(shape: tuple[int, ...], dtype: Any, spec: tuple | None, array: Any) -> jax.Array:
    """Zeros sharded by ``spec`` on the mesh of ``array``."""
    return jnp.zeros(shape, dtype, device=named(spec, array))
