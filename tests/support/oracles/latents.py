"""Latents by brute force: the statistics of a dense [sequences, S, F] array, one latent at a time.

The oracle of `sae_train.latents`, and what writes the small folder that tests of readers open.
Legend: N sequences, S position, F latents, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from activation_cache.storage.records import write_record
from sae_train.latents.sampling import sampling_order
from sae_train.latents.schema import (
    ACTIVITY,
    BINS,
    CONTEXTS,
    DIRECTIONS,
    FOLDER,
    INTERVALS,
    RANKED,
    RANKED_OF_OTHERS,
    RECORD,
    SUMMARY,
    WINDOWS_SCHEMA,
    Record,
    SaeEntry,
    Table,
)
from sae_train.latents.writer import write_table, write_vocabulary, write_windows
from tests.support.tiny_gemma import tiny_pieces

BOS = 2
Row = dict[str, Any]


@dataclass(frozen=True)
class Walked:
    """Text and what an SAE's latents are on it.

    Attributes:
        acts: 0 at tokens that don't count.
        sequences: the index of each sequence in its table.
        length: tokens before padding, of each sequence.
    """

    tokens: np.ndarray  # [N, S]
    usable: np.ndarray  # [N, S]
    acts: np.ndarray  # [N, S, F]
    sequences: Sequence[int]
    subsets: Sequence[str | None]

    @property
    def length(self) -> list[int]:
        """Of each sequence, one past its last token that isn't padding (id 0)."""
        return [int(np.flatnonzero(row)[-1]) + 1 for row in self.tokens]


def activity(walked: Walked, latent: int) -> tuple[Row, Row]:
    """The rows of `summary.parquet` (as far as text says) and of `activity.parquet`."""
    acts = walked.acts[:, :, latent]
    values = acts[acts > 0].astype(np.float64)
    tokens = int(walked.usable.sum())
    fires = len(values)
    summary: Row = {"latent": latent, "count": fires, "frequency": fires / tokens}
    summary |= {"mean": values.mean() if fires else 0.0, "maximum": values.max(initial=0.0)}
    row: Row = {"latent": latent, "histogram_low": None, "histogram_high": None}
    row["histogram_counts"] = []
    if fires:
        edges = np.linspace(values.min(), values.max(), BINS + 1)
        row |= {"histogram_low": values.min(), "histogram_high": values.max()}
        row["histogram_counts"] = np.histogram(values, edges)[0].tolist()
    row["interval_counts"] = [
        int(((values > low) & (values <= high)).sum()) for low, high in intervals(values)
    ]
    row |= _inputs(walked, acts)
    summary["top_input"] = row["input_ids"][0] if fires else None
    together = (walked.acts > 0)[acts > 0].sum(axis=0)
    either = fires + (walked.acts > 0).sum(axis=(0, 1)) - together
    score = together / np.maximum(either, 1)
    order = [one for one in np.lexsort((np.arange(len(score)), -score)) if one != latent]
    best = [int(one) for one in order if together[one]][:RANKED]
    row["coactive_latents"] = best
    row["coactive_counts"] = together[best].tolist()
    row["coactive_scores"] = score[best].tolist()
    return summary, row


def intervals(values: np.ndarray) -> list[tuple[float, float]]:
    """(low, high] of the equal intervals of (0, maximum], from high to low."""
    top = float(values.max(initial=0.0))
    edges = [top * number / INTERVALS for number in range(INTERVALS + 1)]
    return list(zip(edges[-2::-1], edges[:0:-1], strict=True))


def _inputs(walked: Walked, acts: np.ndarray) -> Row:
    ids, counts = np.unique(walked.tokens[acts > 0], return_counts=True)
    order = np.lexsort((ids, -counts))[:RANKED]
    all_ids, all_counts = np.unique(walked.tokens[walked.usable], return_counts=True)
    share = dict(zip(all_ids.tolist(), (all_counts / all_counts.sum()).tolist(), strict=True))
    total = counts.sum()
    lifts = [counts[one] / total / share[int(ids[one])] for one in order]
    names = ("input_ids", "input_counts", "input_lifts")
    return dict(zip(names, (ids[order].tolist(), counts[order].tolist(), lifts), strict=True))


