"""The gradient of the mean-centred logits against transformers' Gemma in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from activation_cache.config import ModelConfig
from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import load_model
from tests.support.tiny_gemma import write_tiny_gemma

pytestmark = pytest.mark.slow

LENGTH = 24  # past the window of 5, and past a query block


def theirs(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    return model.eval()


def their_gradient(model: Any, tap: Tap, tokens: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The same by autograd: what is at the tap becomes a leaf."""
    held: dict[str, torch.Tensor] = {}

    def leaf(value: torch.Tensor) -> torch.Tensor:
        held["x"] = value.detach().requires_grad_(True)
        return held["x"]

    layer = model.model.layers[tap.layer]
    if tap.site == "attn_out_prelinear":
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (leaf(args[0]),))
    elif tap.site == "mlp_out":
        layer.post_feedforward_layernorm.register_forward_hook(lambda _, __, out: leaf(out))
    else:
        layer.register_forward_hook(
            lambda _, __, out: (leaf(out[0]), *out[1:]) if isinstance(out, tuple) else leaf(out)
        )
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits = model(ids).logits[:, :-1]
    picked = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.mean(dim=-1)
    (picked * torch.from_numpy(counted)).sum().backward()
    grad = held["x"].grad
    assert grad is not None
    return grad.numpy()


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize(
    "tap", [Tap("resid_post", 0), Tap("mlp_out", 2), Tap("attn_out_prelinear", 1)]
)
def test_the_gradient_is_theirs(tmp_path: Path, family: Any, tap: Tap):
    folder = write_tiny_gemma(tmp_path / "gemma", family=family)
    ours = load_model(ModelConfig(weights=str(folder), dtype="float32"))
    random = np.random.default_rng(3)
    tokens = random.integers(5, 400, (3, LENGTH)).astype(np.int32)
    tokens[:, 0] = 2
    counted = random.uniform(size=(3, LENGTH - 1)) < 0.7
    found = np.asarray(ours.gradient(tokens, tap, counted))
    expected = their_gradient(theirs(folder), tap, tokens, counted)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert not found[:, -1].any(), "the last position predicts nothing"
