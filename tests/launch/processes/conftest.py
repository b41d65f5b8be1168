"""What both files of tests of a rolling store begin with; imported where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.pipeline import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def one_model() -> Iterator[None]:
    """The model is loaded, and its programs compiled, once for all runs of a file."""
    from tests.launch.processes.rolling import load_the_model_once

    with pytest.MonkeyPatch.context() as patched:
        load_the_model_once(patched)
        yield
