"""`load_sae`: read an SAE in Gemma Scope's, Gemma Scope 2's or SAELens' format, whoever wrote it.

What a format leaves open is settled here, once: names in lower or upper case, tensors in bfloat16,
a decoder bias that the encoder subtracts (SAELens' `apply_b_dec_to_input`, folded on reading).
Whatever its architecture, an SAE is read into the form of `sae_train.release.Sae`; what isn't an
SAE on raw activations is refused in words (docs/release.md).

Legend: D model width, F latents.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from activation_cache.errors import UserError
from activation_cache.safetensors_file import open_safetensors
from activation_cache.storage import AnyPath, Place, on_disk, place, read_json
from sae_train.hooks import hugging_face_hook, parse_hook, transformer_lens_hook
from sae_train.hub_address import fetch_sae, is_hub_address
from sae_train.release import TENSORS, Sae, check_finite, gated_as_jumprelu

Tensors = dict[str, np.ndarray]

_SUPPORTED = (
    "params.npz (Gemma Scope), params.safetensors with config.json (Gemma Scope 2) or "
    "sae_weights.safetensors with cfg.json (SAELens)"
)
# Files of formats that hold an SAE we don't read, with what to do about it.
_FOREIGN = {
    "ae.pt": "a dictionary_learning SAE, a torch pickle: save its tensors with numpy.savez as "
    "params.npz (JumpReLU ones have the same names and shapes)",
    "sae.safetensors": "a sparsify SAE: save it in SAELens' form (architecture topk)",
}


def load_sae(path: AnyPath) -> Sae:
    """Read an SAE from a folder or from its weights file.

    A path here, a bucket's, or an address on the Hub (`organisation/repository/folder`), tried in
    that order. A run's folder or its `release/` is read through the SAELens folder in it, the
    format that says most about the origin.

    Returns:
        An `Sae` on raw activations, float32 NumPy tensors.

    Raises:
        UserError: nothing readable there, a damaged file, a tensor missing, unknown, mis-shaped
            or not finite, or an architecture that isn't read (a transcoder, ...).
    """
    there = place(path)
    if not there.exists() and is_hub_address(str(path)):
        there = fetch_sae(str(path))
    found = _find(there)
    # A lone .npz may have any name; Gemma Scope's files are often renamed to be told apart.
    reader = _READERS.get(found.name, _read_gemma_scope)
    with on_disk(found.parent, (found.name, "cfg.json", "config.json")) as folder:
        try:
            sae = reader(folder / found.name)
        except UserError as error:
            if isinstance(found, Path):
                raise
            raise UserError(str(error).replace(str(folder), str(found.parent))) from error
    check_finite(sae.tensors, where=str(found))
    return sae


def _find(path: Place) -> Place:
    """The weights file that `path` stands for."""
    if path.is_file() and (path.name in _READERS or path.suffix == ".npz"):
        return path
    if not path.exists():
        raise UserError(f"no SAE at {path}: there is no such file or folder")
    for folder in (path, path / "sae_lens", path / "release" / "sae_lens"):
        for name in _READERS:
            if (folder / name).is_file():
                return folder / name
    for name, reason in _FOREIGN.items():
        if path.name == name or (path / name).is_file():
            raise UserError(f"{path} is {reason}")
    raise UserError(f"no SAE at {path}: it should be or hold {_SUPPORTED}")


def _read_gemma_scope(path: Path) -> Sae:
    try:
        # Not np.load: given a file that isn't a zip it tries others and leaves it open.
        with open(path, "rb") as raw, NpzFile(raw, allow_pickle=False) as file:
            tensors = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from error
    return _checked(_capital(tensors), path=path, metadata=_metadata_from_path(path))


def _read_gemma_scope_2(path: Path) -> Sae:
    config_path = path.with_name("config.json")
    config = _read_config(config_path) if config_path.is_file() else {}
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise UserError(
            f"{config_path} has architecture {architecture!r}; only 'jump_relu' is read"
        )
    hook, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    kind = config.get("type", "sae")
    if kind != "sae" or config.get("affine_connection") or hook_out not in (None, hook):
        raise UserError(
            f"{config_path} describes a transcoder (type {kind!r}, from {hook} to {hook_out}): "
            "only SAEs, which reconstruct their own input, are read"
        )
    metadata = {
        "model_name": config.get("model_name"),
        "hf_hook_name": hook,
        "l0": config.get("l0"),
    }
    if hook and (tap := parse_hook(hook)):
        metadata["hook_name"] = transformer_lens_hook(*tap)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return _checked(_capital(_read_safetensors(path)), path=path, metadata=metadata)


def _read_sae_lens(path: Path) -> Sae:
    config_path = path.with_name("cfg.json")
    if not config_path.is_file():
        raise UserError(f"{path} needs SAELens' cfg.json beside it: {config_path} is missing")
    config = _read_config(config_path)
    normalisation = config.get("normalize_activations")
    if normalisation not in (None, False, "none"):
        raise UserError(
            f"{config_path} has normalize_activations {normalisation!r}: its factor isn't in the "
            "files. Fold it with SAELens (fold_activation_norm_scaling_factor) and save again"
        )
    tensors = _read_safetensors(path)
    _drop_saelens_relics(tensors, path=path)
    form = _sae_lens_form(config, tensors, path=config_path)
    metadata = _sae_lens_metadata(config)
    sae = dataclasses.replace(_checked(form.tensors, path=path, metadata=metadata), **form.own)
    for key, found in (("d_in", sae.W_enc.shape[0]), ("d_sae", sae.W_enc.shape[1])):
        if config.get(key, found) != found:
            raise UserError(f"{config_path} says {key} {config[key]}, the tensors have {found}")
    # SAELens' own default is true, for folders from before the key existed.
    return _without_input_bias(sae) if config.get("apply_b_dec_to_input", True) else sae


@dataclass(frozen=True)
class _Form:
    """The five tensors, and what else an architecture says."""

    tensors: Tensors
    own: dict[str, Any] = field(default_factory=dict)


def _sae_lens_form(config: dict[str, Any], tensors: Tensors, *, path: Path) -> _Form:
    """Bring the architectures of SAELens into the form of `Sae`."""
    architecture = config.get("architecture", "standard")
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if architecture == "standard" and activation == "topk":  # as SAELens up to version 5 had it
        architecture = "topk"
        config = {**(config.get("activation_fn_kwargs") or {}), **config}
    if architecture == "jumprelu":
        return _Form(tensors)
    if architecture == "standard" and activation == "relu":
        return _Form(_without_threshold(tensors), {"architecture": "relu"})
    if architecture == "gated":
        return _Form(_from_gated(tensors, path=path), {"architecture": "gated"})
    if architecture == "topk":
        k = config.get("k")
        if not isinstance(k, int) or k < 1:
            raise UserError(f"{path} must give a whole k of at least 1 for topk; it has {k!r}")
        if config.get("rescale_acts_by_decoder_norm"):
            tensors = _unit_decoder(tensors)
        return _Form(_without_threshold(tensors), {"architecture": "topk", "k": k})
    raise UserError(
        f"{path} has architecture {architecture!r} with activation {activation!r}; read are "
        "'jumprelu', 'standard' with relu, 'gated' and 'topk'"
    )


def _without_threshold(tensors: Tensors) -> Tensors:
    if "b_enc" not in tensors:
        return tensors  # told of later, with the names
    return tensors | {"threshold": np.zeros(tensors["b_enc"].shape, np.float32)}


def _from_gated(tensors: Tensors, *, path: Path) -> Tensors:
    missing = sorted({"W_enc", "b_gate", "b_mag", "r_mag"} - set(tensors))
    if missing:
        raise UserError(f"{path} describes a gated SAE, and its tensors lack {missing}")
    exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    kept = {name: t for name, t in tensors.items() if name not in ("b_gate", "b_mag", "r_mag")}
    folded = gated_as_jumprelu(exact, latent_axis=1)
    return kept | {name: tensor.astype(np.float32) for name, tensor in folded.items()}


def _unit_decoder(tensors: Tensors) -> Tensors:
    """Fold what SAELens' `rescale_acts_by_decoder_norm` does at run time into the weights."""
    norm_F = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1)
    folded = {
        "W_enc": tensors["W_enc"] * norm_F[None, :],
        "b_enc": tensors["b_enc"] * norm_F,
        "W_dec": tensors["W_dec"] / norm_F[:, None],
    }
    return tensors | {name: tensor.astype(np.float32) for name, tensor in folded.items()}


