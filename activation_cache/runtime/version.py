"""Which version of this package is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """This package's version; `unknown` if it runs without being installed."""
    try:
        return version("open-gemma-scope")
    except PackageNotFoundError:
        return "unknown"
