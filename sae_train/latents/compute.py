"""`compute_latents`: what `sae latents` does, from run folders to the files beside them.

Three stages, each of which continues where it was killed: the walk writes the firings of each
shard of text (`walk`); then each part of an SAE's latents is computed from them and from the
weights; at the end the parts are joined. Processes share shards and parts; who computes one can't
be told from its bytes. Everything unfinished lies in one folder, deleted at the end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import (
    AnyPath,
    StoragePath,
    make_folder,
    remove_tree,
    storage_path,
)
from activation_cache.storage.locks import folder_lock
from activation_cache.storage.records import read_record
from sae_train.config.latents import LatentsConfig
from sae_train.evaluate.jobs import Models
from sae_train.latents.directions import Readout
from sae_train.latents.job import (
    SCRATCH,
    LatentsJob,
    groups,
    is_finished,
    latents_job,
    with_names,
)
from sae_train.latents.parts import Parts, opened_parts, others_of
from sae_train.latents.schema import RECORD, TABLES, VOCABULARY, WINDOWS, Record, SaeEntry
from sae_train.latents.walk import Text, walk

logger = logging.getLogger(__name__)

NO_PIECE = "<|outofrange|>"  # SAEDashboard's word for an id that its tokenizer doesn't have


def compute_latents(
    folders: Sequence[AnyPath],
    *,
    settings: LatentsConfig | None = None,
    places: Sequence[str] = (),
    model: LanguageModel | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[StoragePath]:
    """Write the latents of each run beside it (docs/latents.md); those that are current are kept.

    Processes that have joined (`processes.join`) share the work; the main one writes the files.

    Args:
        folders: run folders. Neighbours are looked for in all of them that are of the same place.
        settings: replaces the `latents` section of each run's config.
        places: overrides of each run's config: where its store and its model's weights lie now.
        model: the runs' own model, if it is loaded already.
        stop: asked between batches and parts.

    Returns:
        The folder of each run's latents.

    Raises:
        UserError: a run has no checkpoint; the SAE, the store or the tokenizer isn't the model's;
            no text; another process works on one of the folders; the disk refuses.
        Interrupted: `stop` returned True; the same call continues.
    """
    models = Models(given=model)
    jobs = with_names(
        [
            latents_job(
                storage_path(folder), settings=settings, places=places, models=models, stop=stop
            )
            for folder in folders
        ]
    )
    compute_jobs(jobs, models, stop=stop)
    return [one.folder for one in jobs]


def compute_jobs(
    jobs: Sequence[LatentsJob], models: Models, *, stop: Callable[[], bool] = lambda: False
) -> None:
    """`compute_latents` of jobs, which have names of their own."""
    for group in groups(jobs):
        waiting = [one for one in group if not _is_current(one, jobs)]
        for one in group:
            if one not in waiting:
                logger.info("%s: its latents are current", one.job.folder)
        if waiting:
            _Work(waiting, list(jobs), models, stop).run()


def _is_current(one: LatentsJob, jobs: Sequence[LatentsJob]) -> bool:
    """Would the same files be written? More neighbours than are asked for now do no harm."""
    if not is_finished(one):
        return False
    try:
        record = read_record(one.folder / RECORD, Record)
    except UserError:  # damaged, or of another version
        return False
    wanted = {(other.name, other.job.fingerprints["sae"]) for other in others_of(one, jobs)}
    return (
        record.settings == one.record
        and record.fingerprints == one.job.fingerprints
        and wanted <= {(entry.name, entry.fingerprint) for entry in record.saes}
        and all((one.folder / table.name).is_file() for table in TABLES)
        and all((one.folder / name).is_file() for name in (VOCABULARY, WINDOWS))
    )


@dataclass(frozen=True)
class _Work:
    """One group of SAEs that share a walk.

    Attributes:
        jobs: all SAEs of the command, among which neighbours are looked for.
    """

    group: list[LatentsJob]
    jobs: list[LatentsJob]
    models: Models
    stop: Callable[[], bool]

    def run(self) -> None:
        with contextlib.ExitStack() as locks:
            exchange.run_on_main_and_broadcast("folders of latents", lambda: self._begin(locks))
            text = Text.of(self.group[0])
            exchange.shared(
                "walk",
                lambda: walk(self.group, text, self._model, stop=self.stop),
                finish=lambda: None,
                stop=self.stop,
            )
            with contextlib.ExitStack() as opened:
                parts = [
                    opened.enter_context(
                        opened_parts([one, *others_of(one, self.jobs)], text, lambda: self._readout)
                    )
                    for one in self.group
                ]
                exchange.shared(
                    "latents",
                    lambda: self._compute(parts),
                    finish=lambda: self._finish(parts),
                    stop=self.stop,
                )

    def _begin(self, locks: contextlib.ExitStack) -> None:
        """Take the folders, and clear what a walk of another text or SAE left in them."""
        for one in self.group:
            folder = make_folder(one.folder)
            locks.enter_context(folder_lock(folder))
            for path in folder.iterdir():
                if path.name.startswith(SCRATCH) and path != one.scratch:
                    remove_tree(path)
            make_folder(one.scratch)

    def _model(self) -> LanguageModel:
        return self.models.load(self.group[0].job)

    @functools.cached_property
    def _readout(self) -> Readout:
        return Readout.of(self._model())

    def _compute(self, parts: Sequence[Parts]) -> None:
        """This process's share of the parts."""
        units = [(one, unit) for one in parts for unit in one.units]
        total = sum(len(unit.latents) for _, unit in units)
        with ProgressMeter("latents", total=total, unit="latents") as meter:
            for number, (one, unit) in enumerate(units):
                if exchange.stop_asked(self.stop):
                    raise Interrupted("the latents were stopped; finished parts stay")
                if number % processes.process_count() == processes.process_index():
                    one.compute(unit)
                meter.update(meter.done + len(unit.latents))

    def _finish(self, parts: Sequence[Parts]) -> None:
        """Join the parts of every SAE, write its record, and delete what is unfinished."""
        pieces = self._pieces()
        for one in parts:
            record = one.join(pieces, [_entry(each, one.one) for each in one.saes])
            logger.info(
                "%s: %d latents, %d of them alive on %d tokens",
                one.one.job.folder,
                record.width,
                record.alive,
                record.tokens,
            )

    def _pieces(self) -> list[str]:
        """The string of every row of the embedding; some rows have none."""
        job = self.group[0].job
        tokenizer = self.models.tokenizer(job.model)
        gemma, _ = self.models.config_and_fingerprint(job.model, job.config)
        names = map(tokenizer.backend.id_to_token, range(gemma.vocab_size))
        return [NO_PIECE if name is None else name for name in names]


def _entry(one: LatentsJob, seen_from: LatentsJob) -> SaeEntry:
    folder, own = one.job.folder.absolute(), seen_from.job.folder.absolute()
    is_near = folder.parts[0] == own.parts[0]  # both on the disk, or in the same bucket
    relative = os.path.relpath(str(folder), str(own)) if is_near else str(folder)
    return SaeEntry(
        name=one.name,
        folder=relative,
        width=one.width,
        fingerprint=one.job.fingerprints["sae"],
    )
