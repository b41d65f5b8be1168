"""Sources of text: all kinds read alike, in a fixed order, and bad ones named to the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from activation_cache.config import TextConfig
from activation_cache.runtime.errors import UserError
from activation_cache.text import file_rows
from activation_cache.text import sources as text_module
from activation_cache.text.sources import find_sources, sampled_hash

TEXTS = ["first text", "zweiter Text äöü", "3\nlines\n"]


def documents(*sources: object, field: str = "text") -> list[str]:
    config = TextConfig(source=[str(source) for source in sources], field=field)
    return [document.text for source in find_sources(config) for document in source.open()]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())})
    pyarrow.parquet.write_table(table, path)
    return path


def table(texts: list[str], separator: str = ",") -> bytes:
    lines = io.StringIO()
    csv.writer(lines, delimiter=separator).writerows([["id", "text"], *((1, t) for t in texts)])
    return lines.getvalue().encode()


CONTENTS = {
    ".jsonl": jsonl(TEXTS),
    ".json": json.dumps([{"id": 12345678901234567890123, "text": text} for text in TEXTS]).encode(),
    ".lines.json": jsonl(TEXTS),  # as in C4
    ".csv": table(TEXTS),
    ".tsv": table(TEXTS, "\t"),
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("compression", COMPRESS)
def test_each_kind_of_file_gives_the_same_documents(tmp_path: Path, compression: str):
    compress = COMPRESS[compression]
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt{compression}").write_bytes(compress(text.encode()))
    assert documents(tmp_path / f"*.txt{compression}") == TEXTS
    for ending, content in CONTENTS.items():
        file = tmp_path / f"a{ending}{compression}"
        file.write_bytes(compress(content))
        assert documents(file) == TEXTS, file
        file.write_bytes(compress(b"\xef\xbb\xbf" + content))
        assert documents(file) == TEXTS, "a byte order mark is no text"


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
def test_parquet_files_of_all_codecs(tmp_path: Path, codec: str):
    rows = pa.table({"id": [1, 2, 3], "text": TEXTS})
    pyarrow.parquet.write_table(rows, tmp_path / "c.parquet", compression=codec)
    assert documents(tmp_path / "c.parquet") == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_several_compressed_parts_are_read_to_the_end(tmp_path: Path, compression: str):
    """Such files come of `cat a.gz b.gz`."""
    parts = [COMPRESS[compression](jsonl([text])) for text in TEXTS]
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(b"".join(parts))
    assert documents(file) == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_compressed_file_that_is_damaged_or_cut_short_is_named(tmp_path: Path, compression: str):
    file = tmp_path / f"a.jsonl{compression}"
    packed = COMPRESS[compression](jsonl([f"text {number}" for number in range(5000)]))
    file.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=rf"{compression} ends within its .*: .* was cut short"):
        documents(file)
    for content in (b"nothing compressed at all", packed[:200] + b"\0" * 50 + packed[250:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{compression} is not readable .*: it is damaged"):
            documents(file)


BAD_JSON = {
    "cut short": (b'[{"text": "a"}, {"te', "is not JSON after element 1 .*EOF"),
    "no comma": (b'[{"text": "a"} {"text": "b"}]', "after element 1 .*I expect ','"),
    "not UTF-8": (b'[{"text": "\xff"}]', "after element 0 .*invalid bytes in UTF8"),
    "trailing": (b'[{"text": "a"}]\n{"text": "b"}', "after element 1 .*trailing garbage"),
    "not an object": (b'["a"]', "element 1 is str, not an object"),
    "an object over lines": (b'{\n"text": "a"}', "line 1 is not JSON"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_a_bad_array_is_named(tmp_path: Path, kind: str):
    content, message = BAD_JSON[kind]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"a.json.* {message}"):
        documents(tmp_path / "a.json")


BAD_TABLES = {
    "a short row": (b"id,text\n1,a\n2\n", "line 3 ends a row of 1 fields, and .* names 2: quote"),
    "a long row": (b"id,text\n1,a,b\n", "line 2 ends a row of 3 fields"),
    "an open quote": (b'id,text\n1,"a\n', r"line 2 is not CSV \(unexpected end of data\)"),
    "not UTF-8": (b"id,text\n1,\xff\n", "line 2 is not UTF-8"),
    "a field twice": (b"text,text\n1,a\n", "line 1 names the field 'text' twice"),
    "no such field": (b"id,body\n1,a\n", "1 rows and no text in field 'text'.*'body'"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_a_bad_table_is_named(tmp_path: Path, kind: str):
    content, message = BAD_TABLES[kind]
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"a.csv.* {message}"):
        documents(tmp_path / "a.csv")


def test_files_come_sorted_sources_as_listed_and_none_twice(tmp_path: Path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert documents(tmp_path / "*.txt") == ["a", "b", "c"]
    assert documents(tmp_path / "c.txt", tmp_path / "*.txt") == ["c", "a", "b"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "d.txt").write_text("d")
    assert documents(tmp_path / "**" / "*.txt") == ["a", "b", "c", "d"]


def test_the_position_ends_at_the_size(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    write_parquet(tmp_path / "c.parquet", list(TEXTS))
    for name in ("a.jsonl", "c.parquet"):
        (source,) = find_sources(TextConfig(source=[str(tmp_path / name)]))
        assert [d.position for d in source.open()][-1] == source.size


def test_another_field(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": "y"}\n\n{"content": "z"}\n')
    assert documents(tmp_path / "a.jsonl", field="content") == ["x", "z"]
    write_parquet(tmp_path / "c.parquet", ["p"], column="content")
    assert documents(tmp_path / "c.parquet", field="content") == ["p"]


BAD_LINES = {
    "not UTF-8": (b'{"text": "\xff"}', r"line 2 is not UTF-8 \(byte 10 is 0xff\)"),
    "half a surrogate": (b'{"text": "\\ud800"}', r"line 2 is not UTF-8"),
    "not text": (b'{"text": 5}', r"line 2: field 'text' holds int"),
    "not JSON": (b'{"text": "cut sho', r"line 2 is not JSON"),
    "not an object": (b'["text"]', r"line 2 is list, not an object with a field 'text'"),
    "deep": (
        b'{"text": "x", "m": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        r"line 2 is JSON that can't be read .*Remove that field or the line",
    ),
    "a number of 6,000 digits": (
        b'{"text": "x", "m": ' + b"9" * 6000 + b"}",
        r"line 2 is JSON that can't be read \(Exceeds the limit .*numbers may have 4,300 digits",
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.zst"])
def test_a_bad_line_is_named(tmp_path: Path, kind: str, ending: str):
    line, message = BAD_LINES[kind]
    content = b'{"text": "good"}\n' + line + b"\n"
    file = tmp_path / f"a{ending}"
    file.write_bytes(zstandard.compress(content) if ending.endswith("zst") else content)
    with pytest.raises(UserError, match=f"a{ending}, {message}"):
        documents(file)


def test_a_bad_txt_file_is_named(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"ab\xfe")
    with pytest.raises(UserError, match=rf"{file} is not UTF-8 \(byte 2 is 0xfe\)"):
        documents(file)


def test_a_txt_file_too_large_for_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_rows, "MAX_FILE_DOCUMENT_BYTES", 3)
    (tmp_path / "a.txt").write_text("four")
    with pytest.raises(UserError, match=r"more than 3 bytes, .* at most that many: split it"):
        documents(tmp_path / "a.txt")


def test_a_parquet_file_without_the_column_or_with_two_is_named(tmp_path: Path):
    file = write_parquet(tmp_path / "c.parquet", ["x", "y"])
    with pytest.raises(UserError, match=r"no column 'body' .* it has \['id', 'text'\]"):
        documents(file, field="body")
    with pytest.raises(UserError, match=r"c\.parquet, row 1: field 'id' holds int, not text"):
        documents(file, field="id")
    twice = pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, file)
    with pytest.raises(UserError, match=r"c\.parquet has 2 columns named 'text'"):
        documents(file)


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    parquet = write_parquet(tmp_path / "c.parquet", list(TEXTS))
    parquet.write_bytes(parquet.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"c\.parquet is not readable parquet"):
        documents(parquet)


ROWS_WITHOUT_TEXT = [{}, {"text": None}, {"text": ""}, {"text": " \n"}]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
        return file
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(zstandard.compress(content) if file.suffix == ".zst" else content)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_rows_without_text_are_skipped_and_counted(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    good = [{"text": text, "id": 1} for text in TEXTS]
    file = write_rows(tmp_path / name, [good[0], *ROWS_WITHOUT_TEXT, *good[1:]])
    assert documents(file) == TEXTS
    assert f"{name}: 4 of 7 documents have no text and are skipped" in caplog.text
    write_rows(file, [{"text": None, "id": 1}] * 3)
    with pytest.raises(UserError, match=r"3 rows and no text in field 'text' .*'text'"):
        documents(file)


def test_a_field_that_no_row_has_is_told_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_module, "_ROWS_IN_VAIN", 5)
    file = write_rows(tmp_path / "a.jsonl", [{"body": "x"}] * 6 + [{"text": 5}])
    with pytest.raises(UserError, match=r"5 rows and no text in field 'text' .* has \['body'\]"):
        documents(file)


def test_an_empty_txt_file_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name, content in (("a", "x"), ("b", ""), ("c", " \n"), ("d", "y")):
        (tmp_path / f"{name}.txt").write_text(content)
    assert documents(tmp_path / "*.txt") == ["x", "y"]
    assert caplog.text.count("1 of 1 documents have no text") == 2


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    """It begins a file, and in a .jsonl that was put together of several any of its lines."""
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + "a\ufeffb".encode())
    assert documents(tmp_path / "a.txt") == ["a\ufeffb"]
    content = mark + jsonl(TEXTS[:1]) + mark + jsonl(TEXTS[1:])
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(content))
    for name in ("a.jsonl", "b.jsonl.zst"):
        assert documents(tmp_path / name) == TEXTS


def test_a_git_lfs_pointer_is_named(tmp_path: Path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer, .*`git lfs pull`"):
            find_sources(TextConfig(source=[str(tmp_path / name)]))
    (tmp_path / "a.txt").write_bytes(
        b"version https://git-lfs.github.com/spec/v1 is its first line"
    )
    assert len(documents(tmp_path / "a.txt")) == 1


def test_what_exists_is_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in ("[2024]", "2", "what?"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a*.txt").write_text(folder)
        (tmp_path / folder / "ab.txt").write_text(f"{folder}, ab")
    for root in (f"{tmp_path}/", ""):
        monkeypatch.chdir(tmp_path)
        assert documents(f"{root}[2024]/a*.txt") == ["[2024]"]
        assert documents(f"{root}[2024]/?b.txt") == ["[2024], ab"]
        assert documents(f"{root}what?/*.txt") == ["what?", "what?, ab"]
        assert documents(f"{root}[1-3]/ab.txt") == ["2, ab"]


def test_a_folder_is_all_its_readable_files(tmp_path: Path):
    inside = tmp_path / "corpus" / "b"
    inside.mkdir(parents=True)
    (tmp_path / "corpus" / "c.txt").write_text("c")
    (inside / "a.jsonl").write_bytes(jsonl(["a"]))
    for name in ("README.md", ".hidden.txt", "dataset_infos.json"):
        (inside / name).write_text("not text to read")
    assert documents(tmp_path / "corpus") == documents(f"{tmp_path}/corpus/") == ["a", "c"]
    (inside / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"is a folder without files that end in \.txt, \.jsonl"):
        documents(inside)
    with pytest.raises(UserError, match=r"matches folders only, such as .*corpus/b: name the"):
        documents(f"{tmp_path}/corpus/b*")
    (inside / "link.txt").symlink_to(tmp_path / "nothing")
    for entry in (inside / "link.txt", inside / "*.txt"):
        with pytest.raises(UserError, match=r"link\.txt, which is a link to nothing"):
            documents(entry)


def test_a_file_named_twice_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file, link = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("x")
    assert documents(file, file) == ["x"]
    assert "names 1 sources more than once, such as" in caplog.text
    link.symlink_to(file)
    assert documents(file, link) == ["x", "x"]
    assert f"{file} and {link} are one file, which is read twice" in caplog.text


def test_a_glob_without_files_and_an_unknown_ending(tmp_path: Path):
    with pytest.raises(UserError, match="matches no file"):
        documents(tmp_path / "*.txt")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a\.pdf, whose ending is not one of \.txt, \.jsonl"):
        documents(tmp_path / "*")


def test_the_hash_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, twin = tmp_path / "a", tmp_path / "b"
    file.write_bytes(bytes(range(256)) * 100)
    twin.write_bytes(file.read_bytes())
    assert sampled_hash(file) == sampled_hash(twin)
    twin.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert sampled_hash(file) != sampled_hash(twin)
    monkeypatch.setattr(text_module, "_SAMPLE_BYTES", 100)  # now only 64 samples are read
    assert sampled_hash(file) != sampled_hash(twin)  # the last byte is one of them
    twin.write_bytes(file.read_bytes() + b"\0")
    assert sampled_hash(file) != sampled_hash(twin)


@pytest.fixture
def hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset where `datasets` looks before it asks the Hub: a folder under the current one."""
    folder = tmp_path / "some-org" / "some-set"
    folder.mkdir(parents=True)
    rows = [{"id": 1, "text": text} for text in TEXTS]
    write_rows(folder / "train.jsonl", [rows[0], *ROWS_WITHOUT_TEXT, *rows[1:]])
    (folder / "test.jsonl").write_bytes(jsonl(["of the test split"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return "hf://some-org/some-set"


def test_a_hub_dataset_is_streamed_and_its_empty_rows_skipped(
    hub_dataset: str, caplog: pytest.LogCaptureFixture
):
    assert documents(hub_dataset) == TEXTS
    assert "some-set: 4 of 7 documents have no text and are skipped" in caplog.text
    assert documents(f"{hub_dataset}?split=test") == ["of the test split"]
    (source,) = find_sources(TextConfig(source=[hub_dataset]))
    assert source.streamed
    assert source.content_hash() is None
    with pytest.raises(UserError, match=r"no text in field 'body' .* has \['id', 'text'\]"):
        documents(hub_dataset, field="body")


def test_a_hub_dataset_that_cannot_be_had(hub_dataset: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"cannot read hf://some-org/missing .*Check them"):
        documents("hf://some-org/missing")
    with pytest.raises(UserError, match=r"cannot read .*no-such-split"):
        documents(f"{hub_dataset}?split=no-such-split")
    with pytest.raises(UserError, match=r"unknown: \['splitt'\]"):
        documents(f"{hub_dataset}?splitt=train")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # as if not installed
    with pytest.raises(UserError, match=r"pip install 'open-gemma-scope\[hub\]'"):
        documents(hub_dataset)
