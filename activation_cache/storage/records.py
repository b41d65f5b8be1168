"""Small JSON files with a checksum and a format version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, read_json, write_json

FORMAT_VERSION = 1


Record = TypeVar("Record", bound=BaseModel)


def write_record(path: StoragePath, record: BaseModel) -> None:
    """Write a small JSON record with a checksum over the rest of it, atomically."""
    content = record.model_dump(mode="json")
    write_json(path, {**content, "checksum": _checksum(content)})


def read_record(path: StoragePath, kind: type[Record]) -> Record:
    """Read a record back.

    Raises:
        UserError: the file is damaged (not JSON, fields missing, checksum wrong) or of another
            format version; names the file.
    """
    content = read_json(path)
    if isinstance(content, dict) and content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {content.get('format_version')!r} and this program reads "
            f"{FORMAT_VERSION}: make the folder again, or use the program that wrote it."
        )
    try:
        found = content.pop("checksum")
        if found != _checksum(content):
            raise KeyError("checksum")
        return kind.model_validate_json(json.dumps(content))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: its fields and its checksum do not agree. Restore it from a copy, "
            "or delete the folder and make it again."
        ) from error


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