_READERS: dict[str, Callable[[Path], Sae]] = {
    "sae_weights.safetensors": _read_sae_lens,
    "params.safetensors": _read_gemma_scope_2,
    "params.npz": _read_gemma_scope,
}


def _without_input_bias(sae: Sae) -> Sae:
    """Fold z = (x - b_dec) W_enc + b_enc into the encoder bias, in float64."""
    tensors = sae.tensors
    shift_F = tensors["b_dec"].astype(np.float64) @ tensors["W_enc"].astype(np.float64)
    return dataclasses.replace(sae, b_enc=(tensors["b_enc"] - shift_F).astype(np.float32))


def _drop_saelens_relics(tensors: Tensors, *, path: Path) -> None:
    """Undo what older SAELens versions saved: a factor of ones, the threshold's logarithm."""
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not np.allclose(factor.astype(np.float32), 1.0):
        raise UserError(f"{path} has a scaling_factor other than 1, which isn't supported")
    if "threshold" not in tensors and "log_threshold" in tensors:
        tensors["threshold"] = np.exp(tensors.pop("log_threshold").astype(np.float32))


def _sae_lens_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The `metadata` of SAELens 6; before that its keys lay beside the others."""
    if isinstance(config.get("metadata"), dict):
        return dict(config["metadata"])
    keys = ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path")
    renamed = {"hook_name": config.get("hook_point"), **config}
    return {key: renamed[key] for key in keys if renamed.get(key) is not None}


def _metadata_from_path(path: Path) -> dict[str, Any]:
    """What Gemma Scope's repository and folder names say; a `params.npz` itself says nothing."""
    name = path.absolute().as_posix()
    metadata: dict[str, Any] = {}
    if l0 := re.search(r"average_l0_(\d+)", name):
        metadata["l0"] = int(l0[1])
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)", name)
    layer = re.search(r"layer_(\d+)", name)
    if repository and layer:
        size, tuned, short = repository.groups()
        sites = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out_prelinear"}
        site: Any = sites[short]
        metadata["model_name"] = f"gemma-2-{size}" + ("-it" if tuned == "it" else "")
        metadata["hook_name"] = transformer_lens_hook(site, int(layer[1]))
        metadata["hf_hook_name"] = hugging_face_hook(site, int(layer[1]))
    return metadata


