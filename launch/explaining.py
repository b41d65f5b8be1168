"""`sae explain`: its options, what it says before it begins, and what it asks of the user."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, storage_path
from launch.console import print_text
from launch.processes.signals import StopFlag
from sae_train.config.file import FILE_NAME
from sae_train.runs.folder import run_folders

if TYPE_CHECKING:
    from sae_train.explain.explain import Estimate, Explainer

MOST_CALLS, MOST_COST = 1000, 1.0  # above either, --yes is needed

_SCORES = ("detection", "fuzzing", "simulation")


def _scores(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",")) if text != "none" else ()
    if unknown := [one for one in found if one not in _SCORES]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no score: write some of {','.join(_SCORES)}, or none"
        )
    return tuple(dict.fromkeys(found))


def _price(text: str) -> tuple[float, float]:
    try:
        question, answer = (float(part) for part in text.split(","))
    except ValueError:
        question = answer = -1.0
    if not (0 <= question < float("inf") and 0 <= answer < float("inf")):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not two prices: write those of a million tokens in and out, as 0.15,0.60"
        )
    return question, answer


def _count(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


SWITCHES = (
    ("--yes", f"begin also with more than {MOST_CALLS:,} calls or a cost above {MOST_COST:g}"),
    ("--dry-run", "say what would be asked and what it would cost, and ask nothing"),
)
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--url", {"help": "of the endpoint, up to /v1 (default: the variable OPENAI_BASE_URL)"}),
    ("--model", {"help": "that the endpoint is to use (default: the variable OPENAI_MODEL)"}),
    (
        "--method",
        {
            "choices": ("max-act-logits", "examples"),
            "default": "max-act-logits",
            "help": "what the model is shown: the tokens a latent fires on and raises (a label of "
            "a few words), or texts with its values (a sentence); default max-act-logits",
        },
    ),
    (
        "--scores",
        {
            "type": _scores,
            "default": ("detection", "fuzzing"),
            "help": "how explanations are tested, with commas: detection, fuzzing, simulation, "
            "or none (default: detection,fuzzing)",
        },
    ),
    ("--latents", {"metavar": "LIST", "help": "which to explain, as 0-99,200"}),
    (
        "--sample",
        {
            "type": _count(1),
            "default": 100,
            "metavar": "N",
            "help": "without --latents: N of those that fire, drawn at random (default 100)",
        },
    ),
    ("--seed", {"type": _count(0), "default": 0, "help": "of every draw (default 0)"}),
    (
        "--texts",
        {
            "type": _count(2),
            "default": 10,
            "metavar": "N",
            "help": "N texts in which a latent fires, and N others, test its explanation "
            "(default 10)",
        },
    ),
    (
        "--together",
        {
            "type": _count(1),
            "default": 5,
            "metavar": "N",
            "help": "at most N of these texts in one question, answered with a list (default 5); "
            "with 1 the answer is yes or no, for small models that make no lists",
        },
    ),
    (
        "--price",
        {
            "type": _price,
            "metavar": "IN,OUT",
            "help": "of a million tokens of questions and of answers; without it no cost is shown",
        },
    ),
    (
        "--max-tokens",
        {
            "type": _count(1),
            "default": 500,
            "metavar": "N",
            "help": "longest answer; give models that think before they answer more (default 500)",
        },
    ),
    (
        "--parallel",
        {
            "type": _count(1),
            "default": 8,
            "metavar": "N",
            "help": "questions under way at once (default 8)",
        },
    ),
    (
        "--timeout",
        {
            "type": _positive,
            "default": 120.0,
            "metavar": "SECONDS",
            "help": "to wait for one answer (default 120)",
        },
    ),
)


def explain(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae explain`: explain latents by an endpoint, score the explanations; returns 0.

    Raises:
        UserError: no latents, no endpoint, more than the limits without --yes, or the endpoint
            doesn't work.
        Interrupted: a signal came; the answers so far are kept.
    """
    from sae_train.explain.chosen import choose
    from sae_train.explain.endpoint import KEY, MODEL, URL, Endpoint, EndpointSettings
    from sae_train.explain.explain import Explainer, ExplainSettings
    from sae_train.latents.reader import open_latents

    url = _given(arguments.url, variable=URL, option="--url", what="the address of an endpoint")
    model = _given(arguments.model, variable=MODEL, option="--model", what="the model to ask")
    key = os.environ.get(KEY) or None
    endpoint = Endpoint(EndpointSettings(url, model, key, arguments.timeout))
    settings = ExplainSettings(
        method=arguments.method,
        scores=arguments.scores,
        texts=arguments.texts,
        together=arguments.together,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        parallel=arguments.parallel,
    )
    with contextlib.ExitStack() as opened:
        explainers: list[Explainer] = []
        with stop.at_once():
            for folder in _folders(storage_path(arguments.target)):
                latents = open_latents(folder)
                chosen = choose(
                    latents, listed=arguments.latents, sample=arguments.sample, seed=arguments.seed
                )
                explainers.append(opened.enter_context(Explainer(latents, chosen, settings)))
            estimates = [one.estimate(model) for one in explainers]
        _announce(arguments, explainers, estimates, url=url, model=model)
        if arguments.dry_run:
            return 0
        for one in explainers:
            tally = one.run(endpoint, stop=stop)
            print_text(one.summary(model, tally))
    return 0


def _given(value: str | None, *, variable: str, option: str, what: str) -> str:
    found = value or os.environ.get(variable)
    if not found:
        raise UserError(f"say {what}: with {option} or in the variable {variable}")
    return found


def _folders(target: StoragePath) -> list[StoragePath]:
    """The target, or the runs of a sweep that have latents."""
    from sae_train.latents.reader import has_latents

    if has_latents(target) or not (target / FILE_NAME).is_file():
        return [target]
    return [run for run in run_folders(target) if has_latents(run)] or [target]


def _announce(
    arguments: argparse.Namespace,
    explainers: Sequence[Explainer],
    estimates: Sequence[Estimate],
    *,
    url: str,
    model: str,
) -> None:
    """Say what is to be asked and what it costs; raise `UserError` if that needs a --yes."""
    latents = sum(len(one.chosen) for one in explainers)
    calls = sum(one.calls for one in estimates)
    words = (
        f"{latents:,} latents, {calls:,} calls to {model} at {url} that aren't answered yet, "
        f"about {sum(one.tokens_in for one in estimates):,} tokens in and "
        f"{sum(one.tokens_out for one in estimates):,} out "
        f"(at most {sum(one.most_out for one in estimates):,})"
    )
    cost = most = 0.0
    if arguments.price is not None:
        per_in, per_out = (price / 1e6 for price in arguments.price)
        cost = sum(one.tokens_in * per_in + one.tokens_out * per_out for one in estimates)
        most = sum(one.tokens_in * per_in + one.most_out * per_out for one in estimates)
        words += f": about {cost:,.4f}, at most {most:,.4f}"
    print_text(words)
    if arguments.dry_run or arguments.yes:
        return
    if calls > MOST_CALLS or cost > MOST_COST:
        raise UserError(
            f"that is more than {MOST_CALLS:,} calls or a cost of {MOST_COST:g}: add --yes to "
            "begin, or choose fewer latents (--sample, --latents) or scores"
        )
