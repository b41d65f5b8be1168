"""circuit-tracer's files: one transcoder per layer, and a config.yaml that they share.

    config.yaml                  model, hooks, for TopK its k
    layer_5.safetensors          W_enc [F, D], W_dec [F, D], b_enc, b_dec,
                                 activation_function.threshold [F] of JumpReLU, W_skip [out, in]

Names and shapes are those of decoderesearch/circuit-tracer 4bb8c0e (single_layer_transcoder.py,
hf_utils.py). Its TopK keeps the k largest pre-activations, ours the k largest that are positive:
they differ where a row has fewer than k positive ones.

Legend: D model width, F latents.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.config import Site
from activation_cache.language_model.names import model_name
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, make_folder, replacing, write_text
from activation_cache.storage.safetensors_file import write_safetensors
from sae_train.config import strict_yaml
from sae_train.inference.hook_names import hugging_face_hook, parse_hook, transformer_lens_hook
from sae_train.inference.sae import SKIP, Sae
from sae_train.inference.tensors import checked, read_tensors, text_of

CONFIG = "config.yaml"
LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")

# circuit-tracer's names of what a transcoder of ours may read.
_INPUTS: dict[Site, str] = {"mlp_in": "mlp.hook_in", "mlp_in_normalized": "ln2.hook_normalized"}
_OUTPUT = "hook_mlp_out"
_THRESHOLD = "activation_function.threshold"


def stands_for_mlp(sae: Sae) -> bool:
    """Does it predict an MLP's output from its input, as circuit-tracer's transcoders do?"""
    taps = [parse_hook(sae.metadata.get(key)) for key in ("hook_name", "hook_name_out")]
    return taps[0] is not None and taps[0][0] in _INPUTS and taps[1] == ("mlp_out", taps[0][1])


def write_layer(sae: Sae, folder: StoragePath) -> StoragePath:
    """Write a transcoder that `stands_for_mlp` as `layer_N.safetensors`; returns the file."""
    tap = parse_hook(sae.metadata["hook_name"])
    assert tap is not None
    path = make_folder(folder) / f"layer_{tap[1]}.safetensors"
    tensors = sae.tensors
    tensors["W_enc"] = np.ascontiguousarray(tensors["W_enc"].T)
    if SKIP in tensors:
        tensors[SKIP] = np.ascontiguousarray(tensors[SKIP].T)
    threshold_F = tensors.pop("threshold")
    if sae.architecture not in ("relu", "topk"):
        tensors[_THRESHOLD] = threshold_F
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write_safetensors(file, shapes, tensors.items())
    return path


def set_config(sae: Sae) -> dict[str, Any]:
    """What config.yaml says of a set of transcoders like `sae`.

    Without the key `scan`: circuit-tracer takes the repository's name on the Hub, or the folder's.
    """
    tap = parse_hook(sae.metadata["hook_name"])
    assert tap is not None
    name = str(sae.metadata["model_name"])
    config: dict[str, Any] = {
        "model_kind": "transcoder_set",
        "model_name": f"google/{name}" if name.startswith("gemma-2-") else name,
        "feature_input_hook": _INPUTS[tap[0]],
        "feature_output_hook": _OUTPUT,
    }
    if sae.k is not None:
        config |= {"activation": "topk", "k": sae.k}
    return config


def write_set_config(config: dict[str, Any], folder: StoragePath) -> StoragePath:
    """Write `set_config` as config.yaml; returns the file."""
    write_text(folder / CONFIG, strict_yaml.dump(config))
    return folder / CONFIG


def read_circuit_tracer(path: Path) -> Sae:
    """A transcoder from its `layer_N.safetensors`, with what the config.yaml beside it says.

    Raises:
        UserError: the config is missing or of cross-layer transcoders; a file is damaged.
    """
    return read_layer(path, config=_read_config(path.with_name(CONFIG)))


def read_layer(path: Path, *, config: dict[str, Any]) -> Sae:
    """As `read_circuit_tracer`, with the content of config.yaml given."""
    match = LAYER_FILE.fullmatch(path.name)
    assert match is not None, path
    tensors = read_tensors(path)
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T
    if SKIP in tensors:
        tensors[SKIP] = tensors[SKIP].T
    threshold_F = tensors.pop(_THRESHOLD, None)
    if threshold_F is None and "b_enc" in tensors:
        threshold_F = np.zeros_like(tensors["b_enc"])
    if threshold_F is not None:
        tensors["threshold"] = threshold_F
    sae = checked(tensors, path=path, metadata=_metadata(config, int(match[1]), path=path))
    if config.get("activation") != "topk":
        return sae
    k = config.get("k")
    if not isinstance(k, int) or not 0 < k <= sae.b_enc.shape[0]:
        raise UserError(
            f"{path.with_name(CONFIG)} has k {k!r}; topk needs a number from 1 to the "
            f"{sae.b_enc.shape[0]} latents of {path.name}"
        )
    return dataclasses.replace(sae, k=k, architecture="topk")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: it says what the transcoders beside it read. Fetch it")
    document = strict_yaml.parse(path.read_text(encoding="utf-8"), name=str(path))
    config = document.value
    if not isinstance(config, dict) or config.get("model_kind") != "transcoder_set":
        kind = config.get("model_kind") if isinstance(config, dict) else config
        raise UserError(
            f"{path} must have model_kind transcoder_set, circuit-tracer's word for one transcoder "
            f"per layer; it has {kind!r}"
        )
    return config


def _metadata(config: dict[str, Any], layer: int, *, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if name := text_of(config, "model_name", path=path):
        found["model_name"] = model_name(name)
    sites = {theirs: site for site, theirs in _INPUTS.items()} | {_OUTPUT: "mlp_out"}
    for key, ending in (("feature_input_hook", ""), ("feature_output_hook", "_out")):
        hook = text_of(config, key, path=path)
        site = sites.get(hook or "")
        if site is not None:
            found[f"hook_name{ending}"] = transformer_lens_hook(site, layer)
            found[f"hf_hook_name{ending}"] = hugging_face_hook(site, layer)
        else:
            found[f"hook_name{ending}"] = f"blocks.{layer}.{hook}"
    return found
