"""An SAE at its place in a loaded model, and the text that a reader asks about."""

from __future__ import annotations

from dataclasses import dataclass

from activation_cache.gemma.taps import Tap, check_tap, tap_width
from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime.errors import UserError
from sae_train.inference.hook_names import parse_hook
from sae_train.inference.sae import Sae


@dataclass(frozen=True)
class PlacedSae:
    """An SAE in a model.

    Attributes:
        tap: what it reads.
        target: what it writes: of a transcoder the site it predicts, else `tap`.
    """

    sae: Sae
    tap: Tap
    target: Tap

    @property
    def width(self) -> int:
        """The number of latents."""
        return int(self.sae.W_enc.shape[1])


def place(
    sae: Sae | PlacedSae, model: LanguageModel, *, tap: Tap | None = None, target: Tap | None = None
) -> PlacedSae:
    """An SAE where its own metadata says that it belongs, or at the given taps.

    Raises:
        UserError: the metadata names no place and none is given, or the SAE doesn't fit the model
            there.
    """
    if isinstance(sae, PlacedSae):
        placed = sae
    else:
        tap = tap or _hooked(sae, "hook_name")
        if tap is None:
            raise UserError(
                "the SAE's files don't say which activations it reads: give its place, for example "
                "tap=Tap('resid_post', 12)"
            )
        placed = PlacedSae(sae, tap, target or _hooked(sae, "hook_name_out") or tap)
    for one, width, verb in (
        (placed.tap, placed.sae.W_enc.shape[0], "reads"),
        (placed.target, placed.sae.W_dec.shape[1], "writes"),
    ):
        check_tap(one, model.config)
        there = tap_width(model.config, one.site)
        if there != width:
            raise UserError(
                f"the SAE {verb} vectors of {width}, and {one.name} of {model.source} has {there}: "
                "take the model it was trained on, or one tuned from that"
            )
    return placed


def _hooked(sae: Sae, key: str) -> Tap | None:
    found = parse_hook(sae.metadata.get(key))
    return None if found is None else Tap(*found)


def text_ids(model: LanguageModel, text: str, *, at_most: int | None = None) -> list[int]:
    """A text's ids with BOS in front.

    Args:
        at_most: tokens, BOS included; None is the model's context.

    Raises:
        UserError: the text is empty or longer.
    """
    limit = min(at_most or model.config.context_length, model.config.context_length)
    (ids,) = model.tokenizer.encode_batch([text])
    if not ids:
        raise UserError("the text is empty: give at least one token of text")
    if len(ids) + 1 > limit:
        raise UserError(
            f"the text has {len(ids) + 1} tokens with BOS, and at most {limit} are read: shorten it"
        )
    return [model.tokenizer.bos_id, *ids]


def pieces(model: LanguageModel, ids: list[int] | tuple[int, ...]) -> tuple[str, ...]:
    """The tokenizer's string of each id: `▁the`, `<0x0A>`."""
    return tuple(model.tokenizer.backend.id_to_token(one) or f"<{one}>" for one in ids)


def special_ids(model: LanguageModel) -> tuple[int, ...]:
    """BOS, EOS and padding, on which an SAE isn't trained."""
    tokenizer = model.tokenizer
    return (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def check_latents(indices: list[int], placed: PlacedSae) -> None:
    """Raises `UserError` for an index that the SAE doesn't have."""
    for index in indices:
        if not 0 <= index < placed.width:
            raise UserError(
                f"the SAE has the latents 0 to {placed.width - 1}: there is no latent {index}"
            )
