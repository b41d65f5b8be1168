"""Which version of this package is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def package_version() -> str:
    """This package's version, `unknown` where it runs without being installed."""
    try:
        return version("open-gemma-scope")
    except PackageNotFoundError:
        return "unknown"
