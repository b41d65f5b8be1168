"""Checkpoints: opened, checked against the parameter table, and loaded as our parameter tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from activation_cache.config import ModelConfig
from activation_cache.gemma.config import EMBEDDING_HF, GemmaConfig, config_from_hf
from activation_cache.gemma.params import Parameter, parameter_table, placement
from activation_cache.language_model.gguf_file import GgufFile, open_gguf
from activation_cache.language_model.locate import (
    is_gguf,
    locate_weights,
    read_config_json,
    sampled_fingerprint,
)
from activation_cache.language_model.shape import gguf_config
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import read_json
from activation_cache.storage.safetensors_file import SafetensorsFile, open_safetensors

INDEX = "model.safetensors.index.json"

Index = tuple[slice, ...]
Params = dict[str, Any]


@dataclass(frozen=True)
class FolderCheckpoint:
    """A Hugging Face folder: config.json and one or several safetensors files."""

    path: Path
    config: GemmaConfig
    files: tuple[SafetensorsFile, ...]
    tensors: Mapping[str, tuple[SafetensorsFile, str]]  # by name without prefix: file, full name

    def fingerprint(self) -> str:
        """The sampled sha256 of its files (`sampled_fingerprint`), config.json included."""
        files = [(file.path, file.header_bytes) for file in self.files]
        return sampled_fingerprint(files, extra=(self.path / "config.json").read_bytes())

    def read(self, parameter: Parameter, index: Index = ()) -> np.ndarray:
        """A tensor, or a part of it, in the checkpoint's layout."""
        file, name = self.tensors[parameter.hf]
        return file.read(name, index)


@dataclass(frozen=True)
class GgufCheckpoint:
    """A GGUF file."""

    path: Path
    config: GemmaConfig
    file: GgufFile

    def fingerprint(self) -> str:
        """The sampled sha256 of the file (`sampled_fingerprint`)."""
        return sampled_fingerprint([(self.path, self.file.header_bytes)])

    def read(self, parameter: Parameter, index: Index = ()) -> np.ndarray:
        """A tensor, or a part of it, in the checkpoint's layout; norm gains are w, not 1 + w."""
        values = self.file.read(parameter.gguf, index)
        # llama.cpp's converter stores norm gains as 1 + w.
        return values - np.float32(1) if parameter.is_norm else values


# A model on disk, with the presence, shape and type of every tensor checked.
Checkpoint = FolderCheckpoint | GgufCheckpoint


def weight_fingerprint(model: ModelConfig) -> str:
    """The sampled sha256 of the weights (`sampled_fingerprint`), without loading them.

    Raises:
        UserError: weights are missing, truncated, or don't fit their config.
    """
    return open_checkpoint(model).fingerprint()


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """Open what `model.weights` names and check every tensor by the files' headers.

    Raises:
        UserError: missing, truncated or wrong-architecture weights; missing, unexpected or
            mis-shaped tensors, or some of a type that can't be read.
    """
    path = locate_weights(model)
    return open_gguf_checkpoint(path) if is_gguf(path) else open_folder_checkpoint(path)


def open_gguf_checkpoint(path: Path) -> GgufCheckpoint:
    """Open a GGUF file; see `open_checkpoint`."""
    file = open_gguf(path)
    parts = file.metadata.get("split.count", 1)
    if parts != 1:
        raise UserError(
            f"{path} is one of {parts} parts of a model, and one file is read: join them with "
            "llama.cpp's `llama-gguf-split --merge FIRST_PART WHOLE.gguf`."
        )
    config = gguf_config(file)
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    _check_tensors(found, {p.gguf: p.shape for p in parameter_table(config)}, source=path)
    return GgufCheckpoint(path=path, config=config, file=file)


def open_folder_checkpoint(folder: Path) -> FolderCheckpoint:
    """Open a Hugging Face folder; see `open_checkpoint`."""
    config = config_from_hf(read_config_json(folder), source=str(folder / "config.json"))
    files = tuple(open_safetensors(path) for path in _safetensors_paths(folder))
    where = {name: (file, name) for file in files for name in file.entries}
    prefix = _text_prefix(list(where), folder=folder)
    tensors = {
        name.removeprefix(prefix): entry
        for name, entry in where.items()
        # Old checkpoints carry RoPE's frequencies, which follow from the config.
        if name.startswith(prefix) and not name.endswith(("lm_head.weight", "inv_freq"))
    }
    for file, full in tensors.values():
        file.check_dtype(full)
    found = {name: file.entries[full].shape for name, (file, full) in tensors.items()}
    _check_tensors(found, {p.hf: p.shape for p in parameter_table(config)}, source=folder)
    return FolderCheckpoint(path=folder, config=config, files=files, tensors=tensors)


