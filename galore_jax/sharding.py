# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Sharding of the optimizer state, and the helpers that preserve it.

    parameter         (*batch, m, n)            (*b, x, y)       the mesh axes of each dimension
    basis             (*batch, m, r)            (*b, x, -)       on the left; (*batch, n, r), (*b, y, -) on the right
    moments           (*batch, r, n)            (*b, -, y)       on the left; (*batch, m, r), (*b, x, -) on the right
    8-bit codes       as the moment             as the moment
    their scales      one per 256 of the last   as the moment    if that splits no block; otherwise the last axis is replicated

The moments of a parameter that is not projected are sharded like the parameter.  Scalars, and arrays with one number per matrix,
are replicated.

On a mesh with explicit axes, sharding is part of an array's type, and ``update`` returns the types that it receives.  On
automatic axes, the compiler chooses the sharding, and :func:`state_sharding` provides the constraints.  The resharding
helpers do nothing there.

Factorizations do not accept a sharded matrix dimension, so a refresh uses automatic axes internally.  There the partitioner sums
small matrices over devices and gathers no gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def state_sharding(tx: optax.GradientTransformation, params: Any, param_shardings: Any) -> Any:
    """Returns the sharding of every array in an optimizer state, for ``jax.jit(tx.init, out_shardings=...)``.

    This function traces ``tx.init`` on the mesh with all axes explicit, and computes nothing.  The code that creates each array
    therefore determines its sharding.  No sharding is inferred from a name or a shape.

    Args:
      tx: Any transformation, such as a preset, or a :class:`galore_jax.layerwise.Layerwise`.
      params: A tree of arrays or ``jax.ShapeDtypeStruct``.  They do not need a sharding.
      param_shardings: A tree with a ``NamedSharding`` for each parameter, all on one mesh.  The mesh axes may be explicit or
        automatic.

    Returns:
      A tree with the structure of the state, whose leaves are ``NamedSharding`` on that mesh.

    Raises:
      TypeError: A sharding is not a ``NamedSharding``.
      ValueError: The shardings are on different meshes, or a sharding does not divide its parameter.

    >>> from galore_jax import galore_adamw
    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
    >>> params = {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}
    >>> shardings = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp", "model"))}
    >>> tx = galore_adamw(0.01, rank=8)
    >>> sharded = state_sharding(tx, params, shardings)
    >>> optax.tree.get(sharded, "left")["kernel"].spec, optax.tree.get(sharded, "mu")["kernel"].spec
    (P('fsdp', None), P(None, 'model'))
    """
    mesh = _checked_mesh(params, param_shardings)
    explicit = mesh.abstract_mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Explicit))

    def typed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=NamedSharding(explicit, sharding.spec))

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(typed, params, param_shardings))
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else PartitionSpec()), state
    )


def _checked_mesh(params: Any, shardings: Any) -> Mesh | AbstractMesh:
    """Checks every sharding and returns the mesh that they share."""
    meshes = []

    def check(path: tuple, leaf: Any, sharding: Any) -> None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(sharding, NamedSharding):
            raise TypeError(f"The sharding of {name!r} is {sharding!r}: write a jax.sharding.NamedSharding.")
        meshes.append(sharding.mesh)
        if sharding.mesh != meshes[0]:
            raise ValueError(
                f"The sharding of {name!r} is on the mesh {sharding.mesh}, and others are on {meshes[0]}: use one."
            )
        try:
            sharding.shard_shape(jnp.shape(leaf))
        except ValueError as error:
            raise ValueError(
                f"{name!r} of shape {jnp.shape(leaf)} cannot be sharded by {sharding.spec}: {error}"
            ) from error

    jax.tree_util.tree_map_with_path(check, params, shardings)
    if not meshes:
        raise ValueError("params contains no arrays, so there is no mesh to shard the state on.")
    return meshes[0]


def spec_of(array: Any) -> tuple | None:
    """Returns the partition spec in the array's type, one entry per dimension, or None if its mesh has no explicit axes."""
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return (*sharding.spec, *(None,) * (jnp.ndim(array) - len(sharding.spec)))


def named(spec: tuple | None, array: Any) -> NamedSharding | None:
    """Returns ``spec`` as a sharding on the mesh of ``array``, or None if ``spec`` is None."""
    return None if spec is None else NamedSharding(jax.typeof(array).sharding.mesh, PartitionSpec(*spec))


