"""The metadata a released SAE carries: the model, the hook, the text, how it was trained."""

from __future__ import annotations

from typing import Any

from activation_cache.config import NO_MODEL
from activation_cache.language_model.names import model_name
from activation_cache.runtime.version import package_version
from sae_train.checkpoint.trained import Trained
from sae_train.config.sae import SaeConfig
from sae_train.inference.hook_names import hugging_face_hook, transformer_lens_hook

# The version of SAELens whose file format we write; readers before 6.0 drop the metadata.
SAE_LENS_VERSION = "6.54.12"

IMPORTED = "imported rows"  # in the place of a text


def metadata_of(trained: Trained) -> dict[str, Any]:
    """A trained SAE's metadata: SAELens' keys, and under `training` those it has no name for."""
    config = trained.config
    site, layer = config.sae.site, config.sae.layer
    of_rows = config.model.weights == NO_MODEL
    return {
        "sae_lens_version": SAE_LENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": "unknown" if of_rows else model_name(config.model.weights),
        "model_class_name": "HookedTransformer",
        "hook_name": transformer_lens_hook(site, layer),
        "hook_head_index": None,
        "hf_hook_name": hugging_face_hook(site, layer),
        **_target_hooks(config.sae),
        "prepend_bos": not config.cache.is_imported,
        "context_size": None if config.cache.is_imported else config.text.sequence_length,
        "dataset_path": ", ".join(config.text.source) or IMPORTED,
        "seqpos_slice": [None],
        "exclude_special_tokens": True,
        "model_from_pretrained_kwargs": {},
        "neuronpedia_id": None,
        "training_architecture": config.sae.architecture,
        **_prefixes(config.sae),
        "training": {
            "library": f"open-gemma-scope {package_version()}",
            "run": config.name,
            "step": trained.step,
            "tokens": trained.step * config.train.batch_size,
            "input_scale": float(trained.input_scale),
            **({"target_scale": float(trained.target_scale)} if config.sae.is_transcoder else {}),
            "sparsity": config.train.sparsity.model_dump(),
            "seed": config.train.seed,
        },
    }


def _prefixes(config: SaeConfig) -> dict[str, list[int]]:
    """Of a Matryoshka SAE the widths of its prefixes, all latents last, under SAELens' name."""
    return {} if config.matryoshka is None else {"matryoshka_widths": list(config.prefixes)}


def _target_hooks(config: SaeConfig) -> dict[str, str]:
    if config.target is None:
        return {}
    return {
        "hook_name_out": transformer_lens_hook(config.target, config.layer),
        "hf_hook_name_out": hugging_face_hook(config.target, config.layer),
    }
