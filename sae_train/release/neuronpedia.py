"""A latent as Neuronpedia's dashboards have it: the fields, from what `sae latents` found.

Field names, rounding and the groups of activations are those of jbloomAus/SAEDashboard db4839a
(neuronpedia_dashboard.py, neuronpedia_converter.py). What it computes and we don't keep
stays empty: the correlated neurons and latents, which the site shows only where asked to.

Legend: D model width, F latents.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from activation_cache.runtime.errors import UserError
from sae_train.latents.reader import Latents
from sae_train.latents.records import Context, Histogram, Latent, TokenValue

_DECIMALS = 5
_ALIGNED = 3  # coordinates of the decoder's row


@dataclass(frozen=True)
class Source:
    """The SAE on Neuronpedia: a source, one layer of a source set.

    Attributes:
        model: Neuronpedia's name of the model.
        hook: TransformerLens' name of the place that is read, `blocks.12.hook_resid_post`.
        dataset: what the texts are.
    """

    model: str
    set_name: str
    layer: int
    hook: str
    dataset: str

    def __post_init__(self) -> None:
        """Raises `UserError` for names that Neuronpedia refuses."""
        if not re.fullmatch(r"[a-z][a-z0-9.-]{0,30}[a-z0-9]", self.model) or re.search(
            r"--|\.\.", self.model
        ):
            raise UserError(
                f"{self.model!r} is no name of a model on Neuronpedia, which takes 2 to 32 small "
                "letters, digits, '-' and '.', a letter first: give one with --model-id"
            )
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.set_name):
            raise UserError(
                f"{self.set_name!r} is no name of a source set on Neuronpedia, which takes small "
                "letters, digits and single '-': give one with --set-name"
            )

    @property
    def id(self) -> str:
        """`20-gemmascope-res-16k`."""
        return f"{self.layer}-{self.set_name}"


def slug(text: str) -> str:
    """A name in small letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Chosen:
    """Which contexts go along.

    Attributes:
        subsets: of the text; None for all contexts, whatever their subset.
    """

    subsets: frozenset[str] | None = None

    def of(self, latent: Latent) -> list[Context]:
        """The latent's contexts that go along, the greatest values first."""
        return [
            one for one in latent.contexts if self.subsets is None or one.subset in self.subsets
        ]

    @classmethod
    def read(cls, text: str, *, latents: Latents) -> Chosen:
        """From `all`, `none` or names of subsets with commas.

        Raises:
            UserError: the text has no such subset.
        """
        if text == "all":
            return cls()
        names = () if text == "none" else (name.strip() for name in text.split(","))
        wanted = frozenset(names)
        unknown = sorted(wanted - set(latents.record.subsets))
        if unknown:
            has = ", ".join(latents.record.subsets) or "none"
            raise UserError(
                f"--contexts {text}: the text of {latents.name} has no subset {unknown[0]!r}; "
                f"it has {has}. Or write all or none"
            )
        return cls(wanted)


def feature(
    latent: Latent,
    latents: Latents,
    *,
    source: Source,
    chosen: Chosen,
    decoder_D: Float[np.ndarray, " D"] | None,
) -> dict[str, Any]:
    """The feature object of SAEDashboard's batch files.

    Args:
        decoder_D: the latent's decoder row; None leaves the neuron alignment empty.
    """
    record = latents.record
    return {
        "feature_index": latent.index,
        **_alignment(decoder_D),
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        **_logits("neg", latent.plain_bottom_logits),
        **_logits("pos", latent.plain_top_logits),
        "frac_nonzero": _rounded(latent.frequency, 8),
        **_bars("freq_hist_data", latent.histogram),
        **_bars("logits_hist_data", latent.plain_logit_histogram),
        "n_prompts_total": record.sequences,
        "n_tokens_in_prompt": record.sequence_length,
        "dataset": source.dataset,
        "decoder_weights_dist": [],
        "activations": [
            activation(one, latent=latent, tokens=record.tokens) for one in chosen.of(latent)
        ],
        "vector": [],
    }


def activation(context: Context, *, latent: Latent, tokens: int) -> dict[str, Any]:
    """The activation object of SAEDashboard's batch files.

    A context of the greatest values is of the TOP group, whose bounds are -1, the maximum and -1.
    One of an interval has its bounds and the share of all tokens in it; the lowest includes the
    zeros, as SAEDashboard counts.

    Args:
        tokens: all that count.
    """
    if context.interval == 0:
        bounds = (-1.0, latent.maximum, -1.0)
    else:
        number = len(latent.interval_counts)
        low, high = (
            latent.maximum * (number - place) / number
            for place in (context.interval, context.interval - 1)
        )
        inside = latent.interval_counts[context.interval - 1]
        if context.interval == number:
            inside += tokens - latent.count
        bounds = (low, high, inside / tokens)
    return {
        "bin_min": _rounded(bounds[0], 3),
        "bin_max": _rounded(bounds[1], 3),
        "bin_contains": _rounded(bounds[2], 8),
        "tokens": list(context.tokens),
        "values": [_rounded(value) for value in context.values],
        "qualifying_token_index": context.peak,
    }


def _rounded(value: float, decimals: int = _DECIMALS) -> float:
    return round(float(value), decimals)


def _logits(name: str, tokens: Sequence[TokenValue]) -> dict[str, Any]:
    return {
        f"{name}_str": [one.token for one in tokens],
        f"{name}_values": [_rounded(one.value) for one in tokens],
    }


def _bars(name: str, histogram: Histogram | None) -> dict[str, Any]:
    """Bin centres and counts; empty lists of a latent that never fires."""
    edges = () if histogram is None else histogram.edges
    return {
        f"{name}_bar_values": [
            _rounded((low + high) / 2) for low, high in itertools.pairwise(edges)
        ],
        f"{name}_bar_heights": [] if histogram is None else list(histogram.counts),
    }


def _alignment(row_D: Float[np.ndarray, " D"] | None) -> dict[str, Any]:
    """The largest coordinates of the decoder's row, and their share of its L1 norm."""
    indices = [] if row_D is None else np.argsort(-row_D, kind="stable")[:_ALIGNED].tolist()
    norm = 1.0 if row_D is None else float(np.abs(row_D).sum()) or 1.0
    values = [float(row_D[index]) for index in indices] if row_D is not None else []
    return {
        "neuron_alignment_indices": indices,
        "neuron_alignment_values": [_rounded(value) for value in values],
        "neuron_alignment_l1": [_rounded(abs(value) / norm) for value in values],
    }
