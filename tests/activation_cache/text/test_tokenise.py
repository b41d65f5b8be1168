"""Packing and the token table: nothing lost, nothing reordered, nothing stale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.config import ModelConfig, TextConfig
from activation_cache.language_model.tokenizer import Tokenizer, load_tokenizer
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.text import token_table, tokenise
from activation_cache.text.packing import pack
from activation_cache.text.token_table import SpecialIds, TokenTable, open_tokens, usable_tokens
from activation_cache.text.tokenise import prepare_tokens
from tests.support.stores import file_hashes
from tests.support.tiny_gemma import write_tiny_gemma

SPECIAL = SpecialIds(bos=2, eos=1, pad=0)
BOS, EOS, PAD = 2, 1, 0

batches = st.lists(
    st.lists(st.lists(st.integers(3, 50), max_size=30), min_size=1, max_size=5), max_size=5
)


@settings(deadline=None)
@given(batches=batches, length=st.integers(2, 17))
def test_packing_keeps_every_token_in_order(batches, length):
    packed = list(pack(batches, length=length, special=SPECIAL))
    table = np.concatenate([np.empty((0, length), np.int32), *packed])
    assert (table[:, 0] == BOS).all()
    stream = [token for batch in batches for document in batch for token in (*document, EOS)]
    body = table[:, 1:].ravel()
    assert body[: len(stream)].tolist() == stream
    assert (body[len(stream) :] == PAD).all()
    assert len(body) - len(stream) < length - 1 or not stream
    assert int(usable_tokens(table, SPECIAL).sum()) == sum(token > 2 for token in stream)


@settings(deadline=None)
@given(batches=batches, length=st.integers(2, 17))
def test_packing_does_not_depend_on_how_documents_are_batched(batches, length):
    one_by_one = [[document] for batch in batches for document in batch]
    first = [row.tolist() for part in pack(batches, length=length, special=SPECIAL) for row in part]
    again = pack(one_by_one, length=length, special=SPECIAL)
    assert first == [row.tolist() for part in again for row in part]


def test_special_ids_within_a_text_are_not_usable():
    table = np.array([[2, 5, 1, 6, 2, 0, 7, 1]], np.int32)
    expected = [[False, True, False, True, False, False, True, False]]
    assert usable_tokens(table, SPECIAL).tolist() == expected


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tiny_gemma(tmp_path_factory.mktemp("gemma"))
    return load_tokenizer(ModelConfig(weights=str(folder)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        text = f"document {number} on the state of the union " * (number + 1)
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


def config(corpus: Path, **changes) -> TextConfig:
    values = {"sequence_length": 16, "held_out_sequences": 5, **changes}
    return TextConfig(source=[str(corpus / "*.txt")], **values)


def prepare(corpus: Path, tokenizer: Tokenizer, *, rows: int = 100, **options) -> TokenTable:
    text = options.pop("text", None) or config(corpus)
    path = corpus.parent / "tokens"
    return prepare_tokens(text, tokenizer=tokenizer, path=path, rows=rows, **options)


def test_the_table_is_the_packed_text(corpus: Path, tokenizer: Tokenizer):
    table = prepare(corpus, tokenizer)
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    special = table.summary.special_ids
    encoded = tokenizer.encode_batch(texts)
    expected = np.concatenate(list(pack([encoded], length=16, special=special)))
    found = table.read(range(table.num_sequences))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(table.read([3, 0, 3]), expected[[3, 0, 3]])
    summary = table.summary
    assert (summary.documents, summary.sequences) == (12, len(expected))
    assert summary.tokens == sum(map(len, encoded))
    usable = table.usable(found, range(len(found)))
    np.testing.assert_array_equal(table.usable_counts(), usable.sum(axis=1))
    assert summary.usable_rows == usable[:-5].sum()
    assert list(table.held_out) == list(range(len(expected) - 5, len(expected)))
    text = tokenizer.decode([int(token) for token in found[usable]])
    assert text.replace(" ", "") == "".join(texts).replace(" ", "")


def test_small_batches_and_shards_make_the_same_table(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    table = prepare(corpus, tokenizer)
    whole, token_hash = table.read(range(table.num_sequences)), table.summary.token_hash
    monkeypatch.setattr(tokenise, "_BATCH_DOCUMENTS", 1)
    monkeypatch.setattr(token_table, "_CHUNK_BYTES", 4 * 16 * 4)  # four sequences
    monkeypatch.setattr(token_table, "_SHARD_CHUNKS", 4)
    (corpus.parent / "tokens" / "tokens.json").unlink()
    cut = prepare(corpus, tokenizer)
    shards = list((corpus.parent / "tokens" / "tokens" / "c").iterdir())
    assert len(shards) == -(-len(whole) // 16) > 3
    np.testing.assert_array_equal(cut.read(range(cut.num_sequences)), whole)
    np.testing.assert_array_equal(
        cut.usable_counts(), table.usable(whole, range(len(whole))).sum(axis=1)
    )
    assert cut.summary.token_hash == token_hash


def test_a_table_is_reused_while_nothing_changes(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    table = prepare(corpus, tokenizer)
    before = file_hashes(table.path)
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "_TableBuilder", None)  # not built again
        assert prepare(corpus, tokenizer).summary == table.summary
    (table.path / "tokens.json").unlink()  # killed before the end: made again, the same bytes
    (table.path / "tokens" / "c" / "0" / "0").write_bytes(b"half a shard")
    prepare(corpus, tokenizer)
    assert file_hashes(table.path) == before


CHANGES = {
    "text.sequence_length was 16 and is 24": {"sequence_length": 24},
    "text.held_out_sequences was 5 and is 6": {"held_out_sequences": 6},
    "text.field was 'text' and is 'body'": {"field": "body"},
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_text_settings_rebuild_or_are_refused(
    corpus: Path, tokenizer: Tokenizer, message: str
):
    path = prepare(corpus, tokenizer).path
    before = file_hashes(path)
    other = config(corpus, **CHANGES[message])
    with pytest.raises(UserError, match=message):
        prepare(corpus, tokenizer, text=other, keep=True)
    assert file_hashes(path) == before
    assert prepare(corpus, tokenizer, text=other).summary.text == other


def test_changed_files_and_tokenizers_are_named(corpus: Path, tokenizer: Tokenizer, tmp_path: Path):
    first = prepare(corpus, tokenizer).summary
    (corpus / "03.txt").write_text((corpus / "03.txt").read_text().replace("union", "Union"))
    with pytest.raises(UserError, match=r"03\.txt was .* and is "):
        prepare(corpus, tokenizer, keep=True)
    assert prepare(corpus, tokenizer).summary.token_hash != first.token_hash
    (corpus / "99.txt").write_text("one more")
    with pytest.raises(UserError, match=r"text\.source .*99\.txt"):
        prepare(corpus, tokenizer, keep=True)
    (corpus / "99.txt").unlink()
    other = Tokenizer(tokenizer.backend, bos_id=2, eos_id=1, pad_id=3)
    with pytest.raises(UserError, match="the tokenizer was"):
        prepare(corpus, other, keep=True)


def test_too_little_text(corpus: Path, tokenizer: Tokenizer):
    table = prepare(corpus, tokenizer)
    usable = table.summary.usable_rows
    table.require_rows(usable)
    message = rf"asks for {usable + 1} rows and the text has {usable} .* to at most {usable}"
    with pytest.raises(UserError, match=message):
        table.require_rows(usable + 1)
    with pytest.raises(UserError, match=r"makes \d+ sequences .* keeps 1000 .* none is left"):
        prepare(corpus, tokenizer, text=config(corpus, held_out_sequences=1000))


def test_bad_text_leaves_no_table(corpus: Path, tokenizer: Tokenizer):
    (corpus / "05.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"05\.txt is not UTF-8"):
        prepare(corpus, tokenizer)
    with pytest.raises(UserError, match="not a finished token table"):
        open_tokens(corpus.parent / "tokens")


def test_stop_interrupts(corpus: Path, tokenizer: Tokenizer):
    with pytest.raises(Interrupted):
        prepare(corpus, tokenizer, stop=lambda: True)


def test_a_damaged_table_is_named(corpus: Path, tokenizer: Tokenizer):
    table = prepare(corpus, tokenizer)
    shard = table.path / "tokens" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        table.read([0])


def test_a_stream_is_read_only_as_far_as_needed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "org" / "endless"
    folder.mkdir(parents=True)
    line = '{"text": "all the words of the world and then some more of them"}\n'
    (folder / "train.jsonl").write_text(line * 20_000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = TextConfig(source=["hf://org/endless"], sequence_length=16, held_out_sequences=5)

    def make(rows: int, **options) -> TokenTable:
        path = tmp_path / "tokens"
        return prepare_tokens(text, tokenizer=tokenizer, path=path, rows=rows, **options)

    table = make(1000)
    table.require_rows(1000)
    assert table.summary.documents == tokenise._BATCH_DOCUMENTS
    assert make(1000).summary == table.summary
    with pytest.raises(UserError, match=r"cache\.tokens \(the text is a stream\) was 1000"):
        make(200_000, keep=True)
    make(200_000).require_rows(200_000)
