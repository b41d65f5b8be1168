"""An OpenAI-compatible chat endpoint: one question, one answer.

Hosted services, routers, vLLM, llama.cpp and `transformers serve` have this interface, and each
leaves something out: what an endpoint refuses (log-probabilities, `temperature`, the name
`max_tokens`) is left out of all later questions.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field
from typing import Any

from activation_cache.runtime.errors import UserError
from activation_cache.runtime.json_post import JsonPost, Unanswered
from sae_train.explain.question import VERDICTS, Answer, Question

logger = logging.getLogger(__name__)

KEY, URL, MODEL = "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"


class EndpointError(UserError):
    """The endpoint doesn't work: no question would be answered."""


class QuestionRefused(Exception):
    """The endpoint takes questions, and not this one."""


@dataclass(frozen=True)
class EndpointSettings:
    """Where the endpoint is.

    Attributes:
        url: up to and without `/chat/completions`.
        key: sent as a bearer token, if there is one; never logged and never written.
        timeout: seconds for one answer.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0


class Endpoint:
    """Asks questions; may be called by several threads, which then pause together."""

    def __init__(self, settings: EndpointSettings, *, pause: float = 1.0) -> None:
        """`pause` is the first pause before asking again, in seconds.

        Raises:
            UserError: httpx is not installed, or the URL is none.
        """
        self.settings = settings
        headers = {"Authorization": f"Bearer {settings.key}"} if settings.key else {}
        self._post = JsonPost(
            settings.url, headers, secret=settings.key, timeout=settings.timeout, pause=pause
        )
        self._left_out: set[str] = set()
        self._worked = False

    def stop(self) -> None:
        """End all pauses: questions that aren't sent yet raise `Stopped`."""
        self._post.stop()

    def ask(self, question: Question) -> Answer:
        """The answer to one question, asked again after pauses while the endpoint is busy.

        Raises:
            EndpointError: it can't be reached, refuses the key, or has never given an answer.
            QuestionRefused: it refuses this question, or what it says isn't an answer.
            Stopped: `stop` was called.
        """
        while True:
            try:
                response = self._post.send(
                    "/chat/completions",
                    self._body(question),
                    is_sound=lambda response: _answer(question, response) is not None,
                )
            except Unanswered as error:
                what = "not with a chat completion: it " if error.was_unsound else ""
                if self._worked and error.was_unsound:
                    raise QuestionRefused(f"{what}{error}") from error
                raise EndpointError(
                    f"{self.settings.url} {what and 'answers, '}{what}{error}; the answers so far "
                    "are kept, and the same command continues"
                ) from error
            if response.is_success:
                self._worked = True
                answer = _answer(question, response)
                assert answer is not None
                return answer
            self._refused(response)  # raises, or leaves something out

    def _body(self, question: Question) -> dict[str, Any]:
        body = {"model": self.settings.model, **question.body(), "stream": False}
        if "max_tokens" in self._left_out:
            body["max_completion_tokens"] = body["max_tokens"]
        for name in self._left_out:
            body.pop(name, None)
            if name == "logprobs":
                body.pop("top_logprobs", None)
        return body

    def _refused(self, response: Any) -> None:
        """Leave out of later questions what the endpoint doesn't know.

        Raises:
            EndpointError: it refuses the key, or every question.
            QuestionRefused: it refuses this question.
        """
        status, said = response.status_code, self._post.said(response)
        if status in (401, 403):
            given = "the key in" if self.settings.key else "no key: set"
            raise EndpointError(
                f"{self.settings.url} answers with status {status} to {given} {KEY}: {said}"
            )
        for name in ("logprobs", "max_tokens", "temperature"):
            if name in response.text and name not in self._left_out:
                logger.warning("%s doesn't take %s: left out", self.settings.url, name)
                self._left_out.add(name)
                return
        if self._worked and status in (400, 413, 422):
            raise QuestionRefused(f"status {status}: {said}")
        raise EndpointError(
            f"{self.settings.url} answers with status {status}: {said}. Is the address right "
            f"(it ends before /chat/completions), and does it have {self.settings.model}?"
        )


def _answer(question: Question, response: Any) -> Answer | None:
    """An answer from a response; None if it isn't a chat completion."""
    try:
        content = response.json()
        choice = content["choices"][0]
        message = choice["message"]
        usage = content.get("usage") or {}
        refusal = message.get("refusal")
        probabilities = _ones((choice.get("logprobs") or {}).get("content") or [])
        return Answer(
            text=str(message.get("content") or ""),
            finish=str(choice.get("finish_reason") or "stop"),
            refusal=None if refusal is None else str(refusal),
            ones=probabilities if question.verdicts else None,
            tokens_in=int(usage.get("prompt_tokens") or 0),
            tokens_out=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _ones(content: list[dict[str, Any]]) -> tuple[float, ...] | None:
    """The probability of 1 or yes at each token of the answer that is a verdict; None without one.

    P(1) / (P(0) + P(1)), over the alternatives that the endpoint lists.
    """
    found = []
    for token in content:
        if _verdict(token["token"]) is None:
            continue
        listed = [token, *token.get("top_logprobs", ())]
        weights = {one["token"]: math.exp(min(0.0, float(one["logprob"]))) for one in listed}
        sums = [
            sum(weight for text, weight in weights.items() if _verdict(text) == verdict)
            for verdict in (0, 1)
        ]
        found.append(sums[1] / sum(sums) if sum(sums) else 0.5)
    return tuple(found) or None


def _verdict(token: str) -> int | None:
    """1 of `[1`, ` 1,`, ` Yes` and the like; None of a token that is no verdict."""
    return VERDICTS.get(re.sub(r"[\s\[\],.]", "", token).casefold())
