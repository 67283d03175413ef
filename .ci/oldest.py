# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Prints pip's constraints for the oldest versions that pyproject.toml allows of jax, what else the core needs, and Flax.

    python .ci/oldest.py > oldest.txt && PIP_CONSTRAINT=oldest.txt .ci/run

The rest is the newest that goes with them.  A later version that the tests need counts instead.
"""

import re
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    flax = [line for line in project["optional-dependencies"]["train"] if line.startswith("flax")]
    tests = dict(re.findall(r"([\w-]+)>=([\d.]+)", "\n".join(project["optional-dependencies"]["test"])))
    for requirement in project["dependencies"] + flax:
        name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
        print(f"{name}=={tests.get(name, version)}")


if __name__ == "__main__":
    main()
