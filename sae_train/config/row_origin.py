"""Where an SAE's rows are from: harvested from a model's text, or imported without either."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from activation_cache.config import NO_MODEL, CacheConfig, ModelConfig, SiteConfig, TextConfig
from activation_cache.gemma.taps import Tap
from sae_train.config.sae import SaeConfig


def without_model(values: Any) -> Any:
    """A config's plain values; of an imported store there need be neither model nor text.

    A store is imported where `cache` says nothing of what to harvest.
    """
    cache = values.get("cache") if isinstance(values, dict) else None
    if not isinstance(cache, dict) or cache.get("sites") or cache.get("tokens"):
        return values
    return {"model": {"weights": NO_MODEL}, "text": {"source": []}, **values}


def rows_mistakes(
    sae: SaeConfig,
    *,
    model: ModelConfig,
    text: TextConfig,
    cache: CacheConfig,
    through_model: bool,
) -> Iterator[str]:
    """What keeps the SAE's rows from being in the store, a line for each.

    Args:
        through_model: is there a phase of training that goes through the language model?
    """
    if not cache.is_imported:
        for tap in sae.taps:
            yield from _check_tapped(tap, cache.sites)
        yield from _check_text(text, cache.sites)
    elif text.source:
        yield (
            "cache.sites is missing: with text it must say what to harvest. For a store that `sae "
            "import` made leave out the section text"
        )
    elif through_model and model.weights == NO_MODEL:
        yield (
            "train.end_to_end goes through a language model, and the config has none, for its "
            "rows were imported: leave it out, or harvest a store with a model"
        )


def _check_tapped(tap: Tap, sites: list[SiteConfig]) -> Iterator[str]:
    tapped = [entry.layers for entry in sites if entry.site == tap.site]
    if not any(layers == "all" or tap.layer in layers for layers in tapped):
        has = ", ".join(f"{entry.site} {entry.layers}" for entry in sites)
        yield (
            f"sae reads {tap.site} of layer {tap.layer}, which cache.sites does not harvest "
            f"(it has {has}): add it to cache.sites or change sae.site and sae.layer"
        )


def _check_text(text: TextConfig, sites: list[SiteConfig]) -> Iterator[str]:
    if text.source:
        return
    if any(entry.site != "embedding" for entry in sites):
        yield "text.source must not be empty: only the embedding is harvested without text"
    elif text.held_out_sequences:
        yield (
            f"text.source is empty and text.held_out_sequences {text.held_out_sequences}: set it "
            "to 0, or give text for the delta loss"
        )
