"""What the config's classes allow: the keys below a path, and a type put in words.

Both overrides (does `train.batchsize` exist?) and error messages (which names are near?) ask the
pydantic classes here, so that neither keeps a second list of keys.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from activation_cache.config import Section


def alternatives(annotation: Any) -> list[Any]:
    """The types a value may have: unions flattened, `Annotated` opened, `None` kept as NoneType."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [one for part in get_args(annotation) for one in alternatives(part)]
    return [annotation]


def is_section(annotation: Any) -> bool:
    """Is this type one of the config's sections?"""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def sections(annotation: Any) -> list[type[Section]]:
    """The sections among the types a value may have."""
    return [one for one in alternatives(annotation) if is_section(one)]


def child(annotation: Any, key: str | int) -> list[Any]:
    """The types allowed at `key` below a value of such a type; empty if there is no such key."""
    found: list[Any] = []
    for one in alternatives(annotation):
        if is_section(one):
            if key in one.model_fields:
                found.append(one.model_fields[key].annotation)
        elif get_origin(one) is list and isinstance(key, int):
            found.append(get_args(one)[0])
        elif get_origin(one) is dict and isinstance(key, str):
            found.append(get_args(one)[1])
    return found


def describe(annotation: Any) -> str:
    """A type in words: 'a whole number', "'all' or a list of whole numbers", 'a section'."""
    return " or ".join(dict.fromkeys(_describe_one(one) for one in alternatives(annotation)))


def _describe_one(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"'{value}'" for value in get_args(annotation))
    if get_origin(annotation) is list:
        inner = describe(get_args(annotation)[0])
        plural = {"a whole number": "whole numbers", "text": "texts", "a section": "sections"}
        return f"a list of {plural.get(inner, inner)}" if inner != "anything" else "a list"
    if get_origin(annotation) is dict:
        return "a mapping"
    if is_section(annotation):
        return "a section"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    words[type(None)] = "null"
    return words.get(annotation, "anything")


def nearest(name: str, valid: list[str]) -> str | None:
    """The valid name most like `name`, if any is alike."""
    close = difflib.get_close_matches(name.lower(), valid, n=1, cutoff=0.6)
    return close[0] if close else None


def dotted_keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Every key below a value of such a type, sections too, as `train.learning_rate.peak`."""
    seen: set[str] = set()
    for section in sections(annotation):
        for name, field in section.model_fields.items():
            if name not in seen:
                seen.add(name)
                yield prefix + name
            for deeper in dotted_keys(field.annotation, f"{prefix}{name}."):
                if deeper not in seen:
                    seen.add(deeper)
                    yield deeper
