# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the Python blocks of Markdown pages as a reader would, top to bottom, one namespace a page.

    python tests/run_pages.py PAGE ...

A block of ``text`` right behind a block of ``python`` is what that prints, with ``...`` for any text.  Blocks that begin with
``>>>`` are doctests.  Prints what is wrong, and exits with the number of pages that have something wrong.
"""

import contextlib
import doctest
import io
import os
import re
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    body: str
    line: int  # of its first line
    follows: bool  # the block before it, with nothing in between


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page.

    >>> blocks("```python\\nx = 1\\n```\\n\\n```text\\n```")[1]
    Block(language='text', body='', line=6, follows=True)
    """
    found, end = [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        follows = bool(found) and not text[end : match.start()].strip()
        found.append(Block(match["language"], textwrap.dedent(match["body"]), line, follows))
        end = match.end()
    return found


def run(page: Path) -> list[str]:
    """What is wrong with a page."""
    namespace, wrong, printed = {"__name__": "__main__"}, [], None
    for block in blocks(page.read_text()):
        place = f"{page}:{block.line}"
        if block.language == "text" and block.follows and printed is not None:
            if not doctest.OutputChecker().check_output(block.body, printed, OPTIONS):
                wrong.append(f"{place}: printed\n{printed}")
            printed = None
            continue
        if printed:
            wrong.append(f"{place}: nothing says that the block before prints\n{printed}")
        printed = None
        if block.language != "python" or block.body.startswith(">>>"):
            continue
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * (block.line - 1) + block.body, str(page), "exec"), namespace)
        except Exception:
            wrong.append(f"{place}: {traceback.format_exc()}")
            break
        printed = output.getvalue()
    if printed:
        wrong.append(f"{page}: nothing says that the last block prints\n{printed}")
    return wrong


def main() -> int:
    pages = [Path(name).resolve() for name in sys.argv[1:]]
    failed = 0
    for page in pages:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            wrong = run(page)
        results = doctest.testfile(str(page), module_relative=False, optionflags=OPTIONS)
        if wrong or results.failed:
            failed += 1
            print("\n".join(wrong), flush=True)
    return failed


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
