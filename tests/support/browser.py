"""A page in headless Chromium, over its DevTools protocol: what it asks for, shows and answers.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
_PATIENCE = 300.0  # seconds


def chromium() -> str:
    """The browser; without one the test is skipped, or fails where CI says there must be one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    if os.environ.get("SAE_TEST_BROWSER") == "required":
        pytest.fail("SAE_TEST_BROWSER=required, and there is no chromium")
    pytest.skip("needs chromium (apt-get install chromium)")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser with one tab; it ends with the block."""
    to_browser, from_browser = os.pipe(), os.pipe()
    # Its last processes may still write into the profile after it ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # It reads commands on file descriptor 3 and writes answers on 4.
        command = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        flags = [*_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", chromium(), *flags],
            pass_fds=(to_browser[0], from_browser[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            os.close(to_browser[1])  # a browser that nobody commands any more ends
            try:
                process.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(from_browser[0])


class Browser:
    """One tab of a running browser.

    Attributes:
        requests: the addresses of everything that pages asked for.
        complaints: errors of pages' scripts.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._received = b""
        self._number = 0
        self._loads = 0
        self._session: str | None = None
        tabs = self._call("Target.getTargets")["targetInfos"]
        tab = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._call(f"{domain}.enable")

    def show(
        self,
        page: Path | str,
        *,
        width: int,
        height: int = 900,
        scheme: Literal["light", "dark"] = "light",
        until: str = "true",
    ) -> None:
        """Open a file or an address in a window of this size, and wait until it is ready."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.prefer(scheme)
        loads = self._loads
        self._call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        while self._loads == loads:
            self._next()
        self.wait(until)

    def prefer(self, scheme: Literal["light", "dark"]) -> None:
        """Tell pages that the reader prefers light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def wait(self, condition: str) -> None:
        """Until a script's expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}; {self.complaints}"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of a script's expression, as JSON carries it."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def busy(self) -> float:
        """CPU seconds that the page's main thread has spent on all pages since the first call."""
        self._call("Performance.enable", timeDomain="threadTicks")
        metrics = self._call("Performance.getMetrics")["metrics"]
        return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))

    def point_at(self, selector: str, *, click: bool = False) -> None:
        """Move the pointer to the middle of an element; with `click`, press there."""
        x, y = self._within(selector, 0.5, 0.5)
        self._mouse("mouseMoved", x, y)
        if click:
            self._mouse("mousePressed", x, y)
            self._mouse("mouseReleased", x, y)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press, move and let go; both points are shares of an element's width and height."""
        self._mouse("mousePressed", *self._within(selector, *start))
        self._mouse("mouseMoved", *self._within(selector, *end))
        self._mouse("mouseReleased", *self._within(selector, *end))

    def _within(self, selector: str, across: float, down: float) -> tuple[float, float]:
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        left, top, width, height = self.evaluate(
            "(box => [box.x, box.y, box.width, box.height])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        return left + across * width, top + down * height

    def _mouse(self, kind: str, x: float, y: float) -> None:
        button = {"button": "left", "buttons": 1, "clickCount": 1}
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def picture(self, *, whole: bool = False) -> bytes:
        """A PNG of what is in the window, or of the whole page."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def paper(self) -> bytes:
        """The page as a PDF."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=True)["data"])

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            more = os.read(self._from, 1 << 20)
            assert more, "the browser is gone"
            self._received += more
        message, _, self._received = self._received.partition(b"\0")
        event: dict[str, Any] = json.loads(message)
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        elif event.get("method") == "Page.loadEventFired":
            self._loads += 1
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(event["params"]["exceptionDetails"]))
        return event
