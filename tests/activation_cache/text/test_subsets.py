"""Text with a subset field: every sequence belongs to one subset, and is remembered as such."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.config import ModelConfig, TextConfig
from activation_cache.language_model.tokenizer import Tokenizer, load_tokenizer
from activation_cache.runtime.errors import UserError
from activation_cache.text import tokenise
from activation_cache.text.packing import pack, pack_by_subset
from activation_cache.text.sources import find_sources
from activation_cache.text.token_table import SpecialIds
from activation_cache.text.tokenise import prepare_tokens
from tests.support.stores import file_hashes
from tests.support.tiny_gemma import write_tiny_gemma

SPECIAL = SpecialIds(bos=2, eos=1, pad=0)
ROWS = [("arxiv", "proofs"), ("github", "return 0"), ("arxiv", "lemmas"), ("law", "whereas")]

documents = st.tuples(st.integers(0, 3), st.lists(st.integers(3, 50), max_size=30))
batches = st.lists(st.lists(documents, min_size=1, max_size=5), max_size=5)


def packed(batches, length: int) -> list[tuple[int, list[int]]]:
    found = []
    for rows, subsets in pack_by_subset(batches, length=length, special=SPECIAL):
        assert len(rows) == len(subsets)
        found += list(zip(subsets.tolist(), rows.tolist(), strict=True))
    return found


@settings(deadline=None)
@given(batches=batches, length=st.integers(2, 17))
def test_each_subset_is_packed_as_if_it_were_alone(batches, length):
    found = packed(batches, length)
    for subset in range(4):
        alone = [[ids for number, ids in batch if number == subset] for batch in batches]
        expected = [row for part in pack(alone, length=length, special=SPECIAL) for row in part]
        assert [row for number, row in found if number == subset] == [r.tolist() for r in expected]


@settings(deadline=None)
@given(batches=batches, length=st.integers(2, 17))
def test_the_order_of_sequences_does_not_depend_on_the_batches(batches, length):
    one_by_one = [[document] for batch in batches for document in batch]
    assert packed(one_by_one, length) == packed(batches, length)


def jsonl(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(path: Path, field: str) -> list[tuple[str | None, str]]:
    config = TextConfig(source=[str(path)], subset_field=field)
    return [(one.subset, one.text) for source in find_sources(config) for one in source.open()]


def test_files_of_each_kind_name_the_subset(tmp_path: Path):
    flat = jsonl(tmp_path / "flat.jsonl", [{"text": t, "set": s, "id": 3} for s, t in ROWS])
    assert found(flat, "set") == ROWS
    nested = [{"text": text, "meta": {"pile_set_name": name}} for name, text in ROWS]
    assert found(jsonl(tmp_path / "pile.jsonl", nested), "meta.pile_set_name") == ROWS
    pyarrow.parquet.write_table(pa.Table.from_pylist(nested), tmp_path / "pile.parquet")
    assert found(tmp_path / "pile.parquet", "meta.pile_set_name") == ROWS


def test_a_row_without_its_subset_is_named(tmp_path: Path):
    rows = [{"text": "a", "set": "x"}, {"text": "b", "meta": {}}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: text.subset_field 'set' .* is None"):
        found(path, "set")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 1: text.subset_field 'kind' .* is None"):
        found(tmp_path / "a.parquet", "kind")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match=r"text.subset_field names a field and .*a.txt has none"):
        found(tmp_path / "a.txt", "set")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tiny_gemma(tmp_path_factory.mktemp("gemma"))
    return load_tokenizer(ModelConfig(weights=str(folder)))


def text_of(tmp_path: Path, **changes) -> TextConfig:
    rows = [{"text": f"{text} {number} " * 9, "set": s} for number in range(9) for s, text in ROWS]
    path = jsonl(tmp_path / "text.jsonl", rows)
    values = {"source": [str(path)], "sequence_length": 16, "held_out_sequences": 12}
    return TextConfig(**values | changes)


def test_a_table_knows_the_subset_of_every_sequence(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    text = text_of(tmp_path, subset_field="set")
    path = tmp_path / "tokens"
    table = prepare_tokens(text, tokenizer=tokenizer, path=path, rows=1)
    assert table.summary.subsets == ["arxiv", "github", "law"]
    subset_of = table.subset_of(range(table.num_sequences))
    for sequence, subset in enumerate(subset_of):
        inside = tokenizer.decode(table.read([sequence])[0].tolist())
        own = [text for name, text in ROWS if name == table.summary.subsets[subset]]
        foreign = [text for _, text in ROWS if text not in own]
        assert not any(text in inside for text in foreign), (own, inside)
    assert len(set(table.subset_of(table.held_out).tolist())) == 3
    assert table.subset_of([4, 0]).tolist() == subset_of[[4, 0]].tolist()
    before = file_hashes(path)
    monkeypatch.setattr(tokenise, "_BATCH_DOCUMENTS", 1)
    (path / "tokens.json").unlink()
    prepare_tokens(text, tokenizer=tokenizer, path=path, rows=1)
    assert file_hashes(path) == before


def test_another_subset_field_is_another_table(tmp_path: Path, tokenizer: Tokenizer):
    path = tmp_path / "tokens"
    plain = prepare_tokens(text_of(tmp_path), tokenizer=tokenizer, path=path, rows=1)
    assert plain.summary.subsets == []
    assert np.array_equal(plain.subset_of([1, 2]), [0, 0])
    other = text_of(tmp_path, subset_field="set")
    with pytest.raises(UserError, match=r"text.subset_field was None and is 'set'"):
        prepare_tokens(other, tokenizer=tokenizer, path=path, rows=1, keep=True)


def test_a_field_with_a_value_for_each_row_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenise, "_MOST_SUBSETS", 2)
    text = text_of(tmp_path, subset_field="set")
    with pytest.raises(UserError, match=r"text.subset_field set has more than 2 values"):
        prepare_tokens(text, tokenizer=tokenizer, path=tmp_path / "tokens", rows=1)
