"""Checkpoints: Orbax, asynchronous, atomic, kept to a policy; and reading a trained SAE back.

Layout: `<run>/checkpoints/<step>/{state,meta}`, `state` being the training state of
`state.TrainState` and `meta` the JSON that says what it belongs to. Orbax writes a checkpoint
under a temporary name and renames it when it is whole, so one that has its name was complete; in
a bucket `checkpoint_arrays` writes the meta last, so one that has its meta was complete. What
happens to it later is found out by checksums: `meta` has one of itself and one of each array.

Saved by any number of processes on any mesh, a checkpoint restores on any other.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Float

from activation_cache.runtime import processes
from activation_cache.runtime.errors import StorageError, UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import AnyPath, Place, disk_errors, make_folder, place
from sae_train.checkpoint.arrays import ARRAYS, META, BucketCheckpoints, cutting_of, read_state
from sae_train.checkpoint.checksum import DamagedCheckpoint, seal_meta, state_checksums, unseal_meta
from sae_train.config.file import differing_fields
from sae_train.config.run import Config
from sae_train.model.sharding import local_mesh
from sae_train.step.state import TrainState, abstract_state

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
FORMAT_VERSION = 4

Loaded = TypeVar("Loaded")

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
    "train.stacked",
    "train.log_every_steps",
    "train.tensorboard",
)


@dataclass(frozen=True)
class Trained:
    """A trained SAE as training holds it: for scaled inputs, weights latent-major.

    Attributes:
        params: float32 arrays W_enc [F, D], W_dec [F, D], b_dec [D] and what else the architecture
            has (`sharding.table_of`), the threshold [F] plain whatever parametrisation was
            trained; of BatchTopK the threshold that takes the place of the selection.
        input_scale: C of x = x_raw / C.
        target_scale: what a transcoder's target was divided by; of an SAE, C.
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


def checkpoint_meta(
    config: Config, *, input_scale: float, target_scale: float, d_model: int, store: str
) -> dict[str, Any]:
    """The JSON beside a state."""
    return {
        "format_version": FORMAT_VERSION,
        "input_scale": input_scale,
        "target_scale": target_scale,
        "d_model": d_model,
        "store": store,
        "config": config.model_dump(mode="json"),
    }


class _OrbaxCheckpoints:
    """The checkpoints under one folder of a disk."""

    def __init__(self, folder: Path, *, keep: int | None, read_only: bool) -> None:
        self.folder = folder
        if not read_only:
            make_folder(folder)
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=True,
                # A kill in mid-write leaves a folder under a temporary name.
                cleanup_tmp_directories=True,
                read_only=read_only,
                # Several folders may be written at once; processes meet by these words.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=hashlib.sha256(str(self.folder).encode()).hexdigest()
                ),
            ),
            item_names=("state", "meta"),
        )

    def close(self) -> None:
        self._manager.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say it in words when the disk refuses, or has gone away under a save."""
        try:
            with disk_errors(self.folder, doing="save a checkpoint in"):
                yield
        except UserError:
            raise
        except Exception as error:  # whatever Orbax makes of files that vanish
            if self.folder.exists():
                raise
            raise UserError(
                f"cannot save a checkpoint in {self.folder}: that folder is gone. Bring it back "
                "(is its disk mounted?) and give the same command again: it goes on from what is "
                "in there."
            ) from error

    def wait(self) -> None:
        with self._told():
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        return list(self._manager.all_steps())

    def save(self, step: int, state: TrainState, sealed: Mapping[str, Any]) -> None:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(sealed))
        )
        with self._told():
            self._manager.save(step, args=arguments)

    def delete(self, step: int) -> None:
        self._manager.delete(step)


class Checkpoints:
    """The checkpoints of one run folder; a context manager that waits for writes on leaving.

    With several processes, all call everything that writes, in the same order.
    """

    def __init__(
        self, run_folder: AnyPath, *, keep: int | None = None, read_only: bool = False
    ) -> None:
        """Open them; `read_only` disturbs nobody who may be writing there."""
        self.folder = (place(run_folder) / FOLDER).absolute()
        self._files: BucketCheckpoints | _OrbaxCheckpoints
        if isinstance(self.folder, BucketPath):
            self._files = BucketCheckpoints(self.folder, keep=keep, read_only=read_only)
        else:
            self._files = _OrbaxCheckpoints(self.folder, keep=keep, read_only=read_only)

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
            self._files.close()

    def wait(self) -> None:
        """Return when every save has reached the disk under its final name."""
        self._files.wait()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, rising."""
        return sorted(self._files.steps())

    def save(self, state: TrainState, *, step: int, meta: Mapping[str, Any]) -> None:
        """Copy the state off the devices and write it in the background."""
        if isinstance(self.folder, BucketPath):
            meta = {**meta, ARRAYS: cutting_of(state)}
        self._files.save(step, state, seal_meta(meta, checksums=state_checksums(state)))

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON of one checkpoint.

        Raises:
            DamagedCheckpoint: it isn't what was written.
            UserError: another version of this software wrote it, in another format.
        """
        file = self.folder / str(step) / META
        try:
            meta = unseal_meta(file.read_bytes())
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{file} is missing") from error
        # No damage, which a run passes over and deletes: what is there is whole.
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{file} has checkpoint format {meta['format_version']}, and this version of the "
                f"software reads {FORMAT_VERSION}: go on with the version that wrote it, or start "
                "the run anew with --fresh (nothing was changed)"
            )
        return meta

    def restore(self, abstract: TrainState, *, step: int) -> TrainState:
        """The state of one checkpoint, placed as `abstract` says, and checked.

        Each process reads what its devices hold; none waits for another while it reads.

        Raises:
            DamagedCheckpoint: it can't be read, or isn't what was written.
        """
        meta = self.read_meta(step)
        expected = meta["checksums"]
        problem: str | None = None
        state: Any = None
        try:
            state = _read(self.folder / str(step), abstract, meta)
        except (PermissionError, MemoryError, StorageError):
            raise
        except Exception as error:  # whatever Orbax makes of missing and torn files
            problem = f"it can't be read ({_innermost(error)})"
        # All or none: the checksums of arrays that lie on all processes need all of them.
        problem = next(filter(None, processes.gathered("restored", problem)), None)
        if problem is None:
            found = state_checksums(state)
            wrong = [name for name in expected if found.get(name) != expected[name]]
            problem = f"{', '.join(wrong)} failed the checksum" if wrong else None
        if problem is not None:
            raise DamagedCheckpoint(f"{self.folder / str(step)}: {problem}")
        return state

    def newest(
        self, load: Callable[[int], Loaded], *, drop_damaged: bool = False
    ) -> tuple[int, Loaded] | None:
        """What `load` makes of the newest checkpoint that isn't damaged, and its step.

        Those that `load` finds damaged are told of in a warning and passed over;
        `drop_damaged` deletes them, so that the same step can be saved again.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        damaged: list[str] = []
        for step in reversed(steps):
            try:
                loaded = load(step)
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                logger.warning("skipping the damaged checkpoint at step %d: %s", step, error)
                continue
            for newer in [other for other in steps if other > step and drop_damaged]:
                self._files.delete(newer)
            return step, loaded
        if damaged:
            raise UserError(
                f"every checkpoint of {self.folder.parent} is damaged: {'; '.join(damaged)}. "
                "Restore one from a copy, or give --fresh to delete them and start anew."
            )
        return None

    def delete_all(self) -> None:
        """Forget every checkpoint: for a run the user wants to start anew."""
        for step in self.steps():
            self._files.delete(step)


