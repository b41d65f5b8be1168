"""The example of docs/import.md, on a small random model of a family that we have no forward of."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from activation_cache import write_rows
from activation_cache.store.store import open_store
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


def test_the_rows_are_the_model_s_hidden_states(tmp_path: Path):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=50, n_positions=16)
    ).eval()
    ids = torch.randint(0, 50, (30, 16))
    rows_of = runpy.run_path(str(ROOT / "examples/rows_of_any_model.py"))["rows_of"]
    rows = rows_of(model, model.transformer.h[0], ids, tap="resid_post.0")
    write_rows(rows, to=tmp_path / "store", special_ids=[49], held_out=40)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[1].numpy()
    store = open_store(tmp_path / "store")
    found = store.provenance(start=0, stop=store.rows)
    (tap,) = store.taps
    read = store.read(tap, start=0, stop=store.rows)
    np.testing.assert_allclose(read, expected[found.sequence, found.position], atol=1e-6)
    assert store.rows == int((ids[:27] != 49).sum())
    assert (store.tokens.read(range(30)) == ids.numpy()).all()
