"""Write a released SAE in the three formats that the field's tools read (docs/release.md).

    gemma_scope/params.npz                              Gemma Scope
    gemma_scope_2/{config.json, params.safetensors}     Gemma Scope 2
    sae_lens/{cfg.json, sae_weights.safetensors[, sparsity.safetensors]}    SAELens 6

Tensors are streamed: an SAE of a million latents is 30 GB, which must not be held twice.

Legend: D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from activation_cache.storage.files import StoragePath, make_folder, replacing, write_json
from activation_cache.storage.safetensors_file import write_safetensors
from sae_train.inference.sae import SKIP, Sae

FORMATS = ("gemma_scope", "gemma_scope_2", "sae_lens")

# SAELens' own guard against log10(0): a latent that never fired gets -10.
_LOG_SPARSITY_EPSILON = 1e-10


def write_gemma_scope(sae: Sae, folder: StoragePath) -> list[StoragePath]:
    """Write `params.npz`: float32, capital names, the threshold itself (no logarithm).

    A transcoder has the same tensors. The format can't hold an affine skip.

    Returns:
        The file written.
    """
    assert sae.W_skip is None, "params.npz has no affine skip"
    path = make_folder(folder) / "params.npz"
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **sae.tensors)
    return [path]


def write_gemma_scope_2(sae: Sae, folder: StoragePath) -> list[StoragePath]:
    """Write `params.safetensors` with lower-case names, then `config.json`.

    A transcoder's skip is `affine_skip_connection`, [in, out]. `l0` is the measured one, rounded
    (Gemma Scope 2 writes its target there); without an evaluation it is left out.

    Returns:
        The files written.
    """
    make_folder(folder)
    renamed = {SKIP: "affine_skip_connection"}
    tensors = {renamed.get(name, name.lower()): tensor for name, tensor in sae.tensors.items()}
    metadata = sae.metadata
    config: dict[str, Any] = {
        "hf_hook_point_in": metadata.get("hf_hook_name"),
        "hf_hook_point_out": metadata.get("hf_hook_name_out", metadata.get("hf_hook_name")),
        "width": sae.W_enc.shape[1],
        "model_name": metadata.get("model_name"),
        "architecture": "jump_relu",
        "affine_connection": sae.W_skip is not None,
        "type": "transcoder" if sae.is_transcoder else "sae",
    }
    if metadata.get("l0") is not None:
        config["l0"] = round(metadata["l0"])
    weights_path, config_path = folder / "params.safetensors", folder / "config.json"
    _write_tensors(tensors, weights_path)
    write_json(config_path, config)
    return [config_path, weights_path]


def write_sae_lens(
    sae: Sae, folder: StoragePath, *, frequency_F: Float[np.ndarray, " F"] | None = None
) -> list[StoragePath]:
    """Write an inference SAE of SAELens 6, in SAELens' own form for its architecture.

    Args:
        frequency_F: the fraction of tokens each latent fires on, for the sparsity file; None
            writes none.

    Returns:
        The files written.
    """
    make_folder(folder)
    D, F = sae.W_enc.shape
    hook = str(sae.metadata.get("hook_name") or "")
    architecture, tensors, own = _sae_lens_form(sae)
    config = {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        # Without this key SAELens subtracts b_dec from the input.
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        # TransformerLens gives hook_z as [..., heads, head dim]; the SAE reads them joined.
        "reshape_activations": "hook_z" if hook.endswith("hook_z") else "none",
        "metadata": dict(sae.metadata),
        "architecture": architecture,
        **own,
    }
    weights_path, config_path = folder / "sae_weights.safetensors", folder / "cfg.json"
    sparsity_path = folder / "sparsity.safetensors"
    _write_tensors(tensors, weights_path)
    write_json(config_path, config)
    if frequency_F is None:
        sparsity_path.unlink(missing_ok=True)  # an earlier export's would describe other weights
        return [config_path, weights_path]
    log_F = np.log10(np.asarray(frequency_F, np.float64) + _LOG_SPARSITY_EPSILON)
    _write_tensors({"sparsity": log_F.astype(np.float32)}, sparsity_path)
    return [config_path, weights_path, sparsity_path]


def _sae_lens_form(sae: Sae) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """SAELens' name of the architecture, its tensors, and the keys only it has in cfg.json."""
    tensors = sae.tensors
    if sae.is_transcoder:
        return _sae_lens_transcoder(sae, tensors)
    if sae.architecture == "jumprelu":
        return "jumprelu", tensors, {}
    threshold_F = tensors.pop("threshold")
    if sae.architecture == "gated":
        b_mag_F = tensors.pop("b_enc")
        gate = {"b_gate": b_mag_F - threshold_F, "r_mag": np.zeros_like(b_mag_F)}
        return "gated", tensors | {"b_mag": b_mag_F} | gate, {}
    assert not threshold_F.any(), f"a {sae.architecture} SAE has no thresholds"
    if sae.architecture == "topk":
        return "topk", tensors, {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return "standard", tensors, {}


def _sae_lens_transcoder(
    sae: Sae, tensors: dict[str, np.ndarray]
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """As `_sae_lens_form`; SAELens' `transcoder` is a ReLU one, and its W_skip is [out, in]."""
    assert sae.architecture in ("jumprelu", "relu"), sae.architecture
    name = "transcoder" if sae.W_skip is None else "skip_transcoder"
    if sae.architecture == "jumprelu":
        name = f"jumprelu_{name}"
    else:
        tensors.pop("threshold")
    if sae.W_skip is not None:
        tensors[SKIP] = np.ascontiguousarray(tensors[SKIP].T)
    return name, tensors, {"d_out": sae.W_dec.shape[1]}


def _write_tensors(tensors: Mapping[str, np.ndarray], path: StoragePath) -> None:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write_safetensors(file, shapes, tensors.items())
