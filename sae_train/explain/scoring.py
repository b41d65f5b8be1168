"""Scores of one explanation: which questions, and what their answers come to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_train.explain.measures import area_under_curve, balanced_accuracy, correlation
from sae_train.explain.prompts import (
    Score,
    judge_question,
    read_numbers,
    read_verdicts,
    simulation_question,
)
from sae_train.explain.question import Answer, Question
from sae_train.explain.texts import Drawn, Excerpt
from sae_train.latents.records import text_of

_STRONGEST = 10  # of a predicted value
CHANCE: dict[Score, float] = {"detection": 0.5, "fuzzing": 0.5, "simulation": 0.0}
MEASURE: dict[Score, str] = {
    "detection": "balanced_accuracy",
    "fuzzing": "balanced_accuracy",
    "simulation": "correlation",
}


@dataclass(frozen=True)
class Item:
    """One text of a score and what is true of it.

    Attributes:
        shown: as it stands in the question; for simulation the tokens.
        truth: 0 or 1; for simulation the value of each token, in tenths.
    """

    shown: tuple[str, ...]
    truth: tuple[float, ...]


@dataclass(frozen=True)
class Asked:
    """A question of a score, and the items it is about."""

    question: Question
    items: tuple[Item, ...]


def asked(
    kind: Score,
    latent: int,
    explanation: str,
    drawn: Drawn,
    *,
    seed: int,
    together: int,
    max_tokens: int,
) -> list[Asked]:
    """The questions of one score; none where the latent has too few texts.

    The texts and their order don't depend on the explanation.

    Args:
        together: texts of one question, at most; of simulation always one.
    """
    rng = random.Random(f"{seed} {latent} {kind}")
    if kind == "simulation":
        return [
            Asked(
                simulation_question(latent, explanation, item.shown, max_tokens=max_tokens), (item,)
            )
            for item in map(_tokens, drawn.active)
        ]
    if kind == "detection":
        items = [Item((one.text,), (1,)) for one in drawn.active]
        items += [Item((one.text,), (0,)) for one in drawn.silent]
    else:
        items = [Item((one.marked(),), (1,)) for one in drawn.active]
        items += [Item((one.marked(_wrong(one, rng)),), (0,)) for one in drawn.active]
    rng.shuffle(items)
    found = []
    number = -(-len(items) // together)
    for place in range(number):  # as even as can be: a text alone would be asked about otherwise
        part = tuple(items[len(items) * place // number : len(items) * (place + 1) // number])
        texts = [item.shown[0] for item in part]
        question = judge_question(kind, latent, explanation, texts, max_tokens=max_tokens)
        found.append(Asked(question, part))
    return found


def _tokens(one: Excerpt) -> Item:
    tokens = tuple(text_of(token) for token in one.tokens)
    return Item(tokens, tuple(one.tenths(index) for index in range(len(tokens))))


def _wrong(one: Excerpt, rng: random.Random) -> set[int]:
    """As many tokens as are strong, of those on which the latent doesn't fire."""
    quiet = [index for index, value in enumerate(one.values) if value <= 0]
    return set(rng.sample(quiet, min(len(one.strong), len(quiet))))


def _numbers(kind: Score, answer: Answer, *, count: int) -> list[int] | None:
    if kind == "simulation":
        return read_numbers(answer, count=count, most=_STRONGEST)
    return read_verdicts(answer, count=count)


def result(kind: Score, parts: Sequence[tuple[Asked, Answer | None]]) -> dict[str, Any]:
    """The score of these answers, for explanations.parquet.

    Returns:
        The measure by its name, or None where it can't be had; `auc` where there were
        log-probabilities for all texts; `chance`; `texts` that were judged and those `unanswered`
        because an answer was missing, refused or malformed.
    """
    truth: list[float] = []
    said: list[float] = []
    likely: list[float] | None = []
    unanswered = 0
    for part, answer in parts:
        expected = [value for item in part.items for value in item.truth]
        numbers = None if answer is None else _numbers(kind, answer, count=len(expected))
        if answer is None or numbers is None:
            unanswered += len(part.items)
            continue
        truth += expected
        said += numbers
        ones = answer.ones or ()
        ones = ones[:1] if len(numbers) == 1 else ones
        if likely is not None and len(ones) == len(numbers):
            likely += ones
        else:
            likely = None
    texts = sum(len(part.items) for part, _ in parts) - unanswered
    counts = {"texts": texts, "unanswered": unanswered}
    if kind == "simulation":
        return {"correlation": correlation(truth, said), "chance": CHANCE[kind], **counts}
    facts, words = [bool(one) for one in truth], [bool(one) for one in said]
    return {
        "balanced_accuracy": balanced_accuracy(facts, words) if facts else None,
        "auc": area_under_curve(facts, likely) if facts and likely is not None else None,
        "chance": CHANCE[kind],
        **counts,
    }
