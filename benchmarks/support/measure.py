"""What every benchmark shares: interleaved timing, the machine, and where results are kept.

Only ratios of what was timed in one run mean anything here: the ways to be compared take turns, so
that other work on the machine slows all of them, and medians are quoted with the quartiles beside
them.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.processes.allocator import keep_freed_memory


def prepare(*, keep_memory: bool = True) -> None:
    """Make this process as a stage of `sae` is; its log has the benchmark's lines alone."""
    if keep_memory:
        keep_freed_memory()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)


@dataclass(frozen=True)
class Times:
    """Seconds of one way: the median of its rounds and the quartiles around it."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ms ({1e3 * self.low:.1f} to {1e3 * self.high:.1f})"


def interleaved(
    ways: Mapping[str, Callable[[], Any]], *, rounds: int, pause: float = 0.0
) -> dict[str, Times]:
    """Time each way `rounds` times, taking turns, after one untimed call of each.

    What a way returns is waited for, if it is of JAX; `pause` seconds pass before each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        jax.block_until_ready(way())
    for _ in range(rounds):
        for name, way in ways.items():
            time.sleep(pause)
            start = time.perf_counter()
            jax.block_until_ready(way())
            seconds[name].append(time.perf_counter() - start)
    return {name: times_of(own) for name, own in seconds.items()}


def times_of(seconds: Sequence[float]) -> Times:
    """Median and quartiles of what was timed."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Times(float(median), float(low), float(high), len(seconds))


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one program of a step at one size; `temporary_bytes` as XLA reports them."""

    program: str
    width: int
    d_model: int
    batch_size: int
    median: float
    quartiles: tuple[float, float]
    temporary_bytes: int = 0
    overflows: int = 0


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: its head, then a cell for each of its columns in every line."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def machine() -> dict[str, Any]:
    """What ran: processor, cores, memory, versions, and the commit of this repository."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": round(pages / 2**30, 1),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit checked out, with a + where files differ from it."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()


def plain(value: Any) -> Any:
    """Results as JSON knows them."""
    return asdict(value) if isinstance(value, Times) else value


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Keep results as JSON, with the machine and the commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **results}, indent=1, default=plain)
    path.write_text(text + "\n")
