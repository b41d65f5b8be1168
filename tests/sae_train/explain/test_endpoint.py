"""The endpoint's faults, each scripted: what is waited for, what ends all, what is left out."""

from __future__ import annotations

import email.utils
import itertools
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest

from activation_cache.runtime import json_post
from activation_cache.runtime.errors import UserError
from sae_train.explain.endpoint import Endpoint, EndpointError, EndpointSettings, QuestionRefused
from sae_train.explain.prompts import read_explanation, read_numbers, read_verdicts
from sae_train.explain.question import Answer, Question
from tests.support.servers.fake_endpoint import (
    FakeEndpoint,
    Response,
    completion,
    fake_endpoint,
)

KEY = "sk-very-secret"
QUESTION = Question("detection", 3, (("user", "Which?"),), max_tokens=20, verdicts=True)


@pytest.fixture
def fake() -> Iterator[FakeEndpoint]:
    with fake_endpoint() as state:
        yield state


def ask(fake: FakeEndpoint, *, times: int = 1, timeout: float = 20.0) -> list[Answer]:
    settings = EndpointSettings(fake.url, "a-model", KEY, timeout)
    endpoint = Endpoint(settings, pause=0.001)
    return [endpoint.ask(QUESTION) for _ in range(times)]


def test_a_question_is_sent_with_the_key_and_its_answer_read(fake: FakeEndpoint):
    fake.script = lambda body: completion("[1]", finish_reason="length")
    assert ask(fake) == [Answer("[1]", "length", tokens_in=100, tokens_out=7)]
    assert fake.keys == [f"Bearer {KEY}"]
    body = fake.requests[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("a-model", 20, 0)
    assert body["messages"] == [{"role": "user", "content": "Which?"}]
    assert body["logprobs"] is True


def test_probabilities_of_verdicts(fake: FakeEndpoint):
    def token(text: str, *others: tuple[str, float]) -> dict[str, Any]:
        top = [{"token": one, "logprob": math.log(share)} for one, share in others]
        return {"token": text, "logprob": top[0]["logprob"] if top else 0.0, "top_logprobs": top}

    content = [
        token("["),
        token("1", ("1", 0.6), ("0", 0.2), ("no", 0.2)),
        token(","),
        token(" 0", (" 0", 0.9), (" 1", 0.05), ("1", 0.05)),
        token("]"),
    ]
    fake.script = lambda body: completion("[1, 0]", logprobs={"content": content})
    assert ask(fake)[0].ones == pytest.approx((0.75 - 0.15, 0.1))
    content = [token(" Yes", (" Yes", 0.5), ("yes", 0.1), ("No", 0.2), ("maybe", 0.2)), token(".")]
    fake.script = lambda body: completion("Yes.", logprobs={"content": content})
    assert ask(fake)[0].ones == pytest.approx((0.75,))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_busy_endpoint_is_asked_again(fake: FakeEndpoint, status: int):
    turns = itertools.chain([Response("busy", status)] * 3, itertools.repeat(completion("[1]")))
    fake.script = lambda body: next(turns)
    assert ask(fake)[0].text == "[1]"
    assert len(fake.requests) == 4


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_obeyed(fake: FakeEndpoint, as_date: bool):
    begin = time.monotonic()
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "0.4"
    turns = iter([Response("", 429, {"Retry-After": wait}), completion("[1]")])
    fake.script = lambda body: next(turns)
    assert ask(fake)[0].text == "[1]"
    assert time.monotonic() - begin > (0.9 if as_date else 0.4)


def test_a_pause_of_hours_ends_the_command(fake: FakeEndpoint):
    fake.script = lambda body: Response("", 429, {"Retry-After": "7200"})
    with pytest.raises(UserError, match=r"asks for a pause of 7,200 seconds and the longest is"):
        ask(fake)


def test_an_endpoint_that_is_down(fake: FakeEndpoint):
    fake.url = "http://127.0.0.1:9/v1"
    with pytest.raises(EndpointError, match=r"127.0.0.1:9/v1 can't be reached .*Asked 7 times"):
        ask(fake)


def test_an_endpoint_that_is_slow(fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_post, "ATTEMPTS", 2)
    fake.script = lambda body: Response("", delay=0.5)
    with pytest.raises(
        EndpointError, match=r"no answer within 0.1 seconds. Asked 2 times; the answers so"
    ):
        ask(fake, timeout=0.1)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_named_and_never_shown(fake: FakeEndpoint, status: int, caplog):
    caplog.set_level(logging.DEBUG)
    fake.script = lambda body: Response({"error": f"bad key {KEY}\x1b[31m"}, status)
    with pytest.raises(
        EndpointError, match=rf"status {status} to the key in OPENAI_API_KEY"
    ) as one:
        ask(fake)
    assert "bad key ***" in str(one.value)
    assert "\x1b" not in str(one.value)
    assert KEY not in caplog.text + str(one.value)
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    "nonsense", ["<html>hello</html>", "[]", {"choices": []}, {"choices": [{"message": None}]}]
)
def test_nonsense_ends_it_at_the_start_and_is_recorded_later(fake: FakeEndpoint, nonsense: Any):
    fake.script = lambda body: Response(nonsense)
    with pytest.raises(EndpointError, match="not with a chat completion: it answers with"):
        ask(fake)
    turns = itertools.chain([completion("[1]")], itertools.repeat(Response(nonsense)))
    fake.script = lambda body: next(turns)
    with pytest.raises(QuestionRefused, match="not with a chat completion: it answers with"):
        ask(fake, times=2)


