"""The name by which the field calls a model, from whatever a config calls it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def model_name(weights: str) -> str:
    """What to call the model behind `model.weights`.

    A Hub id stays as it is, but for Gemma 2, which SAELens and TransformerLens name without the
    organisation; a folder or a file gives its own name without the ending.
    """
    path = Path(weights)
    if path.suffix == ".gguf" or path.is_absolute() or path.exists() or len(path.parts) != 2:
        return path.stem if path.suffix == ".gguf" else path.name
    return weights.removeprefix("google/") if "gemma-2-" in weights else weights
