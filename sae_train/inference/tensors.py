"""Tensors and configs of released SAEs on disk: read, renamed, checked.

Legend: D model width, F latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import read_json
from activation_cache.storage.safetensors_file import open_safetensors
from sae_train.inference.sae import SKIP, TENSORS, Sae

Tensors = dict[str, np.ndarray]


def capital(tensors: Tensors) -> Tensors:
    """Gemma Scope 2's lower-case names as ours."""
    return {"W_" + name[2:] if name.startswith("w_") else name: t for name, t in tensors.items()}


def checked(tensors: Tensors, *, path: Path, metadata: dict[str, Any]) -> Sae:
    """An `Sae` of these tensors in float32, their names, dtypes and shapes checked.

    Raises:
        UserError: a tensor is missing, unknown, not floating point or of another shape.
    """
    skip = tensors.get(SKIP)
    tensors = {name: tensor for name, tensor in tensors.items() if name != SKIP}
    if set(tensors) != set(TENSORS):
        missing = sorted(set(TENSORS) - set(tensors)) or "nothing"
        unknown = sorted(set(tensors) - set(TENSORS)) or "nothing"
        raise UserError(
            f"{path} must hold exactly {', '.join(TENSORS)}: missing {missing}, unknown {unknown}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise UserError(f"{name} in {path} must be floating point, not {tensor.dtype}")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    _check_shapes(shapes, path=path, skip=None if skip is None else skip.shape)
    kept = {name: np.ascontiguousarray(tensors[name], np.float32) for name in TENSORS}
    return Sae(
        W_enc=kept["W_enc"],
        W_dec=kept["W_dec"],
        b_enc=kept["b_enc"],
        b_dec=kept["b_dec"],
        threshold=kept["threshold"],
        metadata=metadata,
        W_skip=None if skip is None else np.ascontiguousarray(skip, np.float32),
    )


def _check_shapes(
    shapes: dict[str, tuple[int, ...]], *, path: Path, skip: tuple[int, ...] | None
) -> None:
    found = ", ".join(f"{name} {list(shapes[name])}" for name in TENSORS)
    rule = "W_enc [D, F], W_dec [F, D], b_enc [F], b_dec [D], threshold [F]"
    if len(shapes["W_enc"]) != 2 or len(shapes["W_dec"]) != 2:
        raise UserError(f"{path} must have {rule}; found {found}")
    D, F = shapes["W_enc"]
    right = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    if shapes == right and skip not in (None, (D, D)):
        raise UserError(f"{path} must have an affine skip [D, D] with D {D}; it has {list(skip)}")
    if shapes == right:
        return
    hint = ""
    if shapes["b_enc"] == (D,) or shapes["W_dec"] == (D, F):
        hint = ": a weight matrix is transposed"
    elif shapes["W_dec"][0] == F and shapes["b_dec"] == shapes["W_dec"][1:]:
        hint = ": it writes another width than it reads, and transcoders of one width are read"
    raise UserError(f"{path} must have {rule}; found {found}{hint}")


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file; raises `UserError` when it is damaged."""
    file = open_safetensors(path)
    try:
        return {name: file.read(name) for name in file.entries}
    except UserError:
        raise
    except ValueError as error:  # a shape that doesn't fit its bytes
        raise damaged(path, error) from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; raises `UserError` for anything else."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} must be a JSON object, not {type(config).__name__}")
    return config


def text_of(config: dict[str, Any], key: str, *, path: Path) -> str | None:
    """What a config says under `key`: text or nothing; raises `UserError` for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path} has {key} {value!r}, which must be text: fetch or export it again")
    return value


def damaged(path: Path, error: Exception) -> UserError:
    """The error of a file that isn't what its name says."""
    return UserError(f"{path} can't be read ({error}): damaged or cut short; fetch or export again")
