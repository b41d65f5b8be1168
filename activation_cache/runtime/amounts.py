"""Numbers with their unit as text: the same in every command, log line and message.

Bytes count in powers of ten, as disks are sold and as clusters and clouds bill them.
"""

from __future__ import annotations

from collections.abc import Sequence


def bytes_text(size: float) -> str:
    """Bytes in words, three digits: `36.9 TB`."""
    return scaled(size, units=["B", "kB", "MB", "GB", "TB", "PB"])


def scaled(number: float, *, units: Sequence[str]) -> str:
    """Three digits and the fitting one of `units`, each a thousand times the one before."""
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {units[-1]}" if number < 999.5 else f"{number:,.0f} {units[-1]}"