def _safetensors_paths(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"{folder} has neither model.safetensors nor {INDEX}: weights are read from "
                "safetensors or GGUF. Download them, or convert a .bin checkpoint."
            )
        return [single]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} has no weight_map from tensors to files: it is damaged. Download it again."
        ) from error
    if missing:
        raise UserError(
            f"{index} lists {len(names)} files of which {len(missing)} are missing: "
            f"{_some(missing)}. Download them."
        )
    return [folder / name for name in names]


def _text_prefix(names: list[str], *, folder: Path) -> str:
    """What stands before `embed_tokens.weight`: `model.`, or a multimodal model's longer one."""
    prefixes = [name.removesuffix(EMBEDDING_HF) for name in names if name.endswith(EMBEDDING_HF)]
    if len(prefixes) != 1:
        raise UserError(
            f"{folder} has {len(prefixes)} tensors named *{EMBEDDING_HF} among {len(names)}: "
            "exactly one is needed. These are not the weights of a Gemma language model."
        )
    return prefixes[0]


def _check_tensors(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], *, source: Path
) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"{source} has {len(found)} tensors and lacks {len(missing)} of the {len(wanted)} that "
            f"its config asks for: {_some(missing)}. The weights and the config are not of one "
            "model, or the download is incomplete."
        )
    misshapen = [
        f"{name} has shape {list(found[name])} and needs {list(shape)}"
        for name, shape in wanted.items()
        if found[name] != shape
    ]
    if misshapen:
        raise UserError(
            f"{source}: {_some(misshapen)}. The weights and the config are not of one model."
        )
    extra = [name for name in found if name not in wanted]
    if extra:
        raise UserError(
            f"{source} has {len(extra)} tensors that its architecture doesn't know: "
            f"{_some(extra)}. Only plain Gemma 2 and 3 text models are read: merge adapters "
            "first, and choose a checkpoint that isn't quantised, or a .gguf file."
        )


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"


def load_parameters(
    checkpoint: Checkpoint, *, dtype: DTypeLike, meshes: Sequence[Mesh], only: str | None = None
) -> list[Params]:
    """Read all parameters into the tree that `gemma.forward.Gemma` takes, a replica for each mesh.

    This process reads the parts of each tensor that its devices hold, each part once, and keeps one
    part in memory at a time.

    Args:
        dtype: of the embedding and the projections; norm gains stay float32, in which they are
            used.
        meshes: of distinct devices, which may belong to other processes.
        only: the key at the top of the tree to read; None reads all.
    """
    trees: list[Params] = [{} for _ in meshes]
    for parameter in parameter_table(checkpoint.config):
        if only not in (None, parameter.path[0]):
            continue
        arrays = _load_parameter(checkpoint, parameter, dtype=dtype, meshes=meshes)
        for tree, array in zip(trees, arrays, strict=True):
            *parents, leaf = parameter.path
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[leaf] = array
    return trees


def _load_parameter(
    checkpoint: Checkpoint, parameter: Parameter, *, dtype: DTypeLike, meshes: Sequence[Mesh]
) -> list[jax.Array]:
    shape = parameter.tree_shape
    placements = [placement(parameter, checkpoint.config, mesh) for mesh in meshes]
    holders: dict[tuple[tuple[int, int], ...], list[tuple[int, jax.Device]]] = {}
    for number, one in enumerate(placements):
        for device, index in one.addressable_devices_indices_map(shape).items():
            assert index is not None
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            holders.setdefault(bounds, []).append((number, device))
    pieces: list[list[jax.Array]] = [[] for _ in meshes]
    for bounds, slots in holders.items():
        part = tuple(slice(start, stop) for start, stop in bounds)
        values = checkpoint.read(parameter, part[::-1] if parameter.is_projection else part)
        values = values.T if parameter.is_projection else values
        values = np.ascontiguousarray(values, jnp.float32 if parameter.is_norm else dtype)
        for number, device in slots:
            pieces[number].append(jax.device_put(values, device))
    return [
        jax.make_array_from_single_device_arrays(shape, one, held)
        for one, held in zip(placements, pieces, strict=True)
    ]
