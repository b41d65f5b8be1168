"""Sources of text: files named by globs, and Hugging Face datasets, as one stream of documents.

The order is fixed: sources as listed, the files of a glob or folder sorted by name, rows as stored.
Rows without text (an empty, null or absent field) are skipped and counted, in files and on the Hub
alike. Text that can't be read is an error that names the file and line: skipping it would leave a
corpus that nobody can describe.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

from activation_cache.config import TextConfig
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors, refuse_lfs_pointer
from activation_cache.text.source_files import ENDINGS, HUB, files_of, tell_repeats

logger = logging.getLogger(__name__)

MAX_FILE_DOCUMENT_BYTES = 64 * 2**20  # a .txt file is one document, tokenised in one piece
_SAMPLE_BYTES = 2**20
_SAMPLES = 64
_MOST_POINTER_BYTES = 1024  # of a Git LFS pointer
_ROWS_IN_VAIN = 10_000  # so many rows without any text: text.field is wrong, or the dataset is


@dataclass(frozen=True)
class Document:
    """One text; `position` is where it ends in its source (bytes of a file, rows of a dataset).

    `subset` is the value of `text.subset_field`, None without that setting.
    """

    text: str
    position: int
    subset: str | None = None


@dataclass(frozen=True)
class _Fields:
    """The fields of a row that hold its text and its subset; dots lead into nested rows."""

    text: str
    subset: str | None

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
        if not isinstance(text, str):
            raise UserError(
                f"{where}: field {self.text!r} holds {type(text).__name__}, not text. "
                "Point text.field at the field with the text, or remove the row."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\\ud800"
            raise UserError(
                f"{where} is not UTF-8 (character {error.start} is half a surrogate pair): text "
                "must be UTF-8. Mend the row or remove it."
            ) from error
        return text if text.strip() else None

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


@dataclass(frozen=True)
class Source:
    """One file or one Hub dataset, and how to read its documents.

    `size` is in bytes, None for a dataset of the Hub, which is streamed and may be endless.
    """

    name: str
    size: int | None
    open: Callable[[], Iterator[Document]]

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
    fields = _Fields(config.field, config.subset_field)
    for entry in config.source:
        matched = [entry] if entry.startswith(HUB) else files_of(entry)
        names += matched
        for name in matched:
            if name not in found:
                of_hub = name.startswith(HUB)
                found[name] = _hub_source(name, fields) if of_hub else _file_source(name, fields)
    tell_repeats(names)
    return list(found.values())


def _file_source(name: str, fields: _Fields) -> Source:
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
    if ending is None:
        raise UserError(
            f"text.source matches {name}, whose ending is not one of {', '.join(ENDINGS)}: "
            "name only such files, or convert it."
        )
    if ending == ".txt" and fields.subset is not None:
        raise UserError(
            f"text.subset_field names a field and {name} has none: make it a .jsonl with one "
            "document a line, or leave text.subset_field out"
        )
    size = os.path.getsize(name)
    if size < _MOST_POINTER_BYTES:
        with disk_errors(name, doing="read"):
            refuse_lfs_pointer(name, Path(name).read_bytes())
    if ending == ".txt":
        return Source(name, size, lambda: _documents(name, _read_txt(name), _OF_TXT))
    if ending == ".parquet":
        return Source(name, size, lambda: _documents(name, _read_parquet(name, fields), fields))
    return Source(name, size, lambda: _documents(name, _read_jsonl(name), fields))


_OF_TXT = _Fields("text", None)  # a .txt file is read as one row


def _documents(
    name: str, rows: Iterator[tuple[Any, int, str]], fields: _Fields
) -> Iterator[Document]:
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
                yield Document(text, position, fields.subset_of(row, where=where))
                continue
            skipped += 1
            if skipped == number == _ROWS_IN_VAIN:
                break
        if skipped == number > 0 and fields is not _OF_TXT:
            raise UserError(
                f"{name}: {number} rows and no text in field {fields.text!r} (text.field); the "
                f"last row has {list(row)}. Set text.field to the one with the text."
            )
    finally:
        if skipped:
            logger.warning(
                "%s: %d of %d documents have no text and are skipped", name, skipped, number
            )


def _read_txt(name: str) -> Iterator[tuple[Any, int, str]]:
    size = os.path.getsize(name)
    if size > MAX_FILE_DOCUMENT_BYTES:
        raise UserError(
            f"{name} has {size} bytes, and a .txt file is one document of at most "
            f"{MAX_FILE_DOCUMENT_BYTES}: split it, or make it a .jsonl with one document a line."
        )
    with disk_errors(name, doing="read"):
        data = Path(name).read_bytes()
    yield {_OF_TXT.text: _decode(data, where=name)}, size, name


def _read_jsonl(name: str) -> Iterator[tuple[Any, int, str]]:
    with disk_errors(name, doing="read"), open(name, "rb") as file:
        lines = _lines(file, name, compressed=name.endswith(".zst"))
        for number, line in enumerate(lines, start=1):
            where = f"{name}, line {number}"
            text = _decode(line, where=where)
            if text.strip():
                yield _parsed(text, where=where), file.tell(), where


def _parsed(line: str, *, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error}): each line must be one JSON object. "
            "Mend the line; if it is the last one, the file may be cut short."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is JSON that can't be read ({error}): numbers may have 4,300 digits and "
            "brackets may stand some 1,000 deep. Remove that field or the line."
        ) from error


def _lines(file: BinaryIO, name: str, *, compressed: bool) -> Iterator[bytes]:
    if not compressed:
        yield from file
        return
    rest = b""
    for part in _decompressed(file, name):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decompressed(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Every frame of a zstandard file. (The library's stream reader ends a cut file in silence.)"""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = None
    try:
        while chunk := file.read(2**20):
            while chunk:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(chunk)
                if not frame.eof:
                    break
                chunk, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise UserError(f"{name} is not readable zstandard ({error}): it is damaged") from error
    if frame is not None:
        raise UserError(f"{name} ends within a zstandard frame: the file was cut short")