def contexts(
    walked: Walked, latent: int, *, top: int, per_interval: int, size: int, first: int = 1
) -> list[Row]:
    """The rows of `contexts.parquet`, by sorting every firing of the latent."""
    acts = walked.acts[:, :, latent]
    places = [(n, s, acts[n, s]) for n, s in zip(*np.nonzero(acts), strict=True)]
    by_value = sorted(places, key=lambda one: (-one[2], walked.sequences[one[0]], one[1]))
    seen: set[int] = set()
    best = [one for one in by_value if not (one[0] in seen or seen.add(one[0]))]
    rows = [_context(walked, acts, *one[:2], 0, size, first) for one in best[:top]]

    def order(one: tuple[Any, ...]) -> int:
        arrays = [np.array([value]) for value in (latent, walked.sequences[one[0]], one[1])]
        return int(sampling_order(*arrays)[0])

    for number, (low, high) in enumerate(intervals(acts[acts > 0].astype(np.float64))):
        inside = [one for one in by_value if low < one[2] <= high]
        chosen = set(sorted(inside, key=order)[:per_interval])
        rows += [
            _context(walked, acts, *one[:2], number + 1, size, first)
            for one in inside
            if one in chosen
        ]
    return [{"latent": latent} | row for row in rows]


def _context(
    walked: Walked, acts: np.ndarray, n: int, s: int, interval: int, size: int, first: int
) -> Row:
    """Three quarters of a context come before its token, where the sequence has them."""
    end = walked.length[n]
    start = max(first, min(int(s) - 3 * size // 4, end - size))
    stop = min(end, start + size)
    return {
        "interval": interval,
        "sequence": walked.sequences[n],
        "position": int(s),
        "start": start,
        "subset": walked.subsets[n],
        "tokens": walked.tokens[n, start:stop].tolist(),
        "values": acts[n, start:stop].tolist(),
    }


def windows(walked: Walked, *, size: int, most: int) -> list[Row]:
    """The rows of `windows.parquet`: pieces of the text, and who fires on any of their tokens."""
    places = [
        (n, start)
        for n, end in enumerate(walked.length)
        for start in range(1, max(2, end - size + 1), size)
    ]

    def order(place: tuple[int, int]) -> int:
        numbers = (0, walked.sequences[place[0]], place[1])
        return int(sampling_order(*(np.array([one]) for one in numbers))[0])

    rows = []
    for n, start in sorted(sorted(places, key=order)[:most]):
        part = slice(start, min(start + size, walked.length[n]))
        rows.append(
            {
                "sequence": walked.sequences[n],
                "start": start,
                "tokens": walked.tokens[n, part].tolist(),
                "latents": np.flatnonzero((walked.acts[n, part] > 0).any(axis=0)).tolist(),
            }
        )
    return rows


def direction(
    latent: int,
    decoders: Sequence[np.ndarray],
    *,
    embedding: np.ndarray,
    gain: np.ndarray,
    encoders: Sequence[np.ndarray] = (),
) -> Row:
    """The row of `directions.parquet`; `decoders` [F, D] are of this SAE and of its sweep's others.

    `encoders` [F, D] are those of transcoders.
    """
    vector = decoders[0][latent].astype(np.float64)
    row: Row = {"latent": latent}
    for name, direction in (("", vector * gain), ("plain_", vector)):
        logits = embedding.astype(np.float64) @ direction
        row |= _ranked(f"{name}top", logits) | _ranked(f"{name}bottom", -logits, sign=-1)
        low, high = np.float32(logits.min()), np.float32(logits.max())
        row |= {f"{name}logit_low": low, f"{name}logit_high": high}
        edges = np.linspace(float(low), float(high), BINS + 1)
        row[f"{name}logit_counts"] = np.histogram(np.clip(logits, low, high), edges)[0].tolist()
    row |= _nearest("neighbour", latent, decoders)
    none: Row = {
        f"encoder_{end}_{what}": [] for end in ("top", "bottom") for what in ("ids", "values")
    }
    row |= none | _nearest("encoder_neighbour", latent, encoders)
    if len(encoders):
        logits = embedding.astype(np.float64) @ encoders[0][latent]
        row |= _ranked("encoder_top", logits) | _ranked("encoder_bottom", -logits, sign=-1)
    return row


def _ranked(name: str, values: np.ndarray, *, sign: int = 1) -> Row:
    order = np.lexsort((np.arange(len(values)), -values))[:RANKED]
    return {f"{name}_ids": order.tolist(), f"{name}_values": (sign * values[order]).tolist()}


def _nearest(name: str, latent: int, matrices: Sequence[np.ndarray]) -> Row:
    found: list[tuple[int, int, float]] = []
    for number, matrix in enumerate(matrices):
        unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        own = matrices[0][latent] / np.linalg.norm(matrices[0][latent])
        cosines = unit @ own
        order = [int(one) for one in np.argsort(-cosines) if (number, one) != (0, latent)]
        most = RANKED_OF_OTHERS if number else RANKED
        found += [(number, one, float(cosines[one])) for one in order[:most]]
    names = (f"{name}_saes", f"{name}_latents", f"{name}_cosines")
    columns = list(zip(*found, strict=True)) or [()] * 3
    return {key: list(column) for key, column in zip(names, columns, strict=True)}


def summary_of(summary: Row, directed: Row) -> Row:
    """The row of `summary.parquet`: the first of each ranking beside the statistics."""
    names = {"top_logit_token": "top_ids", "top_logit": "top_values"}
    names |= {"bottom_logit_token": "bottom_ids", "bottom_logit": "bottom_values"}
    names |= {"nearest_latent": "neighbour_latents", "nearest_cosine": "neighbour_cosines"}
    return summary | {key: (directed[name] or [None])[0] for key, name in names.items()}


def made_up(*, F: int, S: int = 24, N: int = 30, seed: int = 0) -> Walked:
    """Random text of `tiny_pieces`, and latents that fire on some of it; the last one never."""
    random = np.random.default_rng(seed)
    vocabulary = len(tiny_pieces().pieces)
    tokens = random.integers(5, vocabulary, (N, S)).astype(np.int32)
    tokens[:, 0] = BOS
    tokens[-1, S // 2 :] = 0
    usable = tokens > BOS
    acts = random.standard_normal((N, S, F)).astype(np.float32) - np.float32(2.0)
    acts = np.where(usable[:, :, None], np.maximum(acts, 0), 0)
    acts[:, :, -1] = 0
    subsets = [("news", "law")[number % 2] for number in range(N)]
    return Walked(tokens, usable, acts, range(100, 100 + N), subsets)


def write_latents_folder(
    run: Path, *, F: int = 300, name: str = "run", others: Sequence[str] = (), seed: int = 0
) -> Path:
    """Write `run`/latents as `sae latents` would, of made-up text and weights; returns it.

    Args:
        others: names of further SAEs of the sweep, as wide as this one, that lie beside `run`.
    """
    folder = run / FOLDER
    folder.mkdir(parents=True)
    walked = made_up(F=F, seed=seed)
    random = np.random.default_rng([seed, 1])
    pieces, D = tiny_pieces().pieces, 16
    decoders = [random.standard_normal((F, D)) for _ in (name, *others)]
    embedding, gain = random.standard_normal((len(pieces), D)), random.uniform(0.5, 2, D)
    rows: dict[Table, list[Row]] = {SUMMARY: [], ACTIVITY: [], DIRECTIONS: [], CONTEXTS: []}
    for latent in range(F):
        summary, active = activity(walked, latent)
        directed = direction(latent, decoders, embedding=embedding, gain=gain)
        rows[SUMMARY].append(summary_of(summary, directed))
        rows[ACTIVITY].append(active)
        rows[DIRECTIONS].append(directed)
        rows[CONTEXTS] += contexts(walked, latent, top=20, per_interval=5, size=16)
    for table, listed in rows.items():
        write_table(folder, table, [pa.Table.from_pylist(listed, table.schema)], width=F)
    found = windows(walked, size=6, most=100)
    write_windows(folder, pa.Table.from_pylist(found, WINDOWS_SCHEMA))
    write_vocabulary(folder, pieces)
    saes = [
        SaeEntry(name=one, folder=f"../{one}" if one != name else ".", width=F, fingerprint=one)
        for one in (name, *others)
    ]
    unit = decoders[0] / np.linalg.norm(decoders[0], axis=1, keepdims=True)
    cosines = np.abs(unit @ unit.T)[~np.eye(F, dtype=bool)]
    record = Record(
        name=name,
        step=100,
        model="tiny",
        site="resid_post",
        layer=1,
        architecture="jumprelu",
        width=F,
        sequences=len(walked.tokens),
        sequence_length=walked.tokens.shape[1],
        tokens=int(walked.usable.sum()),
        cofiring_tokens=int(walked.usable.sum()),
        alive=int((walked.acts > 0).any(axis=(0, 1)).sum()),
        mean_abs_cosine=float(cosines.mean()),
        subsets=["law", "news"],
        saes=saes,
        settings={"tokens": None, "top": 20, "per_interval": 5, "context": 16},
        fingerprints={"sae": name, "model": "tiny", "tokens": "made up"},
    )
    write_record(folder / RECORD, record)
    return folder


def with_acts(walked: Walked, acts: np.ndarray) -> Walked:
    """The same text with another SAE's latents."""
    return dataclasses.replace(walked, acts=acts)
