# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Prints pip's constraints for the oldest versions that pyproject.toml allows of what the package needs, with the extra train.

python .ci/oldest.py > oldest.txt && PIP_CONSTRAINT=oldest.txt .ci/run
"""

import re
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["train"]:
        name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
