"""The sweep and its server, made once for both files of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sae_train.browser.support import browsed_sweep, serving


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return browsed_sweep(tmp_path_factory.mktemp("browsed"))


@pytest.fixture(scope="session")
def address(sweep: Path) -> Iterator[str]:
    with serving(sweep) as found:
        yield found
