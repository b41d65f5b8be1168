"""The stored table of tokens: the sequences that a text was cut into, read by their index.

On disk (docs/store.md): `tokens` int32 [sequences, S], `usable` int32 [sequences] (the usable
tokens of each), with `text.subset_field` also `subset` int32 [sequences], with `text.chat` or
`text.masked_text` also `masked` uint8 [sequences, S], and `tokens.json`, written last. A usable
token makes a row of an activation store: it is neither BOS, EOS nor padding (Gemma Scope, section
3.1), nor masked. Legend: S sequence length, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Int32
from pydantic import Field

from activation_cache.config import Count, PositiveCount, Section, TextConfig
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import ArrayLayout, read_rows
from activation_cache.storage.files import StoragePath
from activation_cache.storage.records import read_record
from activation_cache.storage.row_range import Segment

TOKENS_FILE = "tokens.json"
_CHUNK_BYTES = 2**16  # small: sequences are read in random order, a whole chunk for each
_SHARD_CHUNKS = 1024
_CHUNK_COUNTS = 1024


class SpecialIds(Section):
    """Ids that mark and fill sequences; never a row of a store."""

    bos: Count
    eos: Count
    pad: Count


class SourceEntry(Section):
    """One source: a file's size and sampled content hash, both None for a stream."""

    name: str
    size: Count | None
    sha256: str | None

    def __str__(self) -> str:
        return f"{self.size} bytes with hash {str(self.sha256)[:16]}"


class TokenSummary(Section):
    """`tokens.json`: what the table was made from, and what it holds."""

    format_version: int
    text: TextConfig
    sources: list[SourceEntry]
    tokenizer_hash: str
    template_hash: str | None = None  # of the chat template, with `text.chat`
    rows_wanted: PositiveCount | None  # at which reading a stream ended; None without streams
    vocabulary: PositiveCount | None = None  # number of ids, if they are harvested, not text
    special_ids: SpecialIds
    token_hash: str
    documents: Count
    tokens: Count  # of text: without BOS, EOS and padding put there by packing
    sequences: PositiveCount
    usable_rows: Count  # in the sequences that may be harvested
    subsets: list[str] = Field(default_factory=list)  # names; the array `subset` numbers them

    def __str__(self) -> str:
        return (
            f"{self.documents} documents, {self.tokens} tokens, {self.sequences} sequences of "
            f"{self.text.sequence_length}, {self.text.held_out_sequences} of them held out, "
            f"{self.usable_rows} usable rows to harvest"
        )


