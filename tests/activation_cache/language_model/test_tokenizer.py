"""The tokenizer against SentencePiece itself; mismatched and damaged ones refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.config import ModelConfig
from activation_cache.language_model.gguf_file import GgufFile
from activation_cache.language_model.tokenizer import (
    Tokenizer,
    load_tokenizer,
    tokenizer_from_gguf,
)
from activation_cache.language_model.tokenizer_vocabulary import (
    Pieces,
    pieces_from_model_file,
    tokenizer_from_pieces,
)
from activation_cache.runtime.errors import UserError
from tests.support.tiny_gemma import tiny_pieces, write_tiny_gemma
from tests.support.tiny_gguf import write_gguf

CORPUS = """The State of the Union is strong, and the people of the United States know it.
  Indented lines,	tabs and   runs of spaces; numbers 1790, 1,024 and 3.14 — dashes, naïve café.

We the People: a more perfect Union. Über alles, señor. The the the there then them they."""
GEMMA_RULES: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
}
PROBES = [
    "",
    " ",
    "  ",
    "     two   and three",
    "\n\n\n\tcode:\n    return  x\n",
    "The the\nthere",
    "<h1>naïve</h1> café — 日本語 🎉 \u200b",
    "  leading and trailing  ",
    "▁literal▁underscore",
]


def train_sentencepiece(folder: Path, **rules: Any) -> Path:
    """A tokenizer.model with Gemma's rules: BPE, bytes, identity, user-defined whitespace runs."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join([CORPUS] * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=395,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<h1>", "</h1>", "\n", "\n\n", "\t", "▁▁", "▁▁▁"],
        minloglevel=2,
        **GEMMA_RULES | rules,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_gemma(tmp_path_factory.mktemp("sentencepiece"))
    (folder / "tokenizer.json").unlink()
    train_sentencepiece(folder)
    return folder


@pytest.fixture(scope="module")
def both(trained: Path) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    theirs = sentencepiece.SentencePieceProcessor(str(trained / "tokenizer.model"))
    return load_tokenizer(ModelConfig(weights=str(trained))), theirs


