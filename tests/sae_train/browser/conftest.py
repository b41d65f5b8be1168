"""The sweep, made once for both files of tests, and its server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sae_train.browser.support import browsed_sweep, serving


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return browsed_sweep(tmp_path_factory.mktemp("browsed"))


# No thread of it outlives a file's tests: others replace what threads share.
@pytest.fixture(scope="module")
def address(sweep: Path) -> Iterator[str]:
    with serving(sweep) as found:
        yield found
