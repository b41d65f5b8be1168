"""What rows in fewer bytes do to an SAE: L0, FVU, delta loss by `cache.dtype`.

    python -m launch.demo demo-data                  # model and text
    python -m benchmarks.precision.row_dtypes runs/precision
    python -m benchmarks.precision.row_dtypes runs/precision --errors STORE ...    # of rows alone

Two taps of Gemma 3 270M: `resid_post.5` of the demo's text and `resid_post.12` of Python's
standard library (the stores of `benchmarks.precision.quality`), harvested once in float32. The
other dtypes' stores are made of these rows, with the bytes that a harvest would write. The demo's
recipe, whitened rows included, which counts errors in directions of little variance most; 1,024
latents, 300 steps of 256 rows, `match_l0` at 50. Every SAE is measured on the last 16,384 rows in
float32, and spliced into the model on `--sequences` held-out sequences of 256 tokens.

SAEs of one seed see the same rows in the same order and begin with the same weights, so each is
compared with the float32 one of its seed. The folder keeps stores, runs and row_dtypes.jsonl; what
is there is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from activation_cache.config import RowDtype
from activation_cache.harvest.harvest import harvest
from activation_cache.storage.files import storage_path
from activation_cache.storage.records import write_record
from activation_cache.storage.row_range import Segment
from activation_cache.store.store import MANIFEST_FILE, TOKENS_FOLDER, Store, open_store
from activation_cache.store.tap_array import Packing, host_dtype, stored_row_bytes
from activation_cache.store.writer import Bucket, BucketWriter, read_commits
from benchmarks.precision.quality import STORES, base_config
from benchmarks.support.measure import markdown, prepare
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import resolved_yaml, with_values
from sae_train.config.run import Config
from sae_train.evaluate.job import Job
from sae_train.evaluate.jobs import Models, jobs_of
from sae_train.evaluate.result import fvus
from sae_train.evaluate.sums import SaeSums, SiteSums, sae_batch
from sae_train.evaluate.text_pass import Pass
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.runs.folder import newest_checkpoint
from sae_train.train.loop import train

logger = logging.getLogger("row dtypes")

DTYPES: tuple[RowDtype, ...] = get_args(RowDtype)
SAMPLE_ROWS = 16_384
NUMBERS = {
    "l0": ".1f",
    "fvu": ".4f",
    "fvu_without_outlying": ".4f",
    "fvu_median_token": ".4f",
    "alive": ".1%",
    "delta_loss": ".3f",
}


def config_of(store: str, dtype: RowDtype, *, seed: int, root: Path) -> Config:
    """One run; float32's store is that of `benchmarks.precision.quality`."""
    name = "store" if dtype == "float32" else f"store_{dtype}"
    sparsity = {"penalty": "match_l0", "target": 50, "coefficient": 1e-4, "warmup_steps": 100}
    own: dict[str, Any] = {
        "cache.path": str(root / store / name),
        "cache.dtype": dtype,
        "sae.whitening": 0.5,
        "sae.width": 1024,
        "train.tokens": 300 * 256,
        "train.seed": seed,
        "train.sparsity": sparsity,
        "output": str(root / store / f"rows_{dtype}" / f"seed_{seed}"),
    }
    return with_values(base_config(store, root), own, source="benchmark")


def convert(source: Store, config: Config) -> None:
    """The store of a config's dtype, of the rows of one in float32."""
    path = storage_path(config.cache.path)
    if (path / MANIFEST_FILE).exists():
        return
    dtype = config.cache.dtype
    manifest = source.manifest.model_copy(update={"dtype": dtype})
    with BucketWriter(path, manifest) as writer:
        for number in range(manifest.num_buckets):
            span = manifest.bucket_span(number)
            rows = {
                tap: source.read(tap, start=span.start, stop=span.stop).astype(host_dtype(dtype))
                for tap in source.taps
            }
            origin = source.provenance(start=span.start, stop=span.stop)
            writer.submit(Bucket(number, rows, origin.sequence, origin.position))
    commits = read_commits(path, manifest).values()
    sites = [
        entry.model_copy(update={"mean_squared_norm": total / manifest.rows})
        for entry in manifest.sites
        for total in [math.fsum(one.sum_of_squares[entry.tap.name] for one in commits)]
    ]
    shutil.copytree(str(source.path / TOKENS_FOLDER), str(path / TOKENS_FOLDER))
    write_record(path / MANIFEST_FILE, manifest.model_copy(update={"sites": sites}))