def like(array: jax.Array, reference: jax.Array) -> jax.Array:
    """Reshards ``array`` like ``reference``."""
    spec = spec_of(reference)
    return array if spec is None else jax.sharding.reshard(array, named(spec, reference))


def gather(array: jax.Array, dimensions: Collection[int] | None = None) -> jax.Array:
    """Replicates ``array`` over the explicit axes of its mesh along ``dimensions``.  None means all dimensions."""
    spec = spec_of(array)
    if spec is None:
        return array
    kept = tuple(None if dimensions is None or i in dimensions else entry for i, entry in enumerate(spec))
    return jax.sharding.reshard(array, named(kept, array))


def by_partitioner(function: Callable[..., Any], results: Any) -> Callable[..., Any]:
    """Wraps ``function`` so that its mesh axes are automatic inside, and XLA's partitioner places its arrays.

    Args:
      function: A function of arrays.  It must not close over any arrays.
      results: Arrays with the shapes and sharding types of the values that ``function`` returns.
    """
    leaves, treedef = jax.tree.flatten(results)
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in leaves if spec_of(leaf) is not None]
    if not meshes:
        return function
    explicit = [
        name for name, kind in zip(meshes[0].axis_names, meshes[0].axis_types, strict=True) if kind is AxisType.Explicit
    ]
    specs = [NamedSharding(meshes[0], PartitionSpec(*(spec_of(leaf) or ()))) for leaf in leaves]
    return jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=treedef.unflatten(specs))


def cut_by_stack(matrices: jax.Array, batch: int) -> bool:
    """Returns True if explicit axes shard an array (*batch, m, n), with ``batch`` batch axes, along batch axes only."""
    spec = spec_of(matrices)
    return spec is not None and any(spec[:batch]) and not any(spec[batch:])


def by_stack(function: Callable[..., Any], common: tuple, stacks: tuple, results: Any, batch: int) -> Any:
    """Runs ``function(*common, *stacks)`` on each device's part of the stacks.

    Args:
      function: A function that treats each matrix of a stack independently.
      common: Arguments that are replicated on all devices.
      stacks: Arguments whose arrays have the shape (*batch, ...).  :func:`cut_by_stack` is True for the first of these arrays.
      results: Arrays with the shapes and sharding types of the values that ``function`` returns.
      batch: The number of batch axes.
    """
    first = jax.tree.leaves(stacks)[0]
    parts = PartitionSpec(*(spec_of(first) or ())[:batch])
    whole = jax.tree.map(lambda _: PartitionSpec(), common)
    mapped = jax.shard_map(
        function,
        mesh=jax.typeof(first).sharding.mesh,
        in_specs=(*whole, *jax.tree.map(lambda _: parts, stacks)),
        out_specs=jax.tree.map(lambda _: parts, results),
        check_vma=False,
    )
    found = mapped(*common, *jax.tree.map(lambda x: jax.sharding.reshard(x, named(tuple(parts), first)), stacks))
    return jax.tree.map(like, found, results)


def zeros(shape: tuple[int, ...], dtype: Any, spec: tuple | None, array: Any) -> jax.Array:
    """Returns zeros sharded by ``spec`` on the mesh of ``array``."""
    return jnp.zeros(shape, dtype, device=named(spec, array))


