"""Orbax's checkpoint manager, told where our checkpoints lie and which JSON goes with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors, make_folder
from sae_train.step.state import TrainState


class OrbaxCheckpoints:
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
