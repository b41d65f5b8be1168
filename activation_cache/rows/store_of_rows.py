"""Sources of rows into a finished store: plan, buckets, manifest, and the same for held-out rows.

What is committed stays, as in a harvest: a killed import goes on with the next bucket, and refuses
other files, or other settings, than it began with. Two stores are made. That of the rows to train
on is in the order that a harvest of the same sequences has. The one in `held_out` has the last
sequences in the order in which they were given, for `sae evaluate`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from activation_cache.config import Section
from activation_cache.gemma.taps import Tap
from activation_cache.harvest.sizes import check_memory, log_sizes, memory_here
from activation_cache.rows.fill_bucket import IN_ORDER, RowFiller, Sequences
from activation_cache.rows.row_array import RowArray
from activation_cache.rows.settings import ImportSettings
from activation_cache.rows.source import RowSource
from activation_cache.rows.tokens import check_tokens, special_ids, write_tokens
from activation_cache.rows.unpack import TOKEN_IDS
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.arrays import bucket_rows, remove_stray_files
from activation_cache.storage.files import StoragePath, make_folder, remove_tree
from activation_cache.storage.records import FORMAT_VERSION, read_record, write_record
from activation_cache.store.finish import finish_store
from activation_cache.store.manifest import (
    ImportedEntry,
    ImportedSource,
    Manifest,
    OutlyingEntry,
    ShufflingEntry,
    SiteEntry,
)
from activation_cache.store.order import ALGORITHM
from activation_cache.store.store import (
    HELD_OUT_FOLDER,
    MANIFEST_FILE,
    PLAN_FILE,
    PROVENANCE,
    TOKENS_FOLDER,
)
from activation_cache.store.writer import BucketWriter, read_commits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowImport:
    """One import: where to, how, and from what.

    Attributes:
        sources: the rows of each tap; row n of all is of the same token.
        tokens: their token ids, if there are any.
        tokenizer_hash: of the tokenizer that made these; empty if it isn't known.
    """

    path: StoragePath
    settings: ImportSettings
    sources: Mapping[Tap, RowSource]
    tokens: Sequence[RowArray]
    tokenizer_hash: str
    stop: Callable[[], bool]

    def run(self) -> Manifest:
        """Make both stores, or what is missing of them; the caller holds the folder's lock.

        Raises:
            UserError: rows that don't fit together or are not finite, or an import of other rows
                in the folder.
            Interrupted: `stop` turned true; every finished bucket is committed.
        """
        _refuse_harvest(self.path)
        remove_stray_files(self.path)
        sequences = self._sequences()
        held_out = RowFiller(self._plan(sequences, IN_ORDER, rows=1), self.sources, sequences)
        if held_out.rows:
            plan = self._plan(sequences, IN_ORDER, rows=held_out.rows)
            self._fill(self.path / HELD_OUT_FOLDER, plan, sequences)
        stored = RowFiller(self._plan(sequences, ALGORITHM, rows=1), self.sources, sequences)
        if not stored.rows:
            raise UserError("no row is left to train on: all are special tokens or held out")
        plan = self._plan(sequences, ALGORITHM, rows=stored.rows)
        return self._fill(self.path, plan, sequences)

    def _sequences(self) -> Sequences:
        (first_tap, first), *others = self.sources.items()
        for tap, source in others:
            sizes = [(one.rows, one.sequence_length, one.in_sequences) for one in (first, source)]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"{first_tap.name} has {first.rows} rows and {tap.name} {source.rows}"
                    + ("" if sizes[0][0] != sizes[1][0] else ", in other sequences")
                    + ": row n of every tap must be of the same token. Give files of the same text"
                )
        held_out = self.settings.held_out_sequences(
            rows=first.rows, sequences=first.sequences, length=first.sequence_length
        )
        table = None
        if self.tokens:
            if not first.in_sequences:
                raise UserError(
                    f"token ids came with rows of shape {list(first.arrays[0].shape)}: they are "
                    "kept by sequence. Give rows as [sequences, rows, width], or no token ids"
                )
            check_tokens(self.tokens, sequences=first.sequences, length=first.sequence_length)
            table = write_tokens(
                self.tokens,
                path=self.path / TOKENS_FOLDER,
                special=special_ids(self.settings.special_ids),
                tokenizer_hash=self.tokenizer_hash,
                held_out=held_out,
                keep=any(_has_commits(p) for p in (self.path, self.path / HELD_OUT_FOLDER)),
                check=self._stop_if_asked,
            )
        elif self.settings.special_ids:
            raise UserError("special_ids say which tokens make no rows, and no token ids are given")
        return Sequences(first.rows, first.sequence_length, held_out, table)

    def _plan(self, sequences: Sequences, algorithm: str, *, rows: int) -> Manifest:
        settings, limit = self.settings, self.settings.max_norm_over_median
        outlying = None
        if limit is not None and algorithm == ALGORITHM:  # what is measured isn't chosen
            outlying = OutlyingEntry(max_norm_over_median=limit)
        first = next(iter(self.sources.values()))
        return Manifest(
            format_version=FORMAT_VERSION,
            model=None,
            text=None,
            imported=ImportedEntry(
                sources=self._entries(),
                sequence_length=sequences.length,
                held_out_sequences=sequences.held_out,
                in_sequences=first.in_sequences,
            ),
            outlying=outlying,
            tokenizer_hash=self.tokenizer_hash,
            token_hash="" if sequences.table is None else sequences.table.summary.token_hash,
            num_sequences=sequences.number,
            sites=[
                SiteEntry(site=tap.site, layer=tap.layer, width=source.width)
                for tap, source in self.sources.items()
            ],
            rows=rows,
            dtype=settings.dtype,
            sequences_per_batch=1,
            shuffling=ShufflingEntry(
                algorithm=algorithm,
                seed=settings.seed,
                shuffle_rows=settings.shuffle_rows,
                bucket_rows=bucket_rows(
                    shuffle_rows=settings.shuffle_rows, block_rows=settings.block_rows
                ),
                block_rows=settings.block_rows,
            ),
        )

    def _entries(self) -> list[ImportedSource]:
        entries = [e for tap, source in self.sources.items() for e in source.entries(tap.name)]
        if self.tokens:
            entries += RowSource(self.tokens, 1).entries(TOKEN_IDS)
        return entries

    def _fill(self, path: StoragePath, plan: Manifest, sequences: Sequences) -> Manifest:
        """Fill what is missing of one store."""
        if (path / MANIFEST_FILE).exists():
            found = read_record(path / MANIFEST_FILE, Manifest)
            self._compare(_as_planned(found), plan, path)
            logger.info("the store at %s is finished already: %d rows", path, found.rows)
            return found
        if (path / PLAN_FILE).exists():
            begun = read_record(path / PLAN_FILE, Manifest)
            if begun != plan and not read_commits(path, begun):
                for entry in (*(one.tap.name for one in begun.sites), *PROVENANCE):
                    remove_tree(path / entry)
                (path / PLAN_FILE).unlink()
            else:
                self._compare(begun, plan, path)
        make_folder(path)
        write_record(path / PLAN_FILE, plan)
        done = read_commits(path, plan)
        committed = sum(commit.rows for commit in done.values())
        check_memory(plan, [memory_here()])
        log_sizes(path, plan, rows_left=plan.rows - committed)
        filler = RowFiller(plan, self.sources, sequences)
        with (
            ProgressMeter("import", total=plan.rows, unit="rows", initial=committed) as meter,
            BucketWriter(path, plan) as writer,
        ):
            for bucket in range(plan.num_buckets):
                if bucket not in done:
                    on_sequence = functools.partial(self._on_sequence, meter, committed)
                    writer.submit(filler.fill(bucket, on_sequence=on_sequence))
                    committed += len(plan.bucket_span(bucket))
        return finish_store(path, plan, read_commits(path, plan))

    def _on_sequence(self, meter: ProgressMeter, before: int, rows: int) -> None:
        self._stop_if_asked()
        meter.update(before + rows)

    def _stop_if_asked(self) -> None:
        if self.stop():
            raise Interrupted(f"import stopped: the finished buckets of {self.path} are committed")

    def _compare(self, before: Manifest, now: Manifest, path: StoragePath) -> None:
        for field in Manifest.model_fields:
            _refuse_other(path, field, getattr(before, field), getattr(now, field))


def _as_planned(manifest: Manifest) -> Manifest:
    """A manifest without what is known at the end only."""
    sites = [site.model_copy(update={"mean_squared_norm": None}) for site in manifest.sites]
    outlying = manifest.outlying and manifest.outlying.model_copy(update={"dropped": None})
    return manifest.model_copy(update={"sites": sites, "outlying": outlying})


def _refuse_harvest(path: StoragePath) -> None:
    """Raise `UserError` where a harvest has written, or writes."""
    for name in (MANIFEST_FILE, PLAN_FILE):
        if (path / name).exists() and read_record(path / name, Manifest).imported is None:
            raise UserError(
                f"{path} has a store that was harvested: choose another folder for the import "
                "(nothing was changed)"
            )


def check_same_settings(path: StoragePath, found: Manifest, settings: ImportSettings) -> None:
    """Raise `UserError` if a finished import was made with other settings."""
    _refuse_harvest(path)
    shuffling, limit = found.shuffling, settings.max_norm_over_median
    before = (found.dtype, shuffling.seed, shuffling.shuffle_rows, shuffling.block_rows)
    now = (settings.dtype, settings.seed, settings.shuffle_rows, settings.block_rows)
    for name, was, is_now in zip(
        ("dtype", "seed", "shuffle_rows", "block_rows"), before, now, strict=True
    ):
        _refuse_other(path, name, was, is_now)
    dropped = found.outlying and found.outlying.max_norm_over_median
    _refuse_other(path, "max_norm_over_median", dropped, limit)


def _has_commits(path: StoragePath) -> bool:
    folder = path / "commits"
    return folder.is_dir() and any(folder.iterdir())


def _refuse_other(path: StoragePath, field: str, was: object, is_now: object) -> None:
    """Raise `UserError` if a field of the manifest differs; names what in it does."""
    if was == is_now:
        return
    if isinstance(was, Section) and isinstance(is_now, Section):
        for inner in type(was).model_fields:
            _refuse_other(path, inner, getattr(was, inner), getattr(is_now, inner))
    if field == "sources" and isinstance(was, list) and isinstance(is_now, list):
        changed = [one.name for one in is_now if one not in was]
        words = f"the file {changed[0]} is another or new" if changed else "files are missing"
    else:
        words = f"{field} was {was} and is {is_now}"
    raise UserError(
        f"the import at {path} was begun with other rows or settings: {words}. Change it back to "
        "go on, or choose another folder (nothing was changed)"
    )
