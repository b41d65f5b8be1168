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


# What an SAE was trained to see, by SAELens' names: why it can't be read, and what helps.
_FACTOR = "its factor isn't in the files. Fold it with SAELens ({}) and save again"
_NORMALISATIONS = {
    True: _FACTOR.format("fold_activation_norm_scaling_factor"),
    "expected_average_only_in": _FACTOR.format("fold_activation_norm_scaling_factor"),
    "covariance_whitening": _FACTOR.format("fold_activation_whitening"),
    "constant_norm_rescale": "it divides each row by its own norm, and SAEs on raw activations are "
    "read. Use this one with SAELens",
    "layer_norm": "it takes mean and spread out of each row and puts them back after, and SAEs on "
    "raw activations are read. Use this one with SAELens",
}
_TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")


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
    _check_normalisation(config, path=config_path)
    tensors = _todays_tensors(read_tensors(path), config, path=path)
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
    try:
        form = _form(config, tensors, path=config_path)
    except UserError:
        raise
    except ValueError as error:  # NumPy's, of shapes that don't go together
        raise UserError(f"{path}: the shapes of its tensors don't fit ({error})") from error
    sae = dataclasses.replace(checked(form.tensors, path=path, metadata=metadata), **form.fields)
    _check_sizes(sae, config, path=config_path)
    # SAELens takes true for folders from before the key existed.
    return _without_input_bias(sae) if config.get("apply_b_dec_to_input", True) else sae


def _check_normalisation(config: dict[str, Any], *, path: Path) -> None:
    found = config.get("normalize_activations")
    if found in (None, False, "none"):
        return
    known = ", ".join(repr(name) for name in _NORMALISATIONS)
    reason = _NORMALISATIONS.get(found) if isinstance(found, str | bool) else None
    reason = reason or f"SAELens' values are 'none', {known}"
    raise UserError(f"{path} has normalize_activations {found!r}: {reason}")


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
    if config.get("apply_b_dec_to_input"):
        raise UserError(
            f"{path} is a {name!r} with apply_b_dec_to_input: a transcoder's b_dec belongs to what "
            "it predicts, and SAELens refuses the two together. Set the key to false"
        )
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
    if architecture == "jumprelu":
        return _Form(tensors)
    if architecture == "standard" and activation == "relu":
        return _Form(_without_threshold(tensors), {"architecture": "relu"})
    if architecture == "gated":
        return _Form(_from_gated(tensors, path=path), {"architecture": "gated"})
    if architecture == "topk":
        # Up to version 5 k stood among the arguments of the activation function.
        arguments = config.get("activation_fn_kwargs")
        k = arguments.get("k") if isinstance(arguments, dict) else None
        k = config.get("k") if k is None else k
        width = tensors["W_dec"].shape[0] if "W_dec" in tensors else 1
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= width:
            raise UserError(
                f"{path} must give a whole k of at least 1 and at most its {width} latents for "
                f"topk; it has {k!r}"
            )
        if config.get("rescale_acts_by_decoder_norm"):
            tensors = _unit_decoder(tensors)
        return _Form(_without_threshold(tensors), {"architecture": "topk", "k": k})
    if architecture in _TRAINING_ONLY:
        raise UserError(
            f"{path} has architecture {architecture!r}: a checkpoint of SAELens' training, whose "
            "latents depend on the batch. Save it for use (save_inference_model), as a jumprelu"
        )
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
    """Fold SAELens' `rescale_acts_by_decoder_norm`, which scales at run time, into the weights.

    A row of zeros stays one: its latent is then always 0, as in SAELens.
    """
    if not {"W_enc", "W_dec", "b_enc"} <= set(tensors):
        return tensors  # `checked` says what is missing
    norm_F = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1)
    folded = {
        "W_enc": tensors["W_enc"] * norm_F[None, :],
        "b_enc": tensors["b_enc"] * norm_F,
        "W_dec": tensors["W_dec"] / np.where(norm_F > 0, norm_F, 1.0)[:, None],
    }
    return tensors | {name: tensor.astype(np.float32) for name, tensor in folded.items()}


def _without_input_bias(sae: Sae) -> Sae:
    """Fold z = (x - b_dec) W_enc + b_enc into the encoder bias, in float64."""
    tensors = sae.tensors
    shift_F = tensors["b_dec"].astype(np.float64) @ tensors["W_enc"].astype(np.float64)
    return dataclasses.replace(sae, b_enc=(tensors["b_enc"] - shift_F).astype(np.float32))


def _todays_tensors(tensors: Tensors, config: dict[str, Any], *, path: Path) -> Tensors:
    """Earlier versions' tensors in today's form.

    A log threshold becomes a threshold. Versions 3 to 5 could learn a factor for each latent after
    training, by which they decode: it is folded into W_dec.
    """
    tensors = dict(tensors)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name not in tensors:
            continue
        factor_F = tensors.pop(name).astype(np.float64)
        if np.allclose(factor_F, 1.0):
            continue
        if not config.get("finetuning_scaling_factor"):
            raise UserError(
                f"{path} has a {name} other than 1, and finetuning_scaling_factor in its cfg.json "
                "is false: the files don't belong together"
            )
        if "W_dec" not in tensors or factor_F.shape != tensors["W_dec"].shape[:1]:
            raise UserError(f"{path} must have a {name} for each latent; it has {factor_F.shape}")
        tensors["W_dec"] = (factor_F[:, None] * tensors["W_dec"]).astype(np.float32)
    if "threshold" not in tensors and "log_threshold" in tensors:
        tensors["threshold"] = np.exp(tensors.pop("log_threshold").astype(np.float32))
    return tensors


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The `metadata` of SAELens 6; earlier versions kept its keys beside the others."""
    if isinstance(config.get("metadata"), dict):
        return dict(config["metadata"])
    keys = ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path")
    renamed = {"hook_name": config.get("hook_point"), **config}
    return {key: renamed[key] for key in keys if renamed.get(key) is not None}
