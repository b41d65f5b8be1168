"""Sources of text: files named by globs, and Hugging Face datasets, as one stream of documents.

The order is fixed: sources as listed, the files of a glob or folder sorted by name, rows as stored.
Rows without text (an empty, null or absent field) are skipped and counted, in files and on the Hub
alike. Text that can't be read is an error that names the file and line: skipping it would leave a
corpus that nobody can describe.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from activation_cache.config import TextConfig
from activation_cache.language_model.chat_template import Message
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors, refuse_lfs_pointer
from activation_cache.text.file_rows import (
    TXT_FIELD,
    Rows,
    read_csv,
    read_json,
    read_jsonl,
    read_parquet,
    read_txt,
)
from activation_cache.text.source_files import HUB, SPELT, files_of, kind_of, tell_repeats

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 2**20
_SAMPLES = 64
_MOST_POINTER_BYTES = 1024  # of a Git LFS pointer
_ROWS_IN_VAIN = 10_000  # so many rows without any text: text.field is wrong, or the dataset is


@dataclass(frozen=True)
class Document:
    """One text; `position` is where it ends in its source (bytes of a file, rows of a dataset).

    `subset` is the value of `text.subset_field`, None without that setting. Of a conversation
    (`text.chat`) there are the `messages`, and `text` is their contents in a row.
    """

    text: str
    position: int
    subset: str | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class _Fields:
    """The fields of a row that hold its text and its subset; dots lead into nested rows."""

    text: str
    subset: str | None
    of_chats: bool = False  # then the text's field holds messages

    @property
    def key(self) -> str:
        """The key of the config that names the text's field."""
        return "text.chat.field" if self.of_chats else "text.field"

    @property
    def columns(self) -> list[str]:
        """The columns of a parquet file that hold them."""
        nested = [] if self.subset is None else [self.subset.partition(".")[0]]
        return list(dict.fromkeys([self.text, *nested]))

    def text_of(self, row: Any, *, where: str) -> str | None:
        """A row's text; None if the field is absent, null or blank.

        Raises:
            UserError: the row is no object, or the field holds something other than text.
        """
        if not isinstance(row, dict):
            raise UserError(
                f"{where} is {type(row).__name__}, not an object with a field {self.text!r} "
                "(text.field). Mend the row or remove it."
            )
        text = row.get(self.text)
        if text is None:
            return None
        if self.of_chats:
            return "\n".join(one.content for one in self.messages_of(row, where=where)) or None
        if not isinstance(text, str):
            raise UserError(
                f"{where}: field {self.text!r} holds {type(text).__name__}, not text. "
                "Point text.field at the field with the text, or remove the row."
            )
        _check_utf8(text, where=where)
        return text if text.strip() else None

    def messages_of(self, row: Any, *, where: str) -> tuple[Message, ...]:
        """A row's conversation; empty of texts. Raises `UserError` if it is none."""
        if not self.of_chats:
            return ()
        entries = row[self.text]
        wanted = "a list of messages, objects with the texts `role` and `content`"
        if not isinstance(entries, list):
            raise UserError(
                f"{where}: field {self.text!r} (text.chat.field) holds {type(entries).__name__}, "
                f"not {wanted}. Point text.chat.field at the field with the messages."
            )
        messages = []
        for entry in entries:
            role, content = (
                entry.get(key) if isinstance(entry, dict) else None for key in ("role", "content")
            )
            if not (isinstance(role, str) and isinstance(content, str)):
                raise UserError(
                    f"{where}: field {self.text!r} holds a message {str(entry)[:80]!r}, and "
                    f"needed is {wanted}. Convert the file."
                )
            _check_utf8(content, where=where)
            messages.append(Message(role, content))
        return tuple(messages)

    def subset_of(self, row: Any, *, where: str) -> str | None:
        """The subset a row names; raises `UserError` if it names none."""
        if self.subset is None:
            return None
        value = row
        for part in self.subset.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{where}: text.subset_field {self.subset!r} should name the row's subset and is "
                f"{value!r}; the row has {list(row)}. Point text.subset_field at a field that "
                "every row has."
            )
        return value


