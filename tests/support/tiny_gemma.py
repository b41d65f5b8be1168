"""A Gemma small enough for any test, written as a Hugging Face folder without torch.

Random weights, a byte-level-fallback tokenizer of a few hundred ids, everything odd-sized: head
dim other than d_model / heads, local and global layers, a window shorter than usual sequences.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.gemma.config import Family, GemmaConfig, config_to_hf
from activation_cache.gemma.params import parameter_table
from activation_cache.language_model.tokenizer_vocabulary import Pieces, tokenizer_from_pieces
from activation_cache.storage.files import write_json
from activation_cache.storage.safetensors_file import write_safetensors

_WORDS = ["th", "the", "in", "an", "and", "er", "on", "re", "▁the", "▁a", "▁of", "▁and", "▁t"]


def tiny_config(family: Family = "gemma3", **changes: Any) -> GemmaConfig:
    """Four layers (two of them global for Gemma 2, the third alone for Gemma 3), D = 20."""
    gemma3 = family == "gemma3"
    config = GemmaConfig(
        family=family,
        vocab_size=401,
        d_model=20,
        d_ff=28,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        query_scalar=9.0,
        window=5,
        global_layers=(False, False, True, False) if gemma3 else (False, True, False, True),
        rope_base_global=1e6 if gemma3 else 1e4,
        rope_base_local=1e4,
        rope_factor_global=1.0,
        norm_epsilon=1e-6,
        attention_softcap=None if gemma3 else 50.0,
        final_softcap=None if gemma3 else 30.0,
        context_length=256,
        bos_id=2,
    )
    return dataclasses.replace(config, **changes)


def tiny_pieces() -> Pieces:
    """<pad> <eos> <bos> <unk>, a user-defined piece, 256 bytes, ASCII, and a few merged pieces."""
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    special, user = ["<pad>", "<eos>", "<bos>", "<unk>"], ["\n\n"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*special, *user, *byte_pieces, *characters, *_WORDS]
    types = [3, 3, 3, 2, 4] + [6] * 256 + [1] * (len(characters) + len(_WORDS))
    scores = [-float(index) for index in range(len(pieces))]
    return Pieces(pieces=pieces, scores=scores, types=types)


def tiny_tensors(config: GemmaConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by Hugging Face name; norm gains far from 0."""
    rng = np.random.default_rng(seed)
    return {
        f"model.{parameter.hf}": (
            rng.standard_normal(parameter.shape) * (0.3 if parameter.is_norm else 0.2)
        ).astype(np.float32)
        for parameter in parameter_table(config)
    }


def write_tiny_gemma(
    folder: Path, *, family: Family = "gemma3", seed: int = 0, **changes: Any
) -> Path:
    """Write config.json, model.safetensors and tokenizer.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **changes)
    tensors = tiny_tensors(config, seed=seed)
    write_json(folder / "config.json", config_to_hf(config))
    with open(folder / "model.safetensors", "wb") as file:
        write_safetensors(file, {k: v.shape for k, v in tensors.items()}, tensors.items())
    write_tiny_tokenizer(folder)
    return folder


def write_tiny_tokenizer(folder: Path) -> None:
    """Write tokenizer.json alone."""
    tokenizer_from_pieces(tiny_pieces(), source="tiny").save(str(folder / "tokenizer.json"))
