"""Checkpoints: Orbax, asynchronous, atomic, kept to a policy; and reading a trained SAE back.

Layout: `<run>/checkpoints/<step>/{state,meta}`, `state` being the training state of
`state.TrainState` and `meta` the JSON that says what it belongs to. Orbax writes a checkpoint
under a temporary name and renames it when it is whole, so one that has its name is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Float

from activation_cache.errors import UserError
from activation_cache.storage import disk_errors, make_folder
from sae_train.config import Config, MeshConfig
from sae_train.config_file import differing_fields
from sae_train.sharding import make_mesh
from sae_train.state import TrainState, abstract_state

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
FORMAT_VERSION = 1

# Fields that may change between two starts of one run: they name places and how much is said,
# or, the mesh, where the arithmetic happens.
FREE_FIELDS = (
    "name",
    "output",
    "cache.path",
    "model.weights",
    "text.source",
    "mesh",
    "checkpoint",
    "evaluation",
    "launch",
    "sweep",
    "train.log_every_steps",
    "train.tensorboard",
)


@dataclass(frozen=True)
class Trained:
    """A trained SAE as training holds it: for scaled inputs, weights latent-major.

    Attributes:
        params: float32 arrays W_enc [F, D], W_dec [F, D], b_enc [F], b_dec [D] and threshold [F],
            the threshold plain whatever parametrisation was trained.
        input_scale: C of x = x_raw / C.
        step: optimiser steps done.
        config: the run's config.
        store: the identity of the activation store it was trained on.
    """

    params: Mapping[str, Float[np.ndarray, "..."]]
    input_scale: float
    step: int
    config: Config
    store: str


def checkpoint_meta(
    config: Config, *, input_scale: float, d_model: int, store: str
) -> dict[str, Any]:
    """The JSON beside a state."""
    return {
        "format_version": FORMAT_VERSION,
        "input_scale": input_scale,
        "d_model": d_model,
        "store": store,
        "config": config.model_dump(mode="json"),
    }


class Checkpoints:
    """The checkpoints of one run folder; a context manager that waits for writes on leaving."""

    def __init__(self, run_folder: str | Path, *, keep: int | None = None) -> None:
        self.folder = make_folder(Path(run_folder) / FOLDER).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=True,
                # A kill in mid-write leaves a folder under a temporary name.
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "meta"),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def wait(self) -> None:
        """Return when every save has reached the disk under its final name."""
        with disk_errors(self.folder, doing="save a checkpoint in"):
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, rising."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, step: int, meta: Mapping[str, Any]) -> None:
        """Copy the state off the devices and write it in the background."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        with disk_errors(self.folder, doing="save a checkpoint in"):
            self._manager.save(step, args=arguments)

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON of one checkpoint."""
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments)["meta"]

    def restore(self, abstract: TrainState, *, step: int) -> TrainState:
        """The state of one checkpoint, placed as `abstract` says."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=arguments)["state"]

    def delete_all(self) -> None:
        """Forget every checkpoint: for a run the user wants to start anew."""
        for step in self.steps():
            self._manager.delete(step)


def numeric_differences(a: Config, b: Config) -> list[str]:
    """The dotted keys that give two runs different weights: all but `FREE_FIELDS`."""
    return [
        field
        for field in differing_fields(a, b)
        if not any(field == free or field.startswith(f"{free}.") for free in FREE_FIELDS)
    ]


def refuse_difference(config: Config, meta: Mapping[str, Any], *, store: str, folder: Path) -> None:
    """Raise `UserError` naming the fields in which a checkpoint belongs to another run."""
    earlier = Config.model_validate(meta["config"])
    differing = numeric_differences(earlier, config)
    if differing:
        before, now = earlier.model_dump(), config.model_dump()
        changes = ", ".join(
            f"{key} was {_lookup(before, key)} and is now {_lookup(now, key)}" for key in differing
        )
        raise UserError(
            f"{folder} holds a run with another config: {changes}. Put the old value back to go "
            "on with it, choose another output, or give --fresh to delete it and start anew."
        )
    if meta["store"] != store:
        raise UserError(
            f"{folder} holds a run trained on another activation store "
            f"({meta['store'][:16]}, now {store[:16]}): point cache.path at the old store, choose "
            "another output, or give --fresh to delete the run and start anew."
        )


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def load_trained(run_folder: str | Path, *, step: int | None = None) -> Trained:
    """Read the SAE of a run folder: its last checkpoint, or the one at `step`.

    Raises:
        UserError: the folder has no checkpoint, or none at `step`.
    """
    folder = Path(run_folder)
    if not (folder / FOLDER).is_dir():
        raise UserError(f"{folder} has no {FOLDER}/: give a run folder that `sae train` wrote")
    with Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" at step {step}"
            raise UserError(f"{folder} has no checkpoint{wanted}; it has {steps or 'none at all'}")
        chosen = steps[-1] if step is None else step
        meta = checkpoints.read_meta(chosen)
        config = Config.model_validate(meta["config"])
        mesh = make_mesh(MeshConfig())
        abstract = abstract_state(config.sae, d_model=meta["d_model"], mesh=mesh)
        state = checkpoints.restore(abstract, step=chosen)
    params = {name: np.array(value) for name, value in state.params.items()}
    if config.sae.threshold.parametrisation == "log":
        params["threshold"] = np.exp(params["threshold"])
    return Trained(
        params=params,
        input_scale=meta["input_scale"],
        step=chosen,
        config=config,
        store=meta["store"],
    )
