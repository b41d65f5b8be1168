"""The sections of the YAML that this package owns: `model`, `text`, `cache` and `mesh`.

Every section forbids unknown keys and silent casts. Defaults are Gemma Scope's (arXiv
2408.05147, section 3) wherever it states a value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)

from activation_cache.runtime.addresses import is_url, parse_address
from activation_cache.runtime.errors import UserError

Site = Literal[
    "resid_post", "mlp_out", "attn_out_prelinear", "mlp_in", "mlp_in_normalized", "embedding"
]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of the config: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _whole_number(value: Any) -> Any:
    """Read `4e9` as the integer it is; leave everything else for the strict check to judge."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=0)]
PositiveCount = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _folder_or_bucket(text: str) -> str:
    """A folder, or a URL of a bucket: what can be neither is refused before anything is read."""
    if "\0" in text:
        raise ValueError("no path can have the character NUL")
    if is_url(text):
        try:
            parse_address(text)
        except UserError as error:
            raise ValueError(str(error)) from error
    return text


Location = Annotated[str, Field(min_length=1), AfterValidator(_folder_or_bucket)]


class ModelConfig(Section):
    """Which language model is read, and the dtype it computes in."""

    weights: str  # a Hub id, a folder (config.json, safetensors, tokenizer.json) or a .gguf file
    revision: str | None = None
    dtype: Dtype = "bfloat16"


class TextConfig(Section):
    """Where the text comes from and how it is cut into sequences."""

    source: list[str]  # globs, or hf://org/dataset?split=train; empty for the embedding alone
    field: str = "text"
    subset_field: str | None = None  # names a document's subset; dots lead into nested fields
    sequence_length: Annotated[PositiveCount, Field(ge=2)] = 1024
    held_out_sequences: Count = 2048


class SiteConfig(Section):
    """One tap site and the layers (counted from 0) it is tapped at."""

    site: Site
    layers: list[Count] | Literal["all"]

    @field_validator("layers")
    @classmethod
    def _layers_distinct(cls, layers: list[int] | str) -> list[int] | str:
        if isinstance(layers, list) and (not layers or len(set(layers)) != len(layers)):
            raise ValueError("layers must be 'all' or a non-empty list without repeats")
        return layers


class MeshConfig(Section):
    """Devices per mesh axis: batches are split over `data`, weights over `model`."""

    data: PositiveCount = 1
    model: PositiveCount = 1


class CacheConfig(Section):
    """The activation store: its folder, what is tapped, how many rows, how they are shuffled."""

    path: Location
    sites: Annotated[list[SiteConfig], Field(min_length=1)]
    tokens: PositiveCount  # rows per site and layer; only usable tokens count
    dtype: Dtype = "float32"
    shuffle_rows: PositiveCount = 1_000_000  # rows per shuffle bucket
    block_rows: PositiveCount = 256  # rows per chunk: the unit the reader permutes
    sequences_per_batch: PositiveCount = 8  # per forward pass of one replica of the model
    seed: Count = 0
    mesh: MeshConfig | None = None  # of the language model; None: the section `mesh`
