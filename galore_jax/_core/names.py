# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The name that was meant by one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` with the closest of the known names, in any case; empty if none is close.

    >>> did_you_mean("AdamW8bit", ["adamw", "adamw_8bit"]), did_you_mean("sgd", ["adamw", "muon"])
    (' (did you mean adamw_8bit?)', '')
    """
    lowered = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" (did you mean {lowered[close[0]]}?)" if close else ""
