"""Values that programs stumble over, and changes of JSON and of bytes made at random."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Random = np.random.Generator

DEEP: Any = "x"
for _ in range(300):
    DEEP = [DEEP]

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 255, 2**31 - 1, 2**31, 2**32, -(2**31) - 1,
    2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 1e-320, 1e-30, 1e16, 1e38,
    1e39, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), "", " ", "x", "0", "12",
    "1e999", "nan", "null", "true", "\0", "a\0b", "a\nb", "\ud800", "\ufeff", "\u2028", "é", "🦆",
    "x" * 5000, "/proc/x", "/dev/null/x", "..", ".", "~", "$HOME/x", "~nosuchuser/x", "%s", "{0}",
    "{reason}", "<b>&", "[red]", "[/red]", "gs://", "s3://", "hf://", "http://x", "file://x",
    [], {}, [None], [[]], [{}], {"": None}, {"x": [1, {"y": 2}]}, ["x", 1], [1, 2, 3], [-1],
    [0, 0], [1e308, 1e308], ["x"] * 50, DEEP,
)  # fmt: skip


def one_of(random: Random, choices: Any) -> Any:
    """One of a sequence; unlike `Generator.choice`, left as it is."""
    return choices[int(random.integers(len(choices)))]


def nasty(random: Random) -> Any:
    """A value of any type."""
    return one_of(random, NASTY)


Place = tuple[Any, Any]  # a dictionary or list, and a key or index in it


def places(value: Any) -> Iterator[Place]:
    """Every place of a JSON value that holds another."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:200]:
            yield value, key
            yield from places(value[key])


def broken_json(random: Random, data: bytes) -> bytes:
    """A JSON text with one of its values, keys or letters changed."""
    value = json.loads(data)
    text = json.dumps(changed(random, value))
    if random.random() < 0.1:
        text = one_of(random, _TEXT_CHANGES)(text)
    return text.encode()


def changed(random: Random, value: Any) -> Any:
    """A JSON value with one thing changed in it; `value` itself is used up."""
    found = list(places(value))
    if not found or random.random() < 0.03:
        return nasty(random)
    # Levels above count as much as the many leaves below them.
    shallow = [place for place in found if place[0] is value]
    holder, key = one_of(random, shallow if random.random() < 0.4 else found)
    one_of(random, _CHANGES)(random, holder, key)
    return value


def _replace(random: Random, holder: Any, key: Any) -> None:
    holder[key] = nasty(random)


def _replace_number(random: Random, holder: Any, key: Any) -> None:
    old = holder[key]
    if isinstance(old, int | float) and not isinstance(old, bool):
        factor = one_of(random, (-1, 0, 2, 1000, 0.5, 1e9, 1e300, float("nan"), str(old)))
        holder[key] = factor if isinstance(factor, str) else old * factor
    else:
        holder[key] = one_of(random, NASTY[:32])


def _delete(random: Random, holder: Any, key: Any) -> None:
    del holder[key]


def _add(random: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        holder[one_of(random, ("unknown", "", "step", "<<", "\0", "x" * 300))] = nasty(random)
    else:
        holder.insert(key, nasty(random))


def _wrap(random: Random, holder: Any, key: Any) -> None:
    holder[key] = one_of(random, ([holder[key]], {"x": holder[key]}, [holder[key]] * 2))


def _rename(random: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        holder[one_of(random, (key.upper(), key + "x", key[:-1], ""))] = holder.pop(key)
    else:
        holder.reverse()


def _as_text(random: Random, holder: Any, key: Any) -> None:
    old = holder[key]
    holder[key] = list(old) if isinstance(old, str) else json.dumps(old)


def _longer(random: Random, holder: Any, key: Any) -> None:
    old = holder[key]
    holder[key] = old * 2 if isinstance(old, str | list) else [old] * 3


_CHANGES: tuple[Callable[[Random, Any, Any], None], ...] = (
    _replace, _replace, _replace, _replace_number, _replace_number, _delete, _add, _wrap, _rename,
    _as_text, _longer,
)  # fmt: skip

_TEXT_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda text: text[: len(text) // 2],
    lambda text: text + text,
    lambda text: "\ufeff" + text,
    lambda text: text.replace(":", ": " + "9" * 5000 + ", 'x':", 1),
    lambda text: "[" * 5000 + text + "]" * 5000,
    lambda text: text.replace("{", '{"x": 1, "x": 2, ', 1),
    lambda text: text.replace('"', "'", 2),
    lambda text: text.replace(",", ",,", 1),
    lambda text: "",
    lambda text: "\n" + text + "\0",
)

_WORDS = (
    b"\0" * 4, b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\0\0\0\x80", b"\xff\xff\xff\x7f",
    b"\xff" * 7 + b"\x7f", (2**40).to_bytes(8, "little"), b"\x01\0\0\0\0\0\0\0", b"\xfe\xff",
    b"\xef\xbb\xbf", b"\x00", b"\n", b"\r\n", b"{}", b"[", b"\xed\xa0\x80", b"\x80",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
)  # fmt: skip


def broken_bytes(random: Random, data: bytes, *, other: bytes = b"", header: int = 400) -> bytes:
    """Bytes with one place flipped, cut, put in, left out or overwritten.

    Half of the places are in the first or last `header` bytes, where formats say what they are.
    """
    size = len(data)
    at = int(random.integers(size + 1))
    if random.random() < 0.5:
        near = int(random.integers(min(header, size) + 1))
        at = near if random.random() < 0.7 else size - near
    word, width = one_of(random, _WORDS), int(random.integers(1, 65))
    match int(random.integers(9)):
        case 0 if size:
            flipped = bytes([data[min(at, size - 1)] ^ (1 << int(random.integers(8)))])
            return data[: min(at, size - 1)] + flipped + data[min(at, size - 1) + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + word + data[at:]
        case 3:
            return data[:at] + data[at + width :]
        case 4:
            return data[:at] + data[at : at + width] + data[at:]
        case 5:
            return data[:at] + random.bytes(width) + data[at + width :]
        case 6 if other:
            return data[:at] + other[at:]
        case 7:
            return one_of(random, (b"", word, data + word, data[at:], data * 2, data[:0] + other))
    return data[:at] + word + data[at + len(word) :]
