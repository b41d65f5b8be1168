"""Which sequences a step of the phase through the model reads, and which rows it makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from activation_cache.config import ModelConfig
from activation_cache.language_model.tokenizer import load_tokenizer
from activation_cache.runtime.errors import UserError
from activation_cache.text.token_table import TokenTable
from activation_cache.text.tokenise import prepare_tokens
from sae_train.end_to_end.sequences import Sequences
from tests.support.oracles.their_gemma import HELD_OUT, world_config
from tests.support.tiny_gemma import write_tiny_gemma


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    """Many EOS, padding in the text and at its end, 7 sequences held out."""
    config = world_config(tmp_path)
    weights = write_tiny_gemma(tmp_path / "gemma")
    tokenizer = load_tokenizer(ModelConfig(weights=str(weights)))
    return prepare_tokens(config.text, tokenizer=tokenizer, path=tmp_path / "tokens", rows=200)


def test_an_epoch_has_every_sequence_once_and_none_that_is_held_out(table: TokenTable):
    sequences = Sequences(table, batch_size=45, seed=5)
    assert sequences.per_step == 3  # of 15 rows each
    steps = table.num_harvestable // 3
    first = [one for step in range(steps) for one in sequences.chosen(step)]
    assert len({*first}) == 3 * steps
    assert max(first) < table.num_sequences - HELD_OUT
    again = Sequences(table, batch_size=45, seed=5)
    assert again.chosen(steps - 1) == first[-3:], "a step knows its own without those before"
    assert Sequences(table, batch_size=45, seed=6).chosen(0) != first[:3]
    later = [one for step in range(steps, 2 * steps) for one in sequences.chosen(step)]
    assert later != first


def test_rows_are_usable_tokens_and_each_is_found_again(table: TokenTable):
    sequences = Sequences(table, batch_size=60, seed=0)
    text = sequences.text(1)
    assert text.position_BR.shape == (4, 15)
    assert not text.usable_BS[:, 1:].all(), "the case with EOS is not met"
    for b in range(4):
        usable = np.flatnonzero(table.usable(text.tokens_BS, sequences.chosen(1))[b])
        assert {*text.position_BR[b]} == {*usable}
        np.testing.assert_array_equal(text.position_BR[b][text.row_BS[b][usable]], usable)
    assert not (text.counted_BP & ~text.usable_BS[:, :-1]).any()


def test_sequences_of_padding_are_left_out_and_none_left_is_an_error(table: TokenTable):
    counts = np.full(table.num_sequences, 15)
    counts[[0, 2]] = 3

    class Mostly(TokenTable):
        def usable_counts(self) -> np.ndarray:
            return counts.astype(np.int32)

    mostly = Mostly(table.path, table.summary)
    seen = {
        one for step in range(60) for one in Sequences(mostly, batch_size=60, seed=0).chosen(step)
    }
    assert seen == {*range(table.num_harvestable)} - {0, 2}
    counts[:] = 3
    with pytest.raises(UserError, match=r"has 4 usable tokens"):
        Sequences(mostly, batch_size=60, seed=0)
