"""Which files the entries of `text.source` name."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from pathlib import Path

from activation_cache.runtime.errors import UserError

logger = logging.getLogger(__name__)

HUB = "hf://"
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstandard"}
_PLAIN = (".txt", ".jsonl", ".json", ".csv", ".tsv")  # may be compressed as a whole
ENDINGS = (".parquet", *_PLAIN, *(kind + packed for kind in _PLAIN for packed in COMPRESSIONS))
SPELT = f"{', '.join(_PLAIN)} (also with {', '.join(COMPRESSIONS)}) or .parquet"  # in messages


def kind_of(name: str) -> str | None:
    """A file's ending without that of its compression, such as .jsonl; None if it isn't known."""
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
    return ending and "." + ending.split(".")[1]


def files_of(entry: str) -> list[str]:
    """The files that an entry of `text.source` names: a file, a folder or a glob. Sorted.

    What exists is taken literally, though it has characters of a pattern: `[2024]/a.txt` is that
    file, and in `[2024]/*.txt` the folder is that one. Of a folder all files are taken, at any
    depth, whose ending is known; not .json, which in folders of text is mostly about the text.

    Raises:
        UserError: there is no such file.
    """
    literal = entry
    while literal and not os.path.lexists(literal) and literal != os.path.dirname(literal):
        literal = os.path.dirname(literal)
    pattern = glob.escape(literal) + entry[len(literal) :]
    if os.path.isdir(entry):
        inside = sorted(glob.glob(os.path.join(pattern, "**", "*"), recursive=True))
        wanted_here = tuple(ending for ending in ENDINGS if ending != ".json")
        names = [name for name in inside if name.endswith(wanted_here) and os.path.isfile(name)]
        wanted = f"is a folder without files that end in {SPELT}: name one with some"
    else:
        matches = sorted(glob.glob(pattern, recursive=True))
        names = [name for name in matches if os.path.isfile(name)]
        wanted = "matches no file: each entry must match at least one"
        folders = [name for name in matches if os.path.isdir(name)]
        if folders:
            wanted = f"matches folders only, such as {folders[0]}: name the folder, or add /*.txt"
        elif matches:
            wanted = f"matches {matches[0]}, which is a link to nothing or no file"
    if not names:
        raise UserError(
            f"text.source {entry!r} {wanted} (looked from {Path.cwd()}). Check the path; the "
            "characters *, ? and [ make a pattern where nothing has that very name."
        )
    return names


def tell_repeats(names: list[str]) -> None:
    """Warn of files that are named twice: under one name they are read once, under two twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        logger.warning(
            "text.source names %d sources more than once, such as %s: each is read once, where it "
            "is named first",
            len(repeated),
            repeated[0],
        )
    by_file: dict[tuple[int, int], str] = {}
    for name in dict.fromkeys(names):
        if name.startswith(HUB):
            continue
        status = os.stat(name)
        first = by_file.setdefault((status.st_dev, status.st_ino), name)
        if first != name:
            logger.warning("%s and %s are one file, which is read twice", first, name)
