"""The SAEs of `benchmarks.quality`, ours and others', as `sae probe` probes them.

    python -m benchmarks.quality.probing runs/quality

needs scikit-learn and sae-probes' data sets (docs/probing.md) and no other library's trainer: the
SAEs lie in the folder. It probes those of one tap and text at one L0, of all trainers and seeds, on
the ten data sets with short prompts, and prints for each k the AUC and F1: means over data sets and
splits, then over seeds, ± the standard deviation over seeds. The folder's probing.json keeps what
was found.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.language_model.model import conversion_folder, load_model
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import Results, matching
from benchmarks.quality.stores import LAYER, SITES, TEXTS, harvested
from benchmarks.quality.study import TARGETS, table_records
from benchmarks.support.measure import markdown, prepare
from sae_train.config.evaluation import ProbeConfig
from sae_train.probe.datasets import data_files, read_data_set
from sae_train.probe.record import RAW, DataSetScores
from sae_train.probe.scoring import score_on

logger = logging.getLogger("probing")

# sae-probes' protocol, but of each data set the first 500 rows: 400 for training, 100 for the test.
SETTINGS = ProbeConfig(rows=500, k=[1, 5])
_MEASURES = ("auc", "f1")


def main() -> int:
    """Probe what isn't probed yet, and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.probing", description=__doc__)
    parser.add_argument("folder", type=Path, help="of benchmarks.quality")
    parser.add_argument("--site", choices=SITES, default=SITES[0])
    parser.add_argument("--text", choices=TEXTS, default=TEXTS[1])
    parser.add_argument("--target", type=int, choices=TARGETS, default=50, help="L0")
    told = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    path: Path = told.folder / "probing.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    results = Results(told.folder)
    rows = harvested(told.site, told.text, told.folder)
    wanted = {
        (method.name, record.seed): results.sae(record)
        for method in METHODS
        for record in matching(
            table_records(results, method.name),
            site=told.site,
            text=told.text,
            target=told.target,
        )
    }
    names = {key: sae.fingerprint for key, sae in wanted.items()}
    model = load_model(rows.config.model, converted=conversion_folder(rows.store.path))
    for name, file in data_files(SETTINGS).items():
        data = read_data_set(file, name=name, rows=SETTINGS.rows)
        own = found.setdefault(name, {})
        waiting = [key for key in wanted if names[key] not in own]
        if waiting:
            saes = [(rows.tap, wanted[key]) for key in waiting]
            scores = score_on(data, saes, SETTINGS, model=model)
            own |= {names[key]: one.model_dump() for key, one in zip(waiting, scores, strict=True)}
            path.write_text(json.dumps(found))
            logger.info("%s: %d SAEs", name, len(waiting))
    sys.stdout.write(f"{told.site}.{LAYER}, {told.text}, L0 {told.target}\n\n")
    sys.stdout.write(table(found, names) + "\n")
    return 0


def table(found: dict[str, dict[str, Any]], names: dict[tuple[str, int], str]) -> str:
    """A row for each trainer, and the activations' own first."""
    probes = [str(k) for k in SETTINGS.k]
    head = ["trainer", "seeds", *(f"{one.upper()}, k = {k}" for one in _MEASURES for k in probes)]
    lines = []
    for trainer in dict.fromkeys(trainer for trainer, _ in names):
        own = [name for (one, _), name in names.items() if one == trainer]
        cells = [_cell(found, own, k, measure) for measure in _MEASURES for k in probes]
        lines.append([trainer, str(len(own)), *cells])
    first = next(iter(names.values()))
    raw = [_cell(found, [first], RAW, measure) for measure in _MEASURES for _ in probes]
    return markdown(head, [["the activations, all of them", "-", *raw], *lines])


def _cell(found: dict[str, dict[str, Any]], saes: list[str], kind: str, measure: str) -> str:
    """The mean over data sets, splits and SAEs, and how far SAEs are from each other."""
    means = []
    for sae in saes:
        scores = [DataSetScores(**one[sae]).probes[kind] for one in found.values()]
        means.append(np.mean([getattr(one, measure) for one in scores]))
    spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
    return f"{np.mean(means):.3f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
