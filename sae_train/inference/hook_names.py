"""What other tools call a tap: a site of the model and a layer.

SAELens uses TransformerLens' names, Gemma Scope 2's config.json Hugging Face's.
"""

from __future__ import annotations

import re

from activation_cache.config import Site

_TRANSFORMER_LENS: dict[Site, str] = {
    "resid_post": "blocks.{layer}.hook_resid_post",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "attn_out_prelinear": "blocks.{layer}.attn.hook_z",
    # SAELens' name for Gemma Scope 2's site; TransformerLens means the vector before the norm.
    "mlp_in": "blocks.{layer}.hook_mlp_in",
    "mlp_in_normalized": "blocks.{layer}.ln2.hook_normalized",
    # Not `hook_embed`, by which both mean the table times sqrt(D).
    "embedding": "model.embed_tokens.weight",
    "rows": "rows.{layer}",  # nobody else's: of imported rows no module is known
}
_HUGGING_FACE: dict[Site, str] = {
    "resid_post": "model.layers.{layer}.output",
    "mlp_out": "model.layers.{layer}.post_feedforward_layernorm.output",
    "attn_out_prelinear": "model.layers.{layer}.self_attn.o_proj.input",
    "mlp_in": "model.layers.{layer}.pre_feedforward_layernorm.output",
    # Our own name: no module of Hugging Face's outputs the norm without its gain.
    "mlp_in_normalized": "model.layers.{layer}.pre_feedforward_layernorm.normalized",
    "embedding": "model.embed_tokens.weight",
    "rows": "rows.{layer}",
}


def transformer_lens_hook(site: Site, layer: int) -> str:
    """The TransformerLens name of a tap, e.g. `blocks.12.hook_resid_post`."""
    return _TRANSFORMER_LENS[site].format(layer=layer)


def hugging_face_hook(site: Site, layer: int) -> str:
    """Gemma Scope 2's name of a tap, e.g. `model.layers.12.output`."""
    return _HUGGING_FACE[site].format(layer=layer)


def sites() -> tuple[Site, ...]:
    """All sites of a model."""
    return tuple(site for site in _TRANSFORMER_LENS if site != "rows")


def parse_hook(name: object) -> tuple[Site, int] | None:
    """The site and layer that a name of either kind stands for; None for a hook we don't tap.

    It comes out of other people's JSON and may be anything.
    """
    if not isinstance(name, str):
        return None
    for table in (_TRANSFORMER_LENS, _HUGGING_FACE):
        for site, template in table.items():
            pattern = re.escape(template).replace(re.escape("{layer}"), r"(\d+)")
            if match := re.fullmatch(pattern, name):
                return site, int(match[1]) if match.groups() else 0
    return None
