"""`explore`: which latents fire on which token of a text, and what they do to one prediction.

A latent's effect on a prediction is that of Gemma Scope, appendix C.3 (`evaluate.importance`):
y = f · (W_decᵀ ∇L), L the mean-centred logit of the predicted token and ∇L its gradient with
respect to the activations that the SAE writes. Here L is one prediction, so a latent at an earlier
token has an effect too. Its share is y over the sum of |y| of all latents at all tokens.

Legend: S positions (padded), D model width, F latents, C rows of a chunk, K latents that are kept.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime.errors import UserError
from sae_train.evaluate.importance import latent_effects
from sae_train.evaluate.sums import in_chunks
from sae_train.inference.sae import Sae
from sae_train.latents.records import text_of
from sae_train.live.placed import (
    PlacedSae,
    check_latents,
    pieces,
    place,
    special_ids,
    text_ids,
)

_LIKELY = 10  # next tokens that are named
_SHORTEST_BUCKET = 16


@dataclass(frozen=True)
class Firing:
    """A latent that fires on a token.

    Attributes:
        position: of the token; BOS is 0.
        share: of the predicted token's logit, between -1 and 1.
    """

    latent: int
    position: int
    value: float
    share: float


@dataclass(frozen=True)
class Prediction:
    """A next token: of the text, or what the model finds likely."""

    id: int
    token: str
    probability: float


@dataclass(frozen=True)
class Explored:
    """A text seen by an SAE.

    Attributes:
        tokens: as the tokenizer has them, BOS first.
        active: how many latents fire on each; 0 where the SAE isn't used (BOS, EOS, padding).
        strongest: for each token its strongest latents, by value.
        overall: the strongest latents of the text, each at the token where it fires most.
        effective: the latents with the greatest |share| of the prediction, with that share over
            all tokens, at the token where it is greatest.
        position: whose next token's logit the shares are of.
        predicted: that token.
        likely: what the model finds likely there.
    """

    placed: PlacedSae = field(repr=False)
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    active: tuple[int, ...]
    strongest: tuple[tuple[Firing, ...], ...]
    overall: tuple[Firing, ...]
    effective: tuple[Firing, ...]
    position: int
    predicted: Prediction
    likely: tuple[Prediction, ...]
    _read_SD: Float[Array, "S D"] = field(repr=False)
    _used_S: Bool[np.ndarray, " S"] = field(repr=False)

    def values(self, latents: Sequence[int]) -> Float[np.ndarray, "S K"]:
        """The values of any latents at every token; raises `UserError` for one that isn't there."""
        check_latents(list(latents), self.placed)
        chosen = np.array(latents, np.int32)
        values_SK = np.asarray(_chosen_values(self.placed.sae, self._read_SD, chosen))
        return np.where(self._used_S[:, None], values_SK, 0)[: len(self.ids)]

    def _repr_html_(self) -> str:
        """What a notebook shows: the text, shaded by its strongest latent, and the list of them."""
        best = max((one.value for one in self.overall), default=1.0) or 1.0
        spans = []
        for token, firings in zip(self.tokens, self.strongest, strict=True):
            top = firings[0].value if firings else 0.0
            title = ", ".join(f"{one.latent}: {one.value:.3g}" for one in firings)
            spans.append(
                f'<span style="background:rgba(255,140,0,{top / best:.2f})" title="{title}">'
                f"{html.escape(text_of(token))}</span>"
            )
        rows = "".join(
            f"<li>latent {one.latent}: {one.value:.3g} on "
            f"<code>{html.escape(text_of(self.tokens[one.position]))}</code>, "
            f"share {one.share:+.1%}</li>"
            for one in self.overall
        )
        return f'<div style="white-space:pre-wrap">{"".join(spans)}</div><ol>{rows}</ol>'


