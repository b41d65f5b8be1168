"""One latent as Python objects, what `open_latents(folder)[17]` returns, also for a notebook."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 8  # contexts
_AROUND = 24  # tokens before and after the peak


def text_of(piece: str) -> str:
    """A token's text: SentencePiece's `▁` is a space, a byte such as `<0x0A>` its character.

    Bytes above 0x7F, which are parts of a character, stay as they are.
    """
    byte = re.fullmatch(r"<0x([0-7][0-9A-F])>", piece) if piece.startswith("<0x") else None
    return chr(int(byte[1], 16)) if byte else piece.replace("▁", " ")


@dataclass(frozen=True)
class TokenValue:
    """A token of the vocabulary, and a logit."""

    id: int
    token: str
    value: float


@dataclass(frozen=True)
class TokenCount:
    """A token on which the latent fires.

    Attributes:
        count: how often it fires on it.
        lift: how much more frequent the token is where it fires than in the whole text.
    """

    id: int
    token: str
    count: int
    lift: float


@dataclass(frozen=True)
class Neighbour:
    """A latent of a similar direction, in this SAE or in another of its sweep."""

    sae: str
    index: int
    cosine: float


@dataclass(frozen=True)
class Coactive:
    """A latent of the same SAE that fires on the same tokens.

    Attributes:
        count: tokens on which both fire.
        score: `count` over the tokens on which at least one of the two fires.
    """

    index: int
    count: int
    score: float


@dataclass(frozen=True)
class Histogram:
    """Counts of values between equally spaced edges, the last edge included."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """A piece of text around a token on which the latent fires.

    Attributes:
        values: the latent's value at each token; 0 where it doesn't fire, and at EOS and padding.
        peak: which of `tokens` it was chosen for.
        sequence, position: where that token is in the table of tokens; BOS is position 0.
        subset: of the text, if the table divides it.
        interval: 0 for the contexts of the greatest values; 1 to 5 for samples of an interval of
            (0, maximum], from high to low.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    values: tuple[float, ...]
    peak: int
    sequence: int
    position: int
    subset: str | None
    interval: int

    @property
    def value(self) -> float:
        """The latent's value at the token it was chosen for."""
        return self.values[self.peak]


@dataclass(frozen=True)
class TextWindow:
    """A piece of the text that was chosen for no latent.

    Attributes:
        sequence, position: where its first token is in the table of tokens; BOS is position 0.
    """

    tokens: tuple[str, ...]
    sequence: int
    position: int


@dataclass(frozen=True)
class Explanation:
    """A latent in words, as `sae explain` found them, and how well the words predict it."""

    text: str
    method: str
    model: str
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Latent:
    """Everything that is known of one latent; docs/latents.md defines each number.

    Attributes:
        sae: the name of its SAE.
        frequency: fraction of the tokens on which it fires.
        mean, maximum: of its values where it fires; 0 if it never did.
        histogram: of its values where it fires; None if it never did.
        interval_counts: tokens in each interval of (0, maximum], from high to low.
        top_logits, bottom_logits: the tokens that its decoder raises and lowers most, through the
            final norm's gain; empty where the decoder writes no residual stream.
        plain_top_logits, plain_bottom_logits: the same without the gain, as Neuronpedia shows.
        logit_histogram, plain_logit_histogram: of these logits over the vocabulary.
        encoder_top, encoder_bottom: of a transcoder, the tokens whose embedding its encoder reads.
        neighbours: by cosine of the decoder's rows, this SAE's first.
        encoder_neighbours: of a transcoder, by cosine of the encoder's columns.
        explanations: all there are; `explanation` is the last.
    """

    sae: str
    index: int
    count: int
    frequency: float
    mean: float
    maximum: float
    histogram: Histogram | None
    interval_counts: tuple[int, ...]
    contexts: tuple[Context, ...]
    top_logits: tuple[TokenValue, ...]
    bottom_logits: tuple[TokenValue, ...]
    plain_top_logits: tuple[TokenValue, ...]
    plain_bottom_logits: tuple[TokenValue, ...]
    logit_histogram: Histogram | None
    plain_logit_histogram: Histogram | None
    encoder_top: tuple[TokenValue, ...]
    encoder_bottom: tuple[TokenValue, ...]
    top_inputs: tuple[TokenCount, ...]
    neighbours: tuple[Neighbour, ...]
    encoder_neighbours: tuple[Neighbour, ...]
    coactive: tuple[Coactive, ...]
    explanations: tuple[Explanation, ...] = ()

    @property
    def explanation(self) -> Explanation | None:
        """The explanation written last."""
        return self.explanations[-1] if self.explanations else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON carries."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: self-contained, every text escaped."""
        return latent_html(self)


def latent_html(latent: Latent) -> str:
    """A heading, the logits, and the strongest contexts with tokens shaded by value."""
    head = (
        f"<b>{_escaped(latent.sae)}, latent {latent.index}</b>: fires on {latent.frequency:.4%} of "
        f"tokens ({latent.count}), maximum {latent.maximum:.3g}, mean {latent.mean:.3g}"
    )
    parts = [f"<div>{head}</div>"]
    if latent.explanation is not None:
        parts.append(f"<div><i>{_escaped(latent.explanation.text)}</i></div>")
    if not latent.count:
        parts.append("<div>It never fired on the text that was walked.</div>")
    for title, tokens in (("raises", latent.top_logits), ("lowers", latent.bottom_logits)):
        if tokens:
            parts.append(f"<div>{title}: {_listed(tokens)}</div>")
    shown = [context for context in latent.contexts if context.interval == 0][:_SHOWN]
    parts += [_context(one, maximum=latent.maximum) for one in shown]
    return f'<div style="line-height:1.6">{"".join(parts)}</div>'


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _listed(tokens: Sequence[TokenValue]) -> str:
    return ", ".join(f"<code>{_visible(one.token)}</code> {one.value:+.2f}" for one in tokens)


def _visible(piece: str) -> str:
    """A token's text, escaped, with a sign for a line break and a number for what can't be seen."""
    shown = [
        "⏎" if char == "\n" else char if char.isprintable() else f"\\x{ord(char):02x}"
        for char in text_of(piece)
    ]
    return _escaped("".join(shown))


def _context(context: Context, *, maximum: float) -> str:
    begin = max(0, context.peak - _AROUND)
    spans = []
    for place in range(begin, min(len(context.tokens), context.peak + _AROUND)):
        value = context.values[place]
        share = value / maximum if maximum > 0 else 0.0
        style = f"background:rgba(255,140,0,{share:.2f})" if value > 0 else ""
        if place == context.peak:
            style += ";text-decoration:underline"
        spans.append(
            f'<span style="{style}" title="{value:.3g}">{_visible(context.tokens[place])}</span>'
        )
    subset = f"{context.subset}, " if context.subset else ""
    where = f"{subset}sequence {context.sequence}, position {context.position}"
    return (
        f'<div title="{_escaped(where)}" style="white-space:pre-wrap;font-family:monospace">'
        f"{context.value:7.2f} {''.join(spans)}</div>"
    )
