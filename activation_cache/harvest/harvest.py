"""`sae harvest`: the model reads the tokens, and its activations at all taps become a store.

Cheap checks come first. Then the text is tokenised. Then the plan is written, which ties the folder
to this config. Then buckets are computed, each while the one before is written. The manifest,
written last, makes the folder a store.

Of several processes the first does everything but the buckets, and publishes the results. The teams
(`gemma.replicas`) share the buckets; each is written and committed by one process. The bytes don't
depend on which process that is, so that a harvest can go on with any number of them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from activation_cache.config import CacheConfig, MeshConfig, ModelConfig, TextConfig
from activation_cache.gemma.config import GemmaConfig, check_context
from activation_cache.gemma.params import check_model_axis
from activation_cache.gemma.replicas import place_replicas
from activation_cache.gemma.taps import EMBEDDING, resolve_taps, tap_width
from activation_cache.harvest.matching_store import open_matching_store
from activation_cache.harvest.sizes import check_memory, log_sizes, memory_here
from activation_cache.harvest.worker import SHARED_DISK_SECONDS, Share
from activation_cache.language_model.chat_template import load_chat_template
from activation_cache.language_model.checkpoint import weight_fingerprint
from activation_cache.language_model.model import convert_once, precision_on
from activation_cache.language_model.shape import read_gemma_config
from activation_cache.language_model.tokenizer import load_tokenizer
from activation_cache.precision import Precision
from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import UserError
from activation_cache.runtime.exchange import shared
from activation_cache.storage.arrays import bucket_rows, remove_stray_files
from activation_cache.storage.files import StoragePath, remove_tree, storage_path, write_text
from activation_cache.storage.locks import folder_lock
from activation_cache.storage.records import FORMAT_VERSION, read_record, write_record
from activation_cache.store.finish import finish_store
from activation_cache.store.manifest import (
    Manifest,
    ModelEntry,
    OutlyingEntry,
    ShufflingEntry,
    SiteEntry,
    first_difference,
    window_buckets,
)
from activation_cache.store.order import ALGORITHM
from activation_cache.store.store import (
    MANIFEST_FILE,
    PLAN_FILE,
    PROVENANCE,
    TOKENS_FOLDER,
    Store,
)
from activation_cache.store.writer import BucketWriter, Commit, read_commits
from activation_cache.text.token_table import TokenSummary, TokenTable
from activation_cache.text.tokenise import describe_text, prepare_tokens

logger = logging.getLogger(__name__)


def harvest(
    *,
    model: ModelConfig,
    text: TextConfig,
    cache: CacheConfig,
    mesh: MeshConfig | None = None,
    resolved_config_yaml: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Make the activation store at `cache.path`, or go on with one that was begun.

    A finished store of this config is left as it is. Processes that have joined
    (`processes.join`) share the work. Rows depend on `cache.sequences_per_batch` and the size of
    mesh axis `model`, and on no other number of devices or processes.

    Args:
        mesh: of the language model; None is `cache.mesh`, or else one device.
        stop: asked before each forward pass.

    Raises:
        UserError: a mistake that the user can mend, such as a store of another config in the
            folder, too little text, or a full disk. What was committed before stays.
        Interrupted: `stop` turned true; every finished bucket is committed.
    """
    mesh = mesh or cache.mesh or MeshConfig()
    job = PlannedHarvest(storage_path(cache.path), model, text, cache, mesh, stop)
    with contextlib.ExitStack() as held:

        def begin() -> bool:
            # A finished store is only read, and may be on a read-only disk that many share.
            if not job.is_finished():
                place_replicas(mesh)  # raises in one process what it would raise in all
                held.enter_context(folder_lock(job.path))
            return job.is_finished()

        if not exchange.run_on_main_and_broadcast("store", begin):
            return job.run(resolved_config_yaml)
    manifest = exchange.run_on_main_and_broadcast("finished store", job.already_finished)
    return Manifest.model_validate_json(manifest)