def explore(
    model: LanguageModel,
    sae: Sae | PlacedSae,
    text: str,
    *,
    strongest: int = 10,
    position: int | None = None,
    at_most: int | None = None,
    tap: Tap | None = None,
) -> Explored:
    """The latents that fire on a text.

    Args:
        sae: at the place its metadata names, or at `tap`, or as `placed.place` gave it.
        strongest: how many latents to name for each token and for the text.
        position: the shares are of the logit of the token after this one (BOS is 0); None is the
            last, and the token the one that the model finds most likely.
        at_most: tokens that are read; None is the model's context.

    Raises:
        UserError: the text is empty or too long, there is no such position, or the SAE doesn't
            fit the model.
    """
    placed = place(sae, model, tap=tap)
    ids = text_ids(model, text, at_most=at_most)
    last = len(ids) - 1
    position = last if position is None else position
    if not 0 <= position <= last:
        raise UserError(f"the text has the positions 0 to {last}: there is no position {position}")
    likely, logits_V = _likely(model, ids[: position + 1])
    predicted = ids[position + 1] if position < last else likely[0].id
    tokens_1S = _padded([*ids, predicted])
    gradient_SD = _gradient(model, placed, tokens_1S, position)
    acts = model.activations(tokens_1S, (placed.tap,))
    ids_S = np.pad(np.array(ids), (0, tokens_1S.shape[1] - len(ids)), constant_values=-1)
    used_S = (ids_S >= 0) & ~np.isin(ids_S, special_ids(model))
    seen = _see(
        placed.sae,
        acts[placed.tap][0].astype(jnp.float32),
        gradient_SD,
        jnp.asarray(used_S),
        count=min(strongest, placed.width),
    )
    chance = Prediction(
        predicted, pieces(model, [predicted])[0], float(_softmax(logits_V)[predicted])
    )
    return Explored(
        placed=placed,
        ids=tuple(ids),
        tokens=pieces(model, ids),
        active=tuple(np.asarray(seen["active_S"])[: len(ids)].tolist()),
        strongest=tuple(_of_token(seen, at) for at in range(len(ids))),
        overall=_of_text(seen, "overall"),
        effective=_of_text(seen, "effective"),
        position=position,
        predicted=chance,
        likely=likely,
        _read_SD=acts[placed.tap][0].astype(jnp.float32),
        _used_S=used_S,
    )


def _padded(ids: list[int]) -> Int[np.ndarray, "1 S"]:
    """One row, padded to a power of two: a program serves many lengths."""
    size = max(_SHORTEST_BUCKET, 1 << (len(ids) - 1).bit_length())
    return np.array([ids + [0] * (size - len(ids))], np.int32)


def _likely(
    model: LanguageModel, ids: list[int]
) -> tuple[tuple[Prediction, ...], Float[np.ndarray, " V"]]:
    logits_V = np.asarray(model.next_logits(_padded(ids), np.array([len(ids) - 1])))[0]
    chances = _softmax(logits_V)
    best = np.argsort(-logits_V, kind="stable")[:_LIKELY].tolist()
    named = zip(best, pieces(model, best), strict=True)
    return tuple(Prediction(one, token, float(chances[one])) for one, token in named), logits_V


