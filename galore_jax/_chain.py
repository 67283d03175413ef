# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A chain in which what follows a bare ``galore(rank=...)`` runs inside it, on the low-rank gradient.

``optax.chain`` hands full-size parameters to the ``init`` of every member, so that a plain chain cannot give the optimizer
after a projection small moments.
"""

from __future__ import annotations

import optax

from galore_jax.bare import BareGaLore


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Like ``optax.chain``, but what follows a bare ``galore(rank=...)`` becomes its inner transformation.

    ``chain(a, galore(rank=8), b, c)`` is ``optax.chain(a, galore(optax.chain(b, c), rank=8))``: b and c see the low-rank
    gradient and, for their ``params``, PᵀW.  Decoupled weight decay in b or c decays only the part of the weight inside the
    subspace, times α; to decay the whole weight, put ``optax.add_decayed_weights`` around the primitive.

    Raises:
      ValueError: for more than one bare galore, or one with nothing behind it.

    >>> import jax.numpy as jnp
    >>> from galore_jax import galore
    >>> tx = chain(galore(rank=8), optax.adam(1e-3))
    >>> tx.init({"kernel": jnp.ones((64, 256))})[0].inner_state[0][0].mu["kernel"].shape
    (8, 256)
    """
    bare = [(index, transform) for index, transform in enumerate(transforms) if isinstance(transform, BareGaLore)]
    if not bare:
        return optax.with_extra_args_support(optax.chain(*transforms))
    first, projection = bare[0]
    if len(bare) > 1 or first == len(transforms) - 1:
        raise ValueError(
            f"galore_jax.chain got {len(bare)} bare galore(rank=...) in {len(transforms)} transformations, the first at "
            f"position {first}: write one, with the transformation it is to hold behind it."
        )
    bound = projection.bind(optax.chain(*transforms[first + 1 :]))
    return optax.with_extra_args_support(optax.chain(*transforms[:first], bound))
