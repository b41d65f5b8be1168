"""The result of an evaluation: from sums to numbers, and evaluation.json (docs/evaluation.md).

Legend: S position, F latents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from activation_cache.outlying import NORM_OVER_MEDIAN
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, replacing, write_json
from sae_train.evaluate.sums import LossSums, SaeSums, SiteSums
from sae_train.runs.folder import EVALUATION, labelled
from sae_train.runs.recorded import read_evaluation_record

FORMAT_VERSION = 1
FIRING_COUNTS = "firing_counts.npy"

# Fixed, so that runs can be compared: 1e-7 is less than one token in Gemma Scope's 2 million.
LOG10_EDGES = np.linspace(-7, 0, 29)
_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

BOS_TREATMENT = {
    "aggregates": "BOS, EOS and padding are masked: no mean counts them as input, and no loss "
    "counts a prediction made at one of them or a prediction of padding",
    "headline": "special_left_alone",
    "special_left_alone": "delta_loss, loss_spliced, loss_zero_ablated, loss_recovered: BOS, EOS "
    "and padding keep the model's own activations, for the SAE was never trained on them",
    "all_positions": "the same keys ending in _all_positions: the SAE, or zero, replaces the "
    "activations at every position, BOS included",
}


@dataclass(frozen=True)
class Losses:
    """Next-token losses of five passes over the same text, in nats.

    Attributes:
        base: the model as it is.
        spliced, zero: the SAE's output, or zero, replaces the activations but those of BOS, EOS
            and padding.
        spliced_everywhere, zero_everywhere: it replaces them at every position.
    """

    base: LossSums
    spliced: LossSums
    zero: LossSums
    spliced_everywhere: LossSums
    zero_everywhere: LossSums


@dataclass(frozen=True)
class Evaluation:
    """What evaluation.json holds, key by key; None where a number isn't finite.

    Attributes:
        mse: squared error summed over D, per token, in the activations' own units.
        variance: mean squared distance of the activations from their mean, so fvu = mse/variance.
        fvu_median_token, fvu_without_outlying: what outlying tokens don't flatter, as `fvus` has
            it.
        outlying: which tokens were outlying, how many, and the share of the variance they hold.
        target: the site a transcoder predicts, whose mse and variance these are; None for an SAE.
        fingerprints: of the SAE, the model and the tokens measured; with `settings` they decide
            whether an evaluation is still current.
        model: `model.weights` of the model it was measured in.
        label: names an extra evaluation, in another model or on other text; None for the run's own.
        precision: how products of float32 weights were made, of the SAE and of the model.
    """

    format_version: int
    name: str
    step: int
    l0: float
    fvu: float | None
    mse: float | None
    variance: float | None
    alive_fraction: float
    loss: float | None
    loss_spliced: float | None
    loss_zero_ablated: float | None
    delta_loss: float | None
    loss_recovered: float | None
    loss_spliced_all_positions: float | None
    loss_zero_ablated_all_positions: float | None
    delta_loss_all_positions: float | None
    loss_recovered_all_positions: float | None
    bos: dict[str, str]
    sequences: int
    sequence_length: int
    tokens: int
    loss_sequences: int
    loss_tokens: int
    frequency_histogram: dict[str, Any]
    by_position: dict[str, list[Any]]
    site: str
    layer: int
    width: int
    settings: dict[str, Any]
    fingerprints: dict[str, str]
    target: str | None = None
    model: str = ""
    label: str | None = None
    precision: str = "float32"
    fvu_median_token: float | None = None
    fvu_without_outlying: float | None = None
    outlying: dict[str, Any] = dataclasses.field(default_factory=dict)
    importance_uniformity: float | None = None
    importance_sequences: int = 0
    importance_tokens: int = 0
    by_subset: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    by_precision: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    by_prefix: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        def shown(value: float | None) -> str:
            return "not finite" if value is None else f"{value:.4f}"

        losses = (
            f"delta loss {shown(self.delta_loss)} "
            f"(loss {shown(self.loss)}, zero-ablated {shown(self.loss_zero_ablated)}), "
            if self.loss_sequences
            else ""
        )
        return (
            f"L0 {self.l0:.1f}, FVU {shown(self.fvu)} (median token "
            f"{shown(self.fvu_median_token)}, without outlying tokens "
            f"{shown(self.fvu_without_outlying)}), {losses}alive {self.alive_fraction:.1%}"
        )


def measures(
    *, site: SiteSums, sae: SaeSums, losses: Losses, subsets: Sequence[str] = ()
) -> dict[str, Any]:
    """The measured keys of an `Evaluation`.

    FVU = Σ|x - x̂|² / Σ|x - mean|² over the counted tokens (Gemma Scope, arXiv 2408.05147, section
    4.1). By position both sums run over one position, and the mean is still that of all positions.
    """
    tokens = int(site.count_S.sum())
    return {
        **headline(site=site, sae=sae, base=losses.base, spliced=losses.spliced),
        "mse": _finite(float(sae.squared_error_S.sum()) / tokens),
        "variance": _finite(float(site.spread_S.sum()) / tokens),
        "outlying": {
            "norm_over_median": NORM_OVER_MEDIAN,
            "above_norm": _finite(site.largest),
            "tokens": tokens - int(site.usual_count_H[-1]),
            "share_of_variance": _finite(site.outlying_share),
        },
        "alive_fraction": float((sae.fired_F > 0).mean()),
        **_loss_measures(losses.base, losses.spliced, losses.zero, suffix=""),
        **_loss_measures(
            losses.base,
            losses.spliced_everywhere,
            losses.zero_everywhere,
            suffix="_all_positions",
        ),
        "tokens": tokens,
        "loss_tokens": int(losses.base.count_S.sum()),
        "frequency_histogram": frequency_histogram(sae.fired_F, tokens=tokens),
        "by_position": _by_position(site=site, sae=sae, losses=losses),
        "by_subset": _by_subset(subsets, site=site, sae=sae, losses=losses),
    }


def headline(*, site: SiteSums, sae: SaeSums, base: LossSums, spliced: LossSums) -> dict[str, Any]:
    """L0, FVU and losses: the numbers by which precisions are compared too."""
    return {
        "l0": float(sae.active_S.sum() / site.count_S.sum()),
        **fvus(site=site, sae=sae),
        "loss": _finite(base.mean),
        "loss_spliced": _finite(spliced.mean),
        "delta_loss": _finite(spliced.mean - base.mean),
    }


def fvus(*, site: SiteSums, sae: SaeSums) -> dict[str, float | None]:
    """FVU, the same without outlying tokens, and the median token's.

    Without outlying tokens both sums and the mean are of the others. The median, over all counted
    tokens, of |x - x̂|² is divided by the others' mean |x - mean|² too: outlying tokens would
    raise it, and so lower the quotient of every other token.
    """
    tokens, usual = int(site.count_S.sum()), float(site.usual_spread_H[-1])
    median = sae.median_error(tokens) * float(site.usual_count_H[-1])
    return {
        "fvu": _ratio(float(sae.squared_error_S.sum()), float(site.spread_S.sum())),
        "fvu_median_token": _ratio(median, usual),
        "fvu_without_outlying": _ratio(float(sae.usual_error_H[-1]), usual),
    }


def prefix_row(
    first: int,
    *,
    site: SiteSums,
    whole: SaeSums,
    sums: SaeSums,
    base: LossSums,
    spliced: LossSums,
) -> dict[str, Any]:
    """The numbers of an SAE's first latents, as if there were no others.

    Args:
        whole: of the whole SAE, whose latents fire as they would alone.
        sums, spliced: of what the first latents reconstruct.
    """
    fired = whole.fired_F[:first]
    return {
        "latents": first,
        "l0": float(fired.sum() / site.count_S.sum()),
        **fvus(site=site, sae=sums),
        "loss_spliced": _finite(spliced.mean),
        "delta_loss": _finite(spliced.mean - base.mean),
        "alive_fraction": float((fired > 0).mean()),
    }


def _by_subset(
    names: Sequence[str], *, site: SiteSums, sae: SaeSums, losses: Losses
) -> dict[str, dict[str, Any]]:
    """L0, FVU and losses of each subset's sequences, FVU about the subset's own mean."""
    rows = {}
    for number, name in enumerate(names):
        tokens, predicted = int(site.count_G[number]), int(losses.base.count_G[number])
        base, spliced = losses.base.sum_G[number], losses.spliced.sum_G[number]
        rows[name] = {
            "tokens": tokens,
            "l0": _ratio(float(sae.active_G[number]), tokens),
            "fvu": _ratio(float(sae.squared_error_G[number]), float(site.spread_G[number])),
            "fvu_without_outlying": _ratio(
                float(sae.usual_error_H[number]), float(site.usual_spread_H[number])
            ),
            "loss_tokens": predicted,
            "loss": _ratio(float(base), predicted),
            "delta_loss": _ratio(float(spliced - base), predicted),
        }
    return rows


def _loss_measures(
    base: LossSums, spliced: LossSums, zero: LossSums, *, suffix: str
) -> dict[str, float | None]:
    return {
        f"loss_spliced{suffix}": _finite(spliced.mean),
        f"loss_zero_ablated{suffix}": _finite(zero.mean),
        f"delta_loss{suffix}": _finite(spliced.mean - base.mean),
        f"loss_recovered{suffix}": _ratio(zero.mean - spliced.mean, zero.mean - base.mean),
    }


def frequency_histogram(fired_F: Int[np.ndarray, " F"], *, tokens: int) -> dict[str, Any]:
    """How often latents fire: a histogram of log10 frequencies, quantiles and the maximum.

    A frequency is the fraction of tokens on which a latent is active. Latents that never fired are
    counted apart, as `never_fired`.
    """
    frequency_F = fired_F / tokens
    alive = frequency_F[fired_F > 0]
    log10 = np.clip(np.log10(alive), LOG10_EDGES[0], LOG10_EDGES[-1])
    counts, _ = np.histogram(log10, bins=LOG10_EDGES)
    return {
        "log10_edges": LOG10_EDGES.tolist(),
        "counts": counts.tolist(),
        "never_fired": int((fired_F == 0).sum()),
        "quantiles": {str(q): float(np.quantile(frequency_F, q)) for q in _QUANTILES},
        "max": float(frequency_F.max()),
        "fraction_above_0.1": float((frequency_F > 0.1).mean()),
        "fraction_above_0.01": float((frequency_F > 0.01).mean()),
    }


def _by_position(*, site: SiteSums, sae: SaeSums, losses: Losses) -> dict[str, list[Any]]:
    """Curves by position of the token read; the last position predicts nothing."""
    base, spliced = losses.base, losses.spliced
    return {
        "position": list(range(len(site.count_S))),
        "tokens": site.count_S.tolist(),
        "l0": _quotients(sae.active_S, site.count_S),
        "fvu": _quotients(sae.squared_error_S, site.spread_S),
        "loss_tokens": [*base.count_S.tolist(), 0],
        "loss": [*_quotients(base.sum_S, base.count_S), None],
        "delta_loss": [*_quotients(spliced.sum_S - base.sum_S, base.count_S), None],
    }


def _quotients(above: Iterable[Any], below: Iterable[Any]) -> list[float | None]:
    return [_ratio(float(a), float(b)) for a, b in zip(above, below, strict=True)]


def _ratio(above: float, below: float) -> float | None:
    return _finite(above / below) if below != 0 else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def write_evaluation(
    evaluation: Evaluation, folder: StoragePath, *, fired_F: Int[np.ndarray, " F"]
) -> None:
    """Write firing_counts.npy, then evaluation.json with its hash, both named with the label."""
    path = folder / labelled(FIRING_COUNTS, evaluation.label)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, fired_F.astype(np.int64))
    fingerprints = evaluation.fingerprints | {"firing_counts": _sha256(path)}
    written = dataclasses.replace(evaluation, fingerprints=fingerprints)
    write_json(folder / labelled(EVALUATION, evaluation.label), dataclasses.asdict(written))


def read_evaluation(folder: StoragePath, label: str | None = None) -> Evaluation | None:
    """The evaluation in a run's folder; None if there is none or another version wrote it."""
    path = folder / labelled(EVALUATION, label)
    if not path.is_file():
        return None
    try:
        return Evaluation(**read_evaluation_record(path))
    except TypeError:  # other keys
        return None


def read_frequencies(folder: StoragePath, evaluation: Evaluation) -> Float[np.ndarray, " F"]:
    """The fraction of tokens on which each latent fired.

    Raises:
        UserError: firing_counts.npy is missing or wasn't written with this `evaluation`.
    """
    path = folder / labelled(FIRING_COUNTS, evaluation.label)
    if not path.is_file() or _sha256(path) != evaluation.fingerprints.get("firing_counts"):
        raise UserError(
            f"{path} is missing or doesn't belong to "
            f"{folder / labelled(EVALUATION, evaluation.label)}: evaluate again"
        )
    return np.load(io.BytesIO(path.read_bytes())) / evaluation.tokens


def _sha256(path: StoragePath) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
