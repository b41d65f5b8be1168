"""A model's architecture, read from its config.json or GGUF header without loading JAX."""

from __future__ import annotations

from activation_cache.config import ModelConfig
from activation_cache.gemma.config import (
    EMBEDDING_GGUF,
    GemmaConfig,
    config_from_gguf,
    config_from_hf,
)
from activation_cache.language_model.gguf_file import GgufFile, open_gguf
from activation_cache.language_model.locate import is_gguf, locate_weights, read_config_json


def read_gemma_config(model: ModelConfig) -> GemmaConfig:
    """The model's shape, without its weights.

    Raises:
        UserError: missing, of another architecture, or damaged.
    """
    path = locate_weights(model, with_weights=False)
    if is_gguf(path):
        return gguf_config(open_gguf(path))
    return config_from_hf(read_config_json(path), source=str(path / "config.json"))


def gguf_config(file: GgufFile) -> GemmaConfig:
    """The model's shape in a GGUF file; raises `UserError` for another architecture."""
    # The vocabulary is the embedding's rows: a converter may cut those to the tokenizer's size.
    embedding = file.tensors.get(EMBEDDING_GGUF)
    vocab_size = embedding.shape[0] if embedding and embedding.shape else 1
    return config_from_gguf(file.metadata, vocab_size=vocab_size, source=str(file.path))
