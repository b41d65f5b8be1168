"""Sources of text: all kinds read alike, in a fixed order, and bad ones named to the line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from activation_cache.config import TextConfig
from activation_cache.runtime.errors import UserError
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


def test_each_kind_of_file_gives_the_same_documents(tmp_path: Path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(TEXTS)))
    write_parquet(tmp_path / "c.parquet", list(TEXTS))
    for pattern in ("*.txt", "a.jsonl", "b.jsonl.zst", "c.parquet"):
        assert documents(tmp_path / pattern) == TEXTS, pattern


def test_zstandard_in_several_frames_is_read_to_the_end(tmp_path: Path):
    frames = [zstandard.compress(jsonl([text])) for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert documents(tmp_path / "a.jsonl.zst") == TEXTS


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
    "empty": (b'{"text": ""}', r"line 2 holds no text"),
    "blank": (b'{"text": " \\n"}', r"line 2 holds no text"),
    "not UTF-8": (b'{"text": "\xff"}', r"line 2 is not UTF-8 \(byte 10 is 0xff\)"),
    "half a surrogate": (b'{"text": "\\ud800"}', r"line 2 is not UTF-8"),
    "missing field": (b'{"body": "x"}', r"line 2 has no field 'text' .* it has \['body'\]"),
    "not text": (b'{"text": 5}', r"line 2: field 'text' holds int"),
    "not JSON": (b'{"text": "cut sho', r"line 2 is not JSON"),
    "not an object": (b'["text"]', r"line 2 has no field 'text'"),
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
    for content, message in ((b"", "no text"), (b" \n", "no text"), (b"ab\xfe", "byte 2 is 0xfe")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file}.*{message}"):
            documents(file)


def test_a_txt_file_too_large_for_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_module, "MAX_FILE_DOCUMENT_BYTES", 3)
    (tmp_path / "a.txt").write_text("four")
    with pytest.raises(UserError, match=r"4 bytes, .* at most 3: split it"):
        documents(tmp_path / "a.txt")


def test_a_bad_parquet_row_is_named(tmp_path: Path):
    file = tmp_path / "c.parquet"
    write_parquet(file, ["x", None])
    with pytest.raises(UserError, match=r"c\.parquet, row 2: field 'text' holds NoneType"):
        documents(file)
    write_parquet(file, ["x", "y", ""])
    with pytest.raises(UserError, match=r"c\.parquet, row 3 holds no text"):
        documents(file)
    with pytest.raises(UserError, match=r"no field 'body' .* it has \['id', 'text'\]"):
        documents(file, field="body")


def test_damaged_files_are_named(tmp_path: Path):
    parquet = write_parquet(tmp_path / "c.parquet", list(TEXTS))
    parquet.write_bytes(parquet.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"c\.parquet is not readable parquet"):
        documents(parquet)
    packed = zstandard.compress(jsonl(TEXTS * 1000))
    for content in (b"no zstandard at all", packed[:200] + b"\0" * 50):
        (tmp_path / "b.jsonl.zst").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.jsonl\.zst"):
            documents(tmp_path / "b.jsonl.zst")


def test_a_zstandard_file_cut_short_is_noticed(tmp_path: Path):
    packed = zstandard.compress(jsonl([f"text {number}" for number in range(5000)]))
    (tmp_path / "b.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"b\.jsonl\.zst"):
        documents(tmp_path / "b.jsonl.zst")


def test_a_glob_without_files_and_an_unknown_ending(tmp_path: Path):
    with pytest.raises(UserError, match="matches no file"):
        documents(tmp_path / "*.txt")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"a\.csv, whose ending is not one of \.txt, \.jsonl"):
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
    (folder / "train.jsonl").write_bytes(jsonl([TEXTS[0], "", *TEXTS[1:]]))
    (folder / "test.jsonl").write_bytes(jsonl(["of the test split"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return "hf://some-org/some-set"


def test_a_hub_dataset_is_streamed_and_its_empty_rows_skipped(hub_dataset: str):
    assert documents(hub_dataset) == TEXTS
    assert documents(f"{hub_dataset}?split=test") == ["of the test split"]
    (source,) = find_sources(TextConfig(source=[hub_dataset]))
    assert source.streamed
    assert source.content_hash() is None
    with pytest.raises(UserError, match=r"row 1 has no field 'body' .* it has \['id', 'text'\]"):
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
