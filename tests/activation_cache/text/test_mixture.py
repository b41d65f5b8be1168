"""Sources mixed by weight: shares that hold at every point, one order, an end that is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from activation_cache.config import TextConfig
from activation_cache.runtime.errors import UserError
from activation_cache.text.mixture import read_documents
from activation_cache.text.sources import find_sources


def write(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def mixed(mixture: list[float] | None, *source: str) -> tuple[list[str], list[int], list[int]]:
    """The texts, the positions after each, and the sizes of all files."""
    config = TextConfig(source=list(source), mixture=mixture)
    sources = find_sources(config)
    pairs = list(read_documents(config, sources))
    sizes = [source.size or 0 for source in sources]
    return [document.text for document, _ in pairs], [position for _, position in pairs], sizes


def test_shares_hold_at_every_point_and_the_text_ends_with_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    one = write(tmp_path / "one.jsonl", ["a" * 10] * 30)
    other = write(tmp_path / "other.jsonl", ["b" * 5] * 12)
    with caplog.at_level(logging.INFO):
        texts, positions, sizes = mixed([3, 1], one, other)
    for end in range(10, len(texts)):
        shares = {kind: len("".join(t for t in texts[:end] if t[0] == kind)) for kind in "ab"}
        assert abs(shares["a"] - 3 * shares["b"]) <= 3 * 10, "never further apart than a document"
    assert texts.count("b" * 5) == 12
    assert texts.count("a" * 10) == 19
    assert f"{other} has no more text, so the reading ends" in caplog.text
    assert f"{one} 190, {other} 60" in caplog.text
    assert positions == sorted(positions)
    assert positions[-1] < sum(sizes)


def test_an_entry_of_several_files_is_one_share(tmp_path: Path):
    (tmp_path / "many").mkdir()
    for number in range(4):
        write(tmp_path / "many" / f"{number}.jsonl", [f"m{number}"] * 2)
    single = write(tmp_path / "single.jsonl", ["s0"] * 8)
    texts, positions, sizes = mixed([1, 1], str(tmp_path / "many"), single)
    assert texts == [text for number in range(4) for text in [f"m{number}", "s0"] * 2]
    assert positions[-1] == sum(sizes)


def test_without_a_mixture_sources_come_in_turn(tmp_path: Path):
    files = [write(tmp_path / f"{name}.jsonl", [name] * 2) for name in "ab"]
    texts, positions, sizes = mixed(None, *files)
    assert texts == ["a", "a", "b", "b"]
    assert positions[-1] == sum(sizes)


def test_mistakes_are_told(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ValidationError, match="mixture has 2 weights and source 1 entries"):
        TextConfig(source=[file], mixture=[1, 2])
    with pytest.raises(ValidationError, match="greater than or equal to"):
        TextConfig(source=[file], mixture=[0])
    with pytest.raises(UserError, match="names nothing that an entry before it doesn't name"):
        mixed([1, 1], file, str(tmp_path / "*.jsonl"))
