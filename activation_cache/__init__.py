"""From text to an activation store, and from the store to batches.

Rooms, each importing only those before it: `runtime`, `config` and `mesh`, `storage`, `gemma`,
`language_model`, `text`, `store`, `harvest`, `rows`, `rollout`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_cache.rows.write_rows import write_rows

__all__ = ["write_rows"]


def __getattr__(name: str) -> Any:
    # Lazily: every module of the package imports this one first.
    if name == "write_rows":
        from activation_cache.rows.write_rows import write_rows

        return write_rows
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
