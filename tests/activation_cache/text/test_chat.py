"""Conversations: rendered as transformers renders them, and rows of the asked roles' words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from activation_cache.config import CacheConfig, ModelConfig, SiteConfig, TextConfig
from activation_cache.gemma.taps import Tap
from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.chat_template import (
    ChatTemplate,
    Message,
    load_chat_template,
)
from activation_cache.language_model.model import load_model
from activation_cache.language_model.tokenizer import load_tokenizer
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import open_store
from activation_cache.text import tokenise
from activation_cache.text.sources import find_sources
from activation_cache.text.token_table import TokenTable
from activation_cache.text.tokenise import prepare_tokens
from tests.support.tiny_gemma import write_tiny_gemma

# Written after what Gemma 3's template does: roles alternate, the system's words go into the user's
# message, the assistant is called model, contents are trimmed.
TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate: user, assistant, user, ...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
CHAT = [
    {"role": "user", "content": " Why is the sea salt? the sea "},
    {"role": "assistant", "content": "Rivers bring it.\n\n\nthe sea"},
    {"role": "user", "content": "the sea"},
    {"role": "assistant", "content": "the sea äöü 海"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def messages(chat: list[dict[str, str]]) -> list[Message]:
    return [Message(**one) for one in chat]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = write_tiny_gemma(tmp_path_factory.mktemp("gemma"))
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad")}
    config = {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelConfig(weights=str(folder))


@pytest.mark.parametrize("chat", [CHAT, [SYSTEM, *CHAT], CHAT[:1]])
@pytest.mark.parametrize("prompt", [False, True])
def test_it_is_rendered_as_transformers_does(model: ModelConfig, chat: list[Any], prompt: bool):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(model.weights)
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    found = load_chat_template(model).text(messages(chat), prompt=prompt)
    assert found == expected.removeprefix("<bos>")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table_of(model: ModelConfig, path: Path, file: Path, **text: Any) -> TokenTable:
    values = {"source": [str(file)], "sequence_length": 24, "held_out_sequences": 1} | text
    template = load_chat_template(model) if "chat" in text else None
    return prepare_tokens(
        TextConfig(**values),
        tokenizer=load_tokenizer(model),
        template=template,
        path=path,
        rows=1,
    )


def read(table: TokenTable) -> tuple[np.ndarray, np.ndarray]:
    every = range(table.num_sequences)
    tokens = table.read(every)
    return tokens, table.usable(tokens, every)


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        (["assistant"], ["Rivers bring it.\n\n\nthe sea", "the sea äöü 海"]),
        (["user"], ["Why is the sea salt? the sea", "the sea"]),
        (["system", "user"], ["Why is the sea salt? the sea", "the sea"]),
    ],
)
def test_rows_are_the_words_of_the_asked_roles(
    model: ModelConfig, tmp_path: Path, roles: list[str], words: list[str]
):
    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 4)
    table = table_of(model, tmp_path / "tokens", file, chat={"roles": roles})
    tokens, usable = read(table)
    tokenizer = load_tokenizer(model)
    rendered = load_chat_template(model).text(messages(CHAT))
    (plain,) = tokenizer.encode_batch([rendered])
    stream = tokens[:, 1:].ravel()
    np.testing.assert_array_equal(stream[: 4 * (len(plain) + 1)], [*plain, 1] * 4)
    text = tokenizer.decode([int(token) for token in tokens[usable]])
    assert text.replace(" ", "") == "".join(words * 4).replace(" ", "")
    np.testing.assert_array_equal(table.usable_counts(), usable.sum(axis=1))
    assert table.summary.usable_rows == usable[:-1].sum()


def test_a_chat_is_harvested_token_by_token_where_the_asked_role_speaks(
    model: ModelConfig, tmp_path: Path
):
    """Held to the offsets of another tokenizer, in conversations as they are rendered."""
    from transformers import AutoTokenizer

    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 4)
    text = TextConfig(source=[str(file)], chat={}, sequence_length=24, held_out_sequences=1)
    rendered = load_chat_template(model).text(messages(CHAT))
    theirs = AutoTokenizer.from_pretrained(model.weights)
    encoded = theirs(rendered, add_special_tokens=False, return_offsets_mapping=True)
    spoken = [
        range(found.start() + len(found[1]), found.end() - len(found[3]))
        for found in re.finditer(r"(<start_of_turn>model\n)(.*?)(<end_of_turn>)", rendered, re.S)
    ]
    assert [rendered[span.start : span.stop] for span in spoken] == [
        one["content"] for one in CHAT if one["role"] == "assistant"
    ]
    own = [any(start in span for span in spoken) for start, _ in encoded["offset_mapping"]]
    ids, says = [*encoded["input_ids"], theirs.eos_token_id] * 4, [*own, False] * 4
    places = [(number // 23, number % 23 + 1) for number in range(len(ids))]  # after BOS
    held_out = places[-1][0]
    expected = sorted(
        place
        for place, says_it in zip(places, says, strict=True)
        if says_it and place[0] < held_out
    )
    cache = CacheConfig(
        path=str(tmp_path / "store"),
        sites=[SiteConfig(site="resid_post", layers=[1])],
        tokens=len(expected),
        shuffle_rows=16,
        block_rows=4,
    )
    config = model.model_copy(update={"dtype": "float32"})
    harvest(model=config, text=text, cache=cache)
    store = open_store(tmp_path / "store")
    found = store.provenance(start=0, stop=len(expected))
    rows = list(zip(found.sequence.tolist(), found.position.tolist(), strict=True))
    assert sorted(rows) == expected
    tokens = store.tokens.read(range(store.tokens.num_sequences))
    assert [int(tokens[place]) for place in places] == ids
    tap = Tap("resid_post", 1)  # the masked tokens are there for the model to read
    whole = np.asarray(load_model(config).activations(tokens, (tap,))[tap])
    np.testing.assert_allclose(
        store.read(tap, start=0, stop=len(expected)),
        whole[found.sequence, found.position],
        rtol=1e-5,
        atol=1e-5,
    )


def test_batches_make_no_difference_and_masks_are_part_of_the_hash(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": [SYSTEM, *CHAT]}] * 3)
    table = table_of(model, tmp_path / "a", file, chat={})
    monkeypatch.setattr(tokenise, "_BATCH_DOCUMENTS", 1)
    one_by_one = table_of(model, tmp_path / "b", file, chat={})
    np.testing.assert_array_equal(read(table)[1], read(one_by_one)[1])
    assert one_by_one.summary.token_hash == table.summary.token_hash
    users = table_of(model, tmp_path / "c", file, chat={"roles": ["user"]})
    np.testing.assert_array_equal(read(table)[0], read(users)[0])
    assert users.summary.token_hash != table.summary.token_hash


def test_parquet_holds_conversations_too(model: ModelConfig, tmp_path: Path):
    rows = [{"chat": CHAT, "set": "x"}] * 3
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", rows)
    tables = [
        table_of(
            model, tmp_path / ending, tmp_path / f"a.{ending}", chat={"field": "chat"}
        ).summary.token_hash
        for ending in ("parquet", "jsonl")
    ]
    assert tables[0] == tables[1]


def test_masked_text_makes_no_rows(model: ModelConfig, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", [{"text": "say the words and end the day"}] * 9)
    plain = table_of(model, tmp_path / "plain", file)
    masked = table_of(model, tmp_path / "masked", file, masked_text=["the words", " the"])
    tokens, usable = read(masked)
    np.testing.assert_array_equal(tokens, read(plain)[0])
    tokenizer = load_tokenizer(model)
    patterns = tokenizer.encode_batch(["the words", " the"])
    for row, keep in zip(tokens.tolist(), usable, strict=True):
        expected = [token > 2 for token in row]
        for ids in patterns:
            for start in range(len(row) - len(ids) + 1):
                if row[start : start + len(ids)] == ids:
                    expected[start : start + len(ids)] = [False] * len(ids)
        assert keep.tolist() == expected
    assert usable.sum() < read(plain)[1].sum()


MISTAKES = {
    "no messages": ({"messages": "hello"}, "holds str, not a list of messages"),
    "other keys": ({"messages": [{"from": "human", "value": "hi"}]}, "'from': 'human'.* needed is"),
    "parts": ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "and needed is"),
    "no such field": ({"text": "x"}, r"no text in field 'messages' \(text.chat.field\)"),
    "order": ({"messages": CHAT[1:]}, "refuses a conversation of assistant: Roles must alternate"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_bad_conversation_is_told(model: ModelConfig, tmp_path: Path, kind: str):
    row, message = MISTAKES[kind]
    file = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=message):
        table_of(model, tmp_path / "tokens", file, chat={})


def test_a_role_that_never_occurs_leaves_nothing(model: ModelConfig, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 4)
    table = table_of(model, tmp_path / "tokens", file, chat={"roles": ["tool"]})
    with pytest.raises(UserError, match=r"the text has 0 usable tokens .*text.chat.roles \['tool'"):
        table.require_rows(1)


def test_templates_that_cannot_serve(tmp_path: Path):
    folder = write_tiny_gemma(tmp_path / "plain")
    plain = ModelConfig(weights=str(folder))
    with pytest.raises(UserError, match=r"has no chat template, and text.chat renders"):
        load_chat_template(plain)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="isn't Jinja"):
        load_chat_template(plain).text(messages(CHAT))
    shouting = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "loud")
    with pytest.raises(UserError, match=r"message 1 of a conversation \(user\) isn't found"):
        shouting.conversation(messages(CHAT))
    for unsafe in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(UserError, match="refuses a conversation"):
            ChatTemplate(unsafe, "unsafe").text(messages(CHAT))


def test_files_without_lists_are_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("messages\nx\n")
    with pytest.raises(UserError, match=r"text.chat reads lists of messages, and .*a.csv can't"):
        find_sources(TextConfig(source=[str(tmp_path / "a.csv")], chat={}))
