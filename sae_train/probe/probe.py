"""`probe`: from run folders to probe.json beside each, one data set after the other.

After each data set every run's record is written, so that a stop costs at most one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from activation_cache.gemma.config import check_context
from activation_cache.gemma.taps import EMBEDDING, Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import AnyPath, StoragePath, storage_path
from sae_train.config.evaluation import ProbeConfig
from sae_train.config.file import read_run_config
from sae_train.evaluate.jobs import Models, Run
from sae_train.probe.datasets import data_files, read_data_set
from sae_train.probe.record import RAW, ProbeRecord, continued, write_probe
from sae_train.probe.scoring import Stop, score_on

logger = logging.getLogger(__name__)


@dataclass
class Probed:
    """A run whose SAE is probed, and what was found so far."""

    run: Run
    settings: ProbeConfig
    record: ProbeRecord

    @property
    def tap(self) -> Tap:
        """What the SAE reads."""
        return self.run.config.sae.tap


def probe(
    folders: Sequence[AnyPath],
    *,
    settings: ProbeConfig | None = None,
    places: Sequence[str] = (),
    model: LanguageModel | None = None,
    stop: Stop = lambda: False,
) -> list[ProbeRecord]:
    """Probe the SAE of each run and write its probe.json; data sets that are current are kept.

    Args:
        folders: run folders.
        settings: replaces the `probe` section of each run's config.
        places: overrides of each run's config: where its store and its model's weights lie now.
        model: the runs' own model, if it is loaded already.
        stop: asked between batches and between data sets.

    Returns:
        The records, in the order of the folders.

    Raises:
        UserError: a run has no checkpoint, is a transcoder or reads the embedding; a data set is
            missing or damaged; scikit-learn isn't installed.
        Interrupted: `stop` returned True; finished data sets are saved.
    """
    models = Models(given=model)
    runs = [_probed(storage_path(folder), settings, places, models) for folder in folders]

    def key(one: Probed) -> str:
        return one.run.config.model.model_dump_json() + one.settings.model_dump_json()

    for _, group in itertools.groupby(sorted(runs, key=key), key=key):
        _probe_group(list(group), models, stop=stop)
    return [one.record for one in runs]


def _probed(
    folder: StoragePath, settings: ProbeConfig | None, places: Sequence[str], models: Models
) -> Probed:
    run = Run(folder, read_run_config(folder, places), models)
    config, own = run.config, settings or run.config.probe
    if config.sae.is_transcoder:
        raise UserError(
            f"{folder} is a transcoder, and probes ask what the latents of an SAE tell of the "
            "activations it reconstructs: leave it out (sweep.only=... chooses runs)"
        )
    if config.sae.tap == EMBEDDING:
        raise UserError(
            f"{folder} reads the embedding, which at the last token of a prompt knows nothing of "
            "the rest: probe an SAE of another site"
        )
    fingerprint = run.fitting(config.model)
    gemma, _ = models.config_and_fingerprint(config.model, config)
    check_context(gemma, own.max_tokens, key="probe.max_tokens")
    fresh = ProbeRecord(
        name=config.name,
        step=run.step,
        model=config.model.weights,
        tap=config.sae.tap.name,
        width=run.sae.W_enc.shape[1],
        settings=own.model_dump(mode="json", include={"k", "splits", "rows", "max_tokens"}),
        fingerprints={
            "sae": run.sae_fingerprint,
            "model": fingerprint,
            "model_dtype": config.model.dtype,
        },
        data_sets={},
        means={},
    )
    return Probed(run, own, continued(folder, fresh))


def _probe_group(group: Sequence[Probed], models: Models, *, stop: Stop) -> None:
    """Runs of one model with the same settings."""
    settings, first = group[0].settings, group[0].run
    files = data_files(settings)
    digests = {
        name: read_data_set(path, name=name, rows=settings.rows).digest
        for name, path in files.items()
    }  # all of them before the first pass: a bad file is told of at once
    waiting = {name: [one for one in group if not _has(one, name, digests[name])] for name in files}
    for one in group:
        if not any(one in lacking for lacking in waiting.values()):
            logger.info("%s: its probes are current", one.run.folder)
    with ProgressMeter("probe", total=len(files), unit="data sets") as meter:
        for name, path in files.items():
            if stop():
                raise Interrupted("the probes were stopped; finished data sets are saved")
            if waiting[name]:
                data = read_data_set(path, name=name, rows=settings.rows)
                model = models.language_model(first.config.model, first.config, how="float32")
                saes = [(one.tap, one.run.sae) for one in waiting[name]]
                found = score_on(data, saes, settings, model=model, stop=stop)
                for one, scores in zip(waiting[name], found, strict=True):
                    one.record.data_sets[name] = scores
                    one.record = write_probe(one.run.folder, one.record)
            meter.update(meter.done + 1)
    for one in group:
        logger.info("%s: %s", one.run.folder, summary(one.record))


def _has(one: Probed, name: str, digest: str) -> bool:
    found = one.record.data_sets.get(name)
    return found is not None and found.digest == digest


def summary(record: ProbeRecord) -> str:
    """The AUCs in a line."""

    def shown(pair: Mapping[str, tuple[float, float]]) -> str:
        mean, spread = pair["auc"]
        return f"{mean:.3f} ± {spread:.3f}"

    parts = [
        f"{shown(pair)} {'raw' if kind == RAW else f'k {kind}'}"
        for kind, pair in record.means.items()
    ]
    return f"AUC over {len(record.data_sets)} data sets: {', '.join(parts)}"
