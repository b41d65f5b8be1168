"""The name under which a model is known, from `model.weights` of a config."""

from __future__ import annotations

from pathlib import Path


def model_name(weights: str) -> str:
    """The name of the model that `model.weights` names.

    It is the Hub id; for Gemma 2 without the organisation, as SAELens and TransformerLens have it.
    For a folder or a file it is their own name without the ending.
    """
    path = Path(weights)
    if path.suffix == ".gguf" or path.is_absolute() or path.exists() or len(path.parts) != 2:
        return path.stem if path.suffix == ".gguf" else path.name
    return weights.removeprefix("google/") if "gemma-2-" in weights else weights
