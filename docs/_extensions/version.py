# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The version of the library at the bottom of every page."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> None:
    package = Path(config.config_file_path).parent / "galore_jax" / "__init__.py"
    [version] = re.findall(r'^__version__ = "(.+)"$', package.read_text(), re.MULTILINE)
    config.copyright = f"galore_jax {version}, Apache License 2.0"
