"""`sae explain`: explanations of an SAE's latents, their scores, and a baseline for the scores.

    latents/explain/answers.jsonl    every answer, by the hash of its question
    latents/explanations.parquet     what `open_latents` shows: text, method, model, scores

The baseline gives the explanation of another latent to the same questions: what a score says of
an explanation is its distance from that, not from chance alone.
"""

from __future__ import annotations

import functools
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import make_folder, replacing
from activation_cache.storage.locks import folder_lock
from sae_train.explain.asking import Tally, ask_all
from sae_train.explain.endpoint import Endpoint
from sae_train.explain.prompts import Method, Score, explanation_question, read_explanation
from sae_train.explain.question import Answers, Question
from sae_train.explain.scoring import CHANCE, MEASURE, Asked, asked, result
from sae_train.explain.texts import Drawn, draw
from sae_train.latents.reader import Latents
from sae_train.latents.records import text_of
from sae_train.latents.schema import EXPLANATIONS, EXPLANATIONS_SCHEMA

logger = logging.getLogger(__name__)

FOLDER, ANSWERS = "explain", "answers.jsonl"
BASELINE = 100  # latents whose scores are also taken with another's explanation
_DRAWN_KEPT = 1000  # latents whose texts stay in memory, some 100 kB each
_PLACEHOLDER = "references to time, especially days of the week and months in dates"


