"""The client of JAX's coordination service: private to JAX, used in one file, missed in words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from jax._src import distributed

from activation_cache.runtime.coordination import client
from tests.support.paths import ROOT


def test_a_jax_without_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "global_state", SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"^JAX .* has no jax\._src\.distributed"):
        client()


def test_no_other_file_uses_private_modules_of_jax():
    own = ROOT / "activation_cache" / "runtime" / "coordination.py"
    files = [
        file
        for package in ("activation_cache", "sae_train", "launch", "benchmarks")
        for file in (ROOT / package).rglob("*.py")
    ]
    assert own in files
    assert [file for file in files if "jax._src" in file.read_text()] == [own]
