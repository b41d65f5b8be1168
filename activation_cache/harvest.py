"""`sae harvest`: the model reads the tokens, and the activations of all taps become a store.

What is checked comes first and is cheap; then the text is tokenised; then the plan is written,
which ties the folder to this config; then buckets are computed while the ones before them are
written. The manifest, written last, makes it a store.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tensorstore as ts

from activation_cache.config import CacheConfig, ModelConfig, TextConfig
from activation_cache.errors import Interrupted, UserError
from activation_cache.fill import BucketFiller
from activation_cache.gemma_config import GemmaConfig
from activation_cache.layout import bucket_rows, remove_stray_files
from activation_cache.manifest import (
    FORMAT_VERSION,
    Manifest,
    ModelEntry,
    ShufflingEntry,
    SiteEntry,
    first_difference,
    read_record,
    write_record,
)
from activation_cache.model import conversion_folder, load_model
from activation_cache.order import ALGORITHM
from activation_cache.progress import ProgressMeter
from activation_cache.storage import disk_errors, folder_lock, write_text
from activation_cache.store import (
    MANIFEST_FILE,
    PLAN_FILE,
    PROVENANCE,
    TOKENS_FOLDER,
    Store,
    open_store,
)
from activation_cache.taps import resolve_taps, tap_width
from activation_cache.token_table import TokenTable
from activation_cache.tokenizer import load_tokenizer
from activation_cache.tokens import describe_text, prepare_tokens
from activation_cache.weights import read_gemma_config, weight_fingerprint
from activation_cache.writer import BUCKETS_IN_MEMORY, BucketWriter, read_commits

logger = logging.getLogger(__name__)


def harvest(
    *,
    model: ModelConfig,
    text: TextConfig,
    cache: CacheConfig,
    resolved_config_yaml: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Make the activation store at `cache.path`, or go on with one that was begun.

    A finished store of this config is left as it is. `stop` is asked before each forward pass.

    Raises:
        UserError: anything the user can mend, such as a store of another config in the folder,
            too little text, or a full disk. What was committed before stays.
        Interrupted: `stop` turned true; every finished bucket is committed.
    """
    job = _Harvest(Path(cache.path), model, text, cache, stop)
    # A finished store is only read, so it may be shared, on a read-only disk.
    if not (job.path / MANIFEST_FILE).exists():
        with folder_lock(job.path):
            if not (job.path / MANIFEST_FILE).exists():
                return job.run(resolved_config_yaml)
    return job.already_finished()


