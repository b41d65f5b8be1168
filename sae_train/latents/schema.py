"""The files of a `latents` folder: their names, their columns, and the record that names them all.

docs/latents.md describes every column. `Table` says how many latents share a row group: a latent
is read by reading the one group it is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from activation_cache.config import Count, PositiveCount, Section

FOLDER = "latents"  # in a run's folder
RECORD = "latents.json"
VOCABULARY = "vocabulary.parquet"
WINDOWS = "windows.parquet"
EXPLANATIONS = "explanations.parquet"

GROUP = 128  # latents of a row group of the detailed tables
BINS = 50  # of both histograms, as SAEDashboard's
INTERVALS = 5  # of a latent's activation, as SAEDashboard's
RANKED = 10  # tokens, co-firing latents and neighbours of the same SAE that are kept
RANKED_OF_OTHERS = 5  # neighbours in each other SAE
WINDOW_TOKENS = 32  # of a window, as a text of delphi's
WINDOWS_KEPT = 1024

# How the work is cut; unfinished work of other sizes is not continued.
SHARD_TOKENS = 2**14  # of the walk
PART_FIRINGS = 2**22  # of a part's latents, unless a single latent has more
PART_CONTEXT_TOKENS = 2**24  # of a part: where latents fire little, each firing has a context
PART_ROWS = 2**12  # of weights

_INT, _LONG, _REAL, _WIDE = pa.int32(), pa.int64(), pa.float32(), pa.float64()
_INTS, _LONGS, _REALS, _WIDES = (pa.list_(kind) for kind in (_INT, _LONG, _REAL, _WIDE))


def _ranked(*names: str) -> list[tuple[str, pa.DataType]]:
    """Columns of ranked tokens: ids, and the value of each."""
    return [pair for name in names for pair in ((f"{name}_ids", _INTS), (f"{name}_values", _REALS))]


def _neighbours(name: str) -> list[tuple[str, pa.DataType]]:
    """Columns of similar latents: the SAE's number in the record's `saes`, its latent, cosine."""
    return [(f"{name}_saes", _INTS), (f"{name}_latents", _INTS), (f"{name}_cosines", _REALS)]


@dataclass(frozen=True)
class Table:
    """One Parquet file.

    Attributes:
        group: latents of a row group; each has all rows of its latents.
    """

    name: str
    schema: pa.Schema
    group: int


SUMMARY = Table(
    "summary.parquet",
    pa.schema(
        [
            ("latent", _INT),
            ("count", _LONG),
            ("frequency", _WIDE),
            ("mean", _REAL),
            ("maximum", _REAL),
            ("top_input", _INT),
            ("top_logit_token", _INT),
            ("top_logit", _REAL),
            ("bottom_logit_token", _INT),
            ("bottom_logit", _REAL),
            ("nearest_latent", _INT),
            ("nearest_cosine", _REAL),
        ]
    ),
    group=2**16,
)
ACTIVITY = Table(
    "activity.parquet",
    pa.schema(
        [
            ("latent", _INT),
            ("histogram_low", _REAL),
            ("histogram_high", _REAL),
            ("histogram_counts", _LONGS),
            ("interval_counts", _LONGS),
            ("input_ids", _INTS),
            ("input_counts", _LONGS),
            ("input_lifts", _WIDES),
            ("coactive_latents", _INTS),
            ("coactive_counts", _LONGS),
            ("coactive_scores", _WIDES),
        ]
    ),
    group=GROUP,
)
DIRECTIONS = Table(
    "directions.parquet",
    pa.schema(
        [
            ("latent", _INT),
            *_ranked("top", "bottom", "plain_top", "plain_bottom"),
            *(
                (f"{name}_{end}", _REAL)
                for name in ("logit", "plain_logit")
                for end in ("low", "high")
            ),
            ("logit_counts", _LONGS),
            ("plain_logit_counts", _LONGS),
            *_neighbours("neighbour"),
            *_ranked("encoder_top", "encoder_bottom"),
            *_neighbours("encoder_neighbour"),
        ]
    ),
    group=GROUP,
)
CONTEXTS = Table(
    "contexts.parquet",
    pa.schema(
        [
            ("latent", _INT),
            ("interval", pa.int8()),
            ("sequence", _LONG),
            ("position", _INT),
            ("start", _INT),
            ("subset", pa.dictionary(pa.int32(), pa.string())),
            ("tokens", _INTS),
            ("values", _REALS),
        ]
    ),
    group=GROUP,
)
TABLES = (SUMMARY, ACTIVITY, DIRECTIONS, CONTEXTS)

WINDOWS_SCHEMA = pa.schema(
    [("sequence", _LONG), ("start", _INT), ("tokens", _INTS), ("latents", _INTS)]
)
VOCABULARY_SCHEMA = pa.schema([("id", _INT), ("piece", pa.string())])
EXPLANATIONS_SCHEMA = pa.schema(
    [
        ("latent", _INT),
        ("text", pa.string()),
        ("method", pa.string()),
        ("model", pa.string()),
        ("scores", pa.string()),
    ]
)


class SaeEntry(Section):
    """An SAE that neighbours are named of: the folder's own, or another of its sweep.

    Attributes:
        folder: the run's folder, as a path relative to the folder of the run of these latents.
    """

    name: str
    folder: str
    width: PositiveCount
    fingerprint: str


class Record(Section):
    """`latents.json`, written last: a folder without it holds no latents.

    Attributes:
        saes: the first is the SAE itself.
        target: of a transcoder the site it predicts.
        tokens: those that counted: neither BOS, EOS, padding nor masked.
        cofiring_tokens: the first of them, on which co-firing was counted.
        mean_abs_cosine: of all pairs of different decoder rows; None for a single latent.
        settings, fingerprints: what the files were made from; they decide whether they are current.
    """

    format_version: Literal[1] = 1
    name: str
    step: Count
    model: str
    site: str
    layer: Count
    target: str | None = None
    architecture: str
    width: PositiveCount
    sequences: PositiveCount
    sequence_length: PositiveCount
    tokens: PositiveCount
    cofiring_tokens: Count
    alive: Count
    mean_abs_cosine: float | None
    mean_abs_encoder_cosine: float | None = None
    subsets: list[str] = Field(default_factory=list)
    saes: list[SaeEntry]
    settings: dict[str, Any]
    fingerprints: dict[str, str]
