"""The training loop: save if due, next batch, every member's step, read the step before's metrics.

Runs that read the same batches train as one cohort (`cohort`): a batch is read and put on the
devices once, and every member steps on it. A single run is a cohort of one.

A run is a pure function of its config and its store: the batch of a step depends on the step
number alone, so a checkpoint needs no data state, a resumed run is bit-identical, and so is one
that trained beside others. Members needn't be at the same step: the stream begins where the one
furthest behind stands, and each joins when its step is reached.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from activation_cache.runtime import exchange
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.files import StoragePath
from activation_cache.store.reader import ActivationReader
from activation_cache.store.store import Store
from sae_train.config.run import Config
from sae_train.end_to_end.reader import OriginalReader
from sae_train.model.sharding import make_mesh, place_batch, rows_here
from sae_train.train.cohort import check_cohort
from sae_train.train.cohort_member import Member
from sae_train.train.cohort_step import CohortStep
from sae_train.train.initial_state import HostBatch
from sae_train.train.opened_store import OpenedStore, opened_store
from sae_train.train.progress import CohortProgress
from sae_train.train.step_log import Diverged, InputClock
from sae_train.train.train_step import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: optimiser steps done and the last row of its metrics."""

    folder: StoragePath
    step: int
    metrics: Mapping[str, Any]


def train(
    config: Config, *, fresh: bool = False, stop: Callable[[], bool] = lambda: False
) -> TrainResult:
    """Train one SAE: a cohort of one, see `train_cohort`."""
    (result,) = train_cohort([config], fresh=fresh, stop=stop)
    return result


def train_cohort(
    configs: Sequence[Config], *, fresh: bool = False, stop: Callable[[], bool] = lambda: False
) -> list[TrainResult]:
    """Train SAEs side by side, each going on from the newest checkpoint of its folder.

    Each ends as it would alone, bit for bit. One that fails (its folder is another run's or in
    use, its loss stops being finite) leaves; the others go on, and its failure is told at the end.

    Args:
        configs: of runs that read the same batches (`cohort.batch_key`).
        fresh: delete what earlier runs left in the folders and start anew.
        stop: asked before every step; when it says yes all is saved and the loop left.

    Several processes that have joined (`processes.join`) train as one: each holds its devices'
    part, all stop at the same step, and only the main one writes configs and metrics.

    Raises:
        Interrupted: `stop` said yes; everything is saved.
        UserError: the store is missing or another one, the mesh doesn't fit, or runs failed; the
            reason of each is in its folder too.
    """
    check_cohort(configs)
    first = configs[0]
    mesh, clock = make_mesh(first.mesh), InputClock()
    with _memory_in_words(len(configs)), ExitStack() as stack:
        opened = stack.enter_context(opened_store(configs, stop=stop))
        store = opened.store
        members = [Member(config, store=store, mesh=mesh, clock=clock) for config in configs]
        for member in members:
            stack.enter_context(member)
        _each(members, lambda member: member.begin(fresh=fresh))
        _prepare([member for member in members if member.at_work and not member.done], opened)
        at_work = [member for member in members if member.at_work]
        if at_work:
            config = at_work[0].config
            originals = _original_reader(at_work, store=store, mesh=mesh)
            readers = [
                stack.enter_context(reader)
                for reader in _readers(
                    config,
                    opened,
                    start_step=min(member.done for member in at_work),
                    rows=rows_here(mesh, batch_size=config.train.batch_size),
                )
            ]
            for member in at_work:
                member.start(anew=fresh)
            progress = CohortProgress(at_work, stack=stack)
            batches = _Batches(opened, readers, originals, mesh=mesh, clock=clock)
            _steps(at_work, batches=batches, mesh=mesh, progress=progress, stop=stop)
        # A run that failed may go on once its mistake is mended, with the rows that are there.
        if all(member.failure is None for member in members):
            opened.finish()
    exchange.barrier("trained")
    exchange.run_on_main_and_broadcast("failures", lambda: _tell_failures(members))
    return [TrainResult(one.folder, one.done, one.step_log.last_row) for one in members]