def _check_utf8(text: str, *, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\\ud800"
        raise UserError(
            f"{where} is not UTF-8 (character {error.start} is half a surrogate pair): text "
            "must be UTF-8. Mend the row or remove it."
        ) from error


@dataclass(frozen=True)
class Source:
    """One file or one Hub dataset, and how to read its documents.

    `size` is in bytes, None for a dataset of the Hub, which is streamed and may be endless. `entry`
    is the number of the entry of `text.source` that names it.
    """

    name: str
    size: int | None
    open: Callable[[], Iterator[Document]]
    entry: int = 0

    @property
    def streamed(self) -> bool:
        """Whether it comes over the network and should be read only as far as needed."""
        return self.size is None

    def content_hash(self) -> str | None:
        """Hash of a file's content, by which a change is noticed; None for a stream."""
        return None if self.streamed else sampled_hash(Path(self.name))


def sampled_hash(path: Path) -> str:
    """SHA-256 of a file's size and content; above 64 MiB, of 64 evenly spaced samples of 1 MiB."""
    with disk_errors(path, doing="read"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size}\n".encode())
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def find_sources(config: TextConfig) -> list[Source]:
    """Resolve `text.source` into files and datasets, in reading order; a name is read once.

    Raises:
        UserError: an entry matches no file, or an ending or URL isn't known.
    """
    found: dict[str, Source] = {}
    names: list[str] = []
    chat = config.chat
    fields = _Fields(chat.field if chat else config.field, config.subset_field, chat is not None)
    for number, entry in enumerate(config.source):
        matched = [entry] if entry.startswith(HUB) else files_of(entry)
        names += matched
        for name in matched:
            if name not in found:
                of_hub = name.startswith(HUB)
                source = _hub_source(name, fields) if of_hub else _file_source(name, fields)
                found[name] = replace(source, entry=number)
        if config.mixture is not None and all(found[name].entry != number for name in matched):
            raise UserError(
                f"text.source {entry!r} names nothing that an entry before it doesn't name, and "
                "text.mixture gives it a share of the text: remove the entry and its weight."
            )
    tell_repeats(names)
    return list(found.values())


def _file_source(name: str, fields: _Fields) -> Source:
    kind = kind_of(name)
    if kind is None:
        raise UserError(
            f"text.source matches {name}, whose ending is not one of {SPELT}: name only such "
            "files, or convert it."
        )
    if kind == ".txt" and fields.subset is not None:
        raise UserError(
            f"text.subset_field names a field and {name} has none: make it a .jsonl with one "
            "document a line, or leave text.subset_field out"
        )
    if kind in (".txt", ".csv", ".tsv") and fields.of_chats:
        raise UserError(
            f"text.chat reads lists of messages, and {name} can't hold any: make it a .jsonl with "
            "one conversation a line, or leave text.chat out"
        )
    size = os.path.getsize(name)
    if size < _MOST_POINTER_BYTES:
        with disk_errors(name, doing="read"):
            refuse_lfs_pointer(name, Path(name).read_bytes())
    if kind == ".txt":
        return Source(name, size, lambda: _documents(name, read_txt(name), _OF_TXT))
    readers: dict[str, Callable[[str], Rows]] = {
        ".jsonl": read_jsonl,
        ".json": read_json,
        ".csv": read_csv,
        ".tsv": read_csv,
        ".parquet": partial(read_parquet, columns=fields.columns),
    }
    return Source(name, size, lambda: _documents(name, readers[kind](name), fields))


_OF_TXT = _Fields(TXT_FIELD, None)


def _documents(name: str, rows: Rows, fields: _Fields) -> Iterator[Document]:
    """The documents of a source's rows, which come with their position and name in messages.

    Raises:
        UserError: a bad row; or no text in any row, or in a source's first 10,000.
    """
    number = skipped = 0
    try:
        for row, position, where in rows:
            number += 1
            text = fields.text_of(row, where=where)
            if text is not None:
                subset = fields.subset_of(row, where=where)
                yield Document(text, position, subset, fields.messages_of(row, where=where))
                continue
            skipped += 1
            if skipped == number == _ROWS_IN_VAIN:
                break
        if skipped == number > 0 and fields is not _OF_TXT:
            raise UserError(
                f"{name}: {number} rows and no text in field {fields.text!r} ({fields.key}); the "
                f"last row has {list(row)}. Set {fields.key} to the one with the text."
            )
    finally:
        if skipped:
            logger.warning(
                "%s: %d of %d documents have no text and are skipped", name, skipped, number
            )


def _hub_source(url: str, fields: _Fields) -> Source:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    fields = replace(fields, text=options.pop("field", fields.text))
    unknown = sorted(set(options) - {"split", "name", "revision"})
    dataset = (parts.netloc + parts.path).strip("/")
    if unknown or not dataset:
        raise UserError(
            f"text.source {url!r} is not understood (unknown: {unknown or 'no dataset'}): write "
            "hf://organisation/dataset?split=train, optionally with &name=..., &revision=... and "
            "&field=..."
        )
    options.setdefault("split", "train")
    return Source(url, None, lambda: _documents(url, _read_hub(url, dataset, options), fields))


def _read_hub(url: str, dataset: str, options: dict[str, str]) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"text.source {url} needs the package 'datasets': pip install 'open-gemma-scope[hub]'"
        ) from error
    try:
        rows = datasets.load_dataset(dataset, streaming=True, **options)
        for number, row in enumerate(rows, start=1):
            yield row, number, f"{url}, row {number}"
    except Exception as error:  # `datasets` raises anything from OSError to its own and httpx's
        raise UserError(
            f"cannot read {url} ({type(error).__name__}: {error}): the dataset, split and name "
            "must exist and the Hub must be reachable. Check them, or use local files."
        ) from error