def _read_parquet(name: str, fields: _Fields) -> Iterator[tuple[Any, int, str]]:
    import pyarrow
    import pyarrow.parquet

    size = os.path.getsize(name)
    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            present = Counter(file.schema_arrow.names)
            if fields.text not in present:
                raise UserError(
                    f"{name} has no column {fields.text!r} (text.field); it has {list(present)}. "
                    "Set text.field to the one with the text."
                )
            total, number = max(1, file.metadata.num_rows), 0
            columns = [column for column in fields.columns if column in present]
            for column in columns:
                if present[column] > 1:
                    raise UserError(
                        f"{name} has {present[column]} columns named {column!r}, and one is "
                        "needed: rename the others."
                    )
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for values in zip(*(batch.column(column) for column in columns), strict=True):
                    number += 1
                    where = f"{name}, row {number}"
                    plain = (_python(value, where=where) for value in values)
                    row = dict(zip(columns, plain, strict=True))
                    yield row, size * number // total, where
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not readable parquet ({error}): the file is damaged") from error


def _python(value: Any, *, where: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from error


def _hub_source(url: str, fields: _Fields) -> Source:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    unknown = sorted(set(options) - {"split", "name", "revision"})
    dataset = (parts.netloc + parts.path).strip("/")
    if unknown or not dataset:
        raise UserError(
            f"text.source {url!r} is not understood (unknown: {unknown or 'no dataset'}): write "
            "hf://organisation/dataset?split=train, optionally with &name=... and &revision=..."
        )
    options.setdefault("split", "train")
    return Source(url, None, lambda: _documents(url, _read_hub(url, dataset, options), fields))


def _read_hub(url: str, dataset: str, options: dict[str, str]) -> Iterator[tuple[Any, int, str]]:
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


def _decode(data: bytes, *, where: str) -> str:
    """Bytes as text, without the byte order mark with which some programs begin a file."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from error


def _not_utf8(error: UnicodeDecodeError, where: str) -> UserError:
    return UserError(
        f"{where} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): text "
        "must be UTF-8. Convert it, for instance with iconv."
    )
