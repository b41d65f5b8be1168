"""`check`: does a released SAE do what its files declare, and if not, what was it trained on?

About a thousand tokens of text give its L0 and FVU at the site that its files name. Where they
don't fit, the usual mistakes are tried: another tensor of the layer, before or after a norm or its
gain, a neighbouring layer, a scale that wasn't folded in, text without BOS. A wrong tensor costs
most of the variance, so the best FVU tells.

Legend: S position, N tokens that count, D width of what is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from activation_cache.config import Site
from activation_cache.gemma.forward import MLP
from activation_cache.gemma.taps import Tap, check_tap, tap_width
from activation_cache.language_model.model import LanguageModel
from activation_cache.outlying import largest_usual_norm
from activation_cache.runtime.errors import UserError
from sae_train.inference.hook_names import parse_hook
from sae_train.inference.sae import HostOrDevice, Sae

SEQUENCE = 128  # tokens, with BOS
FIRST_COUNTED = 8  # without BOS the first token's activations are unlike all others

# Other text and other tokens than those of the declared L0 move it, but not that far.
L0_FACTOR = 1.5
_MOST_FVU = 0.5
_FVU_FACTOR, _FVU_SLACK = 2.0, 0.05

_SITES: tuple[Site, ...] = tuple(site for site in get_args(Site) if site != "rows")


@dataclass(frozen=True)
class Declared:
    """What the files of an SAE say: where it reads (and predicts), its L0 and FVU if at all."""

    tap: Tap
    target: Tap
    l0: float | None = None
    fvu: float | None = None


@dataclass(frozen=True)
class Measured:
    """L0 and FVU of an SAE on one reading of what it was trained on.

    FVU without outlying tokens and the median token's are those of `result.fvus`.
    """

    words: str
    l0: float
    fvu: float
    fvu_without_outlying: float
    fvu_median_token: float


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        found: at the declared place; None if the model has vectors of another width there.
        problems: what doesn't fit, in words; none if all does.
        others: the other readings, the best FVU first; tried only where something doesn't fit.
    """

    declared: Declared
    found: Measured | None
    problems: tuple[str, ...]
    others: tuple[Measured, ...]


def declared_of(sae: Sae, *, tap: Tap | None, l0: float | None, fvu: float | None) -> Declared:
    """What an SAE's metadata says; the arguments stand where it says nothing.

    Raises:
        UserError: nothing says where it reads.
    """
    metadata = sae.metadata
    named = _tap_of(metadata, "") or tap
    if named is None:
        raise UserError(
            "the SAE's files don't say where it reads: name the site and the layer, as in "
            "--tap resid_post.12"
        )
    target = named
    if sae.is_transcoder:
        target = _tap_of(metadata, "_out") or Tap("mlp_out", named.layer)
    stated = metadata.get("l0", l0)
    return Declared(named, target, None if stated is None else float(stated), fvu)


def _tap_of(metadata: Mapping[str, object], ending: str) -> Tap | None:
    for key in ("hook_name", "hf_hook_name"):
        if parsed := parse_hook(metadata.get(f"{key}{ending}")):
            return Tap(*parsed)
    return None