@dataclass(frozen=True)
class PlannedHarvest:
    """One call of `harvest`, or of `rolling.RollingHarvest`."""

    path: StoragePath
    model: ModelConfig
    text: TextConfig
    cache: CacheConfig
    mesh: MeshConfig
    stop: Callable[[], bool]

    def is_finished(self) -> bool:
        return (self.path / MANIFEST_FILE).exists()

    def already_finished(self) -> str:
        """Check that the finished store is the one asked for; returns its manifest as JSON."""
        store = open_matching_store(model=self.model, text=self.text, cache=self.cache)
        self._compare_inputs(store)
        logger.info(
            "the store at %s is finished already: %d rows at %s",
            self.path,
            store.rows,
            ", ".join(tap.name for tap in store.taps),
        )
        return store.manifest.model_dump_json()

    def run(self, resolved_config_yaml: str | None) -> Manifest:
        """Plan, compute what isn't committed, finish. The first process holds the folder's lock."""
        share = self.share(resolved_config_yaml)
        finished = shared(
            "harvest",
            functools.partial(share.compute, stop=self.stop),
            finish=lambda: self.finish(share.plan).model_dump_json(),
            stop=self.stop,
        )
        return Manifest.model_validate_json(finished)

    def share(self, resolved_config_yaml: str | None) -> Share:
        """Plan; returns what this process needs to know to compute its share."""
        placement = place_replicas(self.mesh)
        prepare = functools.partial(self._prepare, resolved_config_yaml)
        prepared = exchange.run_on_main_and_broadcast("plan", prepare, stop=self.stop)
        plan = Manifest.model_validate_json(prepared["plan"])
        summary = TokenSummary.model_validate_json(prepared["tokens"])
        table = TokenTable(self.path / TOKENS_FOLDER, summary)
        share = Share(
            path=self.path,
            model=self.model,
            plan=plan,
            table=table,
            missing=prepared["missing"],
            committed=prepared["committed"],
            placement=placement,
        )
        machines = [(name, size) for name, size in exchange.gathered("memory", memory_here())]
        exchange.run_on_main_and_broadcast("enough memory", lambda: check_memory(plan, machines))
        if share.missing and not share.of_embedding:
            convert = functools.partial(convert_once, self.model, folder=share.converted)
            exchange.run_on_main_and_broadcast("conversion", convert)
        return share

    def _prepare(self, resolved_config_yaml: str | None) -> dict[str, Any]:
        """Check, tokenise and plan, in the first process; returns what the others need."""
        remove_stray_files(self.path)
        begun = self._begun()
        gemma = read_gemma_config(self.model)
        check_model_axis(gemma, self.mesh.model)
        # Before the text is tokenised, which may take hours: what a wrong layer, weights that can't
        # be read and too long sequences say.
        taps = resolve_taps(self.cache.sites, gemma)
        check_context(gemma, self.text.sequence_length)
        weight_fingerprint(self.model)
        self._precision()
        table = prepare_tokens(
            self.text,
            tokenizer=load_tokenizer(self.model),
            template=load_chat_template(self.model) if self.text.chat else None,
            path=self.path / TOKENS_FOLDER,
            rows=self.cache.tokens,
            vocabulary=gemma.vocab_size if taps == (EMBEDDING,) else None,
            keep=begun is not None,
            stop=lambda: exchange.stop_asked(self.stop),
        )
        table.require_rows(self.cache.tokens)
        plan = self._plan(gemma, table)
        if begun is None:
            self._start(plan, resolved_config_yaml)
        else:
            plan = self._go_on(begun, plan)
        done = read_commits(self.path, plan)
        committed = sum(commit.rows for commit in done.values())
        if committed:
            logger.info("going on: %d of %d rows are committed", committed, plan.rows)
        log_sizes(self.path, plan, rows_left=_rows_on_disk(plan) - committed)
        BucketWriter(self.path, plan)  # creates the arrays before other processes open them
        return {
            "plan": plan.model_dump_json(),
            "tokens": table.summary.model_dump_json(),
            "missing": [bucket for bucket in range(plan.num_buckets) if bucket not in done],
            "committed": committed,
        }

    def _begun(self) -> Manifest | None:
        """The plan of a harvest with committed rows; one without any is discarded.

        Raises:
            UserError: it was begun with another config.
        """
        if not (self.path / PLAN_FILE).exists():
            return None
        plan = read_record(self.path / PLAN_FILE, Manifest)
        if not read_commits(self.path, plan) and not self.is_finished():  # of a rolling store
            self._discard(plan)
            return None
        difference = first_difference(plan, model=self.model, text=self.text, cache=self.cache)
        if difference is not None:
            self._refuse(difference)
        assert plan.model is not None
        was, now = plan.model.precision, self._precision()
        if was != now and [entry.tap for entry in plan.sites] != [EMBEDDING]:
            self._refuse(
                f"model.precision: the rows so far were made with products in {was}, and "
                f"{self.model.precision} makes them in {now} on these devices"
            )
        return plan

    def _precision(self) -> Precision:
        """How the model's products are made on the devices here."""
        return precision_on(self.model, place_replicas(self.mesh).meshes[0])

    def _plan(self, gemma: GemmaConfig, table: TokenTable) -> Manifest:
        model, cache, summary = self.model, self.cache, table.summary
        taps = resolve_taps(cache.sites, gemma)
        sites = [
            SiteEntry(site=tap.site, layer=tap.layer, width=tap_width(gemma, tap.site))
            for tap in taps
        ]
        # Of the embedding's rows there are no products.
        precision = "float32" if taps == (EMBEDDING,) else self._precision()
        plan = Manifest(
            format_version=FORMAT_VERSION,
            model=ModelEntry(
                weights=model.weights,
                revision=model.revision,
                fingerprint=weight_fingerprint(model),
                dtype=model.dtype,
                num_layers=gemma.num_layers,
                precision=precision,
            ),
            text=self.text,
            outlying=_outlying(cache),
            tokenizer_hash=summary.tokenizer_hash,
            token_hash=summary.token_hash,
            num_sequences=summary.sequences,
            sites=sites,
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
        if cache.rolling is None:
            return plan
        window = window_buckets(cache.rolling, bucket_bytes=plan.bucket_bytes)
        return plan.model_copy(update={"window": window})

    def _start(self, plan: Manifest, resolved_config_yaml: str | None) -> None:
        """Tie the folder to this plan."""
        write_record(self.path / PLAN_FILE, plan)
        if resolved_config_yaml is not None:
            write_text(self.path / "config.yaml", resolved_config_yaml)

    def _go_on(self, begun: Manifest, plan: Manifest) -> Manifest:
        """The plan that was begun, if it differs from this one only in the weights' name."""
        assert begun.model is not None
        assert plan.model is not None
        name = {"weights": begun.model.weights, "revision": begun.model.revision}
        plan = plan.model_copy(update={"model": plan.model.model_copy(update=name)})
        for field in Manifest.model_fields:
            before, now = getattr(begun, field), getattr(plan, field)
            if before != now:
                self._refuse(f"{field} was {before} and is {now}")
        return begun

    def _discard(self, plan: Manifest) -> None:
        """Remove what a harvest without a committed bucket has left; tokens are kept."""
        for name in (*(entry.tap.name for entry in plan.sites), *PROVENANCE):
            remove_tree(self.path / name)
        (self.path / PLAN_FILE).unlink()

    def _refuse(self, difference: str) -> NoReturn:
        raise UserError(
            f"the harvest at {self.path} was begun with another config. {difference}. Change it "
            "back to go on, or choose another cache.path (nothing was changed)."
        )

    def finish(self, plan: Manifest) -> Manifest:
        """Write the manifest, which makes the folder a store; of a rolling one the plan stays."""
        return finish_store(self.path, plan, self._all_commits(plan))

    def _all_commits(self, plan: Manifest) -> dict[int, Commit]:
        """The records that the norms are of; those of other machines may take a while to appear."""
        until, wanted = time.monotonic() + SHARED_DISK_SECONDS, plan.first_window
        while True:
            commits = read_commits(self.path, plan)
            if missing := [bucket for bucket in wanted if bucket not in commits]:
                if processes.process_count() == 1 or time.monotonic() > until:
                    raise AssertionError(f"buckets {missing} have no record")
                time.sleep(0.5)
                continue
            return {bucket: commits[bucket] for bucket in wanted}

    def _compare_inputs(self, store: Store) -> None:
        """Compare weights and text with those the store was made from, if they are still here."""
        try:
            fingerprint = weight_fingerprint(self.model)
            recipe = describe_text(self.text, like=store.tokens.summary)
        except UserError as error:
            logger.warning("the inputs of the finished store cannot be compared: %s", error)
            return
        store.check_matches(fingerprint=fingerprint)
        difference = recipe.difference(store.tokens.summary)
        if difference is not None:
            raise UserError(
                f"the store at {self.path} was made from other text. {difference}. Restore that "
                "text, or choose another cache.path (nothing was changed)."
            )


def _rows_on_disk(plan: Manifest) -> int:
    """The most rows that are on the disk at once."""
    if plan.window is None:
        return plan.rows
    return min(plan.rows, (plan.window + 1) * plan.shuffling.bucket_rows)


def _outlying(cache: CacheConfig) -> OutlyingEntry | None:
    limit = cache.max_norm_over_median
    return None if limit is None else OutlyingEntry(max_norm_over_median=limit)
