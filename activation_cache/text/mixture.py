"""The documents of all sources in reading order: one source after the other, or mixed by weight.

Mixed, the next document comes from the entry of `text.source` that is furthest behind its weight,
counted in characters; of several the first. So shares hold at every point of the text, and the
order depends on nothing but the documents. Reading ends with the first entry that has no more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby

from activation_cache.config import TextConfig
from activation_cache.text.sources import Document, Source

logger = logging.getLogger(__name__)


def read_documents(text: TextConfig, sources: Sequence[Source]) -> Iterator[tuple[Document, int]]:
    """Each document, and how many bytes of all sources have been read with it (0 of streams).

    Raises:
        UserError: text that can't be read.
    """
    if text.mixture is None:
        yield from _in_turn(sources)
        return
    entries = [list(group) for _, group in groupby(sources, key=lambda source: source.entry)]
    yield from _mixed(text, entries)


def _in_turn(sources: Sequence[Source]) -> Iterator[tuple[Document, int]]:
    before = 0
    for source in sources:
        for document in source.open():
            yield document, before + document.position
        before += source.size or 0


def _mixed(text: TextConfig, entries: list[list[Source]]) -> Iterator[tuple[Document, int]]:
    assert text.mixture is not None
    readers = [_in_turn(sources) for sources in entries]
    characters, positions = [0] * len(readers), [0] * len(readers)
    while True:
        behind = [count / weight for count, weight in zip(characters, text.mixture, strict=True)]
        entry = behind.index(min(behind))
        following = next(readers[entry], None)
        if following is None:
            _tell_end(text, entry, characters)
            return
        document, positions[entry] = following
        characters[entry] += len(document.text)
        yield document, sum(positions)


def _tell_end(text: TextConfig, entry: int, characters: list[int]) -> None:
    """Say which entry ended the text; what is left of the others isn't read."""
    read = zip(text.source, characters, strict=True)
    logger.info(
        "text.mixture: %s has no more text, so the reading ends; characters read: %s",
        text.source[entry],
        ", ".join(f"{name} {count}" for name, count in read),
    )
