"""`load_trained`: the SAE of a trained run's newest checkpoint, with its config."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import AnyPath
from sae_train.checkpoint.checkpoints import StoredCheckpoints
from sae_train.checkpoint.same_run import THRESHOLDS
from sae_train.config.run import Config
from sae_train.config.sae import SaeConfig
from sae_train.model.matryoshka import latent_at
from sae_train.model.sharding import local_mesh, table_of
from sae_train.runs.folder import CHECKPOINTS
from sae_train.step.state import TrainState, abstract_state


@dataclass(frozen=True)
class Trained:
    """A trained SAE as training holds it: for scaled inputs, one row per latent.

    Latents are in their order, in which a prefix of a Matryoshka SAE is the first of them.

    Attributes:
        params: float32 arrays W_enc [F, D], W_dec [F, D], b_dec [D] and what else the architecture
            has (`sae_train.model.sharding.table_of`). The threshold [F] is θ itself, also where
            its logarithm was trained; for BatchTopK it replaces the selection: one for all
            latents, or, of a run's last checkpoint with `sae.threshold_per_latent`, their own.
        input_scale: C of x = x_raw / C.
        target_scale: what a transcoder's target was divided by; for an SAE, C.
        step: optimiser steps done.
        config: the run's config.
        store: the identity of the activation store it was trained on.
    """

    params: Mapping[str, Float[np.ndarray, "..."]]
    input_scale: float
    target_scale: float
    step: int
    config: Config
    store: str


def load_trained(run_folder: AnyPath, *, step: int | None = None) -> Trained:
    """Read the SAE of a run folder: its newest checkpoint, or the one at `step`.

    A newest checkpoint that is damaged is skipped, with a warning, for the one before.

    Raises:
        UserError: the folder has no checkpoint, none at `step`, or only damaged ones.
        DamagedCheckpoint: the one at `step` is damaged.
    """
    checkpoints = StoredCheckpoints(run_folder)
    if not checkpoints.folder.is_dir():
        raise UserError(
            f"{checkpoints.run_folder} has no {CHECKPOINTS}/: give a run folder that `sae train` "
            "wrote"
        )
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" at step {step}"
        raise UserError(
            f"{checkpoints.run_folder} has no checkpoint{wanted}; it has {steps or 'none at all'}"
        )

    def load(at: int) -> tuple[dict[str, Any], Config, TrainState]:
        meta = checkpoints.read_meta(at)
        config = Config.model_validate(meta["config"])
        abstract = abstract_state(
            config.sae,
            d_model=meta["d_model"],
            mesh=local_mesh(),
            momentum=config.train.has_momentum,
        )
        return meta, config, checkpoints.restore(abstract, step=at)

    newest = checkpoints.newest(load) if step is None else (step, load(step))
    assert newest is not None
    chosen, (meta, config, state) = newest
    params = {name: np.array(value) for name, value in state.params.items()}
    if config.sae.architecture == "batch_topk":
        params["threshold"] = _inference_threshold(meta, state, width=config.sae.width)
    elif "threshold" in params and config.sae.threshold.parametrisation == "log":
        params["threshold"] = np.exp(params["threshold"])
    return Trained(
        params=in_order(params, config=config.sae),
        input_scale=meta["input_scale"],
        # Runs from before there were transcoders don't have it.
        target_scale=meta.get("target_scale", meta["input_scale"]),
        step=chosen,
        config=config,
        store=meta["store"],
    )


def in_order(params: Mapping[str, np.ndarray], *, config: SaeConfig) -> dict[str, np.ndarray]:
    """Parameters as training holds them, thresholds included, with latents in their order."""
    if config.matryoshka is None:
        return dict(params)
    order, table = np.argsort(latent_at(config)), table_of(config)
    per_latent = {name for name, tensor in table.items() if tensor.dims[0] == "F"}
    per_latent.add("threshold")
    return {name: one[order] if name in per_latent else one for name, one in params.items()}


def _inference_threshold(
    meta: Mapping[str, Any], state: TrainState, *, width: int
) -> Float[np.ndarray, " F"]:
    if THRESHOLDS in meta:
        return np.frombuffer(base64.b64decode(meta[THRESHOLDS]), "<f4").astype(np.float32)
    return np.full(width, state.selection_threshold, np.float32)