@dataclass(frozen=True)
class _Harvest:
    """One call of `harvest`."""

    path: Path
    model: ModelConfig
    text: TextConfig
    cache: CacheConfig
    stop: Callable[[], bool]

    def already_finished(self) -> Manifest:
        """Check that the finished store is the one asked for, and touch nothing."""
        store = open_store(self.path)
        store.check_matches(model=self.model, text=self.text, cache=self.cache)
        self._compare_inputs(store)
        logger.info(
            "the store at %s is finished already: %d rows at %s",
            self.path,
            store.rows,
            ", ".join(tap.name for tap in store.taps),
        )
        return store.manifest

    def run(self, resolved_config_yaml: str | None) -> Manifest:
        """Plan, compute what isn't committed, finish. The caller holds the folder."""
        remove_stray_files(self.path)
        begun = self._begun()
        gemma = read_gemma_config(self.model)
        resolve_taps(self.cache.sites, gemma)  # a wrong layer is told before an hour of tokenising
        tokenizer = load_tokenizer(self.model)
        table = prepare_tokens(
            self.text,
            tokenizer=tokenizer,
            path=self.path / TOKENS_FOLDER,
            rows=self.cache.tokens,
            keep=begun is not None,
            stop=self.stop,
        )
        table.require_rows(self.cache.tokens)
        plan = self._plan(gemma, table)
        check_memory(plan)
        if begun is None:
            self._start(plan, resolved_config_yaml)
        else:
            plan = self._go_on(begun, plan)
        self._compute(plan, table)
        return self._finish(plan)

    def _begun(self) -> Manifest | None:
        """The plan of a harvest with committed rows; one without any binds nobody.

        Raises:
            UserError: it was begun with another config.
        """
        if not (self.path / PLAN_FILE).exists():
            return None
        plan = read_record(self.path / PLAN_FILE, Manifest)
        if not read_commits(self.path, plan):
            self._discard(plan)
            return None
        difference = first_difference(plan, model=self.model, text=self.text, cache=self.cache)
        if difference is not None:
            self._refuse(difference)
        return plan

    def _plan(self, gemma: GemmaConfig, table: TokenTable) -> Manifest:
        model, cache, summary = self.model, self.cache, table.summary
        return Manifest(
            format_version=FORMAT_VERSION,
            model=ModelEntry(
                weights=model.weights,
                revision=model.revision,
                fingerprint=weight_fingerprint(model),
                dtype=model.dtype,
                num_layers=gemma.num_layers,
            ),
            text=self.text,
            tokenizer_hash=summary.tokenizer_hash,
            token_hash=summary.token_hash,
            num_sequences=summary.sequences,
            sites=[
                SiteEntry(site=tap.site, layer=tap.layer, width=tap_width(gemma, tap.site))
                for tap in resolve_taps(cache.sites, gemma)
            ],
            rows=cache.tokens,
            dtype=cache.dtype,
            sequences_per_batch=cache.sequences_per_batch,
            shuffling=ShufflingEntry(
                algorithm=ALGORITHM,
                seed=cache.seed,
                shuffle_rows=cache.shuffle_rows,
                bucket_rows=bucket_rows(
                    shuffle_rows=cache.shuffle_rows, block_rows=cache.block_rows
                ),
                block_rows=cache.block_rows,
            ),
        )

    def _start(self, plan: Manifest, resolved_config_yaml: str | None) -> None:
        """Tie the folder to this plan."""
        write_record(self.path / PLAN_FILE, plan)
        if resolved_config_yaml is not None:
            write_text(self.path / "config.yaml", resolved_config_yaml)

    def _go_on(self, begun: Manifest, plan: Manifest) -> Manifest:
        """The plan to go on with: the one begun, if it is this one but for the weights' name."""
        name = {"weights": begun.model.weights, "revision": begun.model.revision}
        plan = plan.model_copy(update={"model": plan.model.model_copy(update=name)})
        for field in Manifest.model_fields:
            before, now = getattr(begun, field), getattr(plan, field)
            if before != now:
                self._refuse(f"{field} was {before} and is {now}")
        return begun

    def _discard(self, plan: Manifest) -> None:
        """Remove what a harvest without a committed bucket left; tokens are kept."""
        with disk_errors(self.path, doing="clean up"):
            for name in (*(entry.tap.name for entry in plan.sites), *PROVENANCE):
                shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / PLAN_FILE).unlink()

    def _refuse(self, difference: str) -> NoReturn:
        raise UserError(
            f"the harvest at {self.path} was begun with another config. {difference}. Change it "
            "back to go on, or choose another cache.path (nothing was changed)."
        )

    def _compute(self, plan: Manifest, table: TokenTable) -> None:
        """Compute and commit the buckets that aren't committed yet."""
        done = read_commits(self.path, plan)
        missing = [bucket for bucket in range(plan.num_buckets) if bucket not in done]
        if not missing:
            return
        committed = sum(commit.rows for commit in done.values())
        if committed:
            logger.info("going on: %d of %d rows are committed", committed, plan.rows)
        _log_sizes(self.path, plan, rows_left=plan.rows - committed)
        model = load_model(self.model, converted=conversion_folder(self.cache))
        filler = BucketFiller(plan, table, model)
        with (
            ProgressMeter("harvest", total=plan.rows, unit="tokens", initial=committed) as meter,
            BucketWriter(self.path, plan) as writer,
        ):
            for bucket in missing:

                def on_batch(rows: int, base: int = committed) -> None:
                    if self.stop():
                        raise Interrupted(
                            f"harvest stopped: the finished buckets of {self.path} are committed; "
                            "give the same command again to go on"
                        )
                    meter.update(base + rows)

                writer.submit(filler.fill(bucket, on_batch=on_batch))
                committed += len(plan.bucket_span(bucket))
                meter.update(committed)

    def _finish(self, plan: Manifest) -> Manifest:
        """Write the manifest: from here on it is a store."""
        commits = read_commits(self.path, plan)
        assert len(commits) == plan.num_buckets
        sites = []
        for entry in plan.sites:
            total = math.fsum(c.sum_of_squares[entry.tap.name] for c in commits.values())
            sites.append(entry.model_copy(update={"mean_squared_norm": total / plan.rows}))
        manifest = plan.model_copy(update={"sites": sites})
        write_record(self.path / MANIFEST_FILE, manifest)
        (self.path / PLAN_FILE).unlink()
        logger.info("the store at %s is finished: %d rows", self.path, manifest.rows)
        return manifest

    def _compare_inputs(self, store: Store) -> None:
        """Compare weights and text with what the store was made of, where they are still here."""
        try:
            fingerprint = weight_fingerprint(self.model)
            recipe = describe_text(self.text, like=store.tokens.summary)
        except UserError as error:
            logger.warning("what the finished store was made of cannot be compared: %s", error)
            return
        store.check_matches(fingerprint=fingerprint)
        difference = recipe.difference(store.tokens.summary)
        if difference is not None:
            raise UserError(
                f"the store at {self.path} was made of other text. {difference}. Go back to what "
                "it was, or choose another cache.path (nothing was changed)."
            )


def bucket_bytes(plan: Manifest) -> int:
    """Bytes of one bucket of a store, all taps."""
    itemsize = ts.dtype(plan.dtype).numpy_dtype.itemsize
    row_bytes = itemsize * sum(entry.width for entry in plan.sites) + 8  # 8: provenance
    return len(plan.bucket_span(0)) * row_bytes


def check_memory(plan: Manifest) -> None:
    """Raises `UserError` when the buckets in flight can't fit this machine's memory."""
    needed = BUCKETS_IN_MEMORY * bucket_bytes(plan)
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        fitting = plan.shuffling.bucket_rows * present // needed // 2
        raise UserError(
            f"buckets of {plan.shuffling.bucket_rows} rows at {len(plan.sites)} taps need "
            f"{needed / 2**30:.3g} GiB of memory ({BUCKETS_IN_MEMORY} at once) and this machine "
            f"has {present / 2**30:.3g}: lower cache.shuffle_rows to about {fitting}, or harvest "
            "fewer sites and layers into each store."
        )


def _log_sizes(path: Path, plan: Manifest, *, rows_left: int) -> None:
    """Say what memory and disk the harvest takes; warn when the disk looks too small."""
    per_bucket = bucket_bytes(plan)
    to_write = per_bucket * rows_left // len(plan.bucket_span(0))
    free = shutil.disk_usage(path).free
    logger.info(
        "%d buckets of %d rows: %.3g GiB of memory for %d at once, %.3g GiB to write, %.3g free",
        plan.num_buckets,
        len(plan.bucket_span(0)),
        BUCKETS_IN_MEMORY * per_bucket / 2**30,
        BUCKETS_IN_MEMORY,
        to_write / 2**30,
        free / 2**30,
    )
    if to_write > free:
        logger.warning(
            "%s has %.3g GiB free and the rest of the store takes %.3g: it will not fit",
            path,
            free / 2**30,
            to_write / 2**30,
        )
