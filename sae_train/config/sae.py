"""The section `sae` of the YAML: an SAE or a transcoder, what it reads and what it is.

Numbers come from the Gemma Scope paper (arXiv 2408.05147, section 3) unless said otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from activation_cache.config import (
    FilePath,
    Fraction,
    NonNegative32,
    Positive32,
    PositiveSmallCount,
    Section,
    Site,
    SmallCount,
)
from activation_cache.gemma.taps import Tap
from sae_train.config.matryoshka import MatryoshkaConfig


class ThresholdConfig(Section):
    """How the JumpReLU threshold θ starts and which parameter is trained for it.

    `log` trains log θ as the JumpReLU paper does; `direct` trains θ itself, for runs too short
    for a logarithm to move (docs/numerics.md).
    """

    init: Positive32 = 0.001
    parametrisation: Literal["log", "direct"] = "log"
    learning_rate_multiplier: Positive32 = 1.0


Architecture = Literal["jumprelu", "relu", "gated", "topk", "batch_topk"]
ARCHITECTURE_NAMES: dict[Architecture, str] = {
    "jumprelu": "JumpReLU",
    "relu": "ReLU",
    "gated": "Gated",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
}


def has_unit_decoder(architecture: Architecture) -> bool:
    """Are the decoder's rows kept at unit norm? An L1 weighted by their norms leaves them free."""
    return architecture != "relu"


# ReLU and Gated SAEs add an L1 penalty that is a whole SAE's, and nobody trains them so.
MATRYOSHKA: tuple[Architecture, ...] = ("jumprelu", "topk", "batch_topk")

# The sites of a layer that have the model's width, in the order of the forward pass.
_IN_ORDER: tuple[Site, ...] = ("mlp_in_normalized", "mlp_in", "mlp_out", "resid_post")


