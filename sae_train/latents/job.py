"""From run folders to walks: which SAEs, on which sequences of which table of tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from activation_cache.config import ModelConfig, TextConfig
from activation_cache.gemma.config import check_context
from activation_cache.gemma.taps import EMBEDDING
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath
from activation_cache.text.token_table import TokenTable
from sae_train.config.file import read_run_config
from sae_train.config.latents import LatentsConfig
from sae_train.evaluate.job import Job
from sae_train.evaluate.jobs import Models, Run
from sae_train.latents import schema
from sae_train.latents.schema import FOLDER, RECORD

SCRATCH = ".walk"  # a folder beside the files, deleted at the end


@dataclass(frozen=True, eq=False)
class LatentsJob:
    """One SAE whose latents are wanted, on a range of sequences.

    Attributes:
        job: the SAE, its model, its text; what is evaluated is not used.
        name: of the run, unique among the jobs of one command.
    """

    job: Job
    settings: LatentsConfig
    name: str

    @property
    def folder(self) -> StoragePath:
        """Where the files go."""
        return self.job.folder / FOLDER

    @property
    def scratch(self) -> StoragePath:
        """Where unfinished work lies; another text or SAE has another folder."""
        sizes = [schema.SHARD_TOKENS, schema.PART_FIRINGS, schema.PART_ROWS]
        sizes.append(schema.PART_CONTEXT_TOKENS)
        identity = json.dumps([self.record, self.job.fingerprints, sizes], sort_keys=True)
        return self.folder / f"{SCRATCH}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    @property
    def sequences(self) -> range:
        """The sequences of the table that are walked, rising."""
        return self.job.sequences

    @property
    def width(self) -> int:
        """Latents of the SAE."""
        return self.job.sae.W_enc.shape[1]

    @property
    def of_embedding(self) -> bool:
        """Is each sequence a list of the vocabulary's ids, not text?"""
        return self.job.tap == EMBEDDING

    @property
    def record(self) -> dict[str, Any]:
        """The settings as latents.json holds them."""
        return {
            **self.settings.model_dump(mode="json"),
            "sequences": [self.sequences.start, self.sequences.stop],
            "sequences_per_batch": self.job.settings.sequences_per_batch,
            "masked_text": list(self.job.settings.masked_text),
        }


def latents_job(
    folder: StoragePath,
    *,
    settings: LatentsConfig | None,
    places: Sequence[str],
    models: Models,
    stop: Callable[[], bool],
) -> LatentsJob:
    """What to walk for a run.

    Raises:
        UserError: no checkpoint; the SAE, the store or the tokenizer doesn't belong to the model;
            no text.
    """
    run = Run(folder, read_run_config(folder, places), models)
    config, own = run.config, settings or run.config.latents
    if config.sae.tap == EMBEDDING and (own.tokens or own.source):
        raise UserError(
            f"{folder} reads the embedding, which is walked token by token of the vocabulary: take "
            "out latents.tokens and latents.source"
        )
    if own.source:
        assert own.tokens is not None
        run.fitting(config.model)
        length = config.text.sequence_length
        gemma, _ = models.config_and_fingerprint(config.model, config)
        check_context(gemma, length, key="text.sequence_length")
        text = TextConfig(
            source=own.source,
            field=own.field,
            subset_field=own.subset_field,
            sequence_length=length,
            held_out_sequences=0,
        )
        wanted = -(-own.tokens // length)
        table = run.tokens(text, config.model, sequences=wanted, stop=stop)
        sequences = range(min(wanted, table.num_sequences))
    else:
        table = run.own_text()
        _check_tokenizer(table, models, config.model)
        sequences = _own_sequences(table, own, of_embedding=config.sae.tap == EMBEDDING)
    job = run.job(
        config.evaluation.model_copy(update={"sequences": len(sequences), "precision": "float32"}),
        model=config.model,
        table=table,
        sequences=sequences,
        masked_text=config.evaluation.masked_text,
        record={},
    )
    return LatentsJob(job=job, settings=own, name=config.name)


def _check_tokenizer(table: TokenTable, models: Models, model: ModelConfig) -> None:
    """Raise `UserError` if a model's tokenizer isn't the one that made the table."""
    if models.tokenizer(model).fingerprint != table.summary.tokenizer_hash:
        raise UserError(
            f"the tokenizer of {model.weights} is another than that of the tokens at {table.path}, "
            "so their strings would be wrong: name the model's own tokenizer, or other text in "
            "latents.source"
        )


def _own_sequences(table: TokenTable, settings: LatentsConfig, *, of_embedding: bool) -> range:
    """Held-out sequences; for more tokens than those have, the sequences before them too."""
    if of_embedding:
        return range(table.num_harvestable)
    held_out = table.held_out
    wanted = -(-settings.tokens // table.sequence_length) if settings.tokens else len(held_out)
    if not wanted:
        raise UserError(
            f"{table.path} holds out no sequences: set latents.tokens, so that harvested text is "
            "walked, or latents.source"
        )
    if wanted <= len(held_out):
        return held_out[:wanted]
    return range(max(0, table.num_sequences - wanted), table.num_sequences)


def with_names(jobs: Sequence[LatentsJob]) -> list[LatentsJob]:
    """The jobs with names by which they can be told apart: longer ends of their paths if needed."""
    named = []
    for one in jobs:
        name, parts = one.name, 1
        while sum(other.name == one.name for other in jobs) > 1:
            parts += 1
            path = one.job.folder.absolute().parts
            name = "/".join(path[-parts:])
            ends = ["/".join(other.job.folder.absolute().parts[-parts:]) for other in jobs]
            if ends.count(name) == 1 or parts > len(path):
                break
        named.append(LatentsJob(job=one.job, settings=one.settings, name=name))
    return named


def groups(jobs: Sequence[LatentsJob]) -> Iterator[list[LatentsJob]]:
    """Jobs that share a walk: same model, same sequences of the same table, same settings."""

    def key(one: LatentsJob) -> tuple[str, ...]:
        job = one.job
        return (
            job.model.model_dump_json(),
            str(job.table.path.absolute()),
            json.dumps(one.record),
            repr((job.masked, one.of_embedding)),
        )

    for _, group in itertools.groupby(sorted(jobs, key=key), key=key):
        yield list(group)


def is_finished(one: LatentsJob) -> bool:
    """Does the folder hold a record, current or not?"""
    return (one.folder / RECORD).is_file()
