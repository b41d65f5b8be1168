"""What text says of a tile of latents: counts, histograms, intervals, input tokens, co-firing.

Legend: T latents of a tile, P firings of the tile, N tokens that are walked, V vocabulary, F
latents of the SAE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import scipy.sparse
from jaxtyping import Float, Int

from sae_train.latents.firings import Firings
from sae_train.latents.schema import ACTIVITY, BINS, INTERVALS, RANKED

# A product of co-firing counts has at most so many entries: 512 MB with their columns.
MAX_COFIRING_ENTRIES = 2**26


@dataclass(frozen=True)
class Cofiring:
    """Who fires together, on the first rows of the walk.

    Attributes:
        fires: [rows, F], 1 where a latent is active.
    """

    fires: scipy.sparse.csr_matrix

    @cached_property
    def counts_F(self) -> Int[np.ndarray, " F"]:
        """How often each latent fires on these rows."""
        return np.bincount(self.fires.indices, minlength=self.fires.shape[1])

    def best(self, firings: Firings, tile: range) -> Iterator[tuple[np.ndarray, ...]]:
        """Of each latent of the tile the latents, counts and scores of the best `RANKED`."""
        rows, width = self.fires.shape
        step = max(1, MAX_COFIRING_ENTRIES // width)
        for begin in range(0, len(tile), step):
            end = min(begin + step, len(tile))
            mine = slice(firings.starts[begin], firings.starts[end])
            early = firings.rows[mine] < rows
            latents = (firings.latents[mine] - begin)[early]
            starts = np.searchsorted(latents, np.arange(end - begin + 1))
            ones = np.ones(len(latents), np.int32)
            by_latent = scipy.sparse.csr_matrix(
                (ones, firings.rows[mine][early], starts), shape=(end - begin, rows)
            )
            together = by_latent @ self.fires
            for number in range(end - begin):
                row = slice(together.indptr[number], together.indptr[number + 1])
                yield self._ranked(tile[begin + number], together.indices[row], together.data[row])

    def _ranked(
        self, latent: int, others: Int[np.ndarray, " O"], counts: Int[np.ndarray, " O"]
    ) -> tuple[np.ndarray, ...]:
        others, counts = others[others != latent], counts[others != latent]
        either = self.counts_F[latent] + self.counts_F[others] - counts
        score = counts / either
        best = best_of(score, others)
        return others[best], counts[best], score[best]


def best_of(scores: np.ndarray, ids: np.ndarray, *, number: int = RANKED) -> np.ndarray:
    """Where the greatest scores are, falling; equal scores by rising id."""
    if len(scores) > number:
        least = np.partition(scores, -number)[-number]
        places = np.flatnonzero(scores >= least)
    else:
        places = np.arange(len(scores))
    return places[np.lexsort((ids[places], -scores[places]))][:number]


@dataclass(frozen=True)
class Activity:
    """The firings of a tile and what is computed from them.

    Attributes:
        first: the tile's first latent.
        tokens: N, the token id of each row of the walk.
        token_counts: V, how often each id is among the tokens that count.
    """

    first: int
    firings: Firings
    tokens: Int[np.ndarray, " N"]
    token_counts: Int[np.ndarray, " V"]

    @property
    def tile(self) -> range:
        """The tile's latents."""
        return range(self.first, self.first + len(self.firings.starts) - 1)

    @cached_property
    def counts(self) -> Int[np.ndarray, " T"]:
        """How often each latent fires."""
        return np.diff(self.firings.starts)

    @cached_property
    def maxima(self) -> Float[np.ndarray, " T"]:
        """Of each latent the greatest value; 0 if it never fired."""
        return self._reduced(np.maximum, self.firings.values)

    @cached_property
    def minima(self) -> Float[np.ndarray, " T"]:
        """Of each latent the smallest value where it fires; 0 if it never did."""
        return self._reduced(np.minimum, self.firings.values)

    @cached_property
    def means(self) -> Float[np.ndarray, " T"]:
        """Of each latent the mean where it fires, summed in float64; 0 if it never did."""
        sums = self._reduced(np.add, self.firings.values.astype(np.float64))
        return sums / np.maximum(self.counts, 1)

    def _reduced(self, how: np.ufunc, values: np.ndarray) -> np.ndarray:
        result = np.zeros(len(self.counts), values.dtype)
        alive = self.counts > 0
        if alive.any():
            result[alive] = how.reduceat(values, self.firings.starts[:-1][alive])
        return result

    @cached_property
    def intervals(self) -> Int[np.ndarray, " P"]:
        """The interval of (0, maximum] each firing is in: 1 is the highest."""
        edges = self.maxima.astype(np.float64)
        interval = np.full(len(self.firings.values), INTERVALS, np.int8)
        for number in range(1, INTERVALS):
            edge = (edges * number / INTERVALS)[self.firings.latents]
            interval -= self.firings.values > edge
        return interval

    def histograms(self) -> Int[np.ndarray, "T bins"]:
        """Counts as `numpy.histogram` makes them, between smallest and greatest value."""
        low, high = self.minima.astype(np.float64), self.maxima.astype(np.float64)
        edges = np.linspace(low, high, BINS + 1, axis=1)
        latents = self.firings.latents
        values = self.firings.values.astype(np.float64)
        width = np.where(high > low, high - low, 1.0)
        bins = ((values - low[latents]) * (BINS / width)[latents]).astype(np.int64)
        bins = np.clip(bins, 0, BINS - 1)
        # Rounding may have put a value on the wrong side of an edge.
        bins -= values < edges[latents, bins]
        bins += (values >= edges[latents, bins + 1]) & (bins < BINS - 1)
        bins[(high == low)[latents]] = BINS - 1
        return self._counted(bins, BINS)

    def _counted(self, kinds: np.ndarray, number: int) -> np.ndarray:
        counts = np.bincount(
            self.firings.latents * number + kinds, minlength=len(self.counts) * number
        )
        return counts.reshape(-1, number)

    def inputs(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Of each latent the ids, counts and lifts of the tokens it fires on most."""
        vocabulary = len(self.token_counts)
        keys = self.firings.latents * vocabulary + self.tokens[self.firings.rows]
        keys, counts = np.unique(keys, return_counts=True)
        ids = keys % vocabulary
        starts = np.searchsorted(keys, np.arange(len(self.counts) + 1) * vocabulary)
        share = self.token_counts / self.token_counts.sum()
        for number in range(len(self.counts)):
            own = slice(starts[number], starts[number + 1])
            best = best_of(counts[own], ids[own])
            chosen, fires = ids[own][best], counts[own][best]
            yield chosen, fires, fires / max(1, self.counts[number]) / share[chosen]

    def rows(self, cofiring: Cofiring) -> pa.Table:
        """The rows of `activity.parquet`."""
        alive = self.counts > 0
        histograms = self.histograms()
        inputs = list(zip(*self.inputs(), strict=True))
        coactive = list(zip(*cofiring.best(self.firings, self.tile), strict=True))
        return pa.table(
            [
                pa.array(np.array(self.tile, np.int32)),
                pa.array(self.minima, mask=~alive),
                pa.array(self.maxima, mask=~alive),
                lists(
                    [
                        row if fired else row[:0]
                        for row, fired in zip(histograms, alive, strict=True)
                    ]
                ),
                lists(self._counted(self.intervals - 1, INTERVALS)),
                *(lists(column) for column in (*inputs, *coactive)),
            ],
            schema=ACTIVITY.schema,
        )


def lists(rows: np.ndarray | list[np.ndarray] | tuple[np.ndarray, ...]) -> pa.ListArray:
    """A column of lists."""
    ends = np.cumsum([0, *(len(row) for row in rows)])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(np.concatenate(rows)))