class SaeConfig(Section):
    """The sparse autoencoder: what it reads and what it is.

    With a `target`, a later site of the same layer, it is a transcoder: it predicts that site's
    rows. They are divided by the RMS norm of what is read (Gemma Scope, appendix B) or, with
    `target_scale: own`, by their own. `affine_skip` adds a trained matrix from input to output.
    With `subtract_mean` its encoder reads rows less their mean, a constant taken from the data.

    `bandwidth` and `threshold` are JumpReLU's. TopK and BatchTopK have `k`, the active latents per
    row, and `aux_k_coefficient`, the weight of the aux loss that revives dead latents (1/32 in Gao
    et al. 2024, arXiv 2406.04093). With `threshold_per_latent` a BatchTopK SAE is released with a
    threshold for each latent (Gemma Scope 2, appendix B) instead of one for all. `start_from` is a
    released SAE, a path or a Hub address, that training starts from instead of random weights.
    With `matryoshka` prefixes of the latents reconstruct too.
    """

    site: Site
    layer: SmallCount
    target: Site | None = None
    target_scale: Literal["input", "own"] = "input"
    subtract_mean: bool = False
    affine_skip: bool = False
    architecture: Architecture = "jumprelu"
    width: PositiveSmallCount = 16_384
    k: PositiveSmallCount | None = None
    aux_k_coefficient: NonNegative32 = 1 / 32
    threshold_per_latent: bool = False
    revive_coefficient: NonNegative32 = 0.0  # AuxK's weight for a JumpReLU (step/revive.py)
    matryoshka: MatryoshkaConfig | None = None
    start_from: FilePath | None = None
    bandwidth: Positive32 = 0.001
    threshold: ThresholdConfig = ThresholdConfig()
    pre_encoder_bias: bool = True
    # Gemma Scope starts b_dec at zero; a run of a few hundred steps can't carry it to the mean.
    # `auto` takes the mean where it is longer than what is left of the rows without it.
    b_dec_init: Literal["zeros", "mean", "auto"] = "zeros"
    # The power of the rows' inverse covariance that weighs the error (train/whitening.py).
    whitening: Fraction = 0.0

    @property
    def is_transcoder(self) -> bool:
        """Does it predict another site than the one it reads?"""
        return self.target is not None

    @property
    def tap(self) -> Tap:
        """What is read."""
        return Tap(self.site, self.layer)

    @property
    def target_tap(self) -> Tap:
        """What is predicted: of an SAE, what it reads."""
        return Tap(self.target or self.site, self.layer)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What training reads: one tap, of a transcoder two."""
        return tuple(dict.fromkeys((self.tap, self.target_tap)))

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Widths of the prefixes that reconstruct; the last, of a plain SAE the only, is all."""
        return (self.width,) if self.matryoshka is None else self.matryoshka.widths(self.width)

    @property
    def groups(self) -> tuple[tuple[int, float], ...]:
        """Of each prefix whose error counts its width and weight: what the loss is made of."""
        weights = (1.0,) if self.matryoshka is None else self.matryoshka.loss_weights
        pairs = zip(self.prefixes, weights, strict=True)
        return tuple((end, weight) for end, weight in pairs if weight > 0)

    @model_validator(mode="before")
    @classmethod
    def _no_bias_before_a_transcoder(cls, values: Any) -> Any:
        """b_dec is of the target's space, so a transcoder can't subtract it from its input."""
        if isinstance(values, dict) and values.get("target") is not None:
            return {"pre_encoder_bias": False, **values}
        return values

    @model_validator(mode="after")
    def _whole_transcoder(self) -> SaeConfig:
        if self.target is None:
            own = {
                "affine_skip": self.affine_skip,
                "target_scale": self.target_scale != "input",
                "subtract_mean": self.subtract_mean,
            }
            for key in (key for key, is_set in own.items() if is_set):
                raise ValueError(
                    f"sae.{key} is for transcoders, which have a sae.target, the site they "
                    "predict: set sae.target to mlp_out, or leave it out"
                )
            return self
        both = [self.site, self.target]
        if any(site not in _IN_ORDER for site in both) or (
            _IN_ORDER.index(self.target) <= _IN_ORDER.index(self.site)
        ):
            raise ValueError(
                f"a transcoder can't read {self.site} and predict {self.target}: both must be of "
                f"the model's width, and the target come later, of {', '.join(_IN_ORDER)}"
            )
        if self.pre_encoder_bias:
            raise ValueError(
                "sae.pre_encoder_bias must be false with a sae.target: b_dec is subtracted from "
                "what is read, and a transcoder's belongs to what it predicts"
            )
        if self.architecture == "topk" and self.target != "mlp_out":
            raise ValueError(
                f"a topk transcoder can't predict {self.target}: the one format that holds it is "
                "circuit-tracer's, for transcoders that predict mlp_out. Set sae.target to that, "
                "or use batch_topk, which is released as a JumpReLU one"
            )
        return self

    @model_validator(mode="after")
    def _can_be_whitened(self) -> SaeConfig:
        if not self.whitening:
            return self
        if self.is_transcoder or self.site == "embedding":
            what = "transcoders" if self.is_transcoder else "the embedding"
            raise ValueError(
                f"sae.whitening isn't for {what}: it weighs the error of an SAE of a layer's "
                "activations. Leave it out, or set it to 0"
            )
        if self.start_from is not None:
            raise ValueError(
                "sae.whitening can't be combined with sae.start_from, whose decoder has rows of "
                "unit norm without it. Leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _coherent(self) -> SaeConfig:
        if self.start_from is not None and self.architecture in ("gated", "batch_topk"):
            raise ValueError(
                f"a {self.architecture} SAE can't start from sae.start_from, for its release is a "
                "JumpReLU one: set sae.architecture to jumprelu"
            )
        if self.threshold_per_latent and self.architecture != "batch_topk":
            raise ValueError(
                f"sae.threshold_per_latent is for batch_topk, and sae.architecture is "
                f"{self.architecture}: a jumprelu SAE trains a threshold for each latent anyway, "
                "and others have none. Leave it out"
            )
        selects = self.architecture in ("topk", "batch_topk")
        if selects and self.k is None:
            raise ValueError(f"{self.architecture} needs sae.k, the active latents per row: try 64")
        if not selects and self.k is not None:
            raise ValueError(f"sae.k is for topk and batch_topk; {self.architecture} has no k")
        if self.k is not None and self.k > self.width:
            raise ValueError(f"sae.k {self.k} is above sae.width {self.width}: lower it")
        if self.revive_coefficient and self.architecture != "jumprelu":
            instead = "set sae.aux_k_coefficient" if selects else "leave it at 0"
            raise ValueError(
                f"sae.revive_coefficient is for jumprelu, and sae.architecture is "
                f"{self.architecture}: {instead}"
            )
        if self.matryoshka is None:
            return self
        self.matryoshka.widths(self.width)  # raises what is wrong with them
        if self.architecture not in MATRYOSHKA:
            raise ValueError(
                f"sae.matryoshka is for {', '.join(MATRYOSHKA)}, and sae.architecture is "
                f"{self.architecture}: take sae.matryoshka out, or choose one of those"
            )
        return self
