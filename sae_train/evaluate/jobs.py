"""From run folders to jobs: which SAE, in which model, on which text.

Everything that can be checked without loading a model is checked here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from activation_cache.config import NO_MODEL, ModelConfig, TextConfig
from activation_cache.gemma.config import GemmaConfig, check_context
from activation_cache.gemma.taps import EMBEDDING, check_tap, tap_width
from activation_cache.language_model.checkpoint import open_checkpoint
from activation_cache.language_model.model import LanguageModel, conversion_folder, load_model
from activation_cache.language_model.tokenizer import Tokenizer, load_tokenizer
from activation_cache.mesh import make_mesh
from activation_cache.precision import Precision, resolve
from activation_cache.runtime import exchange
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, storage_path
from activation_cache.store.store import Store, open_store
from activation_cache.text.token_table import TokenTable, open_tokens
from activation_cache.text.tokenise import prepare_tokens
from sae_train.checkpoint.trained import load_trained
from sae_train.config.evaluation import ExtraEvaluationConfig
from sae_train.config.file import read_run_config
from sae_train.config.run import Config, EvaluationConfig
from sae_train.evaluate.held_out_rows import held_out_rows
from sae_train.evaluate.job import Job
from sae_train.inference.fold import fold
from sae_train.inference.read_formats import load_sae
from sae_train.inference.sae import check_kind
from sae_train.runs.folder import newest_checkpoint

logger = logging.getLogger(__name__)

_TOKENS = "evaluation_tokens"  # a folder beside the store: tokens of extra evaluations' texts


@dataclass
class Models:
    """The models that runs name: read from disk once each, one at a time with its weights loaded.

    Attributes:
        given: the runs' own model, if the caller has loaded it.
    """

    given: LanguageModel | None
    facts: dict[ModelConfig, tuple[GemmaConfig, str]] = field(default_factory=dict)
    tokenizers: dict[ModelConfig, Tokenizer] = field(default_factory=dict)
    loaded: tuple[ModelConfig, LanguageModel] | None = None

    def config_and_fingerprint(self, model: ModelConfig, config: Config) -> tuple[GemmaConfig, str]:
        """A model's shape and fingerprint, without loading it; `config` is the run's."""
        if self.given is not None and model == config.model:
            return self.given.config, self.given.fingerprint
        if model not in self.facts:
            checkpoint = open_checkpoint(model)
            self.facts[model] = checkpoint.config, checkpoint.fingerprint()
        return self.facts[model]

    def tokenizer(self, model: ModelConfig) -> Tokenizer:
        """A model's tokenizer."""
        if model not in self.tokenizers:
            self.tokenizers[model] = load_tokenizer(model)
        return self.tokenizers[model]

    def load(self, job: Job) -> LanguageModel:
        """The model a job is measured in; frees the one loaded before."""
        how = job.sae.precision if job.model.dtype == "float32" else "float32"
        return self.language_model(job.model, job.config, how=how)

    def language_model(
        self, model: ModelConfig, config: Config, *, how: Precision
    ) -> LanguageModel:
        """A model of a run with this config, its products made so; frees the one loaded before."""
        if self.given is not None and model == config.model:
            return _at(self.given, how)
        if self.loaded is None or self.loaded[0] != model:
            self.loaded = None  # two don't fit in memory
            gemma, _ = self.config_and_fingerprint(model, config)
            loaded = load_model(
                model.model_copy(update={"precision": "auto"}),
                converted=conversion_folder(config.cache.path),
                mesh=_local_mesh(config, gemma),
            )
            self.loaded = (model, loaded)
        return _at(self.loaded[1], how)


def _at(model: LanguageModel, how: Precision) -> LanguageModel:
    return model if model.precision == how else dataclasses.replace(model, precision=how)


def _local_mesh(config: Config, gemma: GemmaConfig) -> Mesh:
    """A mesh of this process's devices for the language model: harvesting's, as far as they allow.

    Processes evaluate different batches and don't run in step, so each holds a whole model.
    """
    _, mesh = config.harvest_mesh
    devices = jax.local_devices()
    size = math.gcd(mesh.model, len(devices), gemma.num_heads, gemma.d_ff)
    return make_mesh(devices[:size])


def jobs_of(
    folder: StoragePath,
    *,
    settings: EvaluationConfig | None,
    places: Sequence[str] = (),
    models: Models,
    stop: Callable[[], bool],
) -> list[Job]:
    """A run's evaluation in its own model, then the extra ones that `evaluation.also` names.

    Raises:
        UserError: as `evaluate`.
    """
    run = Run(folder, read_run_config(folder, places), models)
    settings = settings or run.config.evaluation
    return [
        run.own(settings),
        *(run.extra(settings, entry, stop=stop) for entry in settings.also),
    ]