@dataclass(frozen=True)
class TokenTable:
    """A finished token table."""

    path: StoragePath
    summary: TokenSummary

    @property
    def num_sequences(self) -> int:
        """All sequences, held-out ones included."""
        return self.summary.sequences

    @property
    def sequence_length(self) -> int:
        """S, with BOS."""
        return self.summary.text.sequence_length

    @property
    def num_harvestable(self) -> int:
        """Sequences `[0, num_harvestable)` may be harvested."""
        return self.num_sequences - self.summary.text.held_out_sequences

    @property
    def held_out(self) -> range:
        """The sequences kept for evaluation: the last ones, never harvested."""
        return range(self.num_harvestable, self.num_sequences)

    def read(self, sequences: Sequence[int]) -> Int32[np.ndarray, "N S"]:
        """The tokens of any sequences, in the order asked for.

        Raises:
            UserError: the table is damaged on disk; names the file.
        """
        layout = token_layout(self.path, self.num_sequences, self.sequence_length)
        segments = [Segment(int(sequence), 1) for sequence in sequences]
        return read_rows(self._array, layout, segments)

    def usable(
        self, tokens: Int32[np.ndarray, "N S"], sequences: Sequence[int]
    ) -> Bool[np.ndarray, "N S"]:
        """Which tokens of these sequences make a row: neither BOS, EOS nor padding, nor masked."""
        return usable_tokens(tokens, self.summary.special_ids) & ~self.masked(sequences)

    def masked(self, sequences: Sequence[int]) -> Bool[np.ndarray, "N S"]:
        """Which tokens of these sequences are masked by `text.chat` or `text.masked_text`."""
        if not masks(self.summary.text):
            return np.zeros((len(sequences), self.sequence_length), bool)
        layout = mask_layout(self.path, self.num_sequences, self.sequence_length)
        segments = [Segment(int(sequence), 1) for sequence in sequences]
        return read_rows(self._masked, layout, segments).astype(bool)

    def usable_counts(self) -> Int32[np.ndarray, " N"]:
        """Usable tokens of every sequence, held-out ones included."""
        layout = count_layout(self.path, self.num_sequences)
        return read_rows(layout.open(), layout, [Segment(0, self.num_sequences)])

    def subset_of(self, sequences: Sequence[int]) -> Int32[np.ndarray, " N"]:
        """The subset of any sequences, as indices into `summary.subsets`; 0 if there are none."""
        if not self.summary.subsets:
            return np.zeros(len(sequences), np.int32)
        layout = subset_layout(self.path, self.num_sequences)
        segments = [Segment(int(sequence), 1) for sequence in sequences]
        return read_rows(layout.open(), layout, segments)

    def require_rows(self, rows: int) -> None:
        """Raises `UserError` when fewer than `rows` usable tokens may be harvested."""
        if self.summary.vocabulary is not None and rows > self.summary.usable_rows:
            raise UserError(
                f"cache.tokens asks for {rows} rows and the embedding has "
                f"{self.summary.usable_rows} without BOS, EOS and padding: set cache.tokens to "
                f"{self.summary.usable_rows}; train.tokens may be more, the rows come again."
            )
        chat = self.summary.text.chat
        if rows > self.summary.usable_rows:
            raise UserError(
                f"cache.tokens asks for {rows} rows and the text has {self.summary.usable_rows} "
                f"usable tokens (in {self.num_harvestable} of {self.num_sequences} sequences; "
                f"{len(self.held_out)} are held out): lower cache.tokens to at most "
                f"{self.summary.usable_rows}, lower text.held_out_sequences, or add text."
                + (f" Only words of text.chat.roles {chat.roles} count." if chat else "")
            )

    @cached_property
    def _array(self) -> ts.TensorStore:
        return token_layout(self.path, self.num_sequences, self.sequence_length).open()

    @cached_property
    def _masked(self) -> ts.TensorStore:
        return mask_layout(self.path, self.num_sequences, self.sequence_length).open()


def open_tokens(path: StoragePath) -> TokenTable:
    """Open a finished table; raises `UserError` when it is missing or damaged."""
    if not (path / TOKENS_FILE).exists():
        raise UserError(f"{path} has no {TOKENS_FILE}: it is not a finished token table.")
    return TokenTable(path, read_record(path / TOKENS_FILE, TokenSummary))


def usable_tokens(tokens: Int32[np.ndarray, "N S"], special: SpecialIds) -> Bool[np.ndarray, "N S"]:
    """Which tokens are neither BOS, EOS nor padding."""
    return (tokens != special.bos) & (tokens != special.eos) & (tokens != special.pad)


def token_layout(path: StoragePath, sequences: int, length: int) -> ArrayLayout:
    """The array of tokens, int32 [sequences, length]."""
    return ArrayLayout(
        path=path / "tokens",
        shape=(sequences, length),
        dtype="int32",
        chunk_rows=_chunk_sequences(length),
        shard_rows=_SHARD_CHUNKS * _chunk_sequences(length),
    )


def masks(text: TextConfig) -> bool:
    """Has a table of this text an array of masked tokens?"""
    return text.chat is not None or bool(text.masked_text)


def mask_layout(path: StoragePath, sequences: int, length: int) -> ArrayLayout:
    """The array of masked tokens, uint8 [sequences, length], 1 or 0: cut as the tokens are."""
    tokens = token_layout(path, sequences, length)
    return replace(tokens, path=path / "masked", dtype="uint8")


def count_layout(path: StoragePath, sequences: int) -> ArrayLayout:
    """The array of usable counts, int32 [sequences]."""
    return _per_sequence(path / "usable", sequences)


def subset_layout(path: StoragePath, sequences: int) -> ArrayLayout:
    """The array of subsets, int32 [sequences]; only with `text.subset_field`."""
    return _per_sequence(path / "subset", sequences)


def _per_sequence(path: StoragePath, sequences: int) -> ArrayLayout:
    return ArrayLayout(
        path=path,
        shape=(sequences,),
        dtype="int32",
        chunk_rows=_CHUNK_COUNTS,
        shard_rows=_SHARD_CHUNKS * _CHUNK_COUNTS,
    )


def _chunk_sequences(length: int) -> int:
    return max(1, _CHUNK_BYTES // (4 * length))
