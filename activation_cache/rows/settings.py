"""What an import is told beside its rows: how they are stored, shuffled and held out."""

from __future__ import annotations

import math
import re
from typing import Annotated, get_args

from pydantic import Field

from activation_cache.config import (
    Count,
    MaxNormOverMedian,
    PositiveCount,
    PositiveSmallCount,
    RowDtype,
    Section,
    Seed,
    Site,
    SmallCount,
)
from activation_cache.gemma.taps import EMBEDDING, Tap
from activation_cache.runtime.errors import UserError

# Rows without sequences are cut into such, of as many rows as a sequence of Gemma Scope's text
# has, or shorter ones so that there are some to hold out.
_ROWS_OF_A_SEQUENCE, _FEWEST_SEQUENCES = 1024, 128


class ImportSettings(Section):
    """How rows become a store; the keys of `cache` have the same names and meaning.

    Attributes:
        held_out: rows for evaluation, the last: below 1 a share, else a number. Whole sequences are
            held out.
        sequence_length: of rows that are not given as sequences; None: 1024, or less where
            there are few rows.
        special_ids: up to three token ids that make no rows, such as those of BOS, EOS and padding.
    """

    dtype: RowDtype = "float32"
    shuffle_rows: PositiveCount = 1_000_000
    block_rows: PositiveSmallCount = 256
    seed: Seed = 0
    held_out: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    sequence_length: PositiveSmallCount | None = None
    special_ids: Annotated[list[SmallCount], Field(max_length=3)] = Field(default_factory=list)
    max_norm_over_median: MaxNormOverMedian | None = None

    def length_for(self, rows: int) -> int:
        """Length of the sequences that so many rows are cut into."""
        return self.sequence_length or max(1, min(_ROWS_OF_A_SEQUENCE, rows // _FEWEST_SEQUENCES))

    def held_out_sequences(self, *, rows: Count, sequences: int, length: int) -> int:
        """How many of the last sequences are held out.

        Raises:
            UserError: none would be left to train on.
        """
        wanted = self.held_out * rows if self.held_out < 1 else self.held_out
        held_out = min(math.ceil(wanted / length), sequences)
        if sequences - held_out < 1:
            raise UserError(
                f"{rows} rows in {sequences} sequences of {length} are all held out for evaluation "
                f"(held_out is {self.held_out:g}, in whole sequences): lower it, or cut the rows "
                "into shorter sequences with sequence_length"
            )
        return held_out


_SITES: tuple[Site, ...] = tuple(site for site in get_args(Site) if site != EMBEDDING.site)


def parse_tap(name: str) -> Tap:
    """The tap that `resid_post.12` names, or `rows.0`.

    Raises:
        UserError: no such site, or no layer.
    """
    site, _, layer = name.partition(".")
    for known in _SITES:
        if site == known and re.fullmatch(r"\d{1,9}", layer):
            return Tap(known, int(layer))
    raise UserError(
        f"{name} is not where rows can be from: it is a site and a layer, as resid_post.12, of "
        f"{', '.join(_SITES)}. What is none of the others is rows, as rows.0"
    )
