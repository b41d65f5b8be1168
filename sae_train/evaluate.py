"""`evaluate`: how well SAEs stand in for a site inside the model, on held-out text.

The protocol is Gemma Scope's (arXiv 2408.05147, section 4.1); docs/evaluation.md defines every
number.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from activation_cache.config import ModelConfig
from activation_cache.errors import UserError
from activation_cache.gemma_config import GemmaConfig
from activation_cache.gemma_params import make_mesh
from activation_cache.model import LanguageModel, conversion_folder, load_model
from activation_cache.storage import AnyPath, Place, place
from activation_cache.store import open_store
from activation_cache.taps import Tap, check_tap, tap_width
from activation_cache.weights import open_checkpoint
from sae_train.checkpoint import load_trained
from sae_train.config import Config, EvaluationConfig
from sae_train.config_file import read_run_config
from sae_train.evaluate_pass import Job, Pass
from sae_train.evaluation import Evaluation, read_evaluation
from sae_train.load import load_sae
from sae_train.release import Sae, fold
from sae_train.run_folder import newest_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class _Models:
    """The models the runs name: facts read once for each, weights loaded for one at a time."""

    given: LanguageModel | None
    facts: dict[ModelConfig, tuple[GemmaConfig, str]] = field(default_factory=dict)
    loaded: tuple[ModelConfig, LanguageModel] | None = None

    def config_and_fingerprint(self, model: ModelConfig) -> tuple[GemmaConfig, str]:
        if self.given is not None:
            return self.given.config, self.given.fingerprint
        if model not in self.facts:
            checkpoint = open_checkpoint(model)
            self.facts[model] = checkpoint.config, checkpoint.fingerprint()
        return self.facts[model]

    def load(self, config: Config) -> LanguageModel:
        if self.given is not None:
            return self.given
        if self.loaded is None or self.loaded[0] != config.model:
            self.loaded = None  # let go of the one before first
            gemma, _ = self.config_and_fingerprint(config.model)
            model = load_model(
                config.model,
                converted=conversion_folder(config.cache.path),
                mesh=_local_mesh(config, gemma),
            )
            self.loaded = (config.model, model)
        return self.loaded[1]


def _local_mesh(config: Config, gemma: GemmaConfig) -> Mesh:
    """Devices of this process for the language model, as for harvesting as far as they go.

    The processes of an evaluation keep no step, so a copy lies in one of them.
    """
    _, mesh = config.harvest_mesh
    devices = jax.local_devices()
    size = math.gcd(mesh.model, len(devices), gemma.num_heads, gemma.d_ff)
    return make_mesh(devices[:size])


def evaluate(
    folders: Sequence[AnyPath],
    *,
    settings: EvaluationConfig | None = None,
    model: LanguageModel | None = None,
    force: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> list[Evaluation]:
    """Evaluate the newest checkpoint of each run and write its evaluation.json.

    A run whose evaluation is of the same SAE, model, tokens and settings is left as it is.

    Args:
        folders: run folders.
        settings: instead of the `evaluation` section of each run's config.
        model: loaded already; else each run's `model` is, once for all runs that share it.
        force: evaluate again even what is current.
        stop: asked between batches.

    Processes that have joined (`distributed.join`) share the batches; the main one writes.

    Returns:
        One evaluation per folder, in their order.

    Raises:
        UserError: a run without a checkpoint; an SAE or a store that isn't of this model; text
            that is missing or too short.
        Interrupted: `stop` said yes; runs not evaluated yet are as they were.
    """
    models = _Models(given=model)
    jobs = [_job(place(folder), settings=settings, models=models) for folder in folders]
    waiting = []
    for job in jobs:
        if not force and job.is_current(read_evaluation(job.folder)):
            logger.info("%s: the evaluation of step %d is current", job.folder, job.step)
        else:
            waiting.append(job)
    for group in _groups(waiting):
        Pass(group, models.load(group[0].config), stop=stop).run()
    results = []
    for job in jobs:
        written = read_evaluation(job.folder)
        assert written is not None
        logger.info("%s: %s", job.folder, written)
        results.append(written)
    return results


def _job(folder: Place, *, settings: EvaluationConfig | None, models: _Models) -> Job:
    """Read one run's SAE and check all that can be checked before the model is loaded."""
    config = read_run_config(folder)
    settings = settings or config.evaluation
    sae, step, trained_on = _sae_of(folder, config)
    gemma, fingerprint = models.config_and_fingerprint(config.model)
    tap = Tap(config.sae.site, config.sae.layer)
    check_tap(tap, gemma)
    width = tap_width(gemma, tap.site)
    if sae.W_enc.shape[0] != width:
        raise UserError(
            f"the SAE in {folder} reads vectors of {sae.W_enc.shape[0]}, and {tap.name} of "
            f"{config.model.weights} has {width}: evaluate it in the model it was trained on"
        )
    store = open_store(config.cache.path)
    store.check_matches(model=config.model, fingerprint=fingerprint)
    if trained_on not in (None, store.identity):
        logger.warning(
            "%s was trained on another store than the one now at %s: its held-out text may have "
            "been trained on",
            folder,
            store.path,
        )
    if settings.sequences > len(store.tokens.held_out):
        raise UserError(
            f"evaluation.sequences asks for {settings.sequences} sequences and "
            f"{store.tokens.path} holds out {len(store.tokens.held_out)}: lower "
            "evaluation.sequences, or harvest with a larger text.held_out_sequences"
        )
    fingerprints = {
        "sae": sae.fingerprint,
        "model": fingerprint,
        "model_dtype": config.model.dtype,
        "tokens": store.tokens.summary.token_hash,
    }
    return Job(folder, config, settings, step, sae, store.tokens, fingerprints)


def _sae_of(folder: Place, config: Config) -> tuple[Sae, int, str | None]:
    """A folder's SAE, its step, and the store it was trained on.

    A folder without checkpoints stands for the released SAE that its config would start from.
    """
    if config.sae.start_from is not None and newest_checkpoint(folder) is None:
        return load_sae(config.sae.start_from), 0, None
    trained = load_trained(folder)
    return fold(trained), trained.step, trained.store


def _groups(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that can share passes: same model, same tokens, same settings."""

    def key(job: Job) -> tuple[str, ...]:
        return (
            job.config.model.model_dump_json(),
            str(job.table.path.absolute()),
            job.settings.model_dump_json(),
        )

    for _, group in itertools.groupby(sorted(jobs, key=key), key=key):
        yield list(group)
