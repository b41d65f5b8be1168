"""A tiny model, a little text, and a finished store that no test changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from activation_cache.harvest.harvest import harvest
from activation_cache.store.store import Store, open_store
from tests.support.harvests import sections
from tests.support.tiny_gemma import write_tiny_gemma


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"the {number}th state of the union " * 5)
    return folder


@pytest.fixture(scope="module")
def finished(gemma: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished store that no test changes."""
    path = tmp_path_factory.mktemp("finished") / "store"
    harvest(**sections(gemma, corpus, path), resolved_config_yaml="name: test\n")
    return open_store(path)
