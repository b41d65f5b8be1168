"""Broken text: .txt, .jsonl, .jsonl.zst and .parquet."""

from __future__ import annotations

import json
from typing import Any

import zstandard

from tests.fuzz.outcome import Input
from tests.fuzz.values import NASTY, Random, broken_bytes, broken_json, nasty, one_of
from tests.fuzz.world import World

_PIECES = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\r", b"\x85", b" ",
    b"<bos>", b"<eos><pad>", b"<unk>", b"<0x0A>", b"\n\n\n", b"x" * 300_000, b" " * 100_000,
    "\u2581\u2581 \u200d\u0301".encode(), "🦆é漢字".encode(), "\ufffe\uffff".encode(),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
)  # fmt: skip
_PATTERNS = (
    "{t}/*", "{t}/**", "{t}", "{t}/", "{t}/[a]*.txt", "{t}/a.txt", "{t}/../texts/a.txt",
    "{t}/*.{{x}}",
    "~/x.txt", "", " ", "\0", "hf://", "hf://x?split=", "hf://a/b?x=1", "gs://", "{t}/nothing",
    "[", "**", "/proc/self/mem", "/dev/null",
)  # fmt: skip


def broken_text(random: Random, world: World) -> Input:
    """One file of text broken and harvested, or a source that names odd things."""
    folder = f"{world.folder}/texts"
    name = one_of(random, ("a.txt", "b.jsonl", "b.jsonl", "c.jsonl.zst", "d.parquet"))
    data = _broken(random, name, world)
    sources = [f"{folder}/{name}"]
    if random.random() < 0.15:
        sources.append(one_of(random, _PATTERNS).format(t=folder))
    words = ["harvest", f"{world.folder}/config.yaml", f"cache.path={world.folder}/new",
             "cache.tokens=100", f"text.source={json.dumps(sources)}"]  # fmt: skip
    if random.random() < 0.2:
        field = one_of(random, ("meta.set", "meta", "text", "x", "", "meta.x.y", "a.b"))
        words.append(f"text.{one_of(random, ('field', 'subset_field'))}={json.dumps(field)}")
    if random.random() < 0.1:
        words.append(f"text.sequence_length={one_of(random, (1, 2, 3, 255, 256, 257))}")
    return Input(tuple(words), {f"texts/{name}": data})


def _broken(random: Random, name: str, world: World) -> bytes:
    data = world.files[f"texts/{name}"]
    if name == "a.txt":
        at = int(random.integers(len(data)))
        piece = one_of(random, _PIECES)
        return (
            data[:at] + piece + data[at:] if random.random() < 0.7 else broken_bytes(random, data)
        )
    if name == "d.parquet":
        return _table(random, data)
    lines = _broken_lines(random, world.files["texts/b.jsonl"])
    if name == "b.jsonl":
        return lines if random.random() < 0.9 else broken_bytes(random, data)
    packed = zstandard.ZstdCompressor().compress(lines)
    return packed if random.random() < 0.4 else broken_bytes(random, packed, header=20)


def _broken_lines(random: Random, data: bytes) -> bytes:
    lines = data.splitlines()
    at = int(random.integers(len(lines)))
    kind = random.random()
    if kind < 0.4:
        lines[at] = json.dumps({"text": nasty(random), "meta": nasty(random)}).encode()
    elif kind < 0.7:
        lines[at] = broken_json(random, lines[at])
    elif kind < 0.8:
        lines = [json.dumps({"text": one_of(random, NASTY)}).encode()]
    else:
        lines.insert(at, one_of(random, _PIECES))
    return b"\n".join(lines) + b"\n"


def _table(random: Random, data: bytes) -> bytes:
    """A parquet file with a column of another type, or with a byte broken."""
    import pyarrow
    import pyarrow.parquet

    if random.random() < 0.5:
        return broken_bytes(random, data, header=80)
    body = "the cat and a dog " * 40
    columns: tuple[Any, ...] = (
        [body, None], [None, None], [1, 2], [1.5, None], [[body], [body]], [{"x": body}, None],
        [body.encode(), b"\xff"], [True, False], ["", body], [" ", body], [],
    )  # fmt: skip
    column = one_of(random, columns)
    names = one_of(random, (["text"], ["text", "text"], ["x"], ["text", "meta"], ["meta", "text"]))
    arrays = [pyarrow.array(column)] * len(names)
    if random.random() < 0.2 and column and isinstance(column[0], str):
        arrays = [one.dictionary_encode() for one in arrays]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), sink)
    return sink.getvalue().to_pybytes()
