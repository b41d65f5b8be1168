"""From `model.weights` of a config to files on this machine: a folder, a .gguf file, or the Hub."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from activation_cache.config import NO_MODEL, ModelConfig
from activation_cache.runtime.errors import UserError
from activation_cache.storage import hub
from activation_cache.storage.files import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
_SMALL_FILES = ["config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
_WEIGHT_FILES = ["*.safetensors", "model.safetensors.index.json"]

_SAMPLES_PER_FILE = 16
_SAMPLE_BYTES = 2**20


def is_gguf(path: Path) -> bool:
    """Whether a located path is a GGUF file; else it is a Hugging Face folder."""
    return path.suffix == ".gguf"


def locate_weights(model: ModelConfig, *, with_weights: bool = True) -> Path:
    """The local folder or .gguf file that `model.weights` names.

    Args:
        model: `weights` is a path or a Hub id; `revision` is used for the Hub only.
        with_weights: False fetches only the config and the tokenizer from the Hub.

    Raises:
        UserError: no such path, another kind of file, or the Hub doesn't give it.
    """
    if model.weights == NO_MODEL:
        raise UserError(
            "this needs a language model, and the config has none, for its rows were imported: "
            "give model.weights, a Gemma that the rows are of, where the import has token ids. "
            "Training, L0 and FVU need no model"
        )
    path = Path(model.weights)
    if path.is_dir() or (path.is_file() and is_gguf(path)):
        return path
    if path.is_file():
        raise UserError(
            f"model.weights is the file {path}: it must be a .gguf file, a folder with "
            "config.json and safetensors, or a Hub id. For safetensors name their folder."
        )
    if is_gguf(path) or not _HUB_ID.fullmatch(model.weights):
        raise UserError(
            f"model.weights is {model.weights}: there is no such file or folder here, and it is "
            "not a Hub id of the form organisation/name. Correct the path."
        )
    patterns = _SMALL_FILES + (_WEIGHT_FILES if with_weights else [])
    return hub.fetch(
        model.weights, revision=model.revision, patterns=patterns, named_by="model.weights"
    )


def read_config_json(folder: Path) -> dict[str, object]:
    """`config.json` of a Hugging Face folder; raises `UserError` when missing or not JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json: a folder of weights needs config.json, safetensors and "
            "tokenizer.json. Name another folder, or the .gguf file itself."
        )
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object: the file is damaged. Download it again.")
    return raw


def file_identity(file: Path) -> tuple[int, ...]:
    """Changes when a file is written anew or replaced; empty where there is none."""
    if not file.is_file():
        return ()
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def sampled_fingerprint(files: Iterable[tuple[Path, bytes]], *, extra: bytes = b"") -> str:
    """A sha256 by which checkpoints are told apart without reading them whole.

    It covers `extra`, every file's size and header, and 16 evenly spaced samples of 1 MiB per
    file. A change confined to unsampled bytes goes unnoticed; two trainings of one model differ
    everywhere. While the files stay as they are, a process reads them once.

    Args:
        files: (path, header bytes) in a fixed order.
        extra: what else makes the model, such as config.json.
    """
    return _sampled(tuple((path, file_identity(path), header) for path, header in files), extra)


# Each cohort of a sweep needs it, and 16 MiB of each file may come over a network.
@functools.lru_cache(maxsize=8)
def _sampled(files: tuple[tuple[Path, tuple[int, ...], bytes], ...], extra: bytes) -> str:
    digest = hashlib.sha256(len(extra).to_bytes(8, "little") + extra)
    for path, _, header in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little") + len(header).to_bytes(8, "little") + header)
        last_start = max(size - _SAMPLE_BYTES, 0)
        with open(path, "rb") as file:
            for sample in range(_SAMPLES_PER_FILE):
                file.seek(last_start * sample // (_SAMPLES_PER_FILE - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
