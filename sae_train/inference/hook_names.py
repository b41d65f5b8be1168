"""What other tools call a tap, and the metadata a release carries for them.

TransformerLens names are SAELens' own; Hugging Face names are those of Gemma Scope 2's config.json.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, get_args

from activation_cache.config import Site

if TYPE_CHECKING:
    pass


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
