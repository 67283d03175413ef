# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore (Gradient Low-Rank Projection, arXiv 2403.03507) for JAX: full-parameter training with low-rank optimizer state."""

from galore_jax import matrix_view as matrix_view, projectors as projectors, refresh as refresh, residual as residual
from galore_jax.description import describe as describe
from galore_jax.limiter import limit_norm_growth as limit_norm_growth
from galore_jax.matrix_codec import MatrixCodec as MatrixCodec
from galore_jax.matrix_view import GaLoreDimensionNumbers as GaLoreDimensionNumbers
from galore_jax.memory import state_bytes as state_bytes, tree_bytes as tree_bytes
from galore_jax.offload import offload_state as offload_state
from galore_jax.presets import (
    adamw_4bit as adamw_4bit,
    apollo_adamw as apollo_adamw,
    apollo_mini as apollo_mini,
    fira_adamw as fira_adamw,
    galore_adafactor as galore_adafactor,
    galore_adamw as galore_adamw,
    galore_adamw_8bit as galore_adamw_8bit,
    galore_muon as galore_muon,
    golore_adamw as golore_adamw,
    grass_adamw as grass_adamw,
    muon as muon,
    muon_2bit as muon_2bit,
    muon_4bit as muon_4bit,
    muon_8bit as muon_8bit,
    q_apollo_mini as q_apollo_mini,
    q_galore_adamw_8bit as q_galore_adamw_8bit,
)
from galore_jax.presets.ldadam import ldadam as ldadam
from galore_jax.presets.recommendation import recommend as recommend
from galore_jax.quantize import quantize_state as quantize_state
from galore_jax.refresh import refresh_bases as refresh_bases
from galore_jax.sharding import state_sharding as state_sharding
from galore_jax.spectra import ranks_from_gradients as ranks_from_gradients
from galore_jax.transform import (
    GaLoreMemoryWarning as GaLoreMemoryWarning,
    GaLoreState as GaLoreState,
    chain as chain,
    galore as galore,
)
from galore_jax.tucker import tucker as tucker

__version__ = "0.1.0"
