"""What was tried to keep latents alive and isn't in the product: other starts, and a tied norm.

`using` puts them into a trainer, for the runs of one block. None of them won (docs/results.md).

    data      decoder rows 0.8 u + 0.2 n: u the direction of a row of the data less their mean, n
              a random one (Anthropic's update of October 2025)
    subspace  random directions within the span of the leading components that have 95 % of the
              variance (after Active Subspace Init, arXiv 2508.16929)
    aligned   after each step encoder rows are divided by <enc, dec>, so that it is 1 (after arXiv
              2605.18629)

W_enc starts as W_dec's transpose in all. Legend: N rows, D model width, F latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np

from sae_train.config.run import Config
from sae_train.step.result import StepResult
from sae_train.train import cohort_member, cohort_step, initial_state, train_step

VARIANTS = ("data", "subspace", "aligned")

_ROWS = 16_384
_SHARE_OF_DATA = 0.8
_VARIANCE = 0.95
# A latent whose encoder has turned from its decoder isn't made ten times as long.
_LEAST_PRODUCT = 0.1


@contextmanager
def using(variants: Mapping[str, str]) -> Iterator[None]:
    """Runs with these outputs train as their variant says."""
    plain = train_step.DenseStep

    class Aligned(plain):  # type: ignore[misc, valid-type]
        def __call__(self, *arguments: Any, **options: Any) -> StepResult:
            result = super().__call__(*arguments, **options)
            if variants.get(self._config.output) != "aligned":
                return result
            params = result.params
            product_F1 = (params["W_enc"] * params["W_dec"]).sum(axis=1, keepdims=True)
            aligned_FD = params["W_enc"] / jnp.maximum(product_F1, _LEAST_PRODUCT)
            return dataclasses.replace(result, params=params | {"W_enc": aligned_FD})

    def start(config: Config, **options: Any) -> Any:
        state = initial_state.prepare_start(config, **options)
        variant = variants.get(config.output)
        if variant not in ("data", "subspace"):
            return state
        count = -(-_ROWS // config.train.batch_size)
        x_ND = np.concatenate([options["batch"](step)[0] for step in range(count)])
        W_FD = _rows(variant, x_ND.astype(np.float64), config=config)
        return initial_state._with_params(state, {"W_dec": W_FD, "W_enc": W_FD})

    own_key = cohort_step.step_key

    def key(config: Config) -> str:
        return own_key(config) + variants.get(config.output, "")

    replaced = [
        (train_step, "DenseStep", Aligned),
        (cohort_member, "prepare_start", start),
        (cohort_step, "step_key", key),
    ]
    before = [getattr(module, name) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(replaced, before, strict=True):
            setattr(module, name, value)


def _rows(variant: str, x_ND: np.ndarray, *, config: Config) -> np.ndarray:
    """Unit rows [F, D] for both weight matrices."""
    rng = np.random.default_rng(config.train.seed)
    x_ND = x_ND - x_ND.mean(axis=0)
    noise_FD = rng.standard_normal((config.sae.width, x_ND.shape[1]))
    if variant == "data":
        chosen = rng.choice(len(x_ND), config.sae.width, replace=len(x_ND) < config.sae.width)
        rows_FD = _SHARE_OF_DATA * _unit(x_ND[chosen]) + (1 - _SHARE_OF_DATA) * _unit(noise_FD)
    else:
        variances, components = np.linalg.eigh(np.cov(x_ND.T))
        share = np.cumsum(variances[::-1]) / variances.sum()
        leading = components[:, ::-1][:, : int(np.searchsorted(share, _VARIANCE)) + 1]
        rows_FD = noise_FD[:, : leading.shape[1]] @ leading.T
    return _unit(rows_FD).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
