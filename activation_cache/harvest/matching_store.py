"""A finished store, opened for a config that must be the one it was harvested with."""

from __future__ import annotations

from activation_cache.config import CacheConfig, ModelConfig, TextConfig
from activation_cache.store.store import Store, open_store


def open_matching_store(*, model: ModelConfig, text: TextConfig, cache: CacheConfig) -> Store:
    """Open the store at `cache.path` and check that it was made with these sections.

    The weights are looked at only if the config names them otherwise than the store's manifest:
    a machine that trains need not have them. They are the same if their fingerprint is.

    Raises:
        UserError: there is no finished store; a field differs, which is named; or the weights
            have another name and can't be read.
    """
    store = open_store(cache.path)
    store.check_matches(model=model, text=text, cache=cache)
    if not store.names_weights(model):
        # Imported here because it loads JAX, which a launcher on a login node does without.
        from activation_cache.language_model.checkpoint import weight_fingerprint

        store.check_matches(fingerprint=weight_fingerprint(model))
    return store
