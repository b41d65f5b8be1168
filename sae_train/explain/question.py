"""A question to an endpoint and its answer, and the file in which answers are kept.

An answer is kept under a hash of the model's name and of all that was asked, so that no question is
paid for twice: not after a kill, and not by a later command that asks the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_cache.storage.files import disk_errors

logger = logging.getLogger(__name__)

VERDICTS = {"1": 1, "yes": 1, "0": 0, "no": 0}  # words of an answer about a text
CUT_OFF = "cut off"
_TOP = 5  # alternatives of a token whose log-probabilities are asked for


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        kind: `explanation`, or the score's name.
        latent: whom it is about.
        messages: role and content of each.
        max_tokens: of the answer.
        verdicts: the answer is yes or no, or a list of 1 and 0, whose probabilities are wanted.
    """

    kind: str
    latent: int
    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    verdicts: bool = False

    def body(self) -> dict[str, Any]:
        """The request, but for the model."""
        wanted = {"logprobs": True, "top_logprobs": _TOP} if self.verdicts else {}
        return {
            "messages": [{"role": role, "content": text} for role, text in self.messages],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **wanted,
        }

    def key(self, model: str) -> str:
        """SHA-256 of the model's name and the request."""
        text = json.dumps([model, self.body()], ensure_ascii=False, sort_keys=True)
        # A lone surrogate, of a token that is half a character, has no UTF-8.
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of text in it."""
        return sum(len(text.encode("utf-8", "replace")) for _, text in self.messages)


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        finish: the endpoint's word: `stop`, `length` if it was cut off, ...
        refusal: what it says instead, if it declines in the field made for that.
        ones: the probability of 1 or yes at each verdict, where it gives log-probabilities.
        tokens_in, tokens_out: as the endpoint counts them; 0 if it doesn't.
    """

    text: str
    finish: str = "stop"
    refusal: str | None = None
    ones: tuple[float, ...] | None = None
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def problem(self) -> str | None:
        """Why it can't be read, whatever was asked; None if it can."""
        if self.refusal is not None or self.finish == "content_filter":
            return "refused"
        return CUT_OFF if self.finish == "length" else None


class Answers:
    """The answers in a file of JSON lines, one per question; a line is on the disk when it returns.

    Use it as a context manager.
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there; a line that a kill cut short is dropped and its question open."""
        self._path = path
        self._by_key: dict[str, Answer] = {}
        with disk_errors(path, doing="read"):
            data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                content = json.loads(line)
                key = content.pop("key")
                ones = content.pop("ones")
                known = {name: content[name] for name in _FIELDS}
            except (ValueError, LookupError, TypeError, AttributeError):
                logger.warning("%s: line %d is damaged, and its question open", path, number)
                continue
            self._by_key[key] = Answer(**known, ones=None if ones is None else tuple(ones))
        with disk_errors(path, doing="write"):
            self._file = open(path, "ab")  # noqa: SIM115
            self._file.truncate(len(whole))

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, key: str) -> Answer | None:
        """The answer under a question's key."""
        return self._by_key.get(key)

    def add(self, key: str, question: Question, answer: Answer) -> None:
        """Keep an answer."""
        about = {"key": key, "kind": question.kind, "latent": question.latent}
        line = json.dumps(about | dataclasses.asdict(answer))
        with disk_errors(self._path, doing="write"):
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._by_key[key] = answer


_FIELDS = [one.name for one in dataclasses.fields(Answer) if one.name != "ones"]
