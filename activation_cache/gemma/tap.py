"""One site of one layer; apart from `taps`, for a config is read before JAX is."""

from __future__ import annotations

from dataclasses import dataclass

from activation_cache.config import Site


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
