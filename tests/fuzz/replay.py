"""An input that ended wrongly, as files of a folder from which it can be run again."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fuzz.outcome import Fault, Input, Outcome

_INPUT, _PRINTED, _FILES = "input.json", "printed.txt", "files"


def save(given: Input, outcome: Outcome, folder: Path) -> None:
    """Write the words, the changed files and what the command printed."""
    files = folder / _FILES
    for name, data in given.changes.items():
        if data is not None:
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "words": given.words,
        "deleted": [name for name, data in given.changes.items() if data is None],
        "fault": None if given.fault is None else vars(given.fault),
        "then": given.then,
        "wrong": outcome.wrong,
        "place": outcome.place,
    }
    (folder / _INPUT).write_text(json.dumps(content, indent=2) + "\n")
    printed = outcome.printed
    (folder / _PRINTED).write_text(printed, encoding="utf-8", errors="backslashreplace")


def load(folder: Path) -> Input:
    """The input that `save` wrote."""
    content = json.loads((folder / _INPUT).read_text())
    files = folder / _FILES
    changed = {
        str(path.relative_to(files)): path.read_bytes()
        for path in sorted(files.rglob("*"))
        if path.is_file()
    }
    return Input(
        words=tuple(content["words"]),
        changes={**changed, **dict.fromkeys(content["deleted"])},
        fault=Fault(**content["fault"]) if content["fault"] else None,
        then=tuple(content["then"]),
    )
