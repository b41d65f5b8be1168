"""transformers' Gemma 2 as an oracle: a tiny random one, and a config of a run on it.

Tests put hooks on it to see and to replace activations.

Legend: D model width, HEADS width of all heads joined, F latents, S tokens of a sequence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from sae_train.config.run import Config
from tests.support.saes import make_config
from tests.support.tiny_gemma import write_tiny_tokenizer

D, HEADS, F, S = 36, 60, 40, 16
HELD_OUT = 7
PAD, EOS, BOS = 0, 1, 2
TAPS = [("resid_post", 2), ("resid_post", 2), ("attn_out_prelinear", 1)]


def their_model() -> Any:
    """A Gemma 2 with random weights, the norms' gains not 0 as transformers starts them."""
    config = transformers.Gemma2Config(
        vocab_size=403, hidden_size=D, intermediate_size=52, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=7,
        sliding_window=5, max_position_embeddings=64, attn_implementation="eager",
        final_logit_softcapping=5.0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.4 if "norm" in name else 0.25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def their_losses(
    theirs: Any, tokens: np.ndarray, *, tap: tuple[str, int], replace: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Losses [B, S-1] in float64, and the activations at `tap`, which `replace` may change."""
    seen: dict[str, np.ndarray] = {}

    def change(value: torch.Tensor) -> torch.Tensor:
        seen["acts"] = value.detach().numpy()
        if replace is None:
            return value
        return torch.from_numpy(replace(seen["acts"]).astype(np.float32))

    layer = theirs.model.layers[tap[1]]
    if tap[0] == "attn_out_prelinear":
        handle = layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: (change(args[0]),)
        )
    else:
        handle = layer.register_forward_hook(
            lambda _, __, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = theirs(ids).logits.double()
    handle.remove()
    log_p = torch.log_softmax(logits[:, :-1], dim=-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0].numpy(), seen["acts"]


def save_their_gemma(folder: Path) -> Any:
    """Write `their_model` with a tokenizer as a folder that we load; returns it."""
    theirs = their_model()
    theirs.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return theirs


def _write_text(path: Path) -> Path:
    """Many EOS, a last sequence filled up with padding, and text that spells out padding."""
    random = np.random.default_rng(4)
    words = ["the", "and", "of", "there", "inner", "on", "re", "<pad>"]
    documents = [" ".join(random.choice(words, random.integers(3, 9))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def world_config(folder: Path, *, importance_sequences: int = 0) -> Config:
    """A run's config on the model in `folder`/gemma and on text that is written there."""
    values = make_config(width=F, layer=2).model_dump()
    values["model"] = {"weights": str(folder / "gemma"), "dtype": "float32"}
    values["text"] |= {
        "source": [str(_write_text(folder / "text.jsonl"))],
        "sequence_length": S,
        "held_out_sequences": HELD_OUT,
    }
    sites = [{"site": site, "layers": [layer]} for site, layer in dict.fromkeys(TAPS)]
    values["cache"] |= {"path": str(folder / "store"), "sites": sites, "tokens": 200}
    values["evaluation"] = {"sequences": HELD_OUT, "sequences_per_batch": 3}
    values["evaluation"] |= {"importance_sequences": importance_sequences}
    return Config.model_validate(values)
