"""SAEs and transcoders in SAELens' format, of any version that `Sae` can express.

Legend: D model width, F latents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.runtime.errors import UserError
from sae_train.config.sae import Architecture
from sae_train.inference.sae import SKIP, Sae, gated_as_jumprelu
from sae_train.inference.tensors import Tensors, checked, read_config, read_tensors

_TRANSCODERS: dict[str, Architecture] = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}


@dataclass(frozen=True)
class _Form:
    """The five tensors of an `Sae`, and the fields that its architecture sets."""

    tensors: Tensors
    fields: dict[str, Any] = field(default_factory=dict)


def read_sae_lens(path: Path) -> Sae:
    """Read `sae_weights.safetensors`, with the `cfg.json` beside it.

    Raises:
        UserError: as `load_sae`.
    """
    config_path = path.with_name("cfg.json")
    if not config_path.is_file():
        raise UserError(f"{path} needs SAELens' cfg.json beside it: {config_path} is missing")
    config = read_config(config_path)
    normalisation = config.get("normalize_activations")
    if normalisation not in (None, False, "none"):
        raise UserError(
            f"{config_path} has normalize_activations {normalisation!r}: its factor isn't in the "
            "files. Fold it with SAELens (fold_activation_norm_scaling_factor) and save again"
        )
    tensors = read_tensors(path)
    _update_old_tensors(tensors, path=path)
    metadata = _metadata(config)
    if metadata.get("hook_name") == "hook_embed":
        raise UserError(
            f"{config_path} is for hook_embed, the embedding times sqrt(D), and SAELens leaves "
            "b_dec out of that scaling: take Gemma Scope's own params.npz, which reads the table"
        )
    if str(config.get("architecture")).endswith("transcoder"):
        metadata.setdefault("hook_name_out", None)
        sae = _transcoder(config, tensors, metadata, path)
        _check_sizes(sae, config, path=config_path)
        return sae
    form = _form(config, tensors, path=config_path)
    sae = dataclasses.replace(checked(form.tensors, path=path, metadata=metadata), **form.fields)
    _check_sizes(sae, config, path=config_path)
    # SAELens takes true for folders from before the key existed.
    return _without_input_bias(sae) if config.get("apply_b_dec_to_input", True) else sae


def _check_sizes(sae: Sae, config: dict[str, Any], *, path: Path) -> None:
    sizes = {"d_in": sae.W_enc.shape[0], "d_sae": sae.W_enc.shape[1], "d_out": sae.W_dec.shape[1]}
    for key, found in sizes.items():
        if config.get(key, found) != found:
            raise UserError(f"{path} says {key} {config[key]}, the tensors have {found}")


def _transcoder(
    config: dict[str, Any], tensors: Tensors, metadata: dict[str, Any], path: Path
) -> Sae:
    """One of SAELens' transcoders: W_skip is [out, in], and none subtracts b_dec from its input."""
    name = config["architecture"]
    if name not in _TRANSCODERS:
        known = ", ".join(_TRANSCODERS)
        raise UserError(f"{path} is a {name!r}; of transcoders those read are {known}")
    architecture = _TRANSCODERS[name]
    if ("skip" in name) != (SKIP in tensors):
        has = "a" if SKIP in tensors else "no"
        raise UserError(
            f"{path} is a {name!r} and has {has} {SKIP}: the files don't belong together"
        )
    if SKIP in tensors:
        tensors[SKIP] = tensors[SKIP].T
    if architecture == "relu":
        tensors = _without_threshold(tensors)
    return dataclasses.replace(
        checked(tensors, path=path, metadata=metadata), architecture=architecture
    )


def _form(config: dict[str, Any], tensors: Tensors, *, path: Path) -> _Form:
    """SAELens' architectures in the form of `Sae`."""
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
        return tensors  # `checked` says what is missing
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
    """Fold SAELens' `rescale_acts_by_decoder_norm`, which scales at run time, into the weights."""
    norm_F = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1)
    folded = {
        "W_enc": tensors["W_enc"] * norm_F[None, :],
        "b_enc": tensors["b_enc"] * norm_F,
        "W_dec": tensors["W_dec"] / norm_F[:, None],
    }
    return tensors | {name: tensor.astype(np.float32) for name, tensor in folded.items()}


def _without_input_bias(sae: Sae) -> Sae:
    """Fold z = (x - b_dec) W_enc + b_enc into the encoder bias, in float64."""
    tensors = sae.tensors
    shift_F = tensors["b_dec"].astype(np.float64) @ tensors["W_enc"].astype(np.float64)
    return dataclasses.replace(sae, b_enc=(tensors["b_enc"] - shift_F).astype(np.float32))


def _update_old_tensors(tensors: Tensors, *, path: Path) -> None:
    """Bring older versions' tensors to today's names: a factor of ones, a log threshold."""
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not np.allclose(factor.astype(np.float32), 1.0):
        raise UserError(f"{path} has a scaling_factor other than 1, which isn't supported")
    if "threshold" not in tensors and "log_threshold" in tensors:
        tensors["threshold"] = np.exp(tensors.pop("log_threshold").astype(np.float32))


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The `metadata` of SAELens 6; earlier versions kept its keys beside the others."""
    if isinstance(config.get("metadata"), dict):
        return dict(config["metadata"])
    keys = ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path")
    renamed = {"hook_name": config.get("hook_point"), **config}
    return {key: renamed[key] for key in keys if renamed.get(key) is not None}
