"""The prompts of a rollout, from the same kinds of sources as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from activation_cache.config import ChatConfig, RolloutConfig, TextConfig
from activation_cache.language_model.chat_template import ChatTemplate, Message
from activation_cache.language_model.tokenizer import Tokenizer
from activation_cache.text.mixture import read_documents
from activation_cache.text.sources import find_sources

_TOKENISED_AT_ONCE = 256


@dataclass(frozen=True)
class Prompt:
    """What the model continues: its ids, BOS in front, and their text without it.

    `messages` are those before the model's answer; of plain text there are none.
    """

    number: int
    ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...] = ()


def read_prompts(
    config: RolloutConfig, *, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Iterator[Prompt]:
    """The first `config.prompts` prompts of the sources, numbered from 0.

    Args:
        template: of the model; needed unless prompts are plain texts.

    Raises:
        UserError: a source can't be read, or the template refuses a conversation.
    """
    chat = ChatConfig(field=config.field) if config.prompt == "messages" else None
    text = TextConfig(source=config.source, field=config.field, chat=chat)
    found = _documents(config, text)
    number = 0
    while batch := list(islice(found, _TOKENISED_AT_ONCE)):
        texts = [_text(plain, messages, template) for plain, messages in batch]
        encoded = tokenizer.encode_batch(texts)
        for (_, messages), shown, ids in zip(batch, texts, encoded, strict=True):
            yield Prompt(number, (tokenizer.bos_id, *ids), shown, messages)
            number += 1


def _documents(
    config: RolloutConfig, text: TextConfig
) -> Iterator[tuple[str, tuple[Message, ...]]]:
    """Text, and messages to answer, of each document that has something to continue."""
    found = (
        (document.text, _asked(config, document.text, document.messages))
        for document, _ in read_documents(text, find_sources(text))
    )
    answerable = (one for one in found if one[1] or config.prompt != "messages")
    yield from islice(answerable, config.prompts)


def _asked(config: RolloutConfig, text: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages to answer: a conversation up to its last message of a user."""
    if config.prompt == "text":
        return ()
    if config.prompt == "user":
        return (Message("user", text),)
    ends = [number for number, one in enumerate(messages, start=1) if one.role == "user"]
    return tuple(messages[: ends[-1]]) if ends else ()


def _text(plain: str, messages: Sequence[Message], template: ChatTemplate | None) -> str:
    if not messages:
        return plain
    assert template is not None
    return template.text(messages, prompt=True)
