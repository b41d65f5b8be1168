"""Documents to sequences of one length.

Each document is followed by EOS; the stream of all documents is cut into pieces of `length - 1`,
each with BOS in front; the last one is padded. If documents have subsets, each subset is a stream
of its own, so that every sequence belongs to one subset.

Legend: S sequence length, N sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from activation_cache.text.token_table import SpecialIds


def pack(
    batches: Iterable[Sequence[Sequence[int]]], *, length: int, special: SpecialIds
) -> Iterator[Int32[np.ndarray, "N S"]]:
    """Cut documents (lists of token ids, in batches) into sequences.

    After each batch it yields the sequences that are complete, so that memory holds one batch and
    less than one sequence.
    """
    of_one_subset = ([(0, document) for document in documents] for documents in batches)
    for rows, _ in pack_by_subset(of_one_subset, length=length, special=special):
        yield rows


def pack_by_subset(
    batches: Iterable[Sequence[tuple[int, Sequence[int]]]], *, length: int, special: SpecialIds
) -> Iterator[tuple[Int32[np.ndarray, "N S"], Int32[np.ndarray, " N"]]]:
    """`pack` for documents that come as (number of their subset, token ids).

    Sequences come in the order in which documents complete them, whatever the batches. The rest of
    each subset comes last, in the order in which the subsets were first met.

    Yields:
        Sequences, and the subset of each.
    """
    streams: dict[int, _Stream] = {}
    for documents in batches:
        rows = [np.empty((0, length), np.int32)]
        subsets: list[int] = []
        for subset, document in documents:
            stream = streams.setdefault(subset, _Stream(length, special))
            stream.add(document)
            if stream.size >= length - 1:
                rows.append(stream.take())
                subsets += [subset] * len(rows[-1])
        yield np.concatenate(rows), np.array(subsets, np.int32)
    for subset, stream in streams.items():
        rest = stream.end()
        yield rest, np.full(len(rest), subset, np.int32)


def pack_vocabulary(size: int, *, length: int, special: SpecialIds) -> Int32[np.ndarray, "N S"]:
    """Every id of a vocabulary once, in rising order, without the special ones."""
    apart = np.array([special.bos, special.eos, special.pad])
    stream = _Stream(length, special)
    stream.parts = [np.setdiff1d(np.arange(size), apart).astype(np.int32)]
    stream.size = len(stream.parts[0])
    return np.concatenate([stream.take(), stream.end()])


@dataclass
class _Stream:
    """Documents one after the other; holds the tokens that aren't cut into sequences yet."""

    length: int
    special: SpecialIds
    parts: list[np.ndarray] = field(default_factory=list)
    size: int = 0

    def add(self, document: Sequence[int]) -> None:
        self.parts.append(np.array([*document, self.special.eos], np.int32))
        self.size += len(self.parts[-1])

    def take(self) -> Int32[np.ndarray, "N S"]:
        """Remove and return every complete sequence."""
        body = self.length - 1
        stream = np.concatenate([np.empty(0, np.int32), *self.parts])
        whole = len(stream) // body * body
        self.parts, self.size = [stream[whole:]], len(stream) - whole
        return self._with_bos(stream[:whole].reshape(-1, body))

    def end(self) -> Int32[np.ndarray, "N S"]:
        """The rest as one padded sequence; none if there is no rest."""
        if not self.size:
            return np.empty((0, self.length), np.int32)
        rest = self.length - 1 - self.size
        self.parts.append(np.full(rest, self.special.pad, np.int32))
        return self.take()

    def _with_bos(self, body: np.ndarray) -> Int32[np.ndarray, "N S"]:
        return np.pad(body, ((0, 0), (1, 0)), constant_values=self.special.bos)