def errors_of_rows(stores: Sequence[Store]) -> str:
    """Of each tap, what rows lose: squared error over variance, in all and by dim."""
    head = ["tap", "rows", "bytes a row", "error / variance", "of the median dim", "of the worst"]
    lines = []
    for store in stores:
        for tap in store.taps:
            x_ND = store.read(tap, start=0, stop=SAMPLE_ROWS).astype(np.float32)
            variance_D = x_ND.var(axis=0, dtype=np.float64)
            for name, (size, y_ND) in _stored(x_ND).items():
                error_D = np.square(y_ND.astype(np.float64) - x_ND).mean(axis=0)
                shares_D = error_D / variance_D
                found = (error_D.sum() / variance_D.sum(), np.median(shares_D), shares_D.max())
                lines.append([tap.name, name, f"{size:,}", *(f"{one:.1e}" for one in found)])
    return markdown(head, lines)


def _stored(x_ND: Float[np.ndarray, "N D"]) -> dict[str, tuple[int, np.ndarray]]:
    """Bytes of a row, and the rows as they are read, by how they are stored."""
    width, block_rows = x_ND.shape[1], 256
    packing = Packing(block_rows, width)
    packed, segments = packing.pack(x_ND), [Segment(0, len(x_ND))]
    scale_N1 = np.abs(x_ND).max(axis=1, keepdims=True) / np.float32(127)
    size = functools.partial(stored_row_bytes, width=width, block_rows=block_rows)
    return {
        "bfloat16": (size("bfloat16"), x_ND.astype(ml_dtypes.bfloat16)),
        "int8": (size("int8"), packing.read(segments, lambda _: packed)),
        "a scale per row alone": (width + 4, np.rint(x_ND / scale_N1) * scale_N1),
    }


def measure_on_rows(configs: Sequence[Config], root: Path) -> None:
    """L0 and FVU of runs of one store on its last rows in float32; they go to the file."""
    exact = open_store(configs[0].cache.path)
    x_ND = exact.read(configs[0].sae.tap, start=exact.rows - SAMPLE_ROWS, stop=exact.rows)
    for config in configs:
        sae = fold(load_trained(storage_path(config.output)))
        _write(config, root, _on_rows(sae, x_ND))


def measure_in_the_model(configs: Sequence[Config], root: Path, *, sequences: int) -> None:
    """Delta loss of runs of one store in one pass over held-out text; it goes to the file."""
    models = Models(given=None)
    jobs = [_job(config, models, sequences=sequences) for config in configs]
    one = Pass(jobs, models.load(jobs[0]))
    one.run()
    for index, config in enumerate(configs):
        delta_loss = one.spliced[index, False].mean - one.base.mean
        _write(config, root, {"delta_loss": delta_loss, "sequences": sequences})


def _write(config: Config, root: Path, found: dict[str, Any]) -> None:
    key = {"tap": config.sae.tap.name, "dtype": config.cache.dtype, "seed": config.train.seed}
    with (root / "row_dtypes.jsonl").open("a") as file:
        file.write(json.dumps(key | found) + "\n")


def _on_rows(sae: Sae, x_ND: Float[np.ndarray, "N D"]) -> dict[str, float]:
    """L0, the three FVUs and the share of latents that fire, of rows in float32."""
    site, sums = SiteSums(), SaeSums(error_TS=np.zeros((1, len(x_ND)), np.float32))
    x_BSD, counted_BS = jnp.asarray(x_ND[None]), np.ones((1, len(x_ND)), bool)
    usual_BS = site.add(x_BSD, counted_BS)
    sums.add(sae_batch(sae, x_BSD, counted_BS), usual_BS=usual_BS, first=0)
    l0 = float(sums.active_S.sum() / len(x_ND))
    found = {name: value for name, value in fvus(site=site, sae=sums).items() if value is not None}
    return {"l0": l0, **found, "alive": float((sums.fired_F > 0).mean())}


