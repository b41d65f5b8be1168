"""The sections of the YAML that this package owns: `model`, `text`, `cache` and `mesh`.

Every section forbids unknown keys and silent casts. Defaults are Gemma Scope's (arXiv
2408.05147, section 3) wherever it states a value.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from activation_cache.precision import PrecisionChoice
from activation_cache.runtime.addresses import is_url, parse_address
from activation_cache.runtime.errors import UserError

Site = Literal[
    "resid_post",
    "mlp_out",
    "attn_out_prelinear",
    "mlp_in",
    "mlp_in_normalized",
    "embedding",
    "rows",  # imported, from a place that is none of the others
]
Dtype = Literal["float32", "bfloat16"]
RowDtype = Literal["float32", "bfloat16", "int8"]  # of a store's rows


class Section(BaseModel):
    """A part of the config: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _whole_number(value: Any) -> Any:
    """Read `4e9` as the integer it is; leave everything else for the strict check to judge."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole_number)]
# Of rows and tokens, and whatever else may be more than two thousand million.
Count = Annotated[Whole, Field(ge=0, le=2**63 - 1)]
PositiveCount = Annotated[Whole, Field(ge=1, le=2**63 - 1)]
# Of what is counted or indexed in 32 bits: sizes of arrays, steps, layers, devices, seconds.
LARGEST_INT32 = 2**31 - 1
SmallCount = Annotated[Whole, Field(ge=0, le=LARGEST_INT32)]
PositiveSmallCount = Annotated[Whole, Field(ge=1, le=LARGEST_INT32)]
Seed = Annotated[Whole, Field(ge=0, le=2**64 - 1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Of what becomes a float32, in which 1e300 would be infinite and 1e-300 be 0.
NonNegative32 = Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)]
Positive32 = Annotated[float, Field(ge=1e-30, le=1e38, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Of norms; more than half of all rows lie below 1.
MaxNormOverMedian = Annotated[float, Field(gt=1, le=1e38, allow_inf_nan=False)]

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)


def expanded(path: str) -> str:
    """A path with `~`, `$NAME` and `${NAME}` replaced, as a shell would; a URL as it is.

    What comes out has nothing left to replace: a resolved config is read back as it was written.

    Raises:
        ValueError: a variable isn't set, a user is unknown, or a variable's value names another.
    """
    if "://" in path or is_url(path):
        return path

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(
                f"the environment variable {name} is not set: set it, or write the path without it"
            )
        return os.environ[name]

    found = _VARIABLE.sub(value, path)
    if left := _VARIABLE.search(found):
        raise ValueError(
            f"{path} becomes {found}, which has {left[0]} in it: only what the config itself "
            "says is replaced. Write the whole path"
        )
    home = os.path.expanduser(found)
    if home.startswith("~"):
        user = found.partition("/")[0]
        raise ValueError(
            f"there is no home folder for {user}: write the whole path, or ./{found} for a file of "
            "this name"
        )
    return home


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


# A path of the config, whichever key has it. A Hub id or a URL may stand there too.
FilePath = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
Location = Annotated[FilePath, AfterValidator(_folder_or_bucket)]


NO_MODEL = "none"  # `model.weights` of a run whose rows were imported, where no model is at hand


class ModelConfig(Section):
    """Which language model is read, and how it computes."""

    # A Hub id, a folder (config.json, safetensors, tokenizer.json), a .gguf file, or `NO_MODEL`.
    weights: FilePath
    revision: str | None = None
    dtype: Dtype = "bfloat16"
    # How products are made while harvesting if the dtype is float32.
    precision: PrecisionChoice = "auto"


class ChatConfig(Section):
    """Conversations, rendered by the model's own chat template; some roles' words make rows.

    Only the words of a message count, not the marks that the template puts around them.
    """

    field: str = "messages"  # the column: a list of objects with `role` and `content`
    roles: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["assistant"])


class TextConfig(Section):
    """Where the text comes from and how it is cut into sequences."""

    source: list[FilePath]  # globs, or hf://org/dataset?split=train; empty for the embedding alone
    field: str = "text"
    subset_field: str | None = None  # names a document's subset; dots lead into nested fields
    # A weight for each entry of `source`: their shares of the text, in characters. None: in turn.
    mixture: list[Positive32] | None = None
    sequence_length: Annotated[SmallCount, Field(ge=2)] = 1024
    held_out_sequences: SmallCount = 2048
    chat: ChatConfig | None = None  # None: documents are texts
    masked_text: list[str] = Field(default_factory=list)  # makes no rows, wherever it occurs

    @model_validator(mode="after")
    def _a_weight_for_each_source(self) -> TextConfig:
        if self.mixture is not None and len(self.mixture) != len(self.source):
            raise ValueError(
                f"mixture has {len(self.mixture)} weights and source {len(self.source)} entries: "
                "give each entry one, in the same order"
            )
        return self


class SiteConfig(Section):
    """One tap site and the layers (counted from 0) it is tapped at."""

    site: Site
    layers: list[SmallCount] | Literal["all"]

    @field_validator("layers")
    @classmethod
    def _layers_distinct(cls, layers: list[int] | str) -> list[int] | str:
        if isinstance(layers, list) and (not layers or len(set(layers)) != len(layers)):
            raise ValueError("layers must be 'all' or a non-empty list without repeats")
        return layers


class MeshConfig(Section):
    """Devices per mesh axis: batches are split over `data`, weights over `model`."""

    data: PositiveSmallCount = 1
    model: PositiveSmallCount = 1


class RollingConfig(Section):
    """A store of which only a window of buckets is on the disk: training follows the harvest.

    The window's size is one of `buckets` and `bytes`; the disk holds it and one bucket more.
    """

    buckets: PositiveSmallCount | None = None
    bytes: PositiveCount | None = None  # of the disk, with the one bucket more
    # A process harvests beside the trainer, on its own devices; else the trainer's does, in turns.
    beside: bool = False

    @model_validator(mode="after")
    def _one_size(self) -> RollingConfig:
        if (self.buckets is None) == (self.bytes is None):
            raise ValueError(
                "give the window's size once, as buckets (a number of shuffle buckets) or as bytes "
                "(of disk)"
            )
        return self


class CacheConfig(Section):
    """The activation store: its folder, what is tapped, how many rows, how they are shuffled.

    Of a store that `sae import` made only the folder is given.
    """

    path: Location
    sites: list[SiteConfig] = Field(default_factory=list)  # none: the store was imported
    tokens: Count = 0  # rows per site and layer; only usable tokens count. 0: the store's own
    dtype: RowDtype = "float32"
    shuffle_rows: PositiveCount = 1_000_000  # rows per shuffle bucket
    block_rows: PositiveSmallCount = 256  # rows per chunk: the unit the reader permutes
    sequences_per_batch: PositiveSmallCount = 8  # per forward pass of one replica of the model
    seed: Seed = 0
    mesh: MeshConfig | None = None  # of the language model; None: the section `mesh`
    rolling: RollingConfig | None = None  # None: the whole store is on the disk
    # Rows longer than so many times the median of their bucket are dropped.
    max_norm_over_median: MaxNormOverMedian | None = None

    @property
    def is_imported(self) -> bool:
        """Was the store imported, and not harvested?"""
        return not self.sites

    @model_validator(mode="after")
    def _says_how_many(self) -> CacheConfig:
        if self.sites and not self.tokens:
            raise ValueError("tokens is missing: with sites it must say how many rows to harvest")
        if self.tokens and not self.sites:
            raise ValueError(
                "sites is missing: with tokens it must say what to harvest. Of a store that `sae "
                "import` made give path alone"
            )
        if self.rolling is not None and not self.sites:
            raise ValueError("rolling is of a harvest, and without sites the store was imported")
        return self


class RolloutConfig(Section):
    """Prompts, and how the model continues them.

    `prompt` says what a document of `source` is: `text` is continued as it is; of a `user` it is
    what somebody says to the model; `messages` is a conversation, answered after its last message
    of a user. The last two are rendered by the model's chat template.
    """

    path: Location
    source: Annotated[list[FilePath], Field(min_length=1)]
    field: str = "text"
    prompt: Literal["text", "user", "messages"] = "text"
    prompts: PositiveCount | None = None  # at most so many; None: all, and the source must end
    per_prompt: PositiveSmallCount = 1  # continuations of each
    tokens: PositiveSmallCount = 512  # of a continuation, at most
    temperature: NonNegative32 = 1.0
    seed: Seed = 0
    batch: PositiveSmallCount = 16  # continuations made at once by one replica of the model
