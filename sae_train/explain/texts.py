"""Pieces of text for questions: cut from a latent's contexts, marked, and drawn.

Nothing here depends on anything but the files of `latents` and the seed, so that the same command
asks the same questions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from sae_train.latents.reader import Latents
from sae_train.latents.records import Context, Latent, TextWindow, text_of
from sae_train.latents.schema import WINDOW_TOKENS

_BEFORE = WINDOW_TOKENS * 3 // 4 - 1  # tokens before the peak
_STRONG = 0.3  # of the excerpt's greatest value: tokens above it are marked
_SHOWN = 20  # excerpts that an explanation is made from, of the greatest values
_VALUES = 8  # tokens of an excerpt whose values are written out


@dataclass(frozen=True)
class Excerpt:
    """Up to `WINDOW_TOKENS` tokens, three quarters of them up to the peak, as in delphi.

    Attributes:
        peak: index of the token the context was chosen for; of a silent text the first.
        origin: sequence and position of that token.
        scale: the latent's maximum.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    origin: tuple[int, int]
    scale: float

    @property
    def text(self) -> str:
        """The plain text, on one line."""
        return _line(join(self.tokens))

    @property
    def peak_token(self) -> str:
        """The text of the token at the peak."""
        return text_of(self.tokens[self.peak])

    @property
    def next_token(self) -> str | None:
        """The text of the token after the peak, if there is one."""
        after = self.peak + 1
        return text_of(self.tokens[after]) if after < len(self.tokens) else None

    @property
    def strong(self) -> set[int]:
        """The tokens that are marked: those with more than 0.3 of the greatest value."""
        least = _STRONG * max(self.values)
        return {index for index, value in enumerate(self.values) if value > max(least, 0.0)}

    def marked(self, chosen: set[int] | None = None) -> str:
        """The text with some tokens between << and >>: the strong ones, unless told otherwise."""
        chosen = self.strong if chosen is None else chosen
        parts: list[str] = []
        run: list[str] = []
        is_marked = False
        for index, token in enumerate((*self.tokens, "")):
            if (index in chosen) != is_marked or index == len(self.tokens):
                parts.append(f"<<{join(run)}>>" if is_marked else join(run))
                run, is_marked = [], index in chosen
            run.append(token)
        return _line("".join(parts))

    def peaked(self) -> str:
        """The text with the token at the peak marked."""
        return self.marked({self.peak})

    def values_line(self) -> str:
        """The strongest tokens with their values from 1 to 10, in the order of the text."""
        strongest = sorted(self.strong, key=lambda index: -self.values[index])[:_VALUES]
        return ", ".join(
            f"{_line(text_of(self.tokens[index])).strip()} {self.tenths(index)}"
            for index in sorted(strongest)
        )

    def tenths(self, index: int) -> int:
        """The value of a token in tenths of the latent's maximum, rounded up."""
        share = self.values[index] / self.scale if self.scale else 0.0
        return min(10, max(0, -int(-10 * share // 1)))


def join(pieces: Sequence[str]) -> str:
    """The text of several tokens; the bytes of a character that is several tokens are joined."""
    data = bytearray()
    for piece in pieces:
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        try:
            data += bytes.fromhex(piece[3:5]) if is_byte else b""
        except ValueError:
            is_byte = False
        if not is_byte:
            data += text_of(piece).encode("utf-8", "replace")
    return data.decode("utf-8", "replace")


def _line(text: str) -> str:
    """On one line: an excerpt is a line of a question."""
    return "↵".join((text + "|").splitlines())[:-1]


def excerpt(context: Context, *, latent: Latent) -> Excerpt:
    """The part of a context that questions show."""
    begin = max(0, min(context.peak - _BEFORE, len(context.tokens) - WINDOW_TOKENS))
    end = begin + WINDOW_TOKENS
    return Excerpt(
        tokens=context.tokens[begin:end],
        values=context.values[begin:end],
        peak=context.peak - begin,
        origin=(context.sequence, context.position),
        scale=latent.maximum,
    )


@dataclass(frozen=True)
class Drawn:
    """What a latent's questions are made from.

    Attributes:
        explaining: excerpts that the explanation is made from.
        active: other excerpts in which it fires.
        silent: pieces of the text in which it doesn't fire.
    """

    explaining: tuple[Excerpt, ...]
    active: tuple[Excerpt, ...]
    silent: tuple[Excerpt, ...]


def draw(latents: Latents, latent: Latent, *, count: int, seed: int) -> Drawn:
    """Draw a latent's texts.

    Explanations are made from the greatest values and every second sample of the intervals, scores
    from the other samples, strong ones and weak ones in turn; where too few fired for that, from
    the greatest values that come last. No text is in both.

    Args:
        count: texts in which it fires to score with, at most, and as many in which it doesn't.
    """
    rng = random.Random(f"{seed} {latent.index}")
    greatest = [one for one in latent.contexts if one.interval == 0]
    by_interval: dict[int, list[Context]] = {}
    for context in latent.contexts:
        if context.interval > 0:
            by_interval.setdefault(context.interval, []).append(context)
    explaining = _apart([*greatest, *(c for s in by_interval.values() for c in s[::2])])
    rounds = itertools.zip_longest(*(samples[1::2] for samples in by_interval.values()))
    active = _apart([one for around in rounds for one in around if one], beside=explaining)
    while len(active) < min(count, len(explaining) // 2):
        active.append(explaining.pop())
    chosen = active[:count]
    shown = [one for one in explaining if one.interval == 0][:_SHOWN]
    shown += [one for one in explaining if one.interval > 0]
    windows = latents.silent_windows(latent.index)
    silent = rng.sample(windows, min(len(chosen), len(windows)))
    return Drawn(
        tuple(excerpt(one, latent=latent) for one in shown),
        tuple(excerpt(one, latent=latent) for one in chosen),
        tuple(_silent(one, latent=latent) for one in silent),
    )


def _apart(contexts: Sequence[Context], *, beside: Sequence[Context] = ()) -> list[Context]:
    """Those that neither overlap with one before them nor repeat its tokens."""
    kept: list[Context] = []
    for one in contexts:
        if not any(_overlap(one, other) for other in (*beside, *kept)):
            kept.append(one)
    return kept


def _overlap(one: Context, other: Context) -> bool:
    near = abs(one.position - other.position) < WINDOW_TOKENS
    return (one.sequence == other.sequence and near) or one.token_ids == other.token_ids


def _silent(window: TextWindow, *, latent: Latent) -> Excerpt:
    return Excerpt(
        tokens=window.tokens,
        values=(0.0,) * len(window.tokens),
        peak=0,
        origin=(window.sequence, window.position),
        scale=latent.maximum,
    )
