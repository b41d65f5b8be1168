"""The section `latents` of the YAML: the text that is walked, and what is kept of each latent."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from activation_cache.config import FilePath, PositiveCount, PositiveSmallCount, Section, SmallCount


class LatentsConfig(Section):
    """Which text `sae latents` walks, and how many contexts of a latent it keeps.

    `top` and `per_interval` are SAEDashboard's numbers.
    """

    tokens: PositiveCount | None = None  # None: the store's held-out sequences, or all of `source`
    source: list[FilePath] = Field(default_factory=list)  # empty: the store's own text
    field: str = "text"
    subset_field: str | None = None
    top: PositiveSmallCount = 20  # contexts of the greatest values, of different sequences
    per_interval: SmallCount = 5  # contexts of each of the five intervals of (0, maximum]
    context: Annotated[PositiveSmallCount, Field(le=1024)] = 64  # tokens of a context

    @model_validator(mode="after")
    def _source_has_an_end(self) -> LatentsConfig:
        if self.source and self.tokens is None:
            raise ValueError(
                "latents.source needs latents.tokens, how many of its tokens are read: a source "
                "may be larger than anybody wants to walk"
            )
        if not self.source and (self.field != "text" or self.subset_field is not None):
            raise ValueError(
                "latents.field and latents.subset_field are of latents.source, and that is empty: "
                "the store's own text has those of `text`"
            )
        return self
