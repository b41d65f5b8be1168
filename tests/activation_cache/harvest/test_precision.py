"""Rows made with rounded products: the store says so, and takes no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from activation_cache.harvest import harvest as harvest_module
from activation_cache.harvest.harvest import harvest
from activation_cache.harvest.matching_store import open_matching_store
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import Store, open_store
from tests.support.harvests import ROWS, interrupted, sections
from tests.support.stores import file_hashes

pytestmark = pytest.mark.slow


def test_a_store_says_at_which_precision_its_rows_were_made(
    finished: Store, gemma: Path, corpus: Path, tmp_path: Path
):
    made = sections(gemma, corpus, tmp_path / "s", model__precision="bfloat16")
    harvest(**made)
    store, tap = open_store(tmp_path / "s"), finished.taps[0]
    assert store.manifest.model.precision == "bfloat16"
    ours, exact = (one.read(tap, start=0, stop=ROWS) for one in (store, finished))
    differ = np.abs(ours - exact).max() / np.abs(exact).max()
    assert 1e-4 < differ < 0.05
    for other in ("auto", "bfloat16"):
        open_matching_store(**sections(gemma, corpus, store.path, model__precision=other))
    words = r"model.precision: the store has 'bfloat16', the config says 'float32'"
    with pytest.raises(UserError, match=words):
        open_matching_store(**sections(gemma, corpus, store.path, model__precision="float32"))


def test_a_store_of_float32_says_nothing_and_is_what_it_was(finished: Store):
    """So that it has the identity of one made before there was a choice."""
    manifest = json.loads((finished.path / "manifest.json").read_text())
    assert "precision" not in manifest["model"]
    assert finished.manifest.model.precision == "float32"


def test_a_harvest_goes_on_at_no_other_precision(gemma: Path, corpus: Path, tmp_path: Path):
    path = tmp_path / "s"
    interrupted(gemma, corpus, path, model__precision="bfloat16")
    before = file_hashes(path)
    for precision, words in (
        ("auto", "rows so far were made with products in bfloat16, and auto makes them in float32"),
        ("float32", "the store has 'bfloat16', the config says 'float32'"),
    ):
        with pytest.raises(UserError, match=rf"another config\. model.precision: .*{words}"):
            harvest(**sections(gemma, corpus, path, model__precision=precision))
    assert file_hashes(path) == before


def test_what_the_devices_lack_is_told_before_the_text_is_read(
    gemma: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(harvest_module, "prepare_tokens", None)
    with pytest.raises(UserError, match=r"model.precision is bfloat16_3x, .* cpu"):
        harvest(**sections(gemma, corpus, tmp_path / "s", model__precision="bfloat16_3x"))
