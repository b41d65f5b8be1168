"""FLOPs, hours and money as text."""

from __future__ import annotations

from rich.table import Table

from activation_cache.runtime.amounts import scaled
from sae_train.config.run import MeshConfig


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
