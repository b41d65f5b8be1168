"""A GGUF file converted once to a Hugging Face folder.

Dequantising takes long and float32 files load in a second, so the result is kept in
`<folder>/<first 16 digits of the fingerprint>/`: config.json, model.safetensors (float32),
tokenizer.json and source.json. The folder is written under another name and renamed when complete.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from activation_cache.gemma.config import config_to_hf
from activation_cache.gemma.params import parameter_table
from activation_cache.language_model.checkpoint import (
    FolderCheckpoint,
    GgufCheckpoint,
    open_folder_checkpoint,
)
from activation_cache.language_model.tokenizer import Tokenizer
from activation_cache.runtime.errors import UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import disk_errors, make_folder, read_json, write_json
from activation_cache.storage.safetensors_file import write_safetensors

logger = logging.getLogger(__name__)

SOURCE = "source.json"
FORMAT_VERSION = 1


def converted_checkpoint(
    source: GgufCheckpoint, tokenizer: Tokenizer, *, folder: Path
) -> FolderCheckpoint:
    """The converted copy of a GGUF checkpoint, made first if it isn't there.

    Args:
        folder: under which conversions are kept.

    Raises:
        UserError: the disk refuses, or an existing copy is damaged.
    """
    fingerprint = source.fingerprint()
    target = folder / fingerprint[:16]
    if not target.exists():
        _convert(source, tokenizer, target=target, fingerprint=fingerprint)
    return _open(target, fingerprint=fingerprint)


def _open(target: Path, *, fingerprint: str) -> FolderCheckpoint:
    try:
        described = read_json(target / SOURCE)
        if described != _description(fingerprint):
            raise UserError(f"{target / SOURCE} describes {described}, not {fingerprint}")
        return open_folder_checkpoint(target)
    except (OSError, UserError) as error:
        raise UserError(
            f"the converted copy of the weights in {target} is damaged ({error}). Delete that "
            "folder: it is made again from the GGUF file."
        ) from error


def _description(fingerprint: str) -> dict[str, str | int]:
    return {"format_version": FORMAT_VERSION, "source_fingerprint": fingerprint}


def _convert(
    source: GgufCheckpoint, tokenizer: Tokenizer, *, target: Path, fingerprint: str
) -> None:
    logger.info("converting %s once to %s", source.path, target)
    temporary = make_folder(target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp"))
    table = parameter_table(source.config)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        with ProgressMeter("converting weights", total=len(table), unit="tensors") as meter:
            for done, parameter in enumerate(table):
                yield f"model.{parameter.hf}", source.read(parameter)
                meter.update(done + 1)

    try:
        with disk_errors(target, doing="write converted weights to"):
            write_json(temporary / "config.json", config_to_hf(source.config))
            with open(temporary / "model.safetensors", "wb") as file:
                write_safetensors(file, {f"model.{p.hf}": p.shape for p in table}, tensors())
                file.flush()
                os.fsync(file.fileno())
            _write_tokenizer(temporary, tokenizer)
            write_json(temporary / SOURCE, _description(fingerprint))
            _rename_unless_there(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.backend.save(str(folder / "tokenizer.json"), pretty=False)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id,
           "pad_token": tokenizer.pad_id}  # fmt: skip
    named = {key: tokenizer.backend.id_to_token(token_id) for key, token_id in ids.items()}
    write_json(folder / "tokenizer_config.json", named)


def _rename_unless_there(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        # Another process converted the same file meanwhile; its result is the same.
        if not target.is_dir():
            raise
