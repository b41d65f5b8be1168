"""Neuronpedia's bulk import layout, and SAEDashboard's batch files.

    neuronpedia/{model}/{layer}-{set}/
      release.jsonl model.jsonl sourceset.jsonl source.jsonl
      features/batch-0.jsonl.gz activations/batch-0.jsonl.gz explanations/batch-0.jsonl.gz
    neuronpedia/batches/{model}_{set}_{hook}_{width}/
      run_settings.json skipped_indexes.json batch-0.json

Keys and their order are those of SAEDashboard's exporter (db4839a, neuronpedia_export.py), whose
output ours equals but for times and ids. The site's importer takes a table's columns from a file's
first line, so that all lines of a file have the same keys; it reads `index` as text.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from activation_cache.storage.files import (
    StoragePath,
    make_folder,
    remove_tree,
    write_bytes,
    write_json,
)
from sae_train.latents.reader import Latents
from sae_train.latents.schema import GROUP, RECORD
from sae_train.release.neuronpedia import Chosen, Source, feature

# What SAEDashboard's exporter writes where no creator is given.
FALLBACK_CREATOR = "clkht01d40000jv08hvalcvly"
# Neuronpedia's names of our methods of explaining.
METHOD_NAMES = {"max-act-logits": "np_max-act-logits", "examples": "eleuther_acts_top20"}
_COMPRESSION = 5
_STRENGTH = 10  # with which the site steers by a latent, unless told otherwise


@dataclass(frozen=True)
class About:
    """Who publishes it, and what the site is to say of it.

    Attributes:
        release: a name for all SAEs that are published together.
        title: a line about them.
        url: of more about them; may be empty.
        repository, folder: of the weights on the Hub; may be empty.
    """

    release: str
    title: str
    creator: str
    creator_id: str = FALLBACK_CREATOR
    url: str = ""
    repository: str = ""
    folder: str = ""


@dataclass
class Written:
    """What `write_source` wrote."""

    folder: StoragePath
    latents: int = 0
    contexts: int = 0
    explanations: int = 0
    files: list[StoragePath] = field(default_factory=list)


def write_source(
    latents: Latents,
    target: StoragePath,
    *,
    source: Source,
    about: About,
    chosen: Chosen,
    decoder_FD: Float[np.ndarray, "F D"] | None = None,
    batches: bool = False,
) -> Written:
    """Write one SAE's folder below `target`, from scratch; source.jsonl comes last.

    Args:
        batches: SAEDashboard's batch files too.
    """
    written = Written(target / source.model / source.id)
    remove_tree(written.folder)
    now = _time(latents)
    dashboards = _batch_folder(target, source, latents)
    if batches:
        remove_tree(dashboards)
        _write_batch_records(latents, make_folder(dashboards), source)
    for number, features in enumerate(_features(latents, source, chosen, decoder_FD)):
        if batches:
            write_json(dashboards / f"batch-{number}.json", _batch(source, features))
        _write_tables(written, number, features, latents, source=source, about=about, now=now)
        written.latents += len(features)
    for name, row in _records(source, about, latents, now).items():
        path = written.folder / f"{name}.jsonl"
        write_bytes(path, _line(row))
        written.files.append(path)
    return written


def _features(
    latents: Latents,
    source: Source,
    chosen: Chosen,
    decoder_FD: Float[np.ndarray, "F D"] | None,
) -> Iterator[list[dict[str, Any]]]:
    """The features of each batch; only one batch is in memory."""
    for begin in range(0, len(latents), GROUP):
        yield [
            feature(
                latents[index],
                latents,
                source=source,
                chosen=chosen,
                decoder_D=None if decoder_FD is None else decoder_FD[index],
            )
            for index in range(begin, min(begin + GROUP, len(latents)))
        ]


def _write_tables(
    written: Written,
    number: int,
    features: Sequence[dict[str, Any]],
    latents: Latents,
    *,
    source: Source,
    about: About,
    now: str,
) -> None:
    same = {"modelId": source.model, "layer": source.id}
    neurons, activations, explanations = [], [], []
    for one in features:
        index = str(one["feature_index"])
        own = [
            _activation_row(act, place, index=index, same=same, about=about, now=now)
            for place, act in enumerate(one["activations"])
        ]
        activations += own
        greatest = max((row["maxValue"] for row in own), default=0.0)
        neurons.append(
            _neuron_row(one, greatest, source=source, latents=latents, about=about, now=now)
        )
        for place, said in enumerate(latents.explanations.get(one["feature_index"], ())):
            explanations.append(
                {
                    "id": _id(source.model, source.id, index, "explanation", str(place)),
                    **same,
                    "index": index,
                    "description": said.text,
                    "authorId": about.creator_id,
                    "triggeredById": about.creator_id,
                    "typeName": METHOD_NAMES.get(said.method, said.method),
                    "explanationModelName": said.model,
                    "notes": None,
                    "createdAt": now,
                }
            )
    tables = {"features": neurons, "activations": activations, "explanations": explanations}
    for name, rows in tables.items():
        if rows:
            path = make_folder(written.folder / name) / f"batch-{number}.jsonl.gz"
            data = b"".join(map(_line, rows))
            write_bytes(path, gzip.compress(data, _COMPRESSION, mtime=0))
            written.files.append(path)
    written.contexts += len(activations)
    written.explanations += len(explanations)


def _neuron_row(
    one: dict[str, Any],
    greatest: float,
    *,
    source: Source,
    latents: Latents,
    about: About,
    now: str,
) -> dict[str, Any]:
    own = latents.record.saes[0].name
    alike = [n for n in latents[one["feature_index"]].neighbours if n.sae == own]
    copied = (
        "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
        "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
        "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
        "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
        "freq_hist_data_bar_heights", "freq_hist_data_bar_values",
        "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
    )  # fmt: skip
    return {
        "modelId": source.model,
        "layer": source.id,
        "index": str(one["feature_index"]),
        "creatorId": about.creator_id,
        "createdAt": now,
        "maxActApprox": greatest,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": _STRENGTH,
        "hookName": source.hook,
        "topkCosSimIndices": [n.index for n in alike],
        "topkCosSimValues": [round(n.cosine, 5) for n in alike],
        **{name: one[name] for name in copied},
        "sourceSetName": source.set_name,
    }


def _activation_row(
    one: dict[str, Any], place: int, *, index: str, same: dict[str, str], about: About, now: str
) -> dict[str, Any]:
    values = one["values"]
    greatest = max(values)
    return {
        "id": _id(same["modelId"], same["layer"], index, str(place)),
        "tokens": one["tokens"],
        "index": index,
        "layer": same["layer"],
        "modelId": same["modelId"],
        "maxValue": greatest,
        "maxValueTokenIndex": values.index(greatest),
        "minValue": min(values),
        "values": values,
        "creatorId": about.creator_id,
        "dataSource": None,
        "dataIndex": None,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "createdAt": now,
        "lossValues": [],
        "logitContributions": None,
        "binMin": one["bin_min"],
        "binMax": one["bin_max"],
        "binContains": one["bin_contains"],
        "qualifyingTokenIndex": one["qualifying_token_index"],
        "zIndices": None,
        "zValues": None,
    }


def _records(source: Source, about: About, latents: Latents, now: str) -> dict[str, dict[str, Any]]:
    """The one row of release, model, source set and source; the source comes last."""
    creator = about.creator_id
    release = {
        "name": about.release, "description": about.title, "creatorName": about.creator,
        "creatorId": creator, "visibility": "PUBLIC", "isNewUi": False, "featured": False,
        "descriptionShort": about.title, "urls": [about.url] if about.url else [],
        "creatorEmail": None, "creatorNameShort": about.creator, "defaultSourceSetName": None,
        "defaultSourceId": None, "defaultUmapSourceIds": [], "createdAt": now,
    }  # fmt: skip
    model = {
        "id": source.model, "instruct": source.model.endswith("-it"), "creatorId": creator,
        "displayNameShort": source.model, "displayName": source.model, "tlensId": None,
        "dimension": None, "visibility": "PUBLIC", "defaultSourceSetName": None,
        "defaultSourceId": None, "inferenceEnabled": False, "layers": 0, "neuronsPerLayer": 0,
        "createdAt": now, "owner": "", "updatedAt": now, "website": None,
    }  # fmt: skip
    sourceset = {
        "modelId": source.model, "name": source.set_name, "creatorId": creator,
        "hasDashboards": True, "visibility": "PUBLIC", "description": about.title, "type": "",
        "creatorName": about.creator, "urls": [], "creatorEmail": None,
        "releaseName": about.release, "defaultOfModelId": None, "defaultRange": 1,
        "defaultShowBreaks": True, "showDfa": False, "showCorrelated": False,
        "showHeadAttribution": False, "showUmap": False, "createdAt": now,
    }  # fmt: skip
    row = {
        "id": source.id, "modelId": source.model, "setName": source.set_name,
        "creatorId": creator, "hasDashboards": True, "inferenceEnabled": False,
        "inferenceHosts": [], "saelensConfig": None, "saelensRelease": None,
        "saelensSaeId": None, "hfRepoId": about.repository, "hfFolderId": about.folder,
        "visibility": "PUBLIC", "defaultOfModelId": None, "hasUmap": False,
        "hasUmapLogSparsity": False, "hasUmapClusters": False,
        "num_prompts": latents.record.sequences,
        "num_tokens_in_prompt": latents.record.sequence_length, "dataset": source.dataset,
        "notes": None, "createdAt": now,
    }  # fmt: skip
    return {"release": release, "model": model, "sourceset": sourceset, "source": row}


def _batch(source: Source, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model_id": source.model,
        "layer": source.layer,
        "sae_set": source.set_name,
        "sae_id_suffix": None,
        "features": list(features),
    }


def _batch_folder(target: StoragePath, source: Source, latents: Latents) -> StoragePath:
    hook = source.hook.replace("/", "_")
    name = f"{source.model}_{source.set_name}_{hook}_{len(latents)}"
    return target / "batches" / name


def _write_batch_records(latents: Latents, folder: StoragePath, source: Source) -> None:
    """What SAEDashboard's runner writes beside its batches, but for the tokens' torch file."""
    record = latents.record
    settings = {
        "sae_set": source.set_name,
        "model_id": source.model,
        "layer": source.layer,
        "outputs_dir": str(folder),
        "huggingface_dataset_path": source.dataset,
        "n_prompts_total": record.sequences,
        "n_tokens_in_prompt": record.sequence_length,
        "n_features_at_a_time": GROUP,
    }
    write_json(folder / "run_settings.json", settings)
    skipped = {"model_id": source.model, "layer": str(source.layer), "sae_set": source.set_name}
    write_json(
        folder / "skipped_indexes.json", skipped | {"log_sparsity": None, "skipped_indexes": []}
    )


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _id(*parts: str) -> str:
    """25 characters as the site's ids have; the same row has the same one, so imports repeat."""
    return "c" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _time(latents: Latents) -> str:
    """When the latents were written: the same files give the same bytes."""
    stamp = (latents.folder / RECORD).stat().st_mtime
    return datetime.datetime.fromtimestamp(stamp, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
