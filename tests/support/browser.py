"""A page in headless Chromium: its picture, and what a script finds in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

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
    "--allow-file-access-from-files",
    "--virtual-time-budget=5000",
]


def chromium() -> str:
    """The browser; without one the test is skipped, or fails where CI says there must be one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    if os.environ.get("SAE_TEST_BROWSER") == "required":
        pytest.fail("SAE_TEST_BROWSER=required, and there is no chromium")
    pytest.skip("needs chromium (apt-get install chromium)")


def _run(page: Path, *flags: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [chromium(), *_FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return done.stdout


def screenshot(page: Path, to: Path, *, width: int, height: int) -> bytes:
    """A PNG of the page in a window of this size."""
    _run(page, f"--screenshot={to}", f"--window-size={width},{height}")
    return to.read_bytes()


def measure(page: Path, script: str, *, width: int, workplace: Path) -> str:
    """What `script`, an expression over the page's `document`, is at a window `width` wide.

    The page stands in a frame, for a headless window is never narrower than 500 px.
    """
    frame = workplace / "frame.html"
    frame.write_text(
        f'<iframe src="{page.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>onload = () => { const document_ = frames[0].document;"
        f"document.title = 'found:' + ((document) => {script})(document_) }}</script>"
    )
    dumped = _run(frame, "--dump-dom", "--window-size=1400,1000")
    found = re.search(r"<title>found:(.*?)</title>", dumped)
    assert found, dumped[:2000]
    return found[1]