def _job(config: Config, models: Models, *, sequences: int) -> Job:
    folder = storage_path(config.output)
    (job,) = jobs_of(folder, settings=None, models=models, stop=lambda: False)
    own = {"sequences": sequences, "loss_sequences": sequences, "importance_sequences": 0}
    own |= {"sequences_per_batch": min(sequences, 4)}
    return dataclasses.replace(job, settings=job.settings.model_copy(update=own), compared=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with the largest distance from them; differences from float32 by seed."""
    head = ["tap", "rows", "L0", "FVU", "without outlying", "median token", "alive", "delta loss"]
    head += ["FVU to float32's", "delta loss to float32's", "seeds"]
    lines = []
    taps = dict.fromkeys(row["tap"] for row in rows)
    for tap, dtype in itertools.product(taps, DTYPES):
        own, exact = (_by_seed(rows, tap=tap, dtype=kind) for kind in (dtype, "float32"))
        cells = [
            _spread([row.get(name) for row in own.values()], NUMBERS[name]) for name in NUMBERS
        ]
        pairs = [(own[s], exact[s]) for s in sorted(own.keys() & exact.keys())]
        if dtype != "float32":
            cells.append(_spread([a["fvu"] / b["fvu"] - 1 for a, b in pairs], "+.2%"))
            losses = [(a.get("delta_loss"), b.get("delta_loss")) for a, b in pairs]
            found = [None if None in pair else pair[0] - pair[1] for pair in losses]
            cells.append(_spread(found, "+.4f"))
        lines.append([tap, dtype, *cells, *[""] * (len(head) - len(cells) - 3), str(len(own))])
    return markdown(head, lines)


def _by_seed(rows: Sequence[dict[str, Any]], *, tap: str, dtype: str) -> dict[int, dict[str, Any]]:
    """All that was measured of the SAEs of a tap and a dtype."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if (row["tap"], row["dtype"]) == (tap, dtype):
            found[row["seed"]] = found.get(row["seed"], {}) | row
    return found


def _spread(values: Sequence[float | None], form: str) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return "–"
    mean = float(np.mean(numbers))
    return f"{mean:{form}} ± {max(abs(one - mean) for one in numbers):{form.lstrip('+')}}"


def main() -> int:
    """Harvest, convert, train, measure; print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for stores, runs and numbers; they go on")
    parser.add_argument("--errors", nargs="+", help="only what rows of these stores would lose")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=8, help="for delta loss; 0: none")
    arguments = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    if arguments.errors:
        sys.stdout.write(errors_of_rows([open_store(path) for path in arguments.errors]) + "\n")
        return 0
    root = arguments.folder
    for store in arguments.stores:
        exact = config_of(store, "float32", seed=0, root=root)
        harvest(
            model=exact.model,
            text=exact.text,
            cache=exact.cache,
            mesh=exact.mesh,
            resolved_config_yaml=resolved_yaml(exact),
        )
        for dtype in DTYPES:
            convert(open_store(exact.cache.path), config_of(store, dtype, seed=0, root=root))
    for seed in arguments.seeds:
        for store in arguments.stores:
            configs = [config_of(store, dtype, seed=seed, root=root) for dtype in DTYPES]
            for config in configs:
                if newest_checkpoint(storage_path(config.output)) != config.train.steps:
                    logger.info("%s, %s, seed %d", store, config.cache.dtype, seed)
                    train(config)
    file = root / "row_dtypes.jsonl"
    for store in arguments.stores:
        cells = [
            config_of(store, dtype, seed=seed, root=root)
            for seed in arguments.seeds
            for dtype in DTYPES
        ]
        if waiting := _without(cells, _rows(file), "fvu"):
            measure_on_rows(waiting, root)
        if arguments.sequences and (waiting := _without(cells, _rows(file), "delta_loss")):
            measure_in_the_model(waiting, root, sequences=arguments.sequences)
    sys.stdout.write(table(_rows(file)) + "\n")
    return 0


def _without(configs: Sequence[Config], rows: Sequence[dict[str, Any]], name: str) -> list[Config]:
    """The runs of which a number isn't in the file."""
    done = [(row["tap"], row["dtype"], row["seed"]) for row in rows if name in row]
    return [
        one for one in configs if (one.sae.tap.name, one.cache.dtype, one.train.seed) not in done
    ]


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    sys.exit(main())
