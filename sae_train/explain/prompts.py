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

from sae_train.explain.question import CUT_OFF, VERDICTS, Answer, Question
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
_LISTS_SHOTS = (
    (
        "FIRES ON: [' Monday', ' Friday', ' Tuesday']\nNEXT TOKENS: [' morning', ',', ' at']\n"
        "RAISED TOKENS: [' morning', ' night', 'day']\n"
        "TEXTS:\n1. the meeting on<< Monday>> morning was\n2. until<< Friday>>, when the",
        "Explanation: days of the week",
    ),
    (
        "FIRES ON: [' part', ' because', ' out']\nNEXT TOKENS: [' of']\n"
        "RAISED TOKENS: [' of', 'of', ' thereof']\n"
        "TEXTS:\n1. a large<< part>> of the house\n2. came late<< because>> of the snow",
        "Explanation: say 'of'",
    ),
    (
        "FIRES ON: [' the', ' was', ' signed']\nNEXT TOKENS: [' court', ' filed', ' by']\n"
        "RAISED TOKENS: [' plaintiff', ' pursuant', ' hereby']\n"
        "TEXTS:\n1. before<< the>> court of appeals\n2. the claim<< was>> filed by his heirs",
        "Explanation: legal proceedings",
    ),
)
_EXAMPLES = _LATENT + (
    "You get texts in which it fires. The tokens on which it fires strongly stand between << "
    "and >>; under each text are tokens with their values from 0 to 10. Find what these "
    "tokens, or the texts around them, have in common, and say it in one short sentence. "
    "Don't list the texts and don't speak of latents or values. Answer with one line: "
    "Explanation: and the sentence."
)
_EXAMPLES_SHOTS = (
    (
        "1. and he ran<< faster>> than\nfaster 10\n2. a<< bigger>> house\nbigger 8",
        "Explanation: comparative forms of adjectives and adverbs",
    ),
    (
        "1. the plaintiff<< filed a claim>> in\nfiled 4, a 3, claim 10\n"
        "2. before the<< court>> of\ncourt 7",
        "Explanation: words of legal proceedings",
    ),
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
_ONE_DETECTION = _LATENT + (
    "You get an explanation of what a latent fires on, and a text. Does the text hold what the "
    "explanation says? Answer yes or no, with nothing else."
)
_ONE_FUZZING = _LATENT + (
    "You get an explanation of what a latent fires on, and a text in which some tokens stand "
    "between << and >>. Are the marked tokens those that the explanation means? Answer yes or no, "
    "with nothing else."
)
# An explanation, and texts of which is true: it holds what is explained; the marked tokens are it.
_JUDGE_SHOTS = (
    (
        "days of the week",
        (
            ("she left on<< Monday>> at noon", 1, 1),
            ("the sea was<< calm>> and blue", 0, 0),
            ("it rained Tuesday<< night>> again", 1, 0),
            ("open until<< Friday>> or later", 1, 1),
            ("he paid the<< bill>> in cash", 0, 0),
        ),
    ),
    (
        "negations",
        (
            ("a new road<< to>> the coast", 0, 0),
            ("they have<< not>> agreed yet", 1, 1),
            ("the winter<< was>> long that year", 0, 0),
            ("there is no<< reason>> to wait", 1, 0),
            ("we<< never>> saw it again", 1, 1),
        ),
    ),
    (
        "sums of money",
        (
            ("spent<< three million dollars>> on it", 1, 1),
            ("the<< children>> went to school", 0, 0),
            ("a tax of $<<40>> on each", 1, 1),
            ("peace with all<< nations>> of the", 0, 0),
            ("her old house<< by>> the river", 0, 0),
        ),
    ),
)
_SIMULATION = _LATENT + (
    "You get an explanation of what a latent fires on, and the tokens of a text, one per "
    "line with its number. Predict for each token how strongly the latent fires on it, from "
    "0 (not at all) to 10. Answer with a list of one number per token, and nothing else."
)
_SIMULATION_SHOTS = (
    (
        "Explanation: days of the week\n0 'see'\n1 ' you'\n2 ' on'\n3 ' Friday'\n4 '.'\n"
        "Answer with 5 numbers.",
        "[0,0,0,10,0]",
    ),
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
        return _ask("explanation", latent, (_EXAMPLES, _EXAMPLES_SHOTS), shown, max_tokens)
    after = [text.next_token for text in texts if text.next_token is not None]
    shown = (
        f"FIRES ON: {_distinct([text.peak_token for text in texts])}\n"
        f"NEXT TOKENS: {_distinct(after)}\nRAISED TOKENS: {list(raised)}\nTEXTS:\n"
        + "\n".join(f"{number}. {text.peaked()}" for number, text in enumerate(texts, start=1))
    )
    return _ask("explanation", latent, (_LISTS, _LISTS_SHOTS), shown, max_tokens)


def judge_question(
    kind: Score, latent: int, explanation: str, texts: Sequence[str], *, max_tokens: int
) -> Question:
    """Ask which texts an explanation fits: detection, or fuzzing of marked texts.

    One text is asked about with yes or no, several with a list of 1 and 0.
    """
    fuzzing, alone = kind == "fuzzing", len(texts) == 1
    shots = []
    for about, examples in _JUDGE_SHOTS:
        shown = [text if fuzzing else re.sub("<<|>>", "", text) for text, _, _ in examples]
        truth = [marked if fuzzing else holds for _, holds, marked in examples]
        if alone:
            shots += [
                (_judged(about, [text]), "yes" if true else "no")
                for text, true in zip(shown[:2], truth[:2], strict=True)
            ]
        else:
            shots.append((_judged(about, shown), f"[{','.join(map(str, truth))}]"))
    systems = (_ONE_FUZZING, _ONE_DETECTION) if alone else (_FUZZING, _DETECTION)
    fixed = (systems[0 if fuzzing else 1], tuple(shots))
    return _ask(kind, latent, fixed, _judged(explanation, texts), max_tokens, verdicts=True)


def _judged(explanation: str, texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return f"Explanation: {explanation}\nText: {texts[0]}\nAnswer yes or no."
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
    return f"Explanation: {explanation}\n{listed}\nAnswer with {len(texts)} numbers."


def simulation_question(
    latent: int, explanation: str, tokens: Sequence[str], *, max_tokens: int
) -> Question:
    """Ask for the latent's value at each token of a text."""
    shown = f"Explanation: {explanation}\n" + "\n".join(
        f"{number} {token!r}" for number, token in enumerate(tokens)
    )
    shown += f"\nAnswer with {len(tokens)} numbers."
    return _ask("simulation", latent, (_SIMULATION, _SIMULATION_SHOTS), shown, max_tokens)


def _ask(
    kind: str,
    latent: int,
    fixed: tuple[str, Sequence[tuple[str, str]]],
    shown: str,
    max_tokens: int,
    *,
    verdicts: bool = False,
) -> Question:
    system, shots = fixed
    messages = [("system", system)]
    for question, answer in shots:
        messages += [("user", question), ("assistant", answer)]
    return Question(kind, latent, (*messages, ("user", shown)), max_tokens, verdicts=verdicts)


def _distinct(tokens: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(tokens))


def _said(answer: Answer) -> str:
    """An answer without what was thought before it."""
    return re.sub(r"<think>.*?(</think>|$)", "", answer.text, flags=re.DOTALL)


def read_explanation(answer: Answer) -> str | None:
    """What stands after the last "Explanation:", cut to 512 characters; None if nothing does."""
    if answer.problem is not None:
        return None
    found = re.findall(r"explanation\]?\s*:\W*?([^\s*\"'`_].*)", _said(answer), re.IGNORECASE)
    if not found:
        return None
    words = found[-1].strip().removesuffix(".").strip("*\"'`_ ").removesuffix(".")
    return words[:512] or None


def read_numbers(answer: Answer, *, count: int, most: int) -> list[int] | None:
    """The last list of `count` whole numbers up to `most` in an answer; None if there is none."""
    if answer.problem is not None:
        return None
    for listed in reversed(re.findall(r"\[([\d\s,]*)\]", _said(answer))):
        numbers = [int(one) for one in re.findall(r"\d+", listed)]
        if len(numbers) == count and max(numbers) <= most:
            return numbers
    return None


def read_verdicts(answer: Answer, *, count: int) -> list[int] | None:
    """What an answer says of `count` texts, 1 for yes and 0 for no; None if it can't be read.

    Of one text the first yes, no, 1 or 0 is read, whatever follows. Of several it is a list in
    brackets, or an answer of nothing but so many such words.
    """
    if (numbers := read_numbers(answer, count=count, most=1)) is not None:
        return numbers
    words = re.findall(r"\w+", _said(answer).casefold())
    if count == 1 and answer.problem in (None, CUT_OFF):
        words = [word for word in words if word in VERDICTS][:1]
    elif answer.problem is not None:
        return None
    if len(words) != count or any(word not in VERDICTS for word in words):
        return None
    return [VERDICTS[word] for word in words]
