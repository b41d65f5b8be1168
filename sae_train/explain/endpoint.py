"""An OpenAI-compatible chat endpoint: one question, one answer, whatever goes wrong between.

Hosted services, routers, vLLM, llama.cpp and `transformers serve` have this interface, and each
leaves something out: what an endpoint refuses (log-probabilities, `temperature`, the name
`max_tokens`) is left out of all later questions.
"""

from __future__ import annotations

import email.utils
import logging
import math
import random
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from activation_cache.runtime.errors import UserError
from sae_train.explain.question import Answer, Question

logger = logging.getLogger(__name__)

KEY, URL, MODEL = "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"
ATTEMPTS = 7  # pauses of 1, 2, 4, 8, 16 and 32 seconds between them
_NONSENSE = "something else than a chat completion"
LONGEST_PAUSE = 600.0  # seconds that a server may ask us to wait


class EndpointError(UserError):
    """The endpoint doesn't work: no question would be answered."""


class QuestionRefused(Exception):
    """The endpoint takes questions, and not this one."""


class Stopped(Exception):
    """`Endpoint.stop` was called while this question waited."""


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
        try:
            import httpx
        except ImportError as error:
            raise UserError(
                "`sae explain` needs httpx: pip install 'open-gemma-scope[explain]'"
            ) from error
        if not re.match(r"https?://[^/\s]+", settings.url):
            raise UserError(
                f"{settings.url} is no address of an endpoint: give one that begins with http:// "
                f"or https://, as --url http://localhost:8000/v1, or in {URL}"
            )
        self.settings = settings
        self._pause = pause
        self._left_out: set[str] = set()
        self._not_before = 0.0
        self._worked = False
        self._stopped = threading.Event()
        headers = {"Authorization": f"Bearer {settings.key}"} if settings.key else {}
        try:
            self._client = httpx.Client(headers=headers, timeout=settings.timeout)
        except (UnicodeEncodeError, ValueError) as error:
            raise UserError(f"the key in {KEY} can't be sent: it isn't plain ASCII") from error
        self._transport_error, self._timeout_error = httpx.HTTPError, httpx.TimeoutException

    def stop(self) -> None:
        """End all pauses: questions that aren't sent yet raise `Stopped`."""
        self._stopped.set()

    def ask(self, question: Question) -> Answer:
        """The answer to one question, asked again after pauses while the endpoint is busy.

        Raises:
            EndpointError: it can't be reached, refuses the key, or has never given an answer.
            QuestionRefused: it refuses this question, or what it says isn't an answer.
            Stopped: `stop` was called.
        """
        problem = ""
        for attempt in range(ATTEMPTS):
            self._wait_for_turn()
            pause = self._pause * 2**attempt * random.uniform(1.0, 1.25)
            try:
                response = self._client.post(self._address, json=self._body(question))
            except self._timeout_error:
                problem = f"gave no answer within {self.settings.timeout:g} seconds (--timeout)"
            except self._transport_error as error:
                problem = f"can't be reached ({error or type(error).__name__})"
            else:
                if response.is_success:
                    answer = _answer(question, response)
                    if answer is not None:
                        self._worked = True
                        return answer
                    problem = f"answers with {_NONSENSE}: {self._said(response)}"
                elif self._is_busy(response):
                    problem = f"answers with status {response.status_code}: {self._said(response)}"
                    pause = max(pause, self._asked_to_wait(response))
                else:
                    self._refused(response)  # raises, or leaves something out
                    pause = 0.0
            if attempt < ATTEMPTS - 1:
                self._not_before = max(self._not_before, time.monotonic() + pause)
        if self._worked and _NONSENSE in problem:
            raise QuestionRefused(problem)
        raise EndpointError(
            f"{self.settings.url} {problem}. Asked {ATTEMPTS} times; the answers so far are kept, "
            "and the same command continues"
        )

    @property
    def _address(self) -> str:
        return self.settings.url.rstrip("/") + "/chat/completions"

    def _wait_for_turn(self) -> None:
        while (seconds := self._not_before - time.monotonic()) > 0:
            if self._stopped.wait(seconds):
                break
        if self._stopped.is_set():
            raise Stopped

    def _body(self, question: Question) -> dict[str, Any]:
        body = {"model": self.settings.model, **question.body(), "stream": False}
        if "max_tokens" in self._left_out:
            body["max_completion_tokens"] = body["max_tokens"]
        for name in self._left_out:
            body.pop(name, None)
            if name == "logprobs":
                body.pop("top_logprobs", None)
        return body

    @staticmethod
    def _is_busy(response: Any) -> bool:
        return response.status_code in (408, 409, 425, 429) or response.status_code >= 500

    def _asked_to_wait(self, response: Any) -> float:
        """Seconds that the header Retry-After asks for, which is a number or a date."""
        text = response.headers.get("Retry-After", "")
        try:
            seconds = float(text)
        except ValueError:
            date = email.utils.parsedate_to_datetime(text) if _is_date(text) else None
            seconds = date.timestamp() - time.time() if date else 0.0
        if not seconds < LONGEST_PAUSE:
            raise EndpointError(
                f"{self.settings.url} asks for a pause of {seconds:,.0f} seconds and the longest "
                f"is {LONGEST_PAUSE:g}: give the same command again later, it continues"
            )
        return max(seconds, 0.0)

    def _refused(self, response: Any) -> None:
        """Leave out of later questions what the endpoint doesn't know.

        Raises:
            EndpointError: it refuses the key, or every question.
            QuestionRefused: it refuses this question.
        """
        status, said = response.status_code, self._said(response)
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

    def _said(self, response: Any) -> str:
        """The start of what the endpoint sent, without the key, should it repeat that."""
        text = response.text[:2000]
        if self.settings.key:
            text = text.replace(self.settings.key, "***")
        text = re.sub(r"\s+", " ", "".join(one if one.isprintable() else " " for one in text))
        return text.strip()[:200] or "nothing"


def _is_date(text: str) -> bool:
    return email.utils.parsedate(text) is not None


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
            ones=probabilities if question.digits else None,
            tokens_in=int(usage.get("prompt_tokens") or 0),
            tokens_out=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _ones(content: list[dict[str, Any]]) -> tuple[float, ...] | None:
    """The probability of 1 at each token of the answer that is a 0 or a 1; None without tokens.

    P(1) / (P(0) + P(1)), over the alternatives that the endpoint lists.
    """
    found = []
    for token in content:
        if _digit(token["token"]) is None:
            continue
        listed = [token, *token.get("top_logprobs", ())]
        weights = {one["token"]: math.exp(min(0.0, float(one["logprob"]))) for one in listed}
        sums = [
            sum(weight for text, weight in weights.items() if _digit(text) == digit)
            for digit in ("0", "1")
        ]
        found.append(sums[1] / sum(sums) if sum(sums) else 0.5)
    return tuple(found) or None


def _digit(token: str) -> str | None:
    """`1` of `[1`, ` 1,` and the like; None of a token with no or another digit."""
    digits = re.sub(r"[\s\[\],]", "", token)
    return digits if digits in ("0", "1") else None