def _capital(tensors: Tensors) -> Tensors:
    return {"W_" + name[2:] if name.startswith("w_") else name: t for name, t in tensors.items()}


def _checked(tensors: Tensors, *, path: Path, metadata: dict[str, Any]) -> Sae:
    """Names, dtypes and shapes of the five tensors, in float32."""
    if "affine_skip_connection" in tensors or "W_skip" in tensors:
        raise UserError(f"{path} holds a skip transcoder (an affine connection), not an SAE")
    if set(tensors) != set(TENSORS):
        missing = sorted(set(TENSORS) - set(tensors)) or "nothing"
        unknown = sorted(set(tensors) - set(TENSORS)) or "nothing"
        raise UserError(
            f"{path} must hold exactly {', '.join(TENSORS)}: missing {missing}, unknown {unknown}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise UserError(f"{name} in {path} must be floating point, not {tensor.dtype}")
    _check_shapes({name: tensor.shape for name, tensor in tensors.items()}, path=path)
    kept = {name: np.ascontiguousarray(tensors[name], np.float32) for name in TENSORS}
    return Sae(
        W_enc=kept["W_enc"],
        W_dec=kept["W_dec"],
        b_enc=kept["b_enc"],
        b_dec=kept["b_dec"],
        threshold=kept["threshold"],
        metadata=metadata,
    )


def _check_shapes(shapes: dict[str, tuple[int, ...]], *, path: Path) -> None:
    found = ", ".join(f"{name} {list(shapes[name])}" for name in TENSORS)
    rule = "W_enc [D, F], W_dec [F, D], b_enc [F], b_dec [D], threshold [F]"
    if len(shapes["W_enc"]) != 2 or len(shapes["W_dec"]) != 2:
        raise UserError(f"{path} must have {rule}; found {found}")
    D, F = shapes["W_enc"]
    right = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    if shapes == right:
        return
    hint = ""
    if shapes["b_enc"] == (D,) or shapes["W_dec"] == (D, F):
        hint = ": a weight matrix is transposed"
    elif shapes["W_dec"][0] == F and shapes["b_dec"] == shapes["W_dec"][1:]:
        hint = ": it writes another width than it reads, a transcoder and not an SAE"
    raise UserError(f"{path} must have {rule}; found {found}{hint}")


def _read_safetensors(path: Path) -> Tensors:
    file = open_safetensors(path)
    try:
        return {name: file.read(name) for name in file.entries}
    except UserError:
        raise
    except ValueError as error:  # a shape that doesn't fit its bytes
        raise _damaged(path, error) from error


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} must be a JSON object, not {type(config).__name__}")
    return config


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be read ({error}): damaged or cut short; fetch or export again")
