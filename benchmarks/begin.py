"""From the command to the first step: `sae train` with an empty cache of programs, and a full one.

    python -m benchmarks.begin [--rounds 5] [--folder .]

The real command, in a process of its own, on the demo's SAE and batch (configs/demo.yaml) and a
small store of random rows, made here. The first step is done when its line is in metrics.jsonl.
Cold: the folder in which compiled programs are kept is empty; warm: a run has filled it. Beside
them, what of it is Python importing what trains. The ways take turns.

Seconds by the clock depend on what else the machine does; processor time, of all threads, less so,
and is read where there is a /proc.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.measure import Times, prepare, times_of
from sae_train.config.file import load_config, resolved_yaml
from tests.support.stores import TAP, make_manifest, write_store

logger = logging.getLogger("begin")

ROOT = Path(__file__).parent.parent
WIDTH, ROWS = 640, 16_384  # Gemma 3 270M's residual stream; 16 of the demo's batches
SHUFFLE_ROWS, BLOCK_ROWS = 4096, 256
PATIENCE_SECONDS = 600
IMPORTS = "import launch.cli, sae_train.train.loop"


def _rows(start: int, stop: int, width: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(start)
    return rng.standard_normal((stop - start, width), dtype=np.float32)


def _write_config(folder: Path) -> Path:
    """The demo's config, of its sweep the middle run, on a store written beside it."""
    manifest = make_manifest(
        rows=ROWS,
        width=WIDTH,
        shuffle_rows=SHUFFLE_ROWS,
        block_rows=BLOCK_ROWS,
        mean_squared_norm=float(WIDTH),
    )
    write_store(folder / "store", manifest, make_rows=_rows)
    overrides = [
        "sweep=null",
        "model={weights: tiny, dtype: float32}",
        "text={source: ['*.txt'], sequence_length: 16, held_out_sequences: 1}",
        f"cache.path={folder / 'store'}",
        f"cache.sites=[{{site: {TAP.site}, layers: [{TAP.layer}]}}]",
        f"cache.tokens={ROWS}",
        f"cache.shuffle_rows={SHUFFLE_ROWS}",
        f"cache.block_rows={BLOCK_ROWS}",
        "cache.sequences_per_batch=4",
        f"sae.layer={TAP.layer}",
        "sae.whitening=0",
        "sae.revive_coefficient=0",
        "train.log_every_steps=1",
    ]
    file = folder / "begin.yaml"
    file.write_text(resolved_yaml(load_config(ROOT / "configs" / "demo.yaml", overrides)))
    return file


def _environment(cache: Path) -> dict[str, str]:
    chosen = {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"}
    own = {name: value for name, value in os.environ.items() if name not in chosen}
    return own | {"XDG_CACHE_HOME": str(cache)}


def _processor_seconds(process: int) -> float:
    """What a running process has used, in all its threads."""
    file = Path(f"/proc/{process}/stat")
    if not file.exists():
        return float("nan")
    fields = file.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def _to_first_step(config: Path, *, cache: Path, folder: Path) -> tuple[float, float]:
    """Seconds by the clock and of the processor until the first step's line is written.

    Raises:
        RuntimeError: the command ended before, or took longer than anybody would wait.
    """
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "launch.cli", "train", str(config), f"output={output}", "-q"]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(cache), stderr=subprocess.PIPE)
    try:
        metrics = output / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.perf_counter() - start > PATIENCE_SECONDS:
                process.kill()
                words = process.communicate()[1].decode(errors="replace")
                raise RuntimeError(f"{' '.join(command)} did no step: {words}")
            time.sleep(0.005)
        return time.perf_counter() - start, _processor_seconds(process.pid)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate()


def _to_import() -> tuple[float, float]:
    """The same of a Python that imports what trains and does nothing."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True)
    after = os.times()
    used = sum(
        getattr(after, name) - getattr(before, name)
        for name in ("children_user", "children_system")
    )
    return time.perf_counter() - start, used


def measure(folder: Path, *, rounds: int) -> dict[str, Any]:
    """Make a store below `folder` and time the command on it; medians with their quartiles."""
    config, warm = _write_config(folder), folder / "warm"
    _to_first_step(config, cache=warm, folder=folder)

    def cold() -> tuple[float, float]:
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            return _to_first_step(config, cache=Path(empty), folder=folder)

    ways = {
        "cold": cold,
        "warm": lambda: _to_first_step(config, cache=warm, folder=folder),
        "imports": _to_import,
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(way())
    found: dict[str, Times] = {}
    for name, pairs in taken.items():
        clock, processor = zip(*pairs, strict=True)
        found[f"{name}, by the clock"] = times_of(clock)
        found[f"{name}, processor time"] = times_of(processor)
    return {"to the first step": found}


def main() -> None:
    """Log both ways' seconds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to make the store")
    told = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(dir=told.folder) as scratch:
        found = measure(Path(scratch).resolve(), rounds=told.rounds)
    for name, times in found["to the first step"].items():
        logger.info("%-28s %s", name, times)


if __name__ == "__main__":
    main()
