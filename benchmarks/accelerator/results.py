"""Lines of the benchmark: what was measured, when to stop measuring, and where it is kept."""

from __future__ import annotations

import json
import platform as platform_module
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from activation_cache.precision import AVAILABLE, Precision
from benchmarks.support.measure import Times, machine, markdown, times_of
from sae_train.plan.accelerators import ACCELERATORS

# Where time is short, the first are measured and the last left out.
MOST_WANTED: tuple[Precision, ...] = ("bfloat16", "float32", "tf32", "bfloat16_3x")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line; what doesn't apply is None or empty.

    Attributes:
        quartiles: of the milliseconds.
        mfu: of a step 12 B D F a second (Gemma Scope's convention) over the published peak at the
            precision; of other products their own FLOPs.
        gigabytes: what the program holds at once, by XLA's analysis.
        peak_gigabytes: the most that this process held until then, as the device says.
        error: the largest difference from what was expected, relative to the largest number.
    """

    what: str
    precision: str = ""
    d_model: int | None = None
    width: int | None = None
    milliseconds: float | None = None
    quartiles: tuple[float, float] | None = None
    rate: float | None = None
    unit: str = ""
    mfu: float | None = None
    gigabytes: float | None = None
    peak_gigabytes: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Clock:
    """How long a part may take, and how thoroughly it measures.

    Attributes:
        group: seconds of calls that are sent off together and timed as one.
        groups: how many of these a time is the median of.
    """

    seconds: float
    group: float = 0.1
    groups: int = 7
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until its end."""
        return self.start + self.seconds - time.monotonic()


def platform() -> str:
    """What JAX calls the default device's platform."""
    return jax.devices()[0].platform


def is_gpu() -> bool:
    """Is the default device one?"""
    return platform() in ("gpu", "cuda", "rocm")


def precisions() -> list[Precision]:
    """Those that the default device has, the most wanted first."""
    name = "gpu" if is_gpu() else platform()
    return [one for one in MOST_WANTED if one in AVAILABLE.get(name, ("float32",))]


def peak(precision: Precision) -> float | None:
    """The published FLOP/s of the default device's products; None if it isn't in the table."""
    kind = jax.devices()[0].device_kind.lower()
    found = [chip for name, chip in ACCELERATORS.items() if name in kind]
    return found[0].flops.get(precision) if found else None


def over_peak(rate: float, precision: Precision) -> float | None:
    """A rate in FLOP/s as a share of the peak, if that is known."""
    most = peak(precision)
    return None if most is None else rate / most


def memory_limit() -> float:
    """Bytes that JAX may take of the default device; infinite where it doesn't say."""
    return float(_memory().get("bytes_limit", float("inf")))


def most_held() -> float | None:
    """GB that this process held at most until now; None where the device doesn't say."""
    held = _memory().get("peak_bytes_in_use")
    return None if held is None else held / 1e9


def _memory() -> Mapping[str, int]:
    return jax.devices()[0].memory_stats() or {}


def timed(call: Callable[[], Any], *, clock: Clock) -> Times:
    """Seconds of one call, many of them sent off together, after one that isn't timed."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(1, int(clock.group / (time.perf_counter() - start)))
    seconds: list[float] = []
    while not seconds or (len(seconds) < clock.groups and clock.left > 0):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / calls)
    return times_of(seconds)


def milliseconds(times: Times) -> dict[str, Any]:
    """The columns of a time."""
    return {"milliseconds": 1e3 * times.median, "quartiles": (1e3 * times.low, 1e3 * times.high)}


def reason(error: BaseException) -> str:
    """The first line of an error, for a note."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"


def versions() -> str:
    """What measures, in a line."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    told = ", ".join(f"{name} {version(name)}" for name in names)
    python = platform_module.python_version()
    return f"{device.device_kind} ({device.platform}), Python {python}, {told}"


class Results:
    """A JSON file that is written anew with each line, so that a killed run keeps what it had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        self.versions: str = known.get("versions", "")
        self.parts: dict[str, list[dict[str, Any]]] = known.get("parts", {})

    def begin(self, part: str) -> None:
        """Forget what was known of a part."""
        self.versions = versions()
        self.parts[part] = []

    def add(self, part: str, row: Row) -> None:
        """Keep a line."""
        self.parts[part].append(asdict(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"versions": self.versions, "machine": machine(), "parts": self.parts}
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(whole, indent=1) + "\n")
        fresh.replace(self.path)

    def table(self) -> str:
        """All lines of all parts as one Markdown table."""
        head = ["part", "what", "precision", "D", "width", "ms", "rate", "MFU", "GB", "peak GB"]
        lines = [[part, *_cells(row)] for part, rows in self.parts.items() for row in rows]
        return markdown([*head, "error", "note"], lines)


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    def shown(key: str, form: str, end: str = "") -> str:
        return "" if row[key] is None else f"{row[key]:{form}}{end}"

    return [
        row["what"],
        row["precision"],
        shown("d_model", "d"),
        shown("width", "d"),
        shown("milliseconds", ".4g"),
        shown("rate", ",.0f" if (row["rate"] or 0) >= 1000 else ".4g", f" {row['unit']}"),
        shown("mfu", ".1%"),
        shown("gigabytes", ".3g"),
        shown("peak_gigabytes", ".3g"),
        shown("error", ".1e"),
        row["note"],
    ]