@contextmanager
def _memory_in_words(count: int) -> Iterator[None]:
    """Say what to do where the devices' memory doesn't hold `count` runs."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        runs, remedy = "this run", "lower sae.width or train.batch_size"
        if count > 1:
            runs = f"{count} runs that train together"
            remedy = f"set sweep.cohort.max_members below {count}"
        raise UserError(
            f"the devices have too little memory for {runs}: {remedy} or raise mesh.model "
            "(`sae plan` says what is needed and what fits). What was saved stays. "
            f"({str(error).splitlines()[0]})"
        ) from error


def _each(
    members: Sequence[Member],
    work: Callable[[Member], Any],
    *,
    errors: type[UserError] = UserError,
) -> None:
    """Do something with every member; one that makes an error of this type fails, alone."""
    for member in members:
        try:
            work(member)
        except errors as error:
            member.fail(error)


def _tell_failures(members: Sequence[Member]) -> None:
    failed = [member for member in members if member.failure is not None]
    if not failed:
        return
    if len(members) == 1:
        raise UserError(f"{failed[0].failure}")
    lines = "\n".join(f"  {member.folder.name}: {member.failure}" for member in failed)
    raise UserError(f"{len(failed)} of {len(members)} runs failed:\n{lines}")


def _prepare(members: Sequence[Member], opened: OpenedStore) -> None:
    """Prepare new runs; every process looks at the same whole batches, each read once."""
    if not members:
        return
    with _whole_batches(members[0].config, opened) as batch:
        read_once = functools.cache(batch)
        _each(members, lambda member: member.prepare(read_once))


@contextmanager
def _whole_batches(config: Config, opened: OpenedStore) -> Iterator[Callable[[int], HostBatch]]:
    """A function from a step to its whole batch, the same in every process."""
    with ExitStack() as stack:
        readers = [stack.enter_context(reader) for reader in _readers(config, opened, read_ahead=1)]

        def batch(step: int) -> HostBatch:
            step = opened.prepare(step, wrap=True)
            return tuple(reader.batch(step) for reader in readers)

        yield batch


def _readers(config: Config, opened: OpenedStore, **options: Any) -> Iterator[ActivationReader]:
    """A reader of what the SAE reads and, of a transcoder, one of what it predicts.

    Row n of every tap of a store is of the same token, and the order depends on no tap: batches
    of the two belong together row by row.
    """
    train = config.train
    for tap in config.sae.taps:
        yield ActivationReader(
            opened.store,
            tap,
            batch_size=train.batch_size,
            seed=train.order_seed,
            may_read=opened.may_read,
            **options,
        )


def _original_reader(
    members: Sequence[Member], *, store: Store, mesh: jax.sharding.Mesh
) -> OriginalReader | None:
    """The language model and its text, if a member will train through it; checked at once."""
    config = next((one.config for one in members if one.config.train.end_to_end), None)
    return None if config is None else OriginalReader(config, store=store, mesh=mesh)


@dataclass(frozen=True)
class _Batches:
    """What steps read: rows of the store, or sequences and what the model makes of them."""

    opened: OpenedStore
    readers: Sequence[ActivationReader]
    originals: OriginalReader | None
    mesh: jax.sharding.Mesh
    clock: InputClock

    def prepare(self, step: int) -> UserError | Interrupted | None:
        """Wait for the rows of a step, if they come and go; returns why they don't come."""
        try:
            with self.clock.waiting():
                self.opened.prepare(step)
        except (UserError, Interrupted) as error:
            return error
        return None

    def give(self, members: Sequence[Member], take_step: CohortStep, *, step: int) -> None:
        """Give the devices a step of members, each with the batch of its phase."""
        through = [one for one in members if one.config.train.is_end_to_end(step=step)]
        plain = [one for one in members if one not in through]
        if plain:
            take_step(plain, self._rows(step))
        if through:
            assert self.originals is not None
            with self.clock.waiting():
                batch = self.originals.batch(step)
            take_step.through(self.originals.model, through, batch)

    def _rows(self, step: int) -> Batch:
        with self.clock.waiting():
            rows = [reader.batch(step) for reader in self.readers]
        batch_size = self.readers[0].batch_size
        span = rows_here(self.mesh, batch_size=batch_size)
        placed = [
            place_batch(own, mesh=self.mesh, batch_size=batch_size, span=span) for own in rows
        ]
        return placed[0] if len(placed) == 1 else (placed[0], placed[1])


def _steps(
    members: Sequence[Member],
    *,
    batches: _Batches,
    mesh: jax.sharding.Mesh,
    progress: CohortProgress,
    stop: Callable[[], bool],
) -> None:
    """The loop: the members furthest behind take the next step, until none wants another."""
    take_step = CohortStep(mesh)
    while at_work := [member for member in members if member.at_work]:
        step = min(member.done for member in at_work)
        turn = [member for member in at_work if member.done == step]
        stopping = exchange.agree_to_stop(stop)
        failure = None if stopping else batches.prepare(step)
        stopping = stopping or failure is not None
        _each([one for one in turn if stopping or one.is_save_due], Member.save, errors=Diverged)
        if stopping:
            for member in at_work:
                member.close()
            going_on = [member for member in at_work if member.at_work]
            if isinstance(failure, UserError):
                raise failure
            if going_on:
                raise _interrupted(going_on, alone=len(members) == 1, step=step)
            return  # the last of them has just failed
        turn = [member for member in turn if member.at_work]
        batches.give(turn, take_step, step=step)
        # Only now, with the next steps dispatched: reading waits for the devices.
        _each(turn, Member.judge, errors=Diverged)
        leaving = [one for one in turn if one.failure is None and not one.at_work]
        _leave(leaving, batches, staying=[one for one in members if one.at_work])
        progress.show(step + 1)


def _leave(members: Sequence[Member], batches: _Batches, *, staying: Sequence[Member]) -> None:
    """Save the last state of those that are done, and only then wait for the disk."""
    selecting = [member for member in members if member.config.sae.threshold_per_latent]
    if selecting:
        if batches.opened.window is not None:  # the rows may take hours, and a stop come meanwhile
            _each(staying, Member.save, errors=Diverged)
        for reader in batches.readers:
            reader.drop()  # what was read ahead may be deleted while earlier rows are read again
        with _whole_batches(selecting[0].config, batches.opened) as batch:
            _each(selecting, lambda member: member.find_thresholds(batch))
    _each([one for one in members if one.failure is None], Member.save, errors=Diverged)
    for member in members:
        member.close()


def _interrupted(members: Sequence[Member], *, alone: bool, step: int) -> Interrupted:
    saved = "everything is saved"
    if alone:
        folder, steps = members[0].folder, members[0].steps
        return Interrupted(f"{folder}: stopped by a signal at step {step} of {steps}; {saved}")
    names = ", ".join(member.folder.name for member in members)
    return Interrupted(f"{names}: stopped by a signal at step {step}; {saved}")
