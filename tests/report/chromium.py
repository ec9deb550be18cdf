# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium driven over its debugging pipe: no package beyond the standard library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage", "--mute-audio",
    "--remote-debugging-pipe",
)  # fmt: skip

PATIENCE = 30.0
"""Seconds after which a browser that does not answer is a failure."""


class Chromium:
    """One browser; `open` gives a page."""

    def __init__(self) -> None:
        assert BROWSER is not None
        self._folder = tempfile.mkdtemp(prefix="refmoe-chromium-")
        their_input, self._output = os.pipe()
        self._input, their_output = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_input, their_output)]

        def pipes() -> None:  # the browser reads commands from 3 and answers on 4
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [BROWSER, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, close_fds=False, preexec_fn=pipes
        )
        for end in (their_input, their_output, *high):
            os.close(end)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(PATIENCE)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            os.close(self._input)
            os.close(self._output)
            shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command, keep the events that come meanwhile, and return the answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._output, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait(self, event: str) -> None:
        """Return once an event of this name has come since the events were last cleared."""
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        # not select: in a long test run the descriptor's number may be beyond its limit
        poll = select.poll()
        poll.register(self._input, select.POLLIN)
        while b"\0" not in self._buffer:
            ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            assert ready, "chromium does not answer"
            chunk = os.read(self._input, 1 << 20)
            assert chunk, "chromium has ended"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def open(self, path: Path, width: int = 1200, *, dark: bool = False, script: bool = True) -> Page:
        """Load a file in a window of this width and wait until it is there."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        phone = width < 600
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=phone)
        page.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        page.send("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")
        return page


class Page:
    """One loaded page."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self.browser, self.session, self.target = browser, session, target

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def tap(self, x: float, y: float) -> None:
        """Touch a point of the window."""
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions, console messages and log entries since the page was loaded."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.browser.events if event.get("method") in bad]

    def requests(self) -> list[str]:
        """Addresses asked for since the page was loaded."""
        sent = [event for event in self.browser.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a picture of the page."""
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)


KEYS = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}
