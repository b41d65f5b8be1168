"""A model's chat template: how its messages become one text, and where each message's words are.

Templates are Jinja, as in `transformers`, and run in Jinja's sandbox: they come with weights that
somebody else made.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from activation_cache.config import ModelConfig
from activation_cache.language_model.gguf_file import open_gguf
from activation_cache.language_model.locate import is_gguf, locate_weights
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors, read_json

_FILE, _CONFIG, _KEY = "chat_template.jinja", "tokenizer_config.json", "chat_template"


@dataclass(frozen=True)
class Message:
    """What one side said: `role` is user, assistant, system or what the template knows."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: its text, and where in it each message's content is."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and where it is from."""

    source: str
    name: str

    @property
    def fingerprint(self) -> str:
        """sha256 of the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The messages as the model reads them, without BOS, which sequences begin with anyway.

        Args:
            prompt: end with what begins the model's answer.

        Raises:
            UserError: the template refuses them, such as roles that don't alternate.
        """
        import jinja2

        values = [{"role": one.role, "content": one.content} for one in messages]
        try:
            return self._compiled.render(
                messages=values, add_generation_prompt=prompt, bos_token="", eos_token=""
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(one.role for one in messages)
            raise UserError(
                f"the chat template of {self.name} refuses a conversation of {roles}: {error}"
            ) from error

    def conversation(self, messages: Sequence[Message]) -> Conversation:
        """The text of a conversation, and the place of each message's content in it.

        A message's place is what the conversation up to it has more than the one before; its
        content is in there, stripped of white space at its ends, as templates do.

        Raises:
            UserError: the template refuses it, or a message isn't found.
        """
        before, spans = "", []
        for number, message in enumerate(messages, start=1):
            text = self.text(messages[:number])
            content = message.content.strip()
            start = text.find(content, len(before)) if text.startswith(before) else -1
            if start < 0 and text:
                raise UserError(
                    f"message {number} of a conversation ({message.role}) isn't found in what the "
                    f"chat template of {self.name} makes of it: templates that rewrite messages "
                    "can't be harvested by role. Render the text yourself and use text.field."
                )
            # A template may hold a system message back and put it into the user's.
            spans.append((start, start + len(content)) if text else (0, 0))
            before = text
        return Conversation(before, tuple(spans))

    @functools.cached_property
    def _compiled(self) -> Any:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of {self.name} isn't Jinja: {error}") from error


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def load_chat_template(model: ModelConfig) -> ChatTemplate:
    """The template of a model: chat_template.jinja, tokenizer_config.json, or of a GGUF file.

    Raises:
        UserError: there is none, as with models that weren't trained to chat.
    """
    path = locate_weights(model, with_weights=False)
    found = _of_gguf(path) if is_gguf(path) else _of_folder(path)
    if found is None:
        raise UserError(
            f"{path} has no chat template, and text.chat renders conversations with the model's "
            f"own: use an instruction-tuned model, put its template there as {_FILE}, or render "
            "the text yourself and use text.field."
        )
    return ChatTemplate(found, str(path))


def _of_gguf(path: Path) -> str | None:
    found = open_gguf(path).metadata.get(f"tokenizer.{_KEY}")
    return found if isinstance(found, str) else None


def _of_folder(folder: Path) -> str | None:
    if (file := folder / _FILE).is_file():
        with disk_errors(file, doing="read"):
            return file.read_text(encoding="utf-8")
    file = folder / _CONFIG
    found = read_json(file).get(_KEY) if file.is_file() else None
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
