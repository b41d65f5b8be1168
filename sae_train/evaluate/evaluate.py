"""`evaluate`: how well SAEs reconstruct a site's activations inside the model, on held-out text.

The protocol is Gemma Scope's (arXiv 2408.05147, section 4); docs/evaluation.md defines every
number.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from activation_cache.config import Dtype, ModelConfig
from activation_cache.gemma.taps import EMBEDDING
from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime import exchange
from activation_cache.storage.files import AnyPath, storage_path
from sae_train.config.run import EvaluationConfig
from sae_train.evaluate.job import Job
from sae_train.evaluate.jobs import Models, jobs_of
from sae_train.evaluate.result import (
    BOS_TREATMENT,
    FORMAT_VERSION,
    Evaluation,
    headline,
    measures,
    prefix_row,
    read_evaluation,
    write_evaluation,
)
from sae_train.evaluate.text_pass import Pass

logger = logging.getLogger(__name__)

_OTHER_DTYPE: dict[Dtype, Dtype] = {"float32": "bfloat16", "bfloat16": "float32"}


def evaluate(
    folders: Sequence[AnyPath],
    *,
    settings: EvaluationConfig | None = None,
    places: Sequence[str] = (),
    model: LanguageModel | None = None,
    force: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> list[Evaluation]:
    """Evaluate the newest checkpoint of each run and write its evaluation.json.

    The extra evaluations that `evaluation.also` names are measured too, each into a file of its
    own. An evaluation that exists for the same SAE, model, tokens and settings is kept.

    Processes that have joined (`processes.join`) share the batches; the main one writes.

    Args:
        folders: run folders.
        settings: replaces the `evaluation` section of each run's config.
        places: overrides of each run's config: `cache.path=...`, `model.weights=...`, where its
            store and its model's weights lie now.
        model: the runs' own model, if it is loaded already; else each model is loaded once for
            all runs that share it.
        force: evaluate again what is current.
        stop: asked between batches.

    Returns:
        For each folder the run's own evaluation, in the order of the folders.

    Raises:
        UserError: a run has no checkpoint; an SAE or a store doesn't belong to this model; text is
            missing or too short.
        Interrupted: `stop` returned True; runs not evaluated yet are unchanged.
    """
    models = Models(given=model)
    jobs = [
        job
        for folder in folders
        for job in jobs_of(
            storage_path(folder), settings=settings, places=places, models=models, stop=stop
        )
    ]
    waiting = []
    for job in jobs:
        if not force and job.is_current(read_evaluation(job.folder, job.label)):
            logger.info("%s: the evaluation of step %d is current", _shown(job), job.step)
        else:
            waiting.append(job)
    for group in _groups(waiting):
        _evaluate(group, models, stop=stop)
    results = []
    for job in jobs:
        written = read_evaluation(job.folder, job.label)
        assert written is not None
        logger.info("%s: %s", _shown(job), written)
        if job.label is None:
            results.append(written)
    return results


def _shown(job: Job) -> str:
    return str(job.folder) if job.label is None else f"{job.folder} in {job.label}"


def _groups(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that can share passes: same model, same tokens, same settings."""

    def key(job: Job) -> tuple[str, ...]:
        return (
            job.model.model_dump_json(),
            str(job.table.path.absolute()),
            job.settings.model_dump_json(),
            repr(job.masked),
        )

    for _, group in itertools.groupby(sorted(jobs, key=key), key=key):
        yield list(group)


def _evaluate(group: list[Job], models: Models, *, stop: Callable[[], bool]) -> None:
    """Measure and write jobs that share a pass; comparing precisions takes a second pass."""
    compare = group[0].settings.compare_precision
    compared = [_in_bfloat16(job) for job in group] if compare else []
    model = None if group[0].rows is not None else models.load(group[0])
    first = Pass([*group, *compared], model, stop=stop)
    first.run()
    passes = [first]
    if compare:
        others = [_in_other_model(job) for job in group]
        compared = [_in_bfloat16(job) for job in others]
        passes.append(Pass([*others, *compared], models.load(others[0]), stop=stop))
        passes[-1].run()

    def write_all() -> None:
        for index in range(len(group)):
            evaluation = _evaluation(index, passes)
            write_evaluation(evaluation, group[index].folder, fired_F=first.saes[index].fired_F)

    exchange.run_on_main_and_broadcast("evaluation", write_all)


def _in_bfloat16(job: Job) -> Job:
    return dataclasses.replace(job, sae=job.sae.cast("bfloat16"), compared=True)


def _in_other_model(job: Job) -> Job:
    model: ModelConfig = job.model.model_copy(update={"dtype": _OTHER_DTYPE[job.model.dtype]})
    return dataclasses.replace(job, model=model, compared=True)


def _evaluation(index: int, passes: Sequence[Pass]) -> Evaluation:
    """One job's result: its numbers come from the first pass, a second compares precisions."""
    first, job = passes[0], passes[0].jobs[index]
    losses = first.losses_of(index)
    site, sae = first.sites[job.target], first.saes[index]
    importance = first.importance[index]
    found = measures(site=site, sae=sae, losses=losses, subsets=job.table.summary.subsets)
    if job.tap == EMBEDDING or (job.rows is not None and not job.rows.in_sequences):
        # Tokens of a vocabulary have no positions, nor have rows that were cut into sequences.
        none = [None] * job.table.sequence_length
        found["by_position"] |= {"tokens": [0] * len(none), "l0": none, "fvu": none}
    return Evaluation(
        format_version=FORMAT_VERSION,
        name=job.config.name,
        step=job.step,
        **found,
        bos=dict(BOS_TREATMENT),
        sequences=job.settings.sequences,
        sequence_length=job.table.sequence_length,
        loss_sequences=job.loss_sequences,
        site=job.tap.site,
        layer=job.tap.layer,
        target=job.config.sae.target,
        width=job.sae.W_enc.shape[1],
        settings=job.record,
        fingerprints=job.fingerprints,
        model=job.model.weights,
        label=job.label,
        precision=job.sae.precision,
        importance_uniformity=importance.mean,
        importance_sequences=job.importance_sequences,
        importance_tokens=int(importance.count),
        by_precision=_by_precision(index, passes) if len(passes) > 1 else [],
        by_prefix=_by_prefix(index, first),
    )


def _by_prefix(index: int, one: Pass) -> list[dict[str, Any]]:
    """A row for each prefix of a Matryoshka SAE, the whole SAE last; none of another."""
    job, whole = one.jobs[index], one.saes[index]
    return [
        prefix_row(
            first,
            site=one.sites[job.target],
            whole=whole,
            sums=sums,
            base=one.base,
            spliced=spliced,
        )
        for first in job.sae.prefixes
        for sums, spliced in [one.prefixes.get((index, first), (whole, one.spliced[index, False]))]
    ]


def _by_precision(index: int, passes: Sequence[Pass]) -> list[dict[str, Any]]:
    """Headline numbers of SAE and model, each in float32 and in bfloat16: four rows."""
    rows = []
    for one in passes:
        for number in (index, index + len(one.jobs) // 2):  # the SAE, and it in bfloat16
            job = one.jobs[number]
            numbers = headline(
                site=one.sites[job.target],
                sae=one.saes[number],
                base=one.base,
                spliced=one.spliced[number, False],
            )
            rows.append({"model": job.model.dtype, "sae": str(job.sae.W_enc.dtype), **numbers})
    return sorted(rows, key=lambda row: (row["model"], row["sae"]), reverse=True)