def test_a_refused_question_ends_it_at_the_start_and_is_recorded_later(fake: FakeEndpoint):
    fake.script = lambda body: Response({"error": "no such model"}, 404)
    with pytest.raises(
        EndpointError, match=r"status 404: .*no such model.* does it have a-model\?"
    ):
        ask(fake)
    turns = iter([completion("[1]"), Response({"error": "the text is too long"}, 400)])
    fake.script = lambda body: next(turns)
    with pytest.raises(QuestionRefused, match=r"status 400: .*too long"):
        ask(fake, times=2)


def test_what_an_endpoint_does_not_take_is_left_out(fake: FakeEndpoint):
    def script(body: dict[str, Any]) -> Response:
        for name in ("logprobs", "max_tokens", "temperature"):
            if name in body:
                return Response({"error": {"message": f"unsupported: {name}"}}, 400)
        return completion("[0]")

    fake.script = script
    assert [one.text for one in ask(fake, times=2)] == ["[0]", "[0]"]
    assert len(fake.requests) == 5
    last = fake.requests[-1]
    assert last["max_completion_tokens"] == 20
    assert not {"logprobs", "top_logprobs", "max_tokens", "temperature"} & last.keys()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://"])
def test_an_address_that_is_none(url: str):
    with pytest.raises(UserError, match="is no address: it should begin"):
        Endpoint(EndpointSettings(url, "m"))


def test_a_key_is_not_in_the_settings_text():
    assert KEY not in repr(EndpointSettings("http://x/v1", "m", KEY))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Explanation: days of the week", "days of the week"),
        ('thinking...\n**Explanation:** "<script>alert(1)</script>".', "<script>alert(1)</script>"),
        ("explanation : first\nExplanation: second.", "second"),
        ("[EXPLANATION]: numbers", "numbers"),
        ("I'm sorry, I can't help with that.", None),
        ("Explanation:", None),
        ("", None),
    ],
)
def test_reading_an_explanation(text: str, words: str | None):
    assert read_explanation(Answer(text)) == words


def test_a_cut_or_refused_answer_is_not_read():
    good = "Explanation: days [1,0]"
    assert read_explanation(Answer(good, "length")) is None
    assert read_explanation(Answer(good, refusal="no")) is None
    assert read_numbers(Answer(good, "content_filter"), count=2, most=1) is None
    assert read_numbers(Answer(good), count=2, most=1) == [1, 0]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("[1,0,1]", [1, 0, 1]),
        ("Texts [2]: so [1, 0,\n1].", [1, 0, 1]),
        ("[1,0]", None),
        ("[1,0,2]", None),
        ("1,0,1", None),
        ("[1.5,0,1]", None),
        ("[]", None),
        ("yes", None),
    ],
)
def test_reading_numbers(text: str, numbers: list[int] | None):
    assert read_numbers(Answer(text), count=3, most=1) == numbers


@pytest.mark.parametrize(
    ("text", "count", "verdicts"),
    [
        ("[1,0,1]", 3, [1, 0, 1]),
        ("1,0,1", 3, [1, 0, 1]),
        ("Yes\nno\nNo.", 3, [1, 0, 0]),
        ("1. yes 2. no 3. no", 3, None),
        ("yes, no", 3, None),
        ("[2]", 1, None),
        ("[1]", 1, [1]),
        ("No, it is not: 1 is", 1, [0]),
        ("<think>yes or no</think> Yes", 1, [1]),
        ("<think>yes or", 1, None),
        ("<think>[1,0,1]", 3, None),
        ("I can't tell", 1, None),
    ],
)
def test_reading_verdicts(text: str, count: int, verdicts: list[int] | None):
    assert read_verdicts(Answer(text), count=count) == verdicts
    cut_off = verdicts if count == 1 else None
    assert read_verdicts(Answer(text, "length"), count=count) == cut_off
    assert read_verdicts(Answer(text, "content_filter"), count=count) is None