class Run:
    """A run and its SAE, which several jobs share; `sae latents` walks text for it as well."""

    def __init__(self, folder: StoragePath, config: Config, models: Models) -> None:
        self.folder, self.config, self.models = folder, config, models
        self.trained_on: str | None = None  # the store, if known
        if config.sae.start_from is not None and newest_checkpoint(folder) is None:
            # The released SAE that the run will start from.
            self.sae, self.step = load_sae(config.sae.start_from), 0
            self.sae_name = f"sae.start_from {config.sae.start_from}"
        else:
            trained = load_trained(folder)
            self.sae, self.step, self.trained_on = fold(trained), trained.step, trained.store
            self.sae_name = f"the SAE in {folder}"
        check_kind(self.sae, config.sae, name=self.sae_name)
        self.sae_fingerprint = self.sae.fingerprint

    def own(self, settings: EvaluationConfig) -> Job:
        """The evaluation in the model the run was trained on, on its store's held-out text.

        Of a run on imported rows without a model it is that of the rows alone.
        """
        if self.config.cache.is_imported and self.config.model.weights == NO_MODEL:
            return self._own_rows(settings)
        table = self.own_text()
        own = settings
        if self.config.sae.tap == EMBEDDING and not table.held_out:
            own = settings.model_copy(update={"sequences": 0})  # no text, so no losses
        _check_length(own, None, table.held_out, table)
        return self.job(
            own,
            model=self.config.model,
            table=table,
            sequences=table.held_out,
            masked_text=settings.masked_text,
            record=settings.recorded(),
        )

    def _own_rows(self, settings: EvaluationConfig) -> Job:
        """L0 and FVU on the rows that the import has held out, at most as many as there are."""
        rows = held_out_rows(self._store())
        for tap in self.config.sae.taps:
            rows.store.layout(tap)  # raises if it isn't there
        width = rows.store.tap_info(self.config.sae.tap).width
        if self.sae.W_enc.shape[0] != width:
            raise UserError(
                f"{self.sae_name} reads vectors of {self.sae.W_enc.shape[0]}, and the rows at "
                f"{rows.path} have {width}: evaluate it on rows of the kind it was trained on"
            )
        measured = {
            "sequences": min(settings.sequences, len(rows.held_out)),
            "compare_precision": False,
        }
        job = self.job(
            settings.model_copy(update=measured),
            model=self.config.model,
            table=rows,
            sequences=rows.held_out,
            masked_text=settings.masked_text,
            record=settings.recorded(),
        )
        return dataclasses.replace(job, rows=rows)

    def _store(self) -> Store:
        store = open_store(self.config.cache.path)
        if self.trained_on not in (None, store.identity):
            logger.warning(
                "%s was trained on another store than the one now at %s: what is held out there "
                "may have been trained on",
                self.folder,
                store.path,
            )
        return store

    def own_text(self) -> TokenTable:
        """The text of the run's store; raises `UserError` if that is of another model."""
        model, fingerprint = self.config.model, self.fitting(self.config.model)
        store = self._store()
        store.check_matches(model=model, fingerprint=fingerprint)
        if store.manifest.imported is not None:
            self._check_tokenizer(
                model, store.tokens, remedy="import them with --tokenizer of that model"
            )
        return store.tokens

    def extra(
        self, settings: EvaluationConfig, entry: ExtraEvaluationConfig, *, stop: Callable[[], bool]
    ) -> Job:
        """An extra evaluation: in another model, on other text, or both."""
        if self.config.sae.tap == EMBEDDING:
            raise UserError(
                f"{self.folder} reads the embedding, which is measured on the vocabulary of its "
                "own store: take out evaluation.also"
            )
        model = entry.model or self.config.model
        self.fitting(model)
        length = (entry.text or self.config.text).sequence_length
        gemma, _ = self.models.config_and_fingerprint(model, self.config)
        check_context(gemma, length, key=f"evaluation.also, {entry.called}: text.sequence_length")
        wanted = entry.sequences or settings.sequences
        if entry.text is None:
            table = open_store(self.config.cache.path).tokens
            self._check_tokenizer(
                model, table, remedy="give this entry of evaluation.also a text of its own"
            )
            sequences = table.held_out
        else:
            text = TextConfig(**entry.text.model_dump(), held_out_sequences=0)
            table = self.tokens(text, model, sequences=wanted, stop=stop)
            sequences = range(table.num_sequences)
        measured = settings.model_copy(update={"sequences": wanted})
        _check_length(measured, entry, sequences, table)
        return self.job(
            measured,
            model=model,
            table=table,
            sequences=sequences,
            masked_text=entry.masked_text,
            entry=entry,
            record=settings.recorded(entry),
        )

    def job(
        self,
        settings: EvaluationConfig,
        *,
        model: ModelConfig,
        table: TokenTable,
        sequences: range,
        masked_text: Sequence[str],
        record: dict[str, Any],
        entry: ExtraEvaluationConfig | None = None,
    ) -> Job:
        """This SAE on some sequences of a table; `masked_text` is found by its tokens."""
        precision = resolve(
            settings.precision, platform=jax.default_backend(), key="evaluation.precision"
        )
        masked: tuple[tuple[int, ...], ...] = ()
        if masked_text:
            encoded = self.models.tokenizer(model).encode_batch(list(masked_text))
            masked = tuple(tuple(ids) for ids in encoded if ids)
        fingerprints = {
            "sae": self.sae_fingerprint,
            **self._of_model(model),
            "tokens": table.summary.token_hash,
        }
        return Job(
            folder=self.folder,
            config=self.config,
            settings=settings.model_copy(update={"also": []}),
            step=self.step,
            sae=dataclasses.replace(self.sae, precision=precision),
            model=model,
            table=table,
            sequences=sequences,
            record=record,
            fingerprints=fingerprints,
            label=None if entry is None else entry.called,
            masked=masked,
        )

    def _of_model(self, model: ModelConfig) -> dict[str, str]:
        """What an evaluation's fingerprints say of the model; nothing where there is none."""
        if model.weights == NO_MODEL:
            return {}
        fingerprint = self.models.config_and_fingerprint(model, self.config)[1]
        return {"model": fingerprint, "model_dtype": model.dtype}

    def fitting(self, model: ModelConfig) -> str:
        """The model's fingerprint; raises `UserError` if it lacks the SAE's site or width."""
        gemma, fingerprint = self.models.config_and_fingerprint(model, self.config)
        tap = self.config.sae.tap
        check_tap(tap, gemma)
        width = tap_width(gemma, tap.site)
        if self.sae.W_enc.shape[0] != width:
            raise UserError(
                f"{self.sae_name} reads vectors of {self.sae.W_enc.shape[0]}, and "
                f"{tap.name} of {model.weights} has {width}: evaluate it in the model it was "
                "trained on, or in one tuned from that"
            )
        return fingerprint

    def _check_tokenizer(self, model: ModelConfig, table: TokenTable, *, remedy: str) -> None:
        if self.models.tokenizer(model).fingerprint != table.summary.tokenizer_hash:
            raise UserError(
                f"the tokenizer of {model.weights} is another than that of the tokens at "
                f"{table.path}: {remedy}"
            )

    def tokens(
        self, text: TextConfig, model: ModelConfig, *, sequences: int, stop: Callable[[], bool]
    ) -> TokenTable:
        """The tokens of an extra evaluation's text, made once and kept beside the store."""
        tokenizer = self.models.tokenizer(model)
        digest = hashlib.sha256(f"{text.model_dump_json()} {tokenizer.fingerprint}".encode())
        path = storage_path(self.config.cache.path).parent / _TOKENS / digest.hexdigest()[:16]

        def prepare() -> None:
            rows = sequences * text.sequence_length
            prepare_tokens(
                text,
                tokenizer=tokenizer,
                path=path,
                rows=rows,
                stop=lambda: exchange.stop_asked(stop),
            )

        exchange.run_on_main_and_broadcast("evaluation tokens", prepare, stop=stop)
        return open_tokens(path)


def _check_length(
    settings: EvaluationConfig,
    entry: ExtraEvaluationConfig | None,
    sequences: range,
    table: TokenTable,
) -> None:
    if settings.sequences <= len(sequences):
        return
    if entry is not None and entry.text is not None:
        raise UserError(
            f"evaluation.also, {entry.called}: {settings.sequences} sequences are asked for and "
            f"the text makes {len(sequences)} of {table.sequence_length} tokens: lower its "
            "sequences or add text"
        )
    raise UserError(
        f"evaluation.sequences asks for {settings.sequences} sequences and "
        f"{table.path} holds out {len(sequences)}: lower "
        "evaluation.sequences, or harvest with a larger text.held_out_sequences"
    )
