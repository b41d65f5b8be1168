"""`load_sae`: read an SAE in Gemma Scope's, Gemma Scope 2's or SAELens' format, whoever wrote it.

An SAE or a transcoder of any architecture becomes a `sae_train.inference.sae.Sae`. Differences
between files of one format are resolved on reading: names in lower or upper case, tensors in
bfloat16, a decoder bias that the encoder subtracts (SAELens' `apply_b_dec_to_input`). Anything
else, such as a crosscoder, is refused with a message that says why (docs/release.md).

Legend: D model width, F latents.
"""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from numpy.lib.npyio import NpzFile

from activation_cache.config import Site
from activation_cache.precision import Precision, PrecisionChoice, resolve
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import AnyPath, StoragePath, disk_errors, on_disk, storage_path
from sae_train.inference.circuit_tracer import CONFIG, LAYER_FILE, read_circuit_tracer
from sae_train.inference.hook_names import hugging_face_hook, parse_hook, transformer_lens_hook
from sae_train.inference.hub_address import fetch_sae, is_hub_address
from sae_train.inference.read_sae_lens import read_sae_lens
from sae_train.inference.sae import SKIP, Sae, check_finite
from sae_train.inference.tensors import (
    Tensors,
    capital,
    checked,
    damaged,
    read_config,
    read_tensors,
    text_of,
)

_SUPPORTED = (
    "params.npz (Gemma Scope), params.safetensors with config.json (Gemma Scope 2), "
    "sae_weights.safetensors with cfg.json (SAELens) or layer_N.safetensors with config.yaml "
    "(circuit-tracer)"
)
# Files of other tools that hold an SAE we don't read, with what to do about it.
_GEMMA_SCOPE_SITES: dict[str, Site] = {
    "res": "resid_post",
    "mlp": "mlp_out",
    "att": "attn_out_prelinear",
    "transcoders": "mlp_in_normalized",
}
_FOREIGN = {
    "ae.pt": "a dictionary_learning SAE, a torch pickle: save its tensors with numpy.savez as "
    "params.npz (JumpReLU ones have the same names and shapes)",
    "sae.safetensors": "a sparsify SAE: save it in SAELens' form (architecture topk)",
}


def load_sae(path: AnyPath, *, precision: PrecisionChoice = "float32") -> Sae:
    """Read an SAE from a folder or from its weights file.

    Args:
        path: a local path, a bucket's URL, or an address on the Hub
            (`organisation/repository/folder`), tried in that order. Of a run's folder or its
            `release/` the SAELens format is read: it says most about the origin.
        precision: how `encode` and `decode` make their products; `auto` is float32 on CPUs and
            bfloat16 on accelerators (docs/numerics.md).

    Returns:
        An `Sae` on raw activations, float32 NumPy tensors.

    Raises:
        UserError: there is nothing to read; a file is damaged; a tensor is missing, unknown, not
            finite or of a wrong shape; the architecture isn't read (a crosscoder, ...); JAX's
            devices have no such products.
    """
    resolved: Precision = "float32"
    if precision != "float32":  # every device has that, and none need be looked for
        resolved = resolve(precision, platform=jax.default_backend(), key="precision")
    with disk_errors(path, doing="read"):
        given = storage_path(path)
        if not given.exists() and is_hub_address(str(path)):
            given = fetch_sae(str(path))
        found = _find(given)
        # A lone .npz may have any name: people rename Gemma Scope's files to tell them apart.
        reader = _READERS.get(found.name, _read_gemma_scope)
        if LAYER_FILE.fullmatch(found.name):
            reader = read_circuit_tracer
        sae = _read_on_disk(found, reader)
    check_finite(sae.tensors, where=str(found))
    return dataclasses.replace(sae, precision=resolved)


def _read_on_disk(found: StoragePath, reader: Callable[[Path], Sae]) -> Sae:
    """What a reader makes of a file, which messages name as the user did."""
    with on_disk(found.parent, (found.name, "cfg.json", "config.json", CONFIG)) as folder:
        try:
            return reader(folder / found.name)
        except UserError as error:
            if isinstance(found, Path):
                raise
            raise UserError(str(error).replace(str(folder), str(found.parent))) from error


def _find(path: StoragePath) -> StoragePath:
    """The weights file that `path` is or holds."""
    if path.is_file() and (
        path.name in _READERS or path.suffix == ".npz" or LAYER_FILE.fullmatch(path.name)
    ):
        return path
    if not path.exists():
        raise UserError(f"no SAE at {path}: there is no such file or folder")
    for folder in (path, path / "sae_lens", path / "release" / "sae_lens"):
        for name in _READERS:
            if (folder / name).is_file():
                return folder / name
    for folder in (path, path / "circuit_tracer", path / "release" / "circuit_tracer"):
        if layers := _circuit_tracer_files(folder):
            if len(layers) == 1:
                return layers[0]
            raise UserError(
                f"{folder} holds the transcoders of {len(layers)} layers: name one of its files, "
                f"as {layers[0].name}"
            )
    for name, reason in _FOREIGN.items():
        if path.name == name or (path / name).is_file():
            raise UserError(f"{path} is {reason}")
    raise UserError(f"no SAE at {path}: it should be or hold {_SUPPORTED}")


