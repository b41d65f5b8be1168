"""The folder that a GGUF file is converted to, as `transformers` loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from activation_cache.config import ModelConfig
from activation_cache.language_model.model import load_model
from tests.support.tiny_gguf import write_gguf

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_transformers_loads_it_as_written(tmp_path: Path, family: Any):
    path = write_gguf(tmp_path / "m.gguf", family=family, num_layers=6)
    config = ModelConfig(weights=str(path), dtype="float32")
    ours = load_model(config, converted=tmp_path / "weights")
    (folder,) = (tmp_path / "weights").iterdir()
    read = transformers.AutoConfig.from_pretrained(folder)
    assert (read.query_pre_attn_scalar, read.head_dim, read.bos_token_id) == (6, 6, 2)
    text = "the state of\n\nthe  union"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    (ids,) = ours.tokenizer.encode_batch([text])
    assert theirs.encode(text, add_special_tokens=False) == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.array([[2, *ids]], np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.double()
    log_p = torch.log_softmax(logits[0, :-1], dim=-1)
    expected = -log_p[torch.arange(len(ids)), torch.tensor(ids)].numpy()
    np.testing.assert_allclose(ours.losses(tokens)[0], expected, rtol=1e-5, atol=1e-5)