def check(sae: Sae, declared: Declared, *, model: LanguageModel, text: str, tokens: int) -> Check:
    """Measure an SAE where its files place it and, if that doesn't fit, elsewhere.

    Args:
        tokens: how many are read, in sequences of `SEQUENCE`.

    Raises:
        UserError: the text is too short, the model has no such layer, or none of its sites has
            the SAE's width.
    """
    check_tap(declared.tap, model.config)
    check_tap(declared.target, model.config)
    ids = model.tokenizer.encode_batch([text])[0]
    count = -(-tokens // SEQUENCE)
    needed = count * (SEQUENCE - 1)
    if len(ids) < needed:
        raise UserError(
            f"the text has {len(ids)} tokens and {needed} are needed: give a longer one, or lower "
            "--tokens"
        )
    pieces = np.array(ids[:needed], np.int32).reshape(count, SEQUENCE - 1)
    with_bos = np.pad(pieces, ((0, 0), (1, 0)), constant_values=model.tokenizer.bos_id)
    tensors = _Tensors(model, declared, sae).of(with_bos)
    if not tensors.inputs or not tensors.targets:
        raise UserError(
            f"the SAE reads vectors of {sae.W_enc.shape[0]}, and no site of {model.source} near "
            f"layer {declared.tap.layer} has that width: it is of another model"
        )
    found = None
    names = declared.tap.name, declared.target.name
    if names[0] in tensors.inputs and names[1] in tensors.targets:
        found = _measured(sae, "as declared", tensors.inputs[names[0]], tensors.targets[names[1]])
    problems = tuple(_problems(declared, found))
    if not problems:
        return Check(declared, found, (), ())
    tried = list(_readings(sae, tensors, ending=""))
    tried += _readings(sae, _Tensors(model, declared, sae).of(pieces), ending=", without BOS")
    own = names[0] if not sae.is_transcoder else f"{names[0]} to {names[1]}"
    others = sorted((one for one in tried if one.words != own), key=lambda one: one.fvu)
    return Check(declared, found, problems, tuple(others))


def _problems(declared: Declared, found: Measured | None) -> Iterator[str]:
    if found is None:
        yield f"the SAE's width isn't that of {declared.tap.name}"
        return
    if declared.l0 is not None and not (
        declared.l0 / L0_FACTOR <= found.l0 <= declared.l0 * L0_FACTOR
    ):
        yield f"L0 is {found.l0:.1f}, and {declared.l0:g} is declared"
    if declared.fvu is not None and not found.fvu <= _FVU_FACTOR * declared.fvu + _FVU_SLACK:
        yield f"FVU is {found.fvu:.3f}, and {declared.fvu:g} is declared"
    elif not found.fvu <= _MOST_FVU:  # a NaN too
        yield f"FVU is {found.fvu:.3f}: half of the variance or more is missed"


@dataclass(frozen=True)
class _Read:
    """By its name, each tensor that an SAE may read, and each that it may predict."""

    inputs: dict[str, Float[np.ndarray, "N D"]]
    targets: dict[str, Float[np.ndarray, "N D"]]


@dataclass(frozen=True)
class _Tensors:
    """What of the model comes into question for an SAE."""

    model: LanguageModel
    declared: Declared
    sae: Sae

    def of(self, tokens_BS: np.ndarray) -> _Read:
        """All tensors of the SAE's widths at and next to its layer, on the tokens that count."""
        layer, config = self.declared.tap.layer, self.model.config
        near = [n for n in (layer, layer - 1, layer + 1) if 0 <= n < config.num_layers]
        taps = {Tap(site, layer) for site in _SITES if site != "embedding" or layer == 0}
        taps |= {self.declared.tap, self.declared.target, Tap("mlp_in", layer)}
        taps |= {
            Tap(self.declared.tap.site, n) for n in near if self.declared.tap.site != "embedding"
        }
        taps |= {Tap("resid_post", n) for n in near if n < layer}
        acts = self.model.activations(tokens_BS, sorted(taps))
        # As many tokens with BOS as without: those before it count in neither.
        first = FIRST_COUNTED + tokens_BS.shape[1] - (SEQUENCE - 1)
        found = {tap.name: acts[tap] for tap in sorted(taps)}
        found |= self._around_the_mlp(acts, layer)
        rows = {
            name: np.asarray(x[:, first:].astype(jnp.float32)).reshape(-1, x.shape[-1])
            for name, x in found.items()
        }
        width_in, width_out = self.sae.W_enc.shape[0], self.sae.W_dec.shape[1]
        return _Read(
            {name: x for name, x in rows.items() if x.shape[1] == width_in},
            {name: x for name, x in rows.items() if x.shape[1] == width_out},
        )

    def _around_the_mlp(self, acts: Mapping[Tap, Array], layer: int) -> dict[str, Array]:
        """The MLP's output before the norm that follows it, and after it without its gain."""
        params = self.model.params[f"layers_{layer}"]
        config = self.model.config
        assert tap_width(config, "mlp_out") == config.d_model
        mlp = MLP(config, self.model.precision, self.model.mesh)
        raw = mlp.apply({"params": params["mlp"]}, acts[Tap("mlp_in", layer)])
        gain_D = 1.0 + jnp.asarray(params["post_mlp_norm"]["scale"]).astype(jnp.float32)
        normed = acts[Tap("mlp_out", layer)].astype(jnp.float32) / gain_D[None, None]
        name = f"mlp_out.{layer}"
        return {
            f"{name} before its norm": jnp.asarray(raw),
            f"{name} before its norm's gain": normed,
        }


def _readings(sae: Sae, read: _Read, *, ending: str) -> Iterator[Measured]:
    """Every tensor (of a transcoder every pair), at every scale."""
    pairs: Sequence[tuple[str, str]] = [(name, name) for name in read.inputs]
    if sae.is_transcoder:
        pairs = [
            (one, two) for one, two in itertools.product(read.inputs, read.targets) if one != two
        ]
    for (one, two), (words, scaled) in itertools.product(pairs, _SCALES.items()):
        name = f"{one} to {two}" if sae.is_transcoder else one
        x, y = scaled(read.inputs[one]), scaled(read.targets[two])
        yield _measured(sae, f"{name}{words}{ending}", x, y)


def _over_rms_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x, dtype=np.float64).sum(axis=1).mean()).astype(np.float32)


