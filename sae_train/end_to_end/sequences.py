"""Which sequences a step reads, and which of their positions are its rows.

A step is a pure function of (token table, batch size, seed, step), as `batch(step)` is of a store.
It has whole sequences, for later tokens attend to what is replaced at earlier ones. Each gives
S - 1 rows, one for every position but BOS. Where a position is EOS, padding or masked, which are
never rows, a usable one of the same sequence is taken again: so every step has as many rows, and
the mean over them needs no mask. A sequence of few usable tokens would repeat them very often, so
one with fewer than a quarter is left out, such as the last one, which is mostly padding.

Legend: B sequences of a step, S position, R = S - 1 rows of a sequence, P = S - 1 predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from activation_cache.runtime.errors import UserError
from activation_cache.store.order import Permutation, derive_key
from activation_cache.text.token_table import TokenTable
from sae_train.config.end_to_end import sequences_per_step

# The first word after the seed in the key, as `store.order` has one for each of its orders.
_THROUGH_MODEL = 4
# One token in so many must be usable.
_FEWEST = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Text:
    """The sequences of a step, on the host or on devices; there perhaps in groups of them.

    Attributes:
        position_BR: of each row its position in its sequence.
        row_BS: of each usable position its first row, 0 elsewhere.
        usable_BS: the positions whose activations are replaced.
        counted_BP: the predictions that count, as in an evaluation's losses: from a usable token,
            and neither of padding nor of a masked one.
    """

    tokens_BS: Int[Array | np.ndarray, "... B S"]
    position_BR: Int[Array | np.ndarray, "... B R"]
    row_BS: Int[Array | np.ndarray, "... B S"]
    usable_BS: Bool[Array | np.ndarray, "... B S"]
    counted_BP: Bool[Array | np.ndarray, "... B P"]


class Sequences:
    """The steps' text, from the sequences that may be harvested: never from those held out."""

    def __init__(self, table: TokenTable, *, batch_size: int, seed: int) -> None:
        self._table, self._seed = table, seed
        length = table.sequence_length
        self.per_step = sequences_per_step(batch_size, sequence_length=length)
        counts = table.usable_counts()[: table.num_harvestable]
        self._eligible = np.flatnonzero(_FEWEST * counts >= length - 1)
        if not self._eligible.size:
            raise UserError(
                f"train.end_to_end finds no sequence at {table.path} of which a quarter is usable: "
                f"none of {table.num_harvestable} has {-(-(length - 1) // _FEWEST)} usable tokens. "
                "Lower text.sequence_length, mask less, or give more text"
            )

    def chosen(self, step: int) -> list[int]:
        """The sequences of a step: each comes once an epoch, in an order of the epoch's own."""
        places = range(step * self.per_step, (step + 1) * self.per_step)
        size = len(self._eligible)
        found = []
        for place in places:
            epoch, offset = divmod(place, size)
            order = Permutation(size, derive_key(self._seed, _THROUGH_MODEL, epoch))
            found.append(int(self._eligible[order.forward(np.array([offset]))[0]]))
        return found

    def text(self, step: int) -> Text:
        """A step's text, on the host; raises `UserError` where the table is damaged."""
        chosen = self.chosen(step)
        tokens_BS, masked_BS = self._table.read(chosen), self._table.masked(chosen)
        usable_BS = self._table.usable(tokens_BS, chosen)
        pad = self._table.summary.special_ids.pad
        rows = tokens_BS.shape[1] - 1
        positions = [np.resize(np.flatnonzero(usable_S), rows) for usable_S in usable_BS]
        return Text(
            tokens_BS=tokens_BS,
            position_BR=np.stack(positions).astype(np.int32),
            row_BS=np.where(usable_BS, usable_BS.cumsum(axis=1) - 1, 0).astype(np.int32),
            usable_BS=usable_BS,
            counted_BP=usable_BS[:, :-1] & (tokens_BS[:, 1:] != pad) & ~masked_BS[:, 1:],
        )