def _circuit_tracer_files(folder: StoragePath) -> list[StoragePath]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if LAYER_FILE.fullmatch(path.name))


def _read_gemma_scope(path: Path) -> Sae:
    try:
        # Not np.load: it tries other formats on a file that isn't a zip, and leaves it open.
        with open(path, "rb") as raw, NpzFile(raw, allow_pickle=False) as file:
            tensors = {name: file[name] for name in file.files}
    except Exception as error:  # NumPy and zipfile raise anything for a header that isn't theirs
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a seek to nowhere
            raise
        raise damaged(path, error) from error
    return checked(capital(tensors), path=path, metadata=_metadata_from_path(path))


def _read_gemma_scope_2(path: Path) -> Sae:
    config_path = path.with_name("config.json")
    config = read_config(config_path) if config_path.is_file() else _config_from_path(path)
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise UserError(
            f"{config_path} has architecture {architecture!r}; only 'jump_relu' is read"
        )
    hook, hook_out = (
        text_of(config, key, path=config_path) for key in ("hf_hook_point_in", "hf_hook_point_out")
    )
    kind = config.get("type", "sae")
    if kind not in ("sae", "transcoder"):
        raise UserError(
            f"{config_path} describes a {kind} (from {hook} to {hook_out}): only SAEs and "
            "transcoders are read"
        )
    metadata = {
        "model_name": config.get("model_name"),
        "hf_hook_name": hook,
        "l0": config.get("l0"),
    }
    if hook and (tap := parse_hook(hook)):
        metadata["hook_name"] = transformer_lens_hook(*tap)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    tensors = _with_skip(capital(read_tensors(path)), config, path=config_path)
    if kind == "transcoder" or SKIP in tensors or hook_out not in (None, hook):
        tap = parse_hook(hook_out) if hook_out else None
        metadata["hook_name_out"] = transformer_lens_hook(*tap) if tap else None
        metadata["hf_hook_name_out"] = hook_out
    return checked(tensors, path=path, metadata=metadata)


def _with_skip(tensors: Tensors, config: dict[str, Any], *, path: Path) -> Tensors:
    """The skip under our name; raises `UserError` where config and tensors disagree about it."""
    has_skip = "affine_skip_connection" in tensors
    if config.get("affine_connection", has_skip) != has_skip:
        raise UserError(
            f"{path} has affine_connection {config['affine_connection']}, and the tensors "
            f"{'have' if has_skip else 'lack'} affine_skip_connection: fetch or export both again"
        )
    return {{"affine_skip_connection": SKIP}.get(name, name): t for name, t in tensors.items()}


_READERS: dict[str, Callable[[Path], Sae]] = {
    "sae_weights.safetensors": read_sae_lens,
    "params.safetensors": _read_gemma_scope_2,
    "params.npz": _read_gemma_scope,
}


def _metadata_from_path(path: Path) -> dict[str, Any]:
    """What Gemma Scope's repository and folder names tell; `params.npz` holds tensors only."""
    name = path.absolute().as_posix()
    metadata: dict[str, Any] = {}
    if l0 := re.search(r"average_l0_(\d+)", name):
        metadata["l0"] = int(l0[1])
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", name)
    layer = re.search(r"layer_(\d+)|embedding", name)
    if repository and layer:
        size, tuned, short = repository.groups()
        site = "embedding" if layer[1] is None else _GEMMA_SCOPE_SITES[short]
        metadata["model_name"] = f"gemma-2-{size}" + ("-it" if tuned == "it" else "")
        metadata |= _hooks(site, int(layer[1] or 0))
        if short == "transcoders":
            metadata |= _hooks("mlp_out", int(layer[1] or 0), ending="_out")
    return metadata


def _hooks(site: Site, layer: int, *, ending: str = "") -> dict[str, str]:
    return {
        f"hook_name{ending}": transformer_lens_hook(site, layer),
        f"hf_hook_name{ending}": hugging_face_hook(site, layer),
    }


def _config_from_path(path: Path) -> dict[str, Any]:
    """What the folder's name tells where Gemma Scope 2 has no config.json."""
    name = path.absolute().as_posix()
    layer = re.search(r"/transcoder(?:_all)?/layer_(\d+)_", name)
    if layer is None:
        return {}
    hooks = [hugging_face_hook(site, int(layer[1])) for site in ("mlp_in", "mlp_out")]
    return {"type": "transcoder", "hf_hook_point_in": hooks[0], "hf_hook_point_out": hooks[1]}
