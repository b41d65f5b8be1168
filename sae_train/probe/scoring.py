"""Scores of SAEs on one data set.

It is read once: one pass of the model gives the activations of all taps, the probe on them serves
all SAEs of a tap, and each SAE's latents are probed.

Legend: N rows of the data set, D width of a tap, k latents of a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime.errors import Interrupted
from sae_train.config.evaluation import ProbeConfig
from sae_train.inference.sae import Sae
from sae_train.probe.activations import last_activations, latents_of, prompt_tokens
from sae_train.probe.datasets import DataSet, Split, split_of
from sae_train.probe.fit import Score, best_latents, many_fits, score_of
from sae_train.probe.record import MEASURES, RAW, DataSetScores, Scores

FIRST_SEED = 42  # sae-probes' seed: the first split is the one it makes

Stop = Callable[[], bool]


def score_on(
    data: DataSet,
    saes: Sequence[tuple[Tap, Sae]],
    settings: ProbeConfig,
    *,
    model: LanguageModel,
    stop: Stop = lambda: False,
) -> list[DataSetScores]:
    """Probe each SAE, and the activations at its tap, on one data set.

    Raises:
        UserError: activations aren't finite.
        Interrupted: `stop`, which is asked between batches and between fits, returned True.
    """
    taps = sorted({tap for tap, _ in saes})
    tokens = prompt_tokens(data.prompts, model.tokenizer, max_tokens=settings.max_tokens)
    acts = last_activations(model, tokens, taps, name=data.name, stop=stop)
    splits = [split_of(data.label_N, seed=FIRST_SEED + at) for at in range(settings.splits)]
    # scikit-learn's solvers run outside of Python's lock.
    with many_fits(), ThreadPoolExecutor() as pool:
        fits = _Fits(data, splits, pool, stop)
        raw = {tap: fits.scores([acts[tap]] * len(splits), "l2") for tap in taps}
        return [fits.of_sae(sae, acts[tap], raw[tap], settings.k) for tap, sae in saes]


@dataclass(frozen=True)
class _Fits:
    """The regressions of one data set."""

    data: DataSet
    splits: Sequence[Split]
    pool: ThreadPoolExecutor
    stop: Stop

    def of_sae(self, sae: Sae, x_ND: np.ndarray, raw: Scores, ks: Sequence[int]) -> DataSetScores:
        """The probes of an SAE; `raw` are those of the activations x."""
        latents_NF = latents_of(sae, x_ND)
        ranked = [
            best_latents(latents_NF[one.train], self.data.label_N[one.train], most=max(ks))
            for one in self.splits
        ]
        columns = [latents_NF[:, best].toarray() for best in ranked]
        probes = {RAW: raw} | {
            str(k): self.scores([one[:, :k] for one in columns], "l1") for k in ks
        }
        return DataSetScores(
            digest=self.data.digest,
            rows=len(self.data.prompts),
            train=len(self.splits[0].train),
            test=len(self.splits[0].test),
            probes=probes,
            latents=[best.tolist() for best in ranked],
        )

    def scores(self, columns: Sequence[np.ndarray], penalty: Literal["l1", "l2"]) -> Scores:
        """Of a probe for each split, on these columns of all rows."""

        def one(at: int) -> Score:
            if self.stop():  # the fits of a data set take minutes
                raise Interrupted(
                    f"stopped in data set {self.data.name}; those before it are saved"
                )
            x, split, y = columns[at], self.splits[at], self.data.label_N
            return score_of(
                x[split.train],
                y[split.train],
                x[split.test],
                y[split.test],
                penalty=penalty,
                seed=FIRST_SEED + at,
            )

        found = list(self.pool.map(one, range(len(self.splits))))
        return Scores(**{name: [getattr(each, name) for each in found] for name in MEASURES})