def numeric_differences(a: Config, b: Config) -> list[str]:
    """The dotted keys that give two runs different weights: all but `FREE_FIELDS`."""
    free = [*FREE_FIELDS]
    if a.train.order_seed == b.train.order_seed:
        free.append("train.data_seed")  # null and train.seed's value say the same
    return [
        field
        for field in differing_fields(a, b)
        if not any(field == one or field.startswith(f"{one}.") for one in free)
    ]


def refuse_difference(
    config: Config, meta: Mapping[str, Any], *, store: str, folder: Place
) -> None:
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


def _read(folder: Place, abstract: TrainState, meta: Mapping[str, Any]) -> TrainState:
    if ARRAYS in meta:
        return read_state(folder, abstract, meta)
    if isinstance(folder, BucketPath):
        raise UserError("it was saved on a disk: copy the run's folder to a disk to read it")
    arguments = ocp.args.StandardRestore(abstract)
    return ocp.StandardCheckpointHandler().restore(folder / "state", args=arguments)


def _innermost(error: BaseException) -> str:
    """The words of the error that others were wrapped around."""
    while inner := (error.exceptions[0] if isinstance(error, ExceptionGroup) else error.__cause__):
        error = inner
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def load_trained(run_folder: AnyPath, *, step: int | None = None) -> Trained:
    """Read the SAE of a run folder: its last checkpoint, or the one at `step`.

    A damaged last checkpoint is passed over, with a warning, for the one before.

    Raises:
        UserError: the folder has no checkpoint, none at `step`, or damaged ones only.
        DamagedCheckpoint: the one at `step` is.
    """
    folder = place(run_folder)
    if not (folder / FOLDER).is_dir():
        raise UserError(f"{folder} has no {FOLDER}/: give a run folder that `sae train` wrote")
    with Checkpoints(folder, read_only=True) as checkpoints:

        def load(at: int) -> tuple[dict[str, Any], Config, TrainState]:
            meta = checkpoints.read_meta(at)
            config = Config.model_validate(meta["config"])
            abstract = abstract_state(config.sae, d_model=meta["d_model"], mesh=local_mesh())
            return meta, config, checkpoints.restore(abstract, step=at)

        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" at step {step}"
            raise UserError(f"{folder} has no checkpoint{wanted}; it has {steps or 'none at all'}")
        newest = checkpoints.newest(load) if step is None else (step, load(step))
        assert newest is not None
        chosen, (meta, config, state) = newest
    params = {name: np.array(value) for name, value in state.params.items()}
    if config.sae.architecture == "batch_topk":
        theta = np.float32(state.selection_threshold)
        params["threshold"] = np.full_like(params["b_enc"], theta)
    elif "threshold" in params and config.sae.threshold.parametrisation == "log":
        params["threshold"] = np.exp(params["threshold"])
    return Trained(
        params=params,
        input_scale=meta["input_scale"],
        # Runs from before there were transcoders say nothing of it.
        target_scale=meta.get("target_scale", meta["input_scale"]),
        step=chosen,
        config=config,
        store=meta["store"],
    )