@dataclass(frozen=True)
class ExplainSettings:
    """What is asked.

    Attributes:
        texts: in which the latent fires, to score with; as many in which it doesn't.
        together: texts of one question of a score; 5 as in delphi.
        max_tokens: of an answer.
        parallel: questions under way at once.
    """

    method: Method
    scores: tuple[Score, ...]
    texts: int = 10
    together: int = 5
    seed: int = 0
    max_tokens: int = 500
    parallel: int = 8


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked: exact in calls, about in tokens.

    Attributes:
        tokens_in: of the questions, at 3.5 bytes a token.
        tokens_out: of answers as short as they should be.
        most_out: if every answer is as long as it may be.
    """

    calls: int
    tokens_in: int
    tokens_out: int
    most_out: int


class Explainer:
    """Explains chosen latents of one SAE; use it as a context manager, which locks the folder."""

    def __init__(self, latents: Latents, chosen: Sequence[int], settings: ExplainSettings) -> None:
        """`chosen` are indices of latents that fire.

        Raises:
            UserError: the latents are in a bucket.
        """
        if not isinstance(latents.folder, Path):
            raise UserError(
                f"{latents.folder} is in a bucket, and answers are kept on this machine: copy the "
                "folder here, explain it, and copy explanations.parquet back"
            )
        self.latents, self.chosen, self.settings = latents, list(chosen), settings
        self._folder = latents.folder
        order = list(self.chosen)
        random.Random(settings.seed).shuffle(order)
        # The baseline's explanation of a latent is that of the next in this order.
        self._next = dict(zip(order, order[1:] + order[:1], strict=True))
        self._baseline = order[:BASELINE] if len(order) > 1 else []
        # Each latent's texts are needed several times and come from many places of the files.
        self._drawn = functools.lru_cache(maxsize=_DRAWN_KEPT)(self._draw)

    def __enter__(self) -> Explainer:
        folder = make_folder(self._folder / FOLDER)
        self._lock = folder_lock(folder)
        self._lock.__enter__()
        self._answers = Answers(folder / ANSWERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.__exit__()
        self._lock.__exit__(None, None, None)

    def estimate(self, model: str) -> Estimate:
        """What `run` would ask an endpoint's `model`, without what is answered already."""
        calls = tokens_in = tokens_out = 0
        for question in self._questions(model):
            if self._answers.get(question.key(model)) is None:
                calls += 1
                tokens_in += round(question.size / 3.5) + 8 * len(question.messages)
                of_texts = 2 * self.settings.together + 2
                tokens_out += 20 if question.kind == "explanation" else of_texts
        return Estimate(calls, tokens_in, tokens_out, calls * self.settings.max_tokens)

    def _questions(self, model: str) -> Iterator[Question]:
        """All questions; those about an explanation to come have other words in its place."""
        texts: dict[int, str] = {}
        for latent in self.chosen:
            question = self._explanation_question(latent, self._drawn(latent))
            yield question
            answer = self._answers.get(question.key(model))
            text = _PLACEHOLDER if answer is None else read_explanation(answer)
            if text is not None:
                texts[latent] = text
        for one in self._scored(texts):
            yield from (part.question for part in one.parts)

    def run(self, endpoint: Endpoint, *, stop: Callable[[], bool]) -> Tally:
        """Ask everything and write explanations.parquet; returns what was asked in this command.

        Raises:
            EndpointError: the endpoint doesn't work.
            Interrupted: a signal came. In both cases the answers so far are kept.
        """
        tally, model = Tally(), endpoint.settings.model

        def ask(questions: list[Question], what: str) -> None:
            ask_all(
                questions,
                endpoint=endpoint,
                answers=self._answers,
                parallel=self.settings.parallel,
                stop=stop,
                tally=tally,
                what=what,
            )

        explained = {
            latent: self._explanation_question(latent, self._drawn(latent))
            for latent in self.chosen
        }
        ask(list(explained.values()), "explain")
        texts: dict[int, str] = {}
        for latent, question in explained.items():
            answer = self._answers.get(question.key(model))
            text = answer and read_explanation(answer)
            if text:
                texts[latent] = text
            elif answer is not None:
                why = answer.problem or "has no line 'Explanation:'"
                logger.warning("latent %d: the answer %s: %.80r", latent, why, answer.text)
        self._write(texts, model, {})
        if not texts and explained:
            raise UserError(
                f"none of {len(explained)} answers of {model} holds an explanation; they are in "
                f"{self._folder / FOLDER / ANSWERS}. Take another model, or give --max-tokens more "
                "than the model thinks before it answers"
            )
        scored = list(self._scored(texts))
        ask([part.question for one in scored for part in one.parts], "score")
        self._write(texts, model, self._results(scored, model))
        return tally

    def summary(self, model: str, tally: Tally) -> str:
        """One line about a finished run: what was explained and how well."""
        rows = [
            row
            for row in pq.read_table(self._folder / EXPLANATIONS).to_pylist()
            if (row["method"], row["model"]) == (self.settings.method, model)
            and row["latent"] in set(self.chosen)
        ]
        words = [f"{self.latents.name}: {len(rows)} of {len(self.chosen)} latents explained"]
        for kind in self.settings.scores:
            scores = [json.loads(row["scores"]).get(kind, {}) for row in rows]
            values = [one[MEASURE[kind]] for one in scores if one.get(MEASURE[kind]) is not None]
            if not values:
                words.append(f"{kind}: no score, for latents have too few texts or answers")
                continue
            shuffled = scores[0]["shuffled"]
            beside = "no baseline" if shuffled is None else f"shuffled {shuffled:.3f}"
            chance = f"chance {CHANCE[kind]:g}"
            words.append(
                f"{kind} {MEASURE[kind].replace('_', ' ')} {fmean(values):.3f} of {len(values)} "
                f"latents ({beside}, {chance})"
            )
        refused = f", {len(tally.refused)} questions refused" if tally.refused else ""
        tokens = f"{tally.tokens_in:,} tokens in, {tally.tokens_out:,} out"
        words.append(f"{tally.calls:,} calls, {tokens}{refused}")
        return "; ".join(words)

    def _draw(self, latent: int) -> Drawn:
        return draw(
            self.latents, self.latents[latent], count=self.settings.texts, seed=self.settings.seed
        )

    def _explanation_question(self, latent: int, drawn: Drawn) -> Question:
        raised = [text_of(one.token) for one in self.latents[latent].top_logits]
        return explanation_question(
            latent,
            self.settings.method,
            drawn.explaining,
            raised=raised,
            max_tokens=self.settings.max_tokens,
        )

    def _scored(self, texts: dict[int, str]) -> Iterator[_Scored]:
        baseline = set(self._baseline)
        for latent, text in texts.items():
            if not self.settings.scores:
                return
            drawn = self._drawn(latent)
            explanations = [(text, False)]
            other = texts.get(self._next[latent])
            if latent in baseline and other is not None:
                explanations.append((other, True))
            for explanation, is_baseline in explanations:
                for kind in self.settings.scores:
                    parts = asked(
                        kind,
                        latent,
                        explanation,
                        drawn,
                        seed=self.settings.seed,
                        together=self.settings.together,
                        max_tokens=self.settings.max_tokens,
                    )
                    yield _Scored(latent, kind, is_baseline, parts)

    def _results(self, scored: Sequence[_Scored], model: str) -> dict[int, dict[Score, Any]]:
        """By latent and kind the score, with the baseline's mean beside it."""
        found: dict[int, dict[Score, Any]] = {}
        baseline: dict[Score, list[float]] = {kind: [] for kind in self.settings.scores}
        for one in scored:
            answers = [self._answers.get(part.question.key(model)) for part in one.parts]
            score = result(one.kind, list(zip(one.parts, answers, strict=True)))
            if not one.is_baseline:
                found.setdefault(one.latent, {})[one.kind] = score
            elif (value := score[MEASURE[one.kind]]) is not None:
                baseline[one.kind].append(value)
        for scores in found.values():
            for kind, score in scores.items():
                score["shuffled"] = fmean(baseline[kind]) if baseline[kind] else None
                score["shuffled_latents"] = len(baseline[kind])
        return found

    def _write(
        self, texts: dict[int, str], model: str, scores: dict[int, dict[Score, Any]]
    ) -> None:
        """Write explanations.parquet: what is there of other latents, methods and models stays.

        The row of a latent, method and model is replaced; it keeps scores that weren't asked for.
        """
        method = self.settings.method
        path = self._folder / EXPLANATIONS
        rows = pq.read_table(path).to_pylist() if path.is_file() else []
        mine = {
            row["latent"]: row
            for row in rows
            if (row["method"], row["model"]) == (method, model) and row["latent"] in texts
        }
        rows = [row for row in rows if mine.get(row["latent"]) is not row]
        for latent, text in texts.items():
            before = mine.get(latent)
            kept = json.loads(before["scores"]) if before and before["text"] == text else {}
            kept |= scores.get(latent, {})
            row = {"latent": latent, "text": text, "method": method, "model": model}
            rows.append(row | {"scores": json.dumps(kept)})
        rows.sort(key=lambda row: row["latent"])  # stable: of a latent's, the newest last
        with replacing(path) as temporary:
            pq.write_table(
                pa.Table.from_pylist(rows, schema=EXPLANATIONS_SCHEMA),
                temporary,
                compression="zstd",
            )


@dataclass(frozen=True)
class _Scored:
    latent: int
    kind: Score
    is_baseline: bool
    parts: list[Asked]
