"""`steer`: how the model goes on when latents are set to other values, beside how it goes on.

The stream at the tap (of a transcoder: at the site it predicts) changes by c · d of each chosen
latent, d its decoder row. `add`: c is the strength. `clamp`: c = strength - f, f the latent's value
there, so that it becomes the strength and what the SAE doesn't reconstruct stays. `zero` is a clamp
at 0. Every token is changed but BOS, EOS and padding, on which the SAE isn't trained.

Both continuations come from one program: the plain one has c = 0, which changes no bit.

Legend: B rows, S positions, D model width, K chosen latents (filled up to a power of two).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from activation_cache.gemma.sampling import Continuation, Sampling
from activation_cache.gemma.taps import Splice, Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime.errors import UserError
from sae_train.inference.sae import Sae
from sae_train.live.placed import (
    PlacedSae,
    check_latents,
    pieces,
    place,
    special_ids,
    text_ids,
)

Mode = Literal["add", "clamp", "zero"]
# What to do to each latent: a `Mode`, and how strongly, in units of the latent's values.
Changes = Mapping[int, tuple[str, float]]


@dataclass(frozen=True)
class Steered:
    """Two continuations of one text, drawn with the same seed.

    Attributes:
        plain, steered: the text after the prompt, without and with the changes.
        plain_tokens, steered_tokens: the same as tokens.
        plain_sampled, steered_sampled: their ids and log-probabilities.
    """

    text: str
    plain: str
    steered: str
    plain_tokens: tuple[str, ...]
    steered_tokens: tuple[str, ...]
    plain_sampled: Continuation
    steered_sampled: Continuation

    def _repr_html_(self) -> str:
        """What a notebook shows: both side by side."""
        import html

        cells = "".join(
            f'<td style="vertical-align:top;text-align:left;white-space:pre-wrap">'
            f"<b>{title}</b><br>{html.escape(self.text)}<mark>{html.escape(after)}</mark></td>"
            for title, after in (("plain", self.plain), ("steered", self.steered))
        )
        return f"<table><tr>{cells}</tr></table>"


def steer(
    model: LanguageModel,
    sae: Sae | PlacedSae,
    text: str,
    changes: Changes,
    *,
    new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int = 0,
    tap: Tap | None = None,
    at_most: int | None = None,
    listener: Callable[[str, str], None] = lambda name, so_far: None,
) -> Steered:
    """Continue a text with latents changed, and without.

    Args:
        sae: as for `explore`.
        changes: by latent, `("add", 40.0)`, `("clamp", 40.0)` or `("zero", 0.0)`.
        at_most: tokens of the text that are read; None is the model's context.
        listener: called with "plain" or "steered" and the continuation so far, every few tokens.

    Raises:
        UserError: an empty or too long text, a latent that isn't there, an unknown mode, a strength
            that isn't finite, or the SAE doesn't fit the model.
    """
    placed = place(sae, model, tap=tap)
    check_latents(list(changes), placed)
    for latent, (mode, strength) in changes.items():
        if mode not in get_args(Mode) or not np.isfinite(strength):
            raise UserError(
                f"latent {latent} is to be changed by {mode!r} with strength {strength}: choose "
                "add, clamp or zero, and a finite strength"
            )
    ids = text_ids(model, text, at_most=at_most)
    how = Sampling(
        new_tokens=new_tokens,
        temperature=temperature,
        seed=seed,
        stop_ids=(model.tokenizer.eos_id,),
        unspliced_ids=special_ids(model),
    )

    def go_on(name: str, chosen: Changes) -> Continuation:
        def listen(so_far: list[Continuation]) -> None:
            listener(name, model.tokenizer.decode(so_far[0].tokens))

        splice = _splice(placed, list(changes), chosen)
        return model.sample([ids], how, splices=(splice,), listener=listen)[0]

    plain, steered = go_on("plain", {}), go_on("steered", changes)
    return Steered(
        text=text,
        plain=model.tokenizer.decode(plain.tokens),
        steered=model.tokenizer.decode(steered.tokens),
        plain_tokens=pieces(model, plain.tokens),
        steered_tokens=pieces(model, steered.tokens),
        plain_sampled=plain,
        steered_sampled=steered,
    )


def _splice(placed: PlacedSae, latents: list[int], changes: Changes) -> Splice:
    """The changes to `latents`; those that `changes` doesn't name stay as they are."""
    size = 1 << max(0, len(latents) - 1).bit_length()
    chosen = np.array(latents + [0] * (size - len(latents)), np.int32)
    added, is_set, value = np.zeros(size, np.float32), np.zeros(size, bool), np.zeros(size)
    for place_, latent in enumerate(latents):
        mode, strength = changes.get(latent, ("add", 0.0))
        added[place_] = strength if mode == "add" else 0.0
        is_set[place_] = mode != "add"
        value[place_] = strength if mode == "clamp" else 0.0
    sae = placed.sae
    few = dataclasses.replace(
        sae,
        W_enc=jnp.asarray(sae.W_enc)[:, chosen],
        W_dec=jnp.asarray(sae.W_dec)[chosen],
        b_enc=jnp.asarray(sae.b_enc)[chosen],
        b_dec=jnp.zeros_like(sae.b_dec),
        threshold=jnp.asarray(sae.threshold)[chosen],
        W_skip=None,
        k=None,
    )
    # Of TopK, whether a latent is active depends on all the others.
    whole = None if sae.k is None else (sae, jnp.asarray(chosen))
    arguments = (
        few,
        whole,
        jnp.asarray(added),
        jnp.asarray(is_set),
        jnp.asarray(value, jnp.float32),
    )
    if placed.target == placed.tap:
        return Splice(placed.tap, _steer_sae, arguments)
    return Splice(placed.target, _steer_transcoder, arguments, reads=placed.tap)


def _steer_sae(acts_BSD: Float[Array, "B S D"], arguments: Any) -> Float[Array, "B S D"]:
    return _steer_transcoder(acts_BSD, arguments, read=acts_BSD)


def _steer_transcoder(
    acts_BSD: Float[Array, "B S D"], arguments: Any, *, read: Float[Array, "B S D_in"]
) -> Float[Array, "B S D"]:
    few, whole, added_K, is_set_K, value_K = arguments
    x_BSD = read.astype(jnp.float32)
    if whole is None:
        f_BSK = few.encode(x_BSD)
    else:
        sae, chosen_K = whole
        f_BSK = sae.encode(x_BSD)[..., chosen_K]
    f_BSK = f_BSK.astype(jnp.float32)
    added_BSK, is_set, value = (one[None, None, :] for one in (added_K, is_set_K, value_K))
    change_BSK = jnp.where(is_set, value - f_BSK, added_BSK)
    change_BSD = few.decode(change_BSK).astype(jnp.float32)
    return (acts_BSD.astype(jnp.float32) + change_BSD).astype(acts_BSD.dtype)
