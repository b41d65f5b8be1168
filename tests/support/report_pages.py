"""A sweep whose report shows everything, and what a report's page holds."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

from launch.sweep.expand import expand
from sae_train.config.file import write_config
from tests.support.run_folders import sweep_config, write_run


def published_sweep(folder: Path, *, more: bool = True) -> Path:
    """Two widths at two sparsities; with `more`, all that an evaluation may hold."""
    config = sweep_config(folder, coefficients=[1e-3, 4e-3], widths=[2048, 4096])
    write_config(config, folder)
    for run, l0 in zip(expand(config), (96, 82, 21, 18), strict=True):
        write_run(run.config, l0=l0)
        path = run.folder / "evaluation.json"
        found = json.loads(path.read_text())
        delta = found["delta_loss"]
        rows = [("Europarl", 2.0), ("<b>DM Math", 0.5), ("silent", None)]
        numbers = {"l0": l0, "fvu": 0.2, "delta_loss": delta}
        kinds = ("float32", "bfloat16")
        found |= {
            "importance_uniformity": 0.7 - l0 / 1000,
            "by_subset": {
                name: {"l0": l0, "fvu": 0.2, "delta_loss": None if f is None else f * delta}
                for name, f in rows
            },
            "by_prefix": [
                numbers | {"latents": latents, "alive_fraction": 0.5} for latents in (512, 2048)
            ],
            "by_precision": [numbers | {"model": m, "sae": s} for m in kinds for s in kinds],
        }
        if more:
            path.write_text(json.dumps(found))
            other = found | {"l0": l0 / 2, "delta_loss": 2 * delta}
            (run.folder / "evaluation-gemma-it.json").write_text(json.dumps(other))
    return folder


def charts_of(html: str, *, of: Path | None = None) -> list[dict[str, Any]]:
    """The charts that stand in a page, or in a piece of the page `of`."""
    source = of.read_text() if of else html
    (packed,) = re.findall(r'id="charts">([^<]*)<', source)
    every = json.loads(gzip.decompress(base64.b64decode(packed)))
    return [every[int(number)] for number in re.findall(r'id="chart-(\d+)"', html)]
