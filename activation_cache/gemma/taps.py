"""Taps, where activations are read from the model, and splices, which replace them.

The sites are Gemma Scope's (arXiv 2408.05147, section 3.1 and appendix B) and Gemma Scope 2's;
layers count from 0:

- `resid_post`: the residual stream after the block, width D.
- `mlp_out`: the MLP's output after the post-MLP RMSNorm, width D.
- `attn_out_prelinear`: the heads' outputs side by side, before W_O and before the
  post-attention RMSNorm, width heads x head_dim.
- `mlp_in`: what the MLP reads, after the pre-MLP RMSNorm, width D. Gemma Scope 2's transcoders
  read it.
- `mlp_in_normalized`: the same before the norm's gain, so that |x|² = D. Gemma Scope's transcoders
  read it.
- `embedding`: the rows of the embedding table, unscaled, width D; its layer is 0.

`rows` is no site of a model: it stands for imported rows of which no more is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from activation_cache.config import Site, SiteConfig
from activation_cache.gemma.config import GemmaConfig
from activation_cache.runtime.errors import UserError

__all__ = ["EMBEDDING", "Splice", "Tap", "check_tap", "resolve_taps", "stream_before", "tap_width"]


@dataclass(frozen=True)
class Splice:
    """Replaces the activations at `tap` by `replace(activations, arguments)`.

    With `reads`, an earlier tap of the same layer, the call is `replace(activations, arguments,
    read=...)`, where `read` is this forward's activations there: a transcoder reads the one tap and
    replaces the other.

    `replace` must be the same function in many calls (a module-level function, not a new lambda),
    since the compiled forward is kept for each `(tap, replace)`. What changes from call to call,
    such as an SAE's weights, goes into `arguments`, a pytree that is traced.
    """

    tap: Tap
    replace: Callable[..., Any]  # returns [B, S, D]; not typed with Array, as that loads JAX
    arguments: Any = None
    reads: Tap | None = None


def stream_before(splice: Splice) -> Tap | None:
    """The last residual stream that a splice doesn't change; None if it begins at the tokens.

    At `resid_post` it is what the splice replaces: a forward starts there by replacing it.
    """
    if splice.tap.site == "resid_post" and splice.reads is None:
        return splice.tap
    return Tap("resid_post", splice.tap.layer - 1) if splice.tap.layer else None


def tap_width(config: GemmaConfig, site: Site) -> int:
    """Width D of the vectors at a site."""
    if site == "attn_out_prelinear":
        return config.num_heads * config.head_dim
    return config.d_model


def check_tap(tap: Tap, config: GemmaConfig) -> None:
    """Raises `UserError` when the model has no such site or layer."""
    if tap.site == "rows":
        raise UserError(
            f"{tap.name} is of imported rows, which no site of a model is known for: harvest "
            "another site, or import the rows under the name of the site that they are of"
        )
    if tap.site == "embedding" and tap.layer != 0:
        raise UserError(
            f"site embedding has layer {tap.layer}: the table is there once, and counts as layer "
            "0. Set the layer to 0."
        )
    if not 0 <= tap.layer < config.num_layers:
        raise UserError(
            f"layer {tap.layer} of site {tap.site} does not exist: the model has "
            f"{config.num_layers} layers, numbered 0 to {config.num_layers - 1}. "
            "Choose layers in that range."
        )


def resolve_taps(sites: Sequence[SiteConfig], config: GemmaConfig) -> tuple[Tap, ...]:
    """The taps a config asks for, `layers: all` written out, in the model's order.

    Raises:
        UserError: a layer the model doesn't have, or a site named twice.
    """
    taps: list[Tap] = []
    for site in sites:
        layers = range(config.num_layers) if site.layers == "all" else site.layers
        for layer in layers:
            tap = Tap(site.site, layer)
            check_tap(tap, config)
            if tap in taps:
                raise UserError(
                    f"cache.sites names {tap.name} twice: each site and layer belongs there once. "
                    "Remove one of the two."
                )
            taps.append(tap)
    if EMBEDDING in taps and len(taps) > 1:
        others = ", ".join(tap.name for tap in taps if tap != EMBEDDING)
        raise UserError(
            f"cache.sites has embedding beside {others}: its rows are the tokens of the "
            "vocabulary, theirs tokens of text. Harvest it into a store of its own."
        )
    return tuple(sorted(taps, key=lambda tap: (tap.layer, tap.site)))


@dataclass(frozen=True, order=True)
class Tap:
    """One site of one layer."""

    site: Site
    layer: int

    @property
    def name(self) -> str:
        """`resid_post.5`, and `embedding`: the name of the tap's array in a store."""
        return self.site if self.site == "embedding" else f"{self.site}.{self.layer}"


EMBEDDING = Tap("embedding", 0)