def _at_mean_norm(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x.astype(np.float64), axis=1).mean()
    return (x * (np.sqrt(x.shape[1]) / norm)).astype(np.float32)


def _each_at_norm(x: np.ndarray) -> np.ndarray:
    norm_N1 = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return (x * (np.sqrt(x.shape[1]) / np.maximum(norm_N1, 1e-30))).astype(np.float32)


# Scales that training divides by, which should have been folded into the weights.
_SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda x: x,
    ", scaled to a mean squared norm of 1": _over_rms_norm,
    ", scaled to a mean norm of sqrt(D)": _at_mean_norm,
    ", each row scaled to a norm of sqrt(D)": _each_at_norm,
}


def _measured(sae: Sae, words: str, x: np.ndarray, y: np.ndarray) -> Measured:
    l0, error, spread = _l0_and_errors(sae, jnp.asarray(x), jnp.asarray(y))
    error_N, norm_N = np.asarray(_error_of_each(sae, x, y)), np.linalg.norm(y, axis=1)
    usual_N = norm_N <= largest_usual_norm(norm_N)
    variance = max(float(np.square(y[usual_N] - y[usual_N].mean(axis=0)).sum(axis=1).mean()), 1e-30)
    return Measured(
        words,
        float(l0),
        float(error) / max(float(spread), 1e-30),
        float(error_N[usual_N].mean()) / variance,
        float(np.median(error_N)) / variance,
    )


@jax.jit
def _l0_and_errors(
    sae: Sae, x_ND: Float[Array, "N D"], y_ND: Float[Array, "N E"]
) -> tuple[Array, Array, Array]:
    latents_NF = sae.encode(x_ND)
    predicted_ND = sae.predict(x_ND, latents=latents_NF).astype(jnp.float32)
    l0 = (latents_NF > 0).sum(axis=1, dtype=jnp.float32).mean()
    error = jnp.square(y_ND - predicted_ND).sum()
    return l0, error, jnp.square(y_ND - y_ND.mean(axis=0, keepdims=True)).sum()


@jax.jit
def _error_of_each(
    sae: Sae, x_ND: Float[HostOrDevice, "N D"], y_ND: Float[HostOrDevice, "N E"]
) -> Float[Array, " N"]:
    predicted_ND = sae.predict(x_ND, latents=sae.encode(x_ND)).astype(jnp.float32)
    return jnp.square(y_ND - predicted_ND).sum(axis=1)
