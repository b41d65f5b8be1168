"""What is asked of the endpoint, and how its answers are read.

Two ways to explain. `max-act-logits` shows the tokens the latent fires on, those after them, the
tokens its decoder raises, and texts; it is the idea of Neuronpedia's `np_max-act-logits`.
`examples` shows texts with the values of their tokens, the idea of EleutherAI's delphi. Detection
and fuzzing are delphi's scores (Paulo et al. 2024, arXiv 2410.13928), simulation is that of Bills
et al. 2023. The words are our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from sae_train.explain.question import Answer, Question
from sae_train.explain.texts import Excerpt

Method = Literal["max-act-logits", "examples"]
METHODS: tuple[Method, ...] = ("max-act-logits", "examples")
Score = Literal["detection", "fuzzing", "simulation"]
SCORES: tuple[Score, ...] = ("detection", "fuzzing", "simulation")

_LATENT = (
    "A latent is one unit of a sparse autoencoder that was trained on a language model. It "
    "fires on some tokens of a text. "
)
_LISTS = _LATENT + (
    "You get what is known of one latent, and say in one to six words what it stands for. "
    "Look first for what the tokens under FIRES ON have in common. If that says nothing, "
    "look at the tokens under NEXT TOKENS, and answer 'say X' if they are alike. Then at "
    "RAISED TOKENS, which the latent makes more likely. Then at what the TEXTS are about. In "
    "the texts the token with the greatest value stands between << and >>. Answer with one "
    "line: Explanation: and the words."
)
_LISTS_SHOT = (
    "FIRES ON: [' Monday', ' Friday', ' Tuesday']\nNEXT TOKENS: [' morning', ',', ' at']\n"
    "RAISED TOKENS: [' morning', ' night', 'day']\n"
    "TEXTS:\n1. the meeting on << Monday>> morning was\n2. until << Friday>>, when the",
    "Explanation: days of the week",
)
_EXAMPLES = _LATENT + (
    "You get texts in which it fires. The tokens on which it fires strongly stand between << "
    "and >>; under each text are tokens with their values from 0 to 10. Find what these "
    "tokens, or the texts around them, have in common, and say it in one short sentence. "
    "Don't list the texts and don't speak of latents or values. Answer with one line: "
    "Explanation: and the sentence."
)
_EXAMPLES_SHOT = (
    "1. and he ran <<faster>> than\nfaster 10\n2. a <<bigger>> house\nbigger 8",
    "Explanation: comparative forms of adjectives and adverbs",
)
_DETECTION = _LATENT + (
    "You get an explanation of what a latent fires on, and numbered texts. Decide for each "
    "text whether it holds what the explanation says. Answer with a list of one number per "
    "text, 1 for yes and 0 for no, and nothing else."
)
_FUZZING = _LATENT + (
    "You get an explanation of what a latent fires on, and numbered texts in which some "
    "tokens stand between << and >>. Decide for each text whether the marked tokens are "
    "those that the explanation means. Answer with a list of one number per text, 1 for yes "
    "and 0 for no, and nothing else."
)
_JUDGE_SHOT = (
    "Explanation: days of the week\n1. she left on{} Monday{} at noon\n2. the{} sea{} was calm\n"
    "3. it rained{} Tuesday{} night\nAnswer with 3 numbers.",
    "[1,0,1]",
)
_SIMULATION = _LATENT + (
    "You get an explanation of what a latent fires on, and the tokens of a text, one per "
    "line with its number. Predict for each token how strongly the latent fires on it, from "
    "0 (not at all) to 10. Answer with a list of one number per token, and nothing else."
)
_SIMULATION_SHOT = (
    "Explanation: days of the week\n0 'see'\n1 ' you'\n2 ' on'\n3 ' Friday'\n4 '.'\n"
    "Answer with 5 numbers.",
    "[0,0,0,10,0]",
)


def explanation_question(
    latent: int,
    method: Method,
    texts: Sequence[Excerpt],
    *,
    raised: Sequence[str],
    max_tokens: int,
) -> Question:
    """Ask what a latent stands for.

    Args:
        texts: in which it fires.
        raised: the tokens its decoder raises most, as text.
    """
    if method == "examples":
        shown = "\n".join(
            f"{number}. {text.marked()}\n{text.values_line()}"
            for number, text in enumerate(texts, start=1)
        )
        return _ask("explanation", latent, (_EXAMPLES, *_EXAMPLES_SHOT), shown, max_tokens)
    after = [text.next_token for text in texts if text.next_token is not None]
    shown = (
        f"FIRES ON: {_distinct([text.peak_token for text in texts])}\n"
        f"NEXT TOKENS: {_distinct(after)}\nRAISED TOKENS: {list(raised)}\nTEXTS:\n"
        + "\n".join(f"{number}. {text.peaked()}" for number, text in enumerate(texts, start=1))
    )
    return _ask("explanation", latent, (_LISTS, *_LISTS_SHOT), shown, max_tokens)


def judge_question(
    kind: Score, latent: int, explanation: str, texts: Sequence[str], *, max_tokens: int
) -> Question:
    """Ask which of several texts an explanation fits: detection, or fuzzing of marked texts."""
    marks = ("<<", ">>") if kind == "fuzzing" else ("", "")
    shot = (_JUDGE_SHOT[0].format(*3 * marks), _JUDGE_SHOT[1])
    system = _FUZZING if kind == "fuzzing" else _DETECTION
    shown = f"Explanation: {explanation}\n" + "\n".join(
        f"{number}. {text}" for number, text in enumerate(texts, start=1)
    )
    shown += f"\nAnswer with {len(texts)} numbers."
    return _ask(kind, latent, (system, *shot), shown, max_tokens, digits=True)


def simulation_question(
    latent: int, explanation: str, tokens: Sequence[str], *, max_tokens: int
) -> Question:
    """Ask for the latent's value at each token of a text."""
    shown = f"Explanation: {explanation}\n" + "\n".join(
        f"{number} {token!r}" for number, token in enumerate(tokens)
    )
    shown += f"\nAnswer with {len(tokens)} numbers."
    return _ask("simulation", latent, (_SIMULATION, *_SIMULATION_SHOT), shown, max_tokens)


def _ask(
    kind: str,
    latent: int,
    fixed: tuple[str, str, str],
    shown: str,
    max_tokens: int,
    *,
    digits: bool = False,
) -> Question:
    roles = ("system", "user", "assistant", "user")
    messages = tuple(zip(roles, (*fixed, shown), strict=True))
    return Question(kind, latent, messages, max_tokens, digits=digits)


def _distinct(tokens: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(tokens))


def read_explanation(answer: Answer) -> str | None:
    """What stands after the last "Explanation:", cut to 512 characters; None if nothing does."""
    if answer.problem is not None:
        return None
    found = re.findall(r"explanation\]?\s*:\W*?([^\s*\"'`_].*)", answer.text, re.IGNORECASE)
    if not found:
        return None
    words = found[-1].strip().removesuffix(".").strip("*\"'`_ ").removesuffix(".")
    return words[:512] or None


def read_numbers(answer: Answer, *, count: int, most: int) -> list[int] | None:
    """The last list of `count` whole numbers up to `most` in an answer; None if there is none."""
    if answer.problem is not None:
        return None
    for listed in reversed(re.findall(r"\[([\d\s,]*)\]", answer.text)):
        numbers = [int(one) for one in re.findall(r"\d+", listed)]
        if len(numbers) == count and max(numbers) <= most:
            return numbers
    return None
