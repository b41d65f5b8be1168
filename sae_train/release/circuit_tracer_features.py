"""Latents as circuit-tracer's page of a graph reads them: beside a set of transcoders.

    features/index.json.gz     {"0": {"filename": "layer_0.bin", "offsets": [0, 5123, ...]}, ...}
    features/layer_0.bin       per latent: 4 bytes of length, little-endian, and deflated JSON

Both are what the page fetches from the Hub or, for a set on a disk, from `--features_dir`
(decoderesearch/circuit-tracer 4bb8c0e, frontend/assets/feature_examples/init-feature-examples.js);
the fields of the JSON are those of frontend/feature_models.py.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from activation_cache.storage.files import StoragePath, make_folder, replacing, write_bytes
from sae_train.latents.reader import Latents
from sae_train.latents.records import Context, Histogram, Latent, text_of

FOLDER, INDEX = "features", "index.json.gz"
_PERCENTILES = 100


def write_features(by_layer: Mapping[int, Latents], folder: StoragePath) -> StoragePath:
    """Write the features of a set of transcoders, the index last; returns their folder."""
    target = make_folder(folder / FOLDER)
    index: dict[str, Any] = {}
    for layer, latents in sorted(by_layer.items()):
        path = target / f"layer_{layer}.bin"
        offsets = [0]
        with replacing(path) as temporary, open(temporary, "wb") as file:
            for latent in latents:
                text = json.dumps(feature(latent), allow_nan=False)
                data = zlib.compress(text.encode())
                file.write(len(data).to_bytes(4, "little") + data)
                offsets.append(offsets[-1] + 4 + len(data))
        index[str(layer)] = {"filename": path.name, "offsets": offsets}
    write_bytes(target / INDEX, gzip.compress(json.dumps(index).encode(), mtime=0))
    return target


def feature(latent: Latent) -> dict[str, Any]:
    """One latent's JSON; of one that never fires without examples."""
    groups: dict[int, list[Context]] = {}
    for context in latent.contexts:
        groups.setdefault(context.interval, []).append(context)
    seen: set[tuple[int, ...]] = set()
    return {
        "transcoder_id": latent.sae,
        "index": latent.index,
        "examples_quantiles": [
            {
                "quantile_name": f"Interval {interval}" if interval else "Top activations",
                "examples": [_example(one, seen) for one in contexts],
            }
            for interval, contexts in groups.items()
        ],
        "top_logits": [text_of(one.token) for one in latent.top_logits],
        "bottom_logits": [text_of(one.token) for one in latent.bottom_logits],
        "act_min": latent.histogram.edges[0] if latent.histogram else 0.0,
        "act_max": float(latent.maximum),
        "quantile_values": percentiles(latent.histogram),
        "histogram": [float(count) for count in latent.histogram.counts]
        if latent.histogram
        else [],
        "activation_frequency": latent.frequency,
    }


def _example(context: Context, seen: set[tuple[int, ...]]) -> dict[str, Any]:
    repeated = context.token_ids in seen
    seen.add(context.token_ids)
    return {
        "tokens_acts_list": [round(value, 4) for value in context.values],
        "train_token_ind": context.peak,
        "is_repeated_datapoint": repeated,
        "tokens": [text_of(token) for token in context.tokens],
    }


def percentiles(histogram: Histogram | None) -> list[float]:
    """The 1st to the 100th percentile of the values where it fires, within a bin of the histogram.

    Values are taken as spread evenly over their bin.
    """
    if histogram is None:
        return []
    counts, edges = np.asarray(histogram.counts), np.asarray(histogram.edges)
    total = np.cumsum(counts)
    wanted = np.arange(1, _PERCENTILES + 1) / _PERCENTILES * total[-1]
    place = np.searchsorted(total, wanted)  # never an empty bin: its total is the one before's
    share = (wanted - (total[place] - counts[place])) / counts[place]
    return (edges[place] + share * np.diff(edges)[place]).tolist()
