"""Sources of text: files named by globs, and Hugging Face datasets, as one stream of documents.

The order is fixed: sources as listed, the files of a glob sorted by name, rows as stored. Bad text
is an error that names the file and line. Skipping it would leave a corpus that nobody can describe.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import parse_qsl, urlsplit

from activation_cache.config import TextConfig
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors

logger = logging.getLogger(__name__)

MAX_FILE_DOCUMENT_BYTES = 64 * 2**20  # a .txt file is one document, tokenised in one piece
_SAMPLE_BYTES = 2**20
_SAMPLES = 64
_HUB = "hf://"


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

    def document(self, row: Any, position: int, *, where: str) -> Document:
        text = _field(row, self.text, where=where)
        return Document(text, position, self._subset(row, where=where))

    def _subset(self, row: Any, *, where: str) -> str | None:
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
    """Resolve `text.source` into files and datasets, in reading order; a file named twice is one.

    Raises:
        UserError: a glob matches no file, or an ending or URL isn't known.
    """
    found: dict[str, Source] = {}
    fields = _Fields(config.field, config.subset_field)
    for entry in config.source:
        if entry.startswith(_HUB):
            found.setdefault(entry, _hub_source(entry, fields))
            continue
        names = sorted(glob.glob(os.path.expanduser(entry), recursive=True))
        names = [name for name in names if os.path.isfile(name)]
        if not names:
            raise UserError(
                f"text.source {entry!r} matches no file (looked from {Path.cwd()}): each glob must "
                "match at least one. Check the path, or quote it if the shell expanded it."
            )
        for name in names:
            found.setdefault(name, _file_source(name, fields))
    return list(found.values())


def _file_source(name: str, fields: _Fields) -> Source:
    readers: dict[str, Callable[[], Iterator[Document]]] = {
        ".txt": lambda: _read_txt(name),
        ".jsonl": lambda: _read_jsonl(name, fields, compressed=False),
        ".jsonl.zst": lambda: _read_jsonl(name, fields, compressed=True),
        ".parquet": lambda: _read_parquet(name, fields),
    }
    if name.endswith(".txt") and fields.subset is not None:
        raise UserError(
            f"text.subset_field names a field and {name} has none: make it a .jsonl with one "
            "document a line, or leave text.subset_field out"
        )
    for ending, reader in readers.items():
        if name.endswith(ending):
            return Source(name=name, size=os.path.getsize(name), open=reader)
    raise UserError(
        f"text.source matches {name}, whose ending is not one of {', '.join(readers)}: "
        "name only such files, or convert it."
    )


def _read_txt(name: str) -> Iterator[Document]:
    size = os.path.getsize(name)
    if size > MAX_FILE_DOCUMENT_BYTES:
        raise UserError(
            f"{name} has {size} bytes, and a .txt file is one document of at most "
            f"{MAX_FILE_DOCUMENT_BYTES}: split it, or make it a .jsonl with one document a line."
        )
    with disk_errors(name, doing="read"):
        data = Path(name).read_bytes()
    yield Document(_checked(_decode(data, where=name), where=name), size)


def _read_jsonl(name: str, fields: _Fields, *, compressed: bool) -> Iterator[Document]:
    with disk_errors(name, doing="read"), open(name, "rb") as file:
        for number, line in enumerate(_lines(file, name, compressed=compressed), start=1):
            if not line.strip():
                continue
            where = f"{name}, line {number}"
            try:
                row = json.loads(_decode(line, where=where))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where} is not JSON ({error}): each line must be one JSON object. "
                    "Mend the line; if it is the last one, the file may be cut short."
                ) from error
            yield fields.document(row, file.tell(), where=where)


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


def _read_parquet(name: str, fields: _Fields) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    size = os.path.getsize(name)
    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            names = file.schema_arrow.names
            if fields.text not in names:
                _missing_field(fields.text, names, where=name)
            total, number = max(1, file.metadata.num_rows), 0
            columns = [column for column in fields.columns if column in names]
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for values in zip(*(batch.column(column) for column in columns), strict=True):
                    number += 1
                    where = f"{name}, row {number}"
                    plain = (_python(value, where=where) for value in values)
                    row = dict(zip(columns, plain, strict=True))
                    yield fields.document(row, size * number // total, where=where)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowIOError) as error:
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
    return Source(name=url, size=None, open=lambda: _read_hub(url, dataset, options, fields))


def _read_hub(
    url: str, dataset: str, options: dict[str, str], fields: _Fields
) -> Iterator[Document]:
    """Stream a dataset; its empty rows, which the user can't mend, are skipped."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"text.source {url} needs the package 'datasets': pip install 'open-gemma-scope[hub]'"
        ) from error
    try:
        rows = iter(datasets.load_dataset(dataset, streaming=True, **options))
        number = skipped = 0
        while (row := next(rows, None)) is not None:
            number += 1
            if isinstance(text := row.get(fields.text), str) and not text.strip():
                skipped += 1
                continue
            yield fields.document(row, number, where=f"{url}, row {number}")
        logger.info("%s: %d rows, of which %d without text were skipped", url, number, skipped)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises anything from OSError to its own and httpx's
        raise UserError(
            f"cannot read {url} ({type(error).__name__}: {error}): the dataset, split and name "
            "must exist and the Hub must be reachable. Check them, or use local files."
        ) from error


def _decode(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from error


def _not_utf8(error: UnicodeDecodeError, where: str) -> UserError:
    return UserError(
        f"{where} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): text "
        "must be UTF-8. Convert it, for instance with iconv."
    )


def _field(row: Any, field: str, *, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        _missing_field(field, list(row) if isinstance(row, dict) else [], where=where)
    if not isinstance(row[field], str):
        raise UserError(
            f"{where}: field {field!r} holds {type(row[field]).__name__}, not text. "
            "Point text.field at the field with the text, or remove the row."
        )
    return _checked(row[field], where=where)


def _missing_field(field: str, present: list[str], *, where: str) -> NoReturn:
    raise UserError(
        f"{where} has no field {field!r} (text.field); it has {present}. "
        "Set text.field to the one with the text."
    )


def _checked(text: str, *, where: str) -> str:
    if not text.strip():
        raise UserError(f"{where} holds no text: a document must not be empty. Remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\\ud800"
        raise UserError(
            f"{where} is not UTF-8 (character {error.start} is half a surrogate pair): text must "
            "be UTF-8. Mend the row or remove it."
        ) from error
    return text
