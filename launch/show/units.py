"""FLOPs, rates, precisions, hours and money as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from activation_cache.runtime.amounts import bytes_text, scaled
from sae_train.config.run import MeshConfig
from sae_train.plan.accelerators import ACCELERATORS, Accelerator
from sae_train.plan.suite import SuiteAccelerator
from sae_train.plan.verdict import READER_RATE, AcceleratorPlan

READER = (
    f"† more than the {bytes_text(READER_RATE)}/s that one process read from a local disk on two "
    "cores\n(docs/performance.md): where reading is no faster, steps wait for it. Runs that train "
    "together\nread a batch once, and a store with cache.dtype bfloat16 has half the bytes,\n"
    "one with int8 a quarter"
)


def plan_table(title: str, *headings: str, words: int = 1) -> Table:
    """A table whose first `words` columns are words and the rest numbers."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for number, heading in enumerate(headings):
        if number == 0:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="left" if number < words else "right", no_wrap=True)
    return table


def hours_text(hours: float | None) -> str:
    """Hours, two digits or whole: `0.53`, `1,204.5`; `-` for none."""
    return "-" if hours is None else f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def mesh_text(mesh: MeshConfig) -> str:
    """Data x model: `2 x 4`."""
    return f"{mesh.data} x {mesh.model}"


def money_text(cost: float | None) -> str:
    """An amount with two decimals; `-` for none."""
    return "-" if cost is None else f"{cost:,.2f}"


def seconds_text(seconds: float) -> str:
    """`57.7 ms`, `1.26 s`."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:,.3g} s"


def flops_text(flops: float) -> str:
    """FLOPs in words, three digits: `1.5 TFLOP`."""
    prefixes: list[str] = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    return scaled(flops, units=[f"{prefix}FLOP" for prefix in prefixes])


def rate_text(rate: float | None, *, above: bool) -> str:
    """Bytes a second, marked where `READER` applies; `-` for none."""
    return "-" if rate is None else f"{bytes_text(rate)}/s{'†' if above else ''}"


def peaks_text(chip: Accelerator) -> str:
    """TFLOP/s of each precision."""
    return "TFLOP/s: " + ", ".join(f"{name} {peak / 1e12:.3g}" for name, peak in chip.flops.items())


def products_text(plans: Sequence[AcceleratorPlan | SuiteAccelerator]) -> str:
    """At what precision products are made while training and harvesting, and who can't."""
    training = sorted({verdict.precision for on in plans for verdict in on.verdicts})
    harvest = sorted({on.harvest_precision for on in plans})
    text = f"products: training in {' and '.join(training)}, harvest in {' and '.join(harvest)}"
    lacking = sorted(set(ACCELERATORS) - {on.accelerator.name for on in plans})
    if len(plans) > 1 and lacking:
        text += f"\nwithout a peak at these, so left out: {', '.join(lacking)}"
    return text