def test_tokenizer_model_gives_sentencepiece_ids(both: Any) -> None:
    ours, theirs = both
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == (0, 1, 2)
    assert ours.vocab_size == theirs.vocab_size() == 395
    texts = [*PROBES, CORPUS]
    encoded = ours.encode_batch(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert ids == theirs.encode(text), repr(text)
        assert ours.decode(ids) == text.replace("▁", " ")


@given(st.text(alphabet="the an\n\t ▁<>h1/éé日,.0", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_sentencepiece_ids(both: Any, text: str) -> None:
    ours, theirs = both
    assert ours.encode_batch([text]) == [theirs.encode(text)]


def test_user_defined_pieces_matter(trained: Path) -> None:
    """Left out, whitespace runs come out as single characters: the tests above see that."""
    pieces = pieces_from_model_file(trained / "tokenizer.model")
    kinds = [1 if kind == 4 else kind for kind in pieces.types]
    without = tokenizer_from_pieces(Pieces(pieces.pieces, pieces.scores, kinds), source="x")
    theirs = sentencepiece.SentencePieceProcessor(str(trained / "tokenizer.model"))
    text = "<h1>\n\n\n"
    assert without.encode(text, add_special_tokens=False).ids != theirs.encode(text)


def test_tokenizer_json_and_gguf_agree(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "tiny")
    from_json = load_tokenizer(ModelConfig(weights=str(folder)))
    gguf = write_gguf(tmp_path / "tiny.gguf")
    from_gguf = load_tokenizer(ModelConfig(weights=str(gguf)))
    assert from_json.fingerprint == from_gguf.fingerprint
    assert from_json.encode_batch(PROBES) == from_gguf.encode_batch(PROBES)
    assert (from_gguf.bos_id, from_gguf.eos_id, from_gguf.pad_id) == (2, 1, 0)


def test_nothing_is_added_cut_or_padded(tmp_path: Path) -> None:
    """A tokenizer.json may ask for BOS, truncation and padding: packing does its own."""
    folder = write_tiny_gemma(tmp_path)
    plain = load_tokenizer(ModelConfig(weights=str(folder)))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    backend.save(str(folder / "tokenizer.json"))
    again = load_tokenizer(ModelConfig(weights=str(folder)))
    assert again.encode_batch(["the and of", "a"]) == plain.encode_batch(["the and of", "a"])
    assert again.fingerprint != plain.fingerprint


def test_files_are_read_once_while_they_stay_as_they_are(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "tiny")
    gguf = write_gguf(tmp_path / "tiny.gguf")
    for weights in (folder, gguf):
        model = ModelConfig(weights=str(weights))
        assert load_tokenizer(model) is load_tokenizer(model)
    model = ModelConfig(weights=str(folder))
    before = load_tokenizer(model)
    definition = folder / "tokenizer.json"
    changed = definition.read_text().replace('"fuse_unk": true', '"fuse_unk":false')
    replacement = tmp_path / "replacement"
    replacement.write_text(changed)
    assert replacement.stat().st_size == definition.stat().st_size
    replacement.replace(definition)
    assert load_tokenizer(model).fingerprint != before.fingerprint
    named = folder / "tokenizer_config.json"
    named.write_text(json.dumps({"bos_token": "<none>"}))
    _refused(folder, "<none>")


SOFT_TOKEN = {
    "id": 369, "content": "<image_soft_token>", "single_word": False, "lstrip": False,
    "rstrip": False, "normalized": False, "special": True,
}  # fmt: skip


def _edit(file: Path, change: Callable[[Any], Any]) -> None:
    definition = json.loads(file.read_text())
    change(definition)
    file.write_text(json.dumps(definition))


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_an_added_token_past_the_embedding_is_plain_text(
    tmp_path: Path, in_vocabulary: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As every Gemma 3 tokenizer has one: the tokenizer is the one without the token."""
    folder = write_tiny_gemma(tmp_path, vocab_size=369)
    plain = load_tokenizer(ModelConfig(weights=str(folder)))

    def add(definition: Any) -> None:
        definition["added_tokens"].append(SOFT_TOKEN)
        if in_vocabulary:
            definition["model"]["vocab"][SOFT_TOKEN["content"]] = 369

    _edit(folder / "tokenizer.json", add)
    with caplog.at_level("INFO"):
        found = load_tokenizer(ModelConfig(weights=str(folder)))
    assert "1 added tokens that the model doesn't embed (<image_soft_token>)" in caplog.text
    assert found.fingerprint == plain.fingerprint
    text = "the <image_soft_token> and<bos>"
    (ids,) = found.encode_batch([text])
    assert found.encode_batch([*PROBES, text]) == plain.encode_batch([*PROBES, text])
    assert max(ids) < 369
    assert ids[-1] == 2
    assert found.decode(ids) == text


def test_an_added_token_that_the_model_embeds_stays(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path)  # 401 rows
    _edit(folder / "tokenizer.json", lambda one: one["added_tokens"].append(SOFT_TOKEN))
    found = load_tokenizer(ModelConfig(weights=str(folder)))
    assert found.encode_batch(["<image_soft_token>"]) == [[369]]


@pytest.mark.parametrize(
    ("named", "ids"),
    [
        ({"pad_token": "<eos>"}, (2, 1, 1)),
        ({"bos_token": "<eos>", "pad_token": "<eos>"}, (1, 1, 1)),
        ({"bos_token": None, "pad_token": ""}, (2, 1, 0)),
        ({"eos_token": {"__type": "AddedToken", "content": "\n\n", "lstrip": False}}, (2, 4, 0)),
        ({"eos_token_id": [1, 106], "additional_special_tokens": ["<bos>"]}, (2, 1, 0)),
    ],
)
def test_special_tokens_as_fine_tunes_have_them(
    tmp_path: Path, named: dict[str, Any], ids: tuple[int, int, int]
) -> None:
    folder = write_tiny_gemma(tmp_path)
    _edit(folder / "config.json", lambda raw: raw.update(bos_token_id=None, eos_token_id=[1, 106]))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    found = load_tokenizer(ModelConfig(weights=str(folder)))
    assert (found.bos_id, found.eos_id, found.pad_id) == ids


# --- bad input -----------------------------------------------------------------------------------


def _refused(folder: Path, fragment: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelConfig(weights=str(folder)))
    assert fragment in str(caught.value)


def _write_pieces(folder: Path, pieces: Pieces) -> None:
    tokenizer_from_pieces(pieces, source="test").save(str(folder / "tokenizer.json"))


def test_missing_or_damaged(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path)
    definition = folder / "tokenizer.json"
    _edit(definition, lambda one: one["model"].update(type="BPE2"))
    _refused(folder, "Upgrade it: `pip install --upgrade tokenizers`")
    definition.write_text("{}")
    _refused(folder, "is not a tokenizer definition")
    _refused(folder, "Download it again")
    definition.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    _refused(folder, "git lfs pull")
    (folder / "tokenizer.json").unlink()
    _refused(folder, "neither tokenizer.json nor tokenizer.model")
    (folder / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    _refused(folder, "is not a SentencePiece model")


def test_larger_than_the_embedding(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path, vocab_size=300)
    _refused(folder, "has ids up to 368 and the model embeds 300")


def test_a_special_token_past_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path, vocab_size=369)
    _edit(folder / "tokenizer.json", lambda one: one["added_tokens"].append(SOFT_TOKEN))
    named = {"pad_token": SOFT_TOKEN["content"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    _refused(folder, "has padding id 369 and the model embeds 369 ids, from 0 on")


@pytest.mark.parametrize(
    ("named", "fragment"),
    [
        ({"bos_token": ["<bos>"]}, "bos_token = ['<bos>']: one token's text is needed"),
        ({"eos_token": {"id": 1}}, "eos_token = {'id': 1}"),
        ({"pad_token": 5}, "pad_token = 5"),
        ({"pad_token": "<|pad|>"}, "has no <|pad|> token"),
        (["<bos>"], "is not a JSON object with keys such as bos_token"),
    ],
)
def test_odd_names_of_special_tokens(tmp_path: Path, named: Any, fragment: str) -> None:
    folder = write_tiny_gemma(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    _refused(folder, fragment)


def test_no_bos(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path)
    tiny = tiny_pieces()
    _write_pieces(folder, Pieces(["<s>" if p == "<bos>" else p for p in tiny.pieces],
                                 tiny.scores, tiny.types))  # fmt: skip
    _refused(folder, "has no <bos> token")
    # Named so by its own configuration it is fine.
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(ModelConfig(weights=str(folder))).bos_id == 2


def test_another_models_bos(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path, bos_id=5)
    _refused(folder, "has BOS id 2 and the model's config says 5")


@pytest.mark.parametrize(
    ("rule", "fragment"),
    [
        ({"model_type": "unigram"}, "model type BPE"),
        ({"add_dummy_prefix": True}, "no dummy prefix"),
        ({"remove_extra_whitespaces": True}, "extra whitespace kept"),
        ({"normalization_rule_name": "nmt_nfkc"}, "no normalisation"),
    ],
)
def test_sentencepiece_with_other_rules(
    tmp_path: Path, rule: dict[str, Any], fragment: str
) -> None:
    folder = write_tiny_gemma(tmp_path)
    (folder / "tokenizer.json").unlink()
    train_sentencepiece(folder, **rule)
    _refused(folder, fragment)


def test_vocabulary_without_bytes() -> None:
    tiny = tiny_pieces()
    with pytest.raises(UserError, match="without byte pieces"):
        tokenizer_from_pieces(Pieces(tiny.pieces, tiny.scores, [1] * 369), source="x")


def test_vocabulary_of_uneven_lists() -> None:
    tiny = tiny_pieces()
    with pytest.raises(UserError, match="369 pieces, 368 scores and 369 types"):
        tokenizer_from_pieces(Pieces(tiny.pieces, tiny.scores[:-1], tiny.types), source="x")


def test_gguf_with_another_kind_of_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", num_layers=1)
    path.write_bytes(path.read_bytes().replace(b"llama", b"gpt-2"))
    _refused(path, "tokenizer.ggml.model is 'gpt-2'")


@pytest.mark.parametrize("values", [7, ["a", 5], None])
def test_gguf_with_a_damaged_vocabulary(tmp_path: Path, values: Any) -> None:
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": values}
    with pytest.raises(UserError, match=r"missing keys: \['tokenizer.ggml.tokens'"):
        tokenizer_from_gguf(GgufFile(tmp_path, metadata, {}, b""))
