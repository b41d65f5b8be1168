"""The rows of one file of text: each reader yields (row, position, name of the row in messages).

A row is a dict with the file's fields; a position counts bytes of the file as it lies on the disk.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from activation_cache.runtime.errors import UserError
from activation_cache.text.compressed_files import reading
from activation_cache.text.source_files import kind_of

Rows = Iterator[tuple[Any, int, str]]

TXT_FIELD = "text"  # a .txt file is read as one row with this field
MAX_FILE_DOCUMENT_BYTES = 64 * 2**20  # a .txt file is one document, tokenised in one piece

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # with which some programs begin a file


def read_txt(name: str) -> Rows:
    """A .txt file as one row."""
    with reading(name) as (content, file):
        data = content.read(MAX_FILE_DOCUMENT_BYTES + 1)
        if len(data) > MAX_FILE_DOCUMENT_BYTES:
            raise UserError(
                f"{name} has more than {MAX_FILE_DOCUMENT_BYTES} bytes, and a .txt file is one "
                "document of at most that many: split it, or make it a .jsonl with one document a "
                "line."
            )
        yield {TXT_FIELD: _decode(data, where=name)}, os.fstat(file.fileno()).st_size, name


def read_jsonl(name: str) -> Rows:
    """A .jsonl file, whose rows are its lines."""
    with reading(name) as (content, file):
        yield from _json_lines(content, file, name)


def read_json(name: str) -> Rows:
    """A .json file: an array whose elements are the rows, or lines as in a .jsonl."""
    with reading(name) as (content, file):
        if _first_character(content) == b"[":
            yield from _json_array(content, file, name)
        else:
            yield from _json_lines(content, file, name)


def _first_character(content: io.BufferedReader) -> bytes:
    """The first byte that is neither space nor byte order mark; it stays to be read."""
    head = content.peek()
    if head.startswith(_BYTE_ORDER_MARK):
        content.read(len(_BYTE_ORDER_MARK))
    while head := content.peek():
        rest = head.lstrip()
        content.read(len(head) - len(rest))
        if rest:
            return rest[:1]
    return b""


def _json_array(content: io.BufferedReader, file: BinaryIO, name: str) -> Rows:
    import ijson

    number = 0
    try:
        for number, row in enumerate(ijson.items(content, "item"), start=1):
            yield row, file.tell(), f"{name}, element {number}"
    except (ijson.JSONError, UnicodeDecodeError) as error:
        said = error.args[0] if error.args else error
        said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise UserError(
            f"{name} is not JSON after element {number} ({' '.join(said.split())}): it begins with "
            "[ and must be one array. Mend it; if that is its end, the file may be cut short."
        ) from error


def _json_lines(content: io.BufferedReader, file: BinaryIO, name: str) -> Rows:
    for number, line in enumerate(content, start=1):
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


def read_csv(name: str) -> Rows:
    """A .csv file (RFC 4180): the first line names the fields, quoted fields may have line breaks.

    Of a .tsv file the fields are separated by tabs.
    """
    separator = "\t" if kind_of(name) == ".tsv" else ","
    with reading(name) as (content, file):
        lines = _decoded_lines(content, name)
        csv.field_size_limit(MAX_FILE_DOCUMENT_BYTES)
        table = csv.reader(lines, delimiter=separator, strict=True)
        header: list[str] | None = None
        try:
            for values in table:
                where = f"{name}, line {table.line_num}"
                if header is None:
                    header = _header(values, where=where)
                elif values:
                    if len(values) != len(header):
                        raise UserError(
                            f"{where} ends a row of {len(values)} fields, and the first line names "
                            f"{len(header)}: quote fields that hold the separator or a line break."
                        )
                    yield dict(zip(header, values, strict=True)), file.tell(), where
        except csv.Error as error:
            raise UserError(
                f"{name}, line {table.line_num} is not CSV ({error}): a quoted field must end in "
                "a quote, and quotes within it are doubled."
            ) from error


def _header(names: list[str], *, where: str) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where} names the field {twice[0]!r} twice: rename one of them.")
    return names


def _decoded_lines(content: io.BufferedReader, name: str) -> Iterator[str]:
    for number, line in enumerate(content, start=1):
        yield _decode(line, where=f"{name}, line {number}")


def read_parquet(name: str, columns: list[str]) -> Rows:
    """Those columns of a .parquet file that it has; it must have the first."""
    import pyarrow
    import pyarrow.parquet

    size = os.path.getsize(name)
    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            present = Counter(file.schema_arrow.names)
            if columns[0] not in present:
                raise UserError(
                    f"{name} has no column {columns[0]!r} (text.field); it has {list(present)}. "
                    "Set text.field to the one with the text."
                )
            total, number = max(1, file.metadata.num_rows), 0
            wanted = [column for column in columns if column in present]
            for column in wanted:
                if present[column] > 1:
                    raise UserError(
                        f"{name} has {present[column]} columns named {column!r}, and one is "
                        "needed: rename the others."
                    )
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for values in zip(*(batch.column(column) for column in wanted), strict=True):
                    number += 1
                    where = f"{name}, row {number}"
                    plain = (_python(value, where=where) for value in values)
                    yield dict(zip(wanted, plain, strict=True)), size * number // total, where
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not readable parquet ({error}): the file is damaged") from error


def _python(value: Any, *, where: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from error


def _decode(data: bytes, *, where: str) -> str:
    """Bytes as text, without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from error


def _not_utf8(error: UnicodeDecodeError, where: str) -> UserError:
    return UserError(
        f"{where} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): text "
        "must be UTF-8. Convert it, for instance with iconv."
    )
