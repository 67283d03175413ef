# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Chromium, driven through a pipe in its DevTools protocol: https://chromedevtools.github.io/devtools-protocol."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
TIMEOUT = 60  # seconds for a reply or an event


def find() -> str | None:
    """The path of Chromium or Chrome, if one is installed."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One tab of a browser that reaches no host but this one; ``events`` has what happened in it, to be cleared by the caller."""

    def __init__(self, program: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._number, self._received, self._session = 0, b"", {}
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # The browser reads commands from file descriptor 3 and writes replies to 4.
        theirs, self._commands = _pipe()
        self._replies, their_replies = _pipe()
        script = f'exec 3<&{theirs} 4>&{their_replies} {theirs}<&- {their_replies}>&-; exec "$@"'
        command = [program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(theirs, their_replies), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(their_replies)
        [tab] = [one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=tab["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)

    def send(self, method: str, **arguments: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments} | self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._number:
            self.events.append(reply)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def open(self, url: str) -> None:
        """Opens a page, and returns when all of it is loaded."""
        page = self.send("Page.navigate", url=url)["loaderId"]
        loaded = {"name": "load", "loaderId": page}
        while not any(loaded.items() <= event["params"].items() for event in self.events):
            self.events.append(self._next())

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript, or of its promise."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"]["description"])
        return done["result"].get("value")

    def view(self, width: int, scheme: str) -> None:
        """Makes the window that wide, and the reader's preference light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def close(self) -> None:
        """Ends the browser."""
        os.close(self._commands)  # which tells it to
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._replies)
        self._profile.cleanup()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._replies], [], [], TIMEOUT)
            data = os.read(self._replies, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError(f"The browser said nothing for {TIMEOUT} s, or has ended.")
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)


def _pipe() -> list[int]:
    """The two ends of a pipe, beyond the file descriptors that the browser is given."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]
    for end in low:
        os.close(end)
    return high
