"""The rows that an import has held out, in the place of a text and of the model that reads it.

They are read as a table whose tokens are the numbers of rows, so that L0, FVU and firing are
measured by the pass that measures a model. Legend: B sequences of a batch, S position, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Int64

from activation_cache.config import LARGEST_INT32, TextConfig
from activation_cache.gemma.taps import Tap
from activation_cache.runtime.errors import UserError
from activation_cache.storage.records import FORMAT_VERSION
from activation_cache.store.store import Store
from activation_cache.text.token_table import SpecialIds, TokenSummary, TokenTable

_NO_ROW = LARGEST_INT32


@dataclass(frozen=True)
class HeldOutRows(TokenTable):
    """The held-out rows of an imported store; made by `held_out_rows`.

    Attributes:
        store: that of the held-out rows alone.
    """

    store: Store

    @property
    def in_sequences(self) -> bool:
        """Were the rows given as sequences, so that positions mean something?"""
        imported = self.store.manifest.imported
        return imported is not None and imported.in_sequences

    def read(self, sequences: Sequence[int]) -> Int32[np.ndarray, "N S"]:
        """The numbers of the rows of any held-out sequences; `_NO_ROW` where there is none."""
        numbers = np.full((len(sequences), self.sequence_length), _NO_ROW, np.int32)
        for row, sequence in enumerate(sequences):
            first, stop = np.searchsorted(self._sequence, [sequence, sequence + 1])
            numbers[row, self._position[first:stop]] = np.arange(first, stop)
        return numbers

    def usable(
        self, tokens: Int32[np.ndarray, "N S"], sequences: Sequence[int]
    ) -> Bool[np.ndarray, "N S"]:
        """Where there are rows."""
        return tokens != _NO_ROW

    def activations(
        self, tokens: Int32[np.ndarray, "B S"], taps: Sequence[Tap]
    ) -> dict[Tap, Float[Array, "B S _"]]:
        """The rows with these numbers, at the taps that the store has; zeros where there are none.

        Raises:
            UserError: a shard is damaged; names the file.
        """
        there = tokens != _NO_ROW
        wanted = tokens[there]
        start, stop = (int(wanted.min()), int(wanted.max()) + 1) if wanted.size else (0, 0)
        found = {}
        for tap in taps:
            if tap in self.store.taps:
                values = np.zeros((*tokens.shape, self.store.tap_info(tap).width), np.float32)
                values[there] = self.store.read(tap, start=start, stop=stop)[wanted - start]
                found[tap] = jnp.asarray(values)
        return found

    @cached_property
    def _provenance(self) -> tuple[Int64[np.ndarray, " N"], Int32[np.ndarray, " N"]]:
        found = self.store.provenance(start=0, stop=self.store.rows)
        return found.sequence.astype(np.int64), found.position

    @property
    def _sequence(self) -> Int64[np.ndarray, " N"]:
        return self._provenance[0]

    @property
    def _position(self) -> Int32[np.ndarray, " N"]:
        return self._provenance[1]


def held_out_rows(store: Store) -> HeldOutRows:
    """The rows that an imported store has held out.

    Raises:
        UserError: it was harvested, or nothing was held out.
    """
    imported = store.manifest.imported
    if imported is None:
        raise UserError(
            f"the store at {store.path} was harvested, and the config has no model: copy the "
            "sections model, text and cache from the config.yaml of the store"
        )
    if not imported.held_out_sequences:
        raise UserError(
            f"the store at {store.path} has no held-out rows: L0 and FVU are measured on rows that "
            "were not trained on. Import again with --held-out above 0"
        )
    held_out = store.held_out
    summary = TokenSummary(
        format_version=FORMAT_VERSION,
        text=TextConfig(
            source=[],
            sequence_length=max(2, imported.sequence_length),
            held_out_sequences=imported.held_out_sequences,
        ),
        sources=[],
        tokenizer_hash="",
        rows_wanted=None,
        special_ids=SpecialIds(bos=_NO_ROW, eos=_NO_ROW, pad=_NO_ROW),
        token_hash=held_out.identity,
        documents=0,
        tokens=held_out.rows,
        sequences=store.manifest.num_sequences,
        usable_rows=store.rows,
    )
    return HeldOutRows(held_out.path, summary, held_out)
