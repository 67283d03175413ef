# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How long `import galore_jax` takes beyond `import jax, optax`: the least of five fresh processes; must be under 2 s.

python .ci/import_time.py
"""

import subprocess
import sys

LIMIT = 2.0
MEASURE = """
import time
start = time.perf_counter()
import jax, optax
between = time.perf_counter()
import galore_jax
print(between - start, time.perf_counter() - between)
"""


def main() -> int:
    runs = [
        [float(word) for word in subprocess.check_output([sys.executable, "-c", MEASURE], text=True).split()]
        for _ in range(5)
    ]
    others, ours = (min(column) for column in zip(*runs, strict=True))
    print(f"import jax, optax: {others:.2f} s; import galore_jax beyond them: {ours:.2f} s (limit {LIMIT:.0f} s)")
    return int(ours >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
