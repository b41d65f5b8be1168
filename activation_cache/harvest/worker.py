"""One process's share of a harvest: its part of the missing buckets, computed and committed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from activation_cache.config import ModelConfig
from activation_cache.gemma.replicas import Placement
from activation_cache.gemma.taps import EMBEDDING
from activation_cache.harvest.fill_bucket import BucketFiller
from activation_cache.language_model.model import conversion_folder, load_replicas
from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import StoragePath
from activation_cache.storage.records import read_record
from activation_cache.store.manifest import Manifest
from activation_cache.store.store import PLAN_FILE
from activation_cache.store.writer import Bucket, BucketWriter
from activation_cache.text.token_table import TokenTable

logger = logging.getLogger(__name__)

SHARED_DISK_SECONDS = 120.0  # a network file system may hide other machines' files so long


@dataclass(frozen=True)
class Share:
    """What a process needs to know to compute its share.

    Attributes:
        missing: the buckets without a record, the same list in all processes.
        committed: number of rows in the other buckets.
    """

    path: StoragePath
    model: ModelConfig
    plan: Manifest
    table: TokenTable
    missing: list[int]
    committed: int
    placement: Placement

    @property
    def of_embedding(self) -> bool:
        """Are the embedding's rows harvested? Then no other weight is read."""
        return [entry.tap for entry in self.plan.sites] == [EMBEDDING]

    @property
    def converted(self) -> Path:
        """The folder of converted weights."""
        return conversion_folder(self.path)

    def filler(self) -> BucketFiller:
        """Load the model on this process's part of the mesh.

        Raises:
            UserError: the weights aren't those of the first process.
        """
        replicas = load_replicas(
            self.model,
            converted=None if self.of_embedding else self.converted,
            meshes=self.placement.meshes,
            embedding_only=self.of_embedding,
        )
        self._check_weights(replicas[0].fingerprint)
        return BucketFiller(self.plan, self.table, replicas)

    def compute(
        self,
        *,
        stop: Callable[[], bool],
        filler: BucketFiller | None = None,
        shown: bool = True,
    ) -> None:
        """Compute this team's share of the missing buckets, and commit this process's share.

        Args:
            filler: made before, where a process computes again and again; else it is made here.
            shown: draw the progress, or its end.

        Raises:
            UserError: weights or a folder that aren't those of the first process, or what
                `BucketWriter` raises.
            Interrupted: a process was asked to stop.
        """
        placement = self.placement
        self._check_folder()
        own = self.missing[placement.team :: placement.num_teams]
        if not own:
            self._warn_idle()
            return
        filler = filler or self.filler()
        to_make = sum(len(self.plan.bucket_span(bucket)) for bucket in self.missing)
        total, scale = self.committed + to_make, len(self.missing) / len(own)
        meter = ProgressMeter("harvest", total=total, unit="tokens", initial=self.committed)
        with meter if shown else nullcontext(), BucketWriter(self.path, self.plan) as writer:
            finished, mistakes = 0, []
            for turn, bucket in enumerate(own):

                def on_batch(rows: int, before: int = finished) -> None:
                    self._stop_if_asked(stop)
                    # It assumes that the other processes are as far as this one.
                    meter.update(min(total, self.committed + int(scale * (before + rows))))

                if turn % placement.num_members == placement.member:
                    mistakes += self._submitted(writer, filler.fill(bucket, on_batch=on_batch))
                else:
                    filler.help_fill(bucket, on_batch=on_batch)
                finished += len(self.plan.bucket_span(bucket))
            if mistakes:
                raise mistakes[0]

    def _submitted(self, writer: BucketWriter, bucket: Bucket) -> list[UserError]:
        """Submit a bucket; an error in writing the one before is raised, or returned in a list.

        A process that computes alone raises it. A team computes in step, so that its members must
        all stop at the same batch: there the error is published, and returned.
        """
        try:
            writer.submit(bucket)
        except UserError as mistake:
            if self.placement.num_members == 1:
                raise
            exchange.publish_first(exchange.ASKED_KEY, {"mistake": str(mistake)})
            return [mistake]
        return []

    def _stop_if_asked(self, stop: Callable[[], bool]) -> None:
        def asked() -> bool:
            return exchange.stop_asked(stop)

        if self.placement.num_members > 1:
            stopping = exchange.agree_to_stop(asked, scope=f"team {self.placement.team}")
        else:
            stopping = asked()
        if stopping:
            raise Interrupted(f"harvest stopped: the finished buckets of {self.path} are committed")

    def _check_folder(self) -> None:
        """Check that the folder is the one that the first process prepared.

        Raises:
            UserError: process 0's plan doesn't appear there.
        """
        until = time.monotonic() + SHARED_DISK_SECONDS
        while not (self.path / PLAN_FILE).exists():
            if time.monotonic() > until:
                raise UserError(
                    f"process {processes.process_index()} does not find {self.path / PLAN_FILE}, "
                    "which process 0 wrote: all processes of a harvest write to one folder. Put "
                    "cache.path on a disk that all of them share."
                )
            time.sleep(0.5)
        found = read_record(self.path / PLAN_FILE, Manifest)
        assert found == self.plan, "another harvest writes to this folder"

    def _check_weights(self, fingerprint: str) -> None:
        assert self.plan.model is not None
        wanted = self.plan.model.fingerprint
        if fingerprint != wanted:
            raise UserError(
                f"process {processes.process_index()} finds other weights at "
                f"{self.model.weights} (fingerprint {fingerprint[:16]}) than process 0 "
                f"({wanted[:16]}): give every machine the same."
            )

    def _warn_idle(self) -> None:
        if self.missing:
            logger.warning(
                "process %d has nothing to do: %d buckets are left for %d processes or groups of "
                "them. Start fewer, or lower cache.shuffle_rows (%d) for more buckets in a store",
                processes.process_index(),
                len(self.missing),
                self.placement.num_teams,
                self.plan.shuffling.shuffle_rows,
            )