def blocked(array: jax.Array, width: int) -> jax.Array:
    """Reshapes (*lead, n) to (*lead, ⌈n / w⌉, w) with zero padding at the end, where w = min(``width``, n).

    The block axis keeps the sharding of the last axis.  If that sharding would split a block, the last axis is gathered first.
    """
    *lead, n = array.shape
    width = max(min(n, width), 1)
    count = -(-n // width)
    spec = spec_of(array)
    if spec is not None and (n % width or count % _parts(array, spec[-1])):
        array, spec = gather(array, [array.ndim - 1]), (*spec[:-1], None)
    if n % width:
        array = jnp.pad(array, [(0, 0)] * len(lead) + [(0, count * width - n)])
    return jax.lax.reshape(array, (*lead, count, width), out_sharding=named(spec and (*spec, None), array))


def merged(blocks: jax.Array) -> jax.Array:
    """Reshapes (*lead, blocks, w) to (*lead, blocks w), which keeps the sharding of the blocks."""
    *lead, count, width = blocks.shape
    spec = spec_of(blocks)
    return jax.lax.reshape(blocks, (*lead, count * width), out_sharding=named(spec and spec[:-1], blocks))


def spread(values: jax.Array, array: jax.Array, width: int) -> jax.Array:
    """Repeats the values (*lead, blocks) of each block of ``array`` over that block, to (*lead, n).

    The values are float32 or bfloat16.  The result is float32 and sharded like ``array``.
    """
    n = array.shape[-1]

    def by_reshape(values: jax.Array) -> jax.Array:
        wide = values.astype(jnp.float32)
        whole = merged(jnp.broadcast_to(wide[..., None], (*values.shape, max(min(n, width), 1))))
        return like(jax.lax.slice_in_dim(whole, 0, n, axis=-1), array)

    return _on_tiles(functools.partial(spread_by_products, n=n, width=width), by_reshape, values, array, width)


def spread_by_products(values: jax.Array, n: int, width: int) -> jax.Array:
    """Repeats (*lead, blocks) to (*lead, n) in float32, by products with a matrix of zeros, ones and 256.

    The result is exact for all values, including subnormal and non-finite ones.  Each product handles sixteen bits.  A byte,
    and a byte times 256, are exact in bfloat16, and their sum is exact in float32.

    >>> spread_by_products(jnp.array([[1e-40, jnp.nan, -3.3]]), n=5, width=2)
    Array([[ 1.0e-40,  1.0e-40,      nan,      nan, -3.3e+00]], dtype=float32)
    """
    here = (jnp.arange(n)[None, :] // width == jnp.arange(values.shape[-1])[:, None]).astype(jnp.bfloat16)
    both = jnp.concatenate([here, here * 256])

    def of_sixteen_bits(word: jax.Array) -> jax.Array:
        bytes_ = jnp.concatenate([word & 0xFF, word >> 8], axis=-1).astype(jnp.bfloat16)
        return jnp.matmul(bytes_, both, preferred_element_type=jnp.float32).astype(jnp.uint32)

    # A bfloat16 is the upper half of a float32.
    if values.dtype == jnp.bfloat16:
        whole = of_sixteen_bits(jax.lax.bitcast_convert_type(values, jnp.uint16)) << 16
    else:
        bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
        whole = of_sixteen_bits(bits >> 16) << 16 | of_sixteen_bits(bits & 0xFFFF)
    return jax.lax.bitcast_convert_type(whole, jnp.float32)


def maxima(array: jax.Array, width: int) -> jax.Array:
    """Returns the maximum of each block of ``width``: (*lead, n) -> (*lead, ⌈n / w⌉).  All values must be nonnegative."""

    def by_reshape(array: jax.Array) -> jax.Array:
        return jnp.max(blocked(array, width), axis=-1)

    def window(array: jax.Array, width: int) -> jax.Array:
        sizes = (*(1,) * (array.ndim - 1), width)
        padding = (*((0, 0),) * (array.ndim - 1), (0, -array.shape[-1] % width))
        return jax.lax.reduce_window(array, jnp.zeros([], array.dtype), jax.lax.max, sizes, sizes, padding)

    def by_windows(array: jax.Array) -> jax.Array:
        # Use two passes, because one wide window over an array with few, long rows needs more scratch memory than the TPU
        # compiler allows.
        low = math.gcd(width, 8)
        return window(window(array, width // low), low)

    return _on_tiles(by_windows, by_reshape, array, array, width)


def _on_tiles(
    tiled: Callable[[jax.Array], jax.Array],
    default: Callable[[jax.Array], jax.Array],
    operand: jax.Array,
    array: jax.Array,
    width: int,
) -> jax.Array:
    """Runs ``tiled`` on a TPU and ``default`` elsewhere.

    A TPU stores arrays in tiles of the last two axes, so splitting or merging the last axis would copy the array.
    """
    if spec_of(array) is not None or array.ndim < 2 or array.shape[-1] <= width:
        return default(operand)
    return jax.lax.platform_dependent(operand, tpu=tiled, default=default)


def _parts(array: Any, entry: Any) -> int:
    """Returns the number of shards into which an entry of a partition spec splits its dimension."""
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return math.prod(jax.typeof(array).sharding.mesh.shape[name] for name in names)


def varying_zero(tree: Any) -> jax.Array:
    """Returns a zero that varies over every ``jax.shard_map`` mesh axis over which an array of the tree varies.

    A loop keeps the types of its carry, so the initial carry must vary over the same axes as the inputs.  Adding this zero
    ensures that, and the addition compiles to nothing.
    """
    zero = jnp.zeros([], jnp.float32)
    for leaf in jax.tree.leaves(tree):
        zero = jax.lax.add(zero, jax.lax.full_like(leaf, 0, jnp.float32, shape=()))
    return zero
