"""A threshold for each latent of a trained BatchTopK SAE, at which it fires as often as it did.

BatchTopK selects within a batch, and at inference there is none. Gemma Scope 2 (appendix B) gives
each latent the quantile of its pre-activations that reproduces how often it is selected:

    c_f = rows in which latent f is among the k·B largest of their batch
    θ_f = a value between the c_f-th and the next largest pre-activation of latent f

Both are exact over the rows looked at, those of the run's last batches, with its last weights.

Legend: B rows of a batch, D model width, F latents, P pairs of a row and a latent.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_train.config.run import Config
from sae_train.model.forward import Params
from sae_train.train.initial_state import LOOKED_AT, HostBatch, pre_activations_of_all

# A latent that fires once in 1,000 rows is seen 66 times, and its frequency found to an eighth.
ROWS = 65_536

# Pairs below this share of the single threshold aren't kept: few of them are selected.
_KEPT_ABOVE = 0.8


@dataclass(frozen=True)
class _Pairs:
    """The larger pre-activations of some rows: of which latent, their values, were they selected?

    Attributes:
        smallest: the smallest value selected in each batch.
    """

    latents: Int[np.ndarray, " P"]
    values: Float[np.ndarray, " P"]
    selected: Bool[np.ndarray, " P"]
    smallest: Float[np.ndarray, " batches"]


def latent_thresholds(
    config: Config,
    *,
    params: Params,
    single: float,
    batch: Callable[[int], HostBatch],
    input_scale: float,
) -> Float[np.ndarray, " F"]:
    """θ of each latent, for scaled rows; of one that is never selected, above all that was seen.

    Args:
        params: after the last step, on their devices.
        single: the mean of the smallest values selected in training, where the search begins.
        batch: gives the whole batch of a step, the same in every process.
        input_scale: what rows are divided by before the SAE reads them.
    """
    train = config.train
    count = min(train.steps, -(-ROWS // train.batch_size))
    steps = range(train.steps - count, train.steps)
    above = _KEPT_ABOVE * single
    while True:
        rows = (batch(step)[0].astype(np.float32) / np.float32(input_scale) for step in steps)
        pairs = _larger_pairs(config, params=params, batches=rows, above=above)
        if pairs is not None:
            return quantiles(pairs, width=config.sae.width, above=above)
        above = above / 2 if above > 1e-6 * single else 0.0


def _larger_pairs(
    config: Config, *, params: Params, batches: Iterator[np.ndarray], above: float
) -> _Pairs | None:
    """All pairs above a value that is > 0; None if that is above the smallest value selected."""
    assert config.sae.k is not None
    parts, smallest = [], []
    for x_BD in batches:
        latents, values = _pairs_of_batch(config, params=params, x_BD=x_BD, above=above)
        wanted = config.sae.k * len(x_BD)
        if len(values) < wanted and above > 0:
            return None
        # With fewer positive values than wanted, training selects all of them.
        least = np.partition(values, -wanted)[-wanted] if len(values) >= wanted else 0.0
        parts.append((latents, values, values >= least))
        smallest.append(least)
    latents, values, selected = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Pairs(latents, values, selected, np.asarray(smallest, np.float32))


def _pairs_of_batch(
    config: Config, *, params: Params, x_BD: Float[np.ndarray, "B D"], above: float
) -> tuple[Int[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Latents and values of the pairs above a value, rows in turn."""
    chunk = max(1, min(len(x_BD), LOOKED_AT // config.sae.width))
    # The last chunk overlaps the one before, so that all have one shape and compile once.
    starts = [*range(0, len(x_BD) - chunk, chunk), len(x_BD) - chunk]
    latents, values, begun = [], [], 0
    for start in starts:
        pre_CF = pre_activations_of_all(params, x_BD[start : start + chunk], config=config.sae)
        pre_CF = pre_CF[begun - start :]
        begun = start + chunk
        rows, columns = np.nonzero(pre_CF > above)
        latents.append(columns.astype(np.int32))
        values.append(pre_CF[rows, columns])
    return np.concatenate(latents), np.concatenate(values)


def quantiles(pairs: _Pairs, *, width: int, above: float) -> Float[np.ndarray, " F"]:
    """For each latent a θ that as many of its values exceed as were selected."""
    order = np.lexsort((-pairs.values, pairs.latents))
    values = pairs.values[order]
    first_F = np.searchsorted(pairs.latents[order], np.arange(width + 1))
    selected_F = np.bincount(pairs.latents[pairs.selected], minlength=width)
    threshold_F = np.full(width, pairs.smallest.mean(dtype=np.float64))
    for latent in np.flatnonzero(np.diff(first_F)):
        own = values[first_F[latent] : first_F[latent + 1]]
        count = selected_F[latent]
        if count == 0:
            threshold_F[latent] = max(threshold_F[latent], own[0])
        else:
            below = own[count] if count < len(own) else above
            threshold_F[latent] = (float(own[count - 1]) + float(below)) / 2
    return threshold_F.astype(np.float32)


def as_text(threshold_F: Float[np.ndarray, " F"]) -> str:
    """The thresholds' bytes as text, for the JSON beside a checkpoint."""
    return base64.b64encode(threshold_F.astype("<f4").tobytes()).decode()
