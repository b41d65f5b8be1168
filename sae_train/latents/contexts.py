"""Pieces of text: the contexts of a tile of latents, and windows with all that fires in them.

Legend: T latents of a tile, P firings of the tile, C contexts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from sae_train.latents import schema
from sae_train.latents.activity import Activity, lists
from sae_train.latents.firings import Shards
from sae_train.latents.sampling import sampling_order
from sae_train.latents.schema import CONTEXTS, INTERVALS, WINDOWS_SCHEMA

_CANDIDATES = 40  # for each sample wanted: fewer than one group in 10^11 then lacks candidates


@dataclass(frozen=True)
class Window:
    """The text that contexts are cut from, and how.

    Attributes:
        sequence_length: S; row r of the walk is position r % S of its sequence.
        first_sequence: the index of the walk's first sequence in its table.
        ends: of each sequence, one past its last token that isn't padding.
        size: tokens of a context.
        alone: a context is its own token: sequences are lists of the vocabulary's ids.
    """

    sequence_length: int
    first_sequence: int
    ends: Int[np.ndarray, " N"]
    begins: Int[np.ndarray, " N"]
    size: int
    alone: bool = False

    def pieces(self) -> tuple[Int[np.ndarray, " C"], Int[np.ndarray, " C"]]:
        """Sequence and first position of each piece: sequences are cut, and their rests left out.

        A sequence that is shorter than a piece is one.
        """
        size = self.piece_size
        lengths_N = self.ends - self.begins
        numbers_N = np.where(lengths_N > 0, np.maximum(lengths_N // size, 1), 0)
        sequences_C = np.repeat(np.arange(len(lengths_N)), numbers_N)
        before_C = np.repeat(np.cumsum(numbers_N) - numbers_N, numbers_N)
        return sequences_C, self.begins[sequences_C] + size * (np.arange(len(before_C)) - before_C)

    @property
    def piece_size(self) -> int:
        """Tokens of a piece."""
        return 1 if self.alone else min(schema.WINDOW_TOKENS, self.size)

    def around(
        self, sequences_C: Int[np.ndarray, " C"], positions_C: Int[np.ndarray, " C"]
    ) -> tuple[Int[np.ndarray, " C"], Int[np.ndarray, " C"]]:
        """First position of each context, and one past its last."""
        if self.alone:
            return positions_C, positions_C + 1
        ends_C = self.ends[sequences_C]
        starts_C = np.minimum(positions_C - 3 * self.size // 4, ends_C - self.size)
        starts_C = np.maximum(starts_C, self.begins[sequences_C])
        return starts_C, np.minimum(starts_C + self.size, ends_C)


def context_rows(
    activity: Activity,
    window: Window,
    *,
    top: int,
    per_interval: int,
    subsets: Int[np.ndarray, " N"],
    subset_names: list[str],
) -> pa.Table:
    """The rows of `contexts.parquet`.

    Args:
        subsets: of each sequence of the walk, as an index into `subset_names`, if there are any.
    """
    firings = activity.firings
    best, sampled = top_places(activity, window, top), sample_places(activity, window, per_interval)
    places = np.concatenate([best, sampled])
    intervals = np.concatenate([np.zeros(len(best), np.int8), activity.intervals[sampled]])
    # Within an interval by falling value; equal values by row, as firings are sorted.
    order = np.lexsort((places, -firings.values[places], intervals, firings.latents[places]))
    places, intervals = places[order], intervals[order]
    sequences, positions = np.divmod(firings.rows[places], window.sequence_length)
    starts, stops = window.around(sequences, positions)
    first_rows = sequences * window.sequence_length + starts
    sizes = stops - starts
    ends = np.cumsum(np.concatenate([[0], sizes]))
    rows = np.repeat(first_rows - ends[:-1], sizes) + np.arange(ends[-1])
    offsets = pa.array(ends, pa.int32())
    names: pa.Array = pa.nulls(len(places), CONTEXTS.schema.field("subset").type)
    if subset_names:
        numbers = pa.array(subsets[sequences], pa.int32())
        names = pa.DictionaryArray.from_arrays(numbers, pa.array(subset_names))
    values = _values(activity, window, places, rows, sizes)
    return pa.table(
        [
            pa.array((firings.latents[places] + activity.first).astype(np.int32)),
            pa.array(intervals),
            pa.array(sequences + window.first_sequence),
            pa.array(positions.astype(np.int32)),
            pa.array(starts.astype(np.int32)),
            names,
            pa.ListArray.from_arrays(offsets, pa.array(activity.tokens[rows].astype(np.int32))),
            pa.ListArray.from_arrays(offsets, pa.array(values)),
        ],
        schema=CONTEXTS.schema,
    )


def window_rows(shards: Shards, window: Window, tokens_N: Int[np.ndarray, " N"]) -> pa.Table:
    """The rows of `windows.parquet`: a sample of pieces of the text, in its order.

    Args:
        tokens_N: the token id of each row of the walk.
    """
    sequences, starts = window.pieces()
    order = sampling_order(np.zeros_like(starts), sequences + window.first_sequence, starts)
    chosen = np.sort(np.argsort(order, kind="stable")[: schema.WINDOWS_KEPT])
    sequences, starts = sequences[chosen], starts[chosen]
    sizes = np.minimum(window.piece_size, window.ends[sequences] - starts)
    begins = sequences * window.sequence_length + starts
    piece_of_row = np.full(len(tokens_N), -1, np.int32)
    for number, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        piece_of_row[begin : begin + size] = number
    return pa.table(
        [
            pa.array(sequences + window.first_sequence),
            pa.array(starts.astype(np.int32)),
            lists([tokens_N[begin:][:size] for begin, size in zip(begins, sizes, strict=True)]),
            lists(shards.latents_in(piece_of_row)),
        ],
        names=WINDOWS_SCHEMA.names,
    ).cast(WINDOWS_SCHEMA)


def top_places(activity: Activity, window: Window, number: int) -> Int[np.ndarray, " C"]:
    """Which firings have the greatest values, at most one of each sequence.

    Of a sequence it is the first with its greatest value; equal values of two sequences go by
    sequence.
    """
    firings = activity.firings
    if not len(firings.values):
        return np.zeros(0, np.int64)
    sequences = firings.rows // window.sequence_length
    begins = np.flatnonzero(_changes(firings.latents) | _changes(sequences))
    sizes = np.diff(begins, append=len(sequences))
    greatest = np.repeat(np.maximum.reduceat(firings.values, begins), sizes)
    among = np.flatnonzero(firings.values == greatest)
    group = np.repeat(np.arange(len(begins)), sizes)[among]
    firsts = among[_changes(group)]
    order = np.lexsort((-firings.values[firsts], firings.latents[firsts]))  # stable
    return _first_of_each(firsts[order], firings.latents[firsts[order]], number)


def sample_places(activity: Activity, window: Window, number: int) -> Int[np.ndarray, " C"]:
    """Of each latent and interval the firings that `sampling_order` puts first."""
    firings = activity.firings
    if not number or not len(firings.values):
        return np.zeros(0, np.int64)
    group = firings.latents * INTERVALS + activity.intervals - 1
    sequences, positions = np.divmod(firings.rows, window.sequence_length)
    latents = firings.latents + activity.first
    order = sampling_order(latents, sequences + window.first_sequence, positions)
    # Sort only what may be chosen: of a large group those below a bound that most others exceed.
    sizes = np.bincount(group, minlength=len(activity.counts) * INTERVALS)
    share = np.minimum(1.0, _CANDIDATES * number / np.maximum(sizes, 1))
    bound = np.minimum(share * 2.0**64, 2.0**64 - 2**12).astype(np.uint64)
    maybe = (order <= bound[group]) | (share >= 1.0)[group]
    lacking = np.bincount(group[maybe], minlength=len(sizes)) < np.minimum(sizes, number)
    maybe = np.flatnonzero(maybe | lacking[group])
    sorted_ = maybe[np.lexsort((order[maybe], group[maybe]))]
    return _first_of_each(sorted_, group[sorted_], number)


def _changes(values: Int[np.ndarray, " P"]) -> Bool[np.ndarray, " P"]:
    """Where a value differs from the one before; the first does."""
    return np.concatenate([[True], values[1:] != values[:-1]])


def _first_of_each(places: np.ndarray, group: np.ndarray, number: int) -> np.ndarray:
    """Of each run of equal groups the first so many places."""
    begins = np.flatnonzero(_changes(group))
    rank = np.arange(len(group)) - np.repeat(begins, np.diff(begins, append=len(group)))
    return places[rank < number]


def _values(
    activity: Activity,
    window: Window,
    places: Int[np.ndarray, " C"],
    rows: Int[np.ndarray, " W"],
    sizes: Int[np.ndarray, " C"],
) -> np.ndarray:
    """The latent's value at each token of its contexts: what it fired there, else 0."""
    firings = activity.firings
    num_rows = len(activity.tokens)
    keys = firings.latents * num_rows + firings.rows  # rising
    wanted = np.repeat(firings.latents[places], sizes) * num_rows + rows
    values = np.zeros(len(wanted), np.float32)
    if len(keys):
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        hit = keys[found] == wanted
        values[hit] = firings.values[found[hit]]
    return values