def _softmax(logits_V: Float[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    raised = np.exp(logits_V.astype(np.float64) - logits_V.max())
    return raised / raised.sum()


def _gradient(
    model: LanguageModel, placed: PlacedSae, tokens_1S: Int[np.ndarray, "1 S"], position: int
) -> Float[Array, "S D"]:
    counted = np.zeros((1, tokens_1S.shape[1] - 1), bool)
    counted[0, position] = True
    return model.gradient(tokens_1S, placed.target, counted)[0].astype(jnp.float32)


@jax.jit
def _chosen_values(
    sae: Sae, read_SD: Float[Array, "S D"], chosen_K: Int[Array | np.ndarray, " K"]
) -> Float[Array, "S K"]:
    def one_chunk(chunk: tuple[Array]) -> Array:
        return sae.encode(chunk[0]).astype(jnp.float32)[:, chosen_K]

    chunks = jax.lax.map(one_chunk, in_chunks(sae, read_SD))
    return chunks.reshape(-1, chunks.shape[-1])[: len(read_SD)]


def _see(
    sae: Sae,
    read_SD: Float[Array, "S D"],
    gradient_SD: Float[Array, "S D"],
    used_S: Bool[Array, " S"],
    *,
    count: int,
) -> dict[str, Any]:
    found = _seen(sae, read_SD, gradient_SD, used_S, count)
    return {name: np.asarray(value) for name, value in found.items()}


@jax.jit(static_argnums=4)
def _seen(
    sae: Sae, read_SD: Array, gradient_SD: Array, used_S: Array, count: int
) -> dict[str, Array]:
    """The strongest latents of each token and of the text; shares are y over the sum of |y|.

    Latents of one chunk of tokens are in memory at a time, and four numbers of each latent.
    """
    F = sae.W_enc.shape[1]
    place_S = jnp.arange(len(read_SD), dtype=jnp.int32)
    chunks = in_chunks(sae, read_SD, gradient_SD, used_S, place_S)

    def one_chunk(sums: dict[str, Array], chunk: tuple[Array, ...]) -> tuple[Any, Any]:
        x_CD, gradient_CD, used_C, place_C = chunk
        f_CF = jnp.where(used_C[:, None], sae.encode(x_CD).astype(jnp.float32), 0.0)
        y_CF = latent_effects(sae, f_CF, gradient_CD)
        value_CK, latent_CK = jax.lax.top_k(f_CF, count)
        effect_CK = jnp.take_along_axis(y_CF, latent_CK, axis=1)

        def greatest(name: str, size_CF: Array) -> dict[str, Array]:
            at_F, size_F = size_CF.argmax(axis=0), size_CF.max(axis=0)
            better_F = size_F > sums[f"{name}_size"]
            return {
                f"{name}_size": jnp.where(better_F, size_F, sums[f"{name}_size"]),
                f"{name}_place": jnp.where(better_F, place_C[at_F], sums[f"{name}_place"]),
            }

        sums = {
            "effect": sums["effect"] + y_CF.sum(axis=0),
            "total": sums["total"] + jnp.abs(y_CF).sum(),
            **greatest("value", f_CF),
            **greatest("share", jnp.abs(y_CF)),
        }
        return sums, (value_CK, latent_CK, effect_CK, (f_CF > 0).sum(axis=1, dtype=jnp.int32))

    zeros, places = jnp.zeros(F), jnp.zeros(F, jnp.int32)
    start = {"effect": zeros, "total": jnp.zeros(()), "value_size": zeros, "value_place": places}
    start |= {"share_size": zeros, "share_place": places}
    sums, per_token = jax.lax.scan(one_chunk, start, chunks)
    value, latent, effect, active = (
        one.reshape(-1, *one.shape[2:])[: len(read_SD)] for one in per_token
    )
    total = jnp.maximum(sums["total"], jnp.finfo(jnp.float32).tiny)
    _, overall = jax.lax.top_k(sums["value_size"], count)
    _, effective = jax.lax.top_k(jnp.abs(sums["effect"]), count)
    return {
        "value_SK": value,
        "latent_SK": latent,
        "share_SK": effect / total,
        "active_S": active,
        "overall": overall,
        "overall_position": sums["value_place"][overall],
        "overall_value": sums["value_size"][overall],
        "overall_share": sums["effect"][overall] / total,
        "effective": effective,
        "effective_position": sums["share_place"][effective],
        "effective_value": sums["value_size"][effective],
        "effective_share": sums["effect"][effective] / total,
    }


def _of_token(seen: dict[str, Any], at: int) -> tuple[Firing, ...]:
    rows = zip(seen["latent_SK"][at], seen["value_SK"][at], seen["share_SK"][at], strict=True)
    return tuple(
        Firing(int(latent), at, float(value), float(share))
        for latent, value, share in rows
        if value > 0
    )


def _of_text(seen: dict[str, Any], name: str) -> tuple[Firing, ...]:
    columns = (seen[f"{name}{end}"] for end in ("", "_position", "_value", "_share"))
    return tuple(
        Firing(int(latent), int(position), float(value), float(share))
        for latent, position, value, share in zip(*columns, strict=True)
        if value > 0
    )
