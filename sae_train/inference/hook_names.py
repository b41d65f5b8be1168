"""What other tools call a tap, and the metadata a release carries for them.

TransformerLens names are SAELens' own; Hugging Face names are those of Gemma Scope 2's config.json.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from activation_cache.config import Site

if TYPE_CHECKING:
    from sae_train.checkpoint.checkpoints import Trained
    from sae_train.config.sae import SaeConfig

# The SAELens whose file format we write; below 6.0 its readers drop the metadata.
SAE_LENS_VERSION = "6.54.12"

_TRANSFORMER_LENS: dict[Site, str] = {
    "resid_post": "blocks.{layer}.hook_resid_post",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "attn_out_prelinear": "blocks.{layer}.attn.hook_z",
    # SAELens' name for Gemma Scope 2's; TransformerLens means the same before the norm.
    "mlp_in": "blocks.{layer}.hook_mlp_in",
    "mlp_in_normalized": "blocks.{layer}.ln2.hook_normalized",
    # Not `hook_embed`, which both use for the table times sqrt(D).
    "embedding": "model.embed_tokens.weight",
}
_HUGGING_FACE: dict[Site, str] = {
    "resid_post": "model.layers.{layer}.output",
    "mlp_out": "model.layers.{layer}.post_feedforward_layernorm.output",
    "attn_out_prelinear": "model.layers.{layer}.self_attn.o_proj.input",
    "mlp_in": "model.layers.{layer}.pre_feedforward_layernorm.output",
    # In our words: no module of Hugging Face's has the norm without its gain as an output.
    "mlp_in_normalized": "model.layers.{layer}.pre_feedforward_layernorm.normalized",
    "embedding": "model.embed_tokens.weight",
}


def transformer_lens_hook(site: Site, layer: int) -> str:
    """The TransformerLens name of a tap, e.g. `blocks.12.hook_resid_post`."""
    return _TRANSFORMER_LENS[site].format(layer=layer)


def hugging_face_hook(site: Site, layer: int) -> str:
    """Gemma Scope 2's name of a tap, e.g. `model.layers.12.output`."""
    return _HUGGING_FACE[site].format(layer=layer)


def parse_hook(name: str) -> tuple[Site, int] | None:
    """The site and layer either kind of name stands for; None for a hook we don't tap."""
    for table in (_TRANSFORMER_LENS, _HUGGING_FACE):
        for site in get_args(Site):
            pattern = re.escape(table[site]).replace(re.escape("{layer}"), r"(\d+)")
            if match := re.fullmatch(pattern, name):
                return site, int(match[1]) if match.groups() else 0
    return None


def model_name(weights: str) -> str:
    """What to call the model behind `model.weights`.

    A Hub id stays as it is, but for Gemma 2, which SAELens and TransformerLens name without the
    organisation; a folder or a file gives its own name without the ending.
    """
    path = Path(weights)
    if path.suffix == ".gguf" or path.is_absolute() or path.exists() or len(path.parts) != 2:
        return path.stem if path.suffix == ".gguf" else path.name
    return weights.removeprefix("google/") if "gemma-2-" in weights else weights


def package_version() -> str:
    """This package's version, `unknown` where it runs without being installed."""
    try:
        return version("open-gemma-scope")
    except PackageNotFoundError:
        return "unknown"


def _target_hooks(config: SaeConfig) -> dict[str, str]:
    if config.target is None:
        return {}
    return {
        "hook_name_out": transformer_lens_hook(config.target, config.layer),
        "hf_hook_name_out": hugging_face_hook(config.target, config.layer),
    }


def metadata_of(trained: Trained) -> dict[str, Any]:
    """A trained SAE's metadata under SAELens' names, and under `training` what only we know."""
    config = trained.config
    site, layer = config.sae.site, config.sae.layer
    return {
        "sae_lens_version": SAE_LENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": model_name(config.model.weights),
        "model_class_name": "HookedTransformer",
        "hook_name": transformer_lens_hook(site, layer),
        "hook_head_index": None,
        "hf_hook_name": hugging_face_hook(site, layer),
        **_target_hooks(config.sae),
        "prepend_bos": True,
        "context_size": config.text.sequence_length,
        "dataset_path": ", ".join(config.text.source),
        "seqpos_slice": [None],
        "exclude_special_tokens": True,
        "model_from_pretrained_kwargs": {},
        "neuronpedia_id": None,
        "training_architecture": config.sae.architecture,
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
