"""pydantic's findings put in the user's words: line, key path, what is wrong, what is near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import pydantic

from activation_cache.config import Section
from sae_train.config import schema
from sae_train.config.strict_yaml import Path

_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Location:
    """Where an error is: the path as the user wrote it, and the type expected there.

    `section` is the innermost section of the path, and `tag` what chose it (`penalty: l0`) if
    there are several kinds. `undecided`: pydantic tried several types here, with an error for each.
    """

    path: Path
    annotation: Any
    section: Any = None
    tag: str | int | None = None
    undecided: bool = False


def mistakes(error: pydantic.ValidationError, *, root: type[Section]) -> list[tuple[Path, str]]:
    """Each mistake once, as (path, message), in the order of the schema.

    Args:
        root: the class that the whole file was checked against.
    """
    found: dict[tuple[Path, str], bool] = {}
    for detail in error.errors(include_url=False):
        location = _location(detail["loc"], root)
        path, message = _message(detail, location)
        for line in message.splitlines():
            found[path, line] = location.undecided
    deeper = [path for path, _ in found]
    return [
        (path, message)
        for (path, message), undecided in found.items()
        if not (undecided and any(p != path and p[: len(path)] == path for p in deeper))
    ]


def _location(location: tuple[str | int, ...], root: type[Section]) -> Location:
    """Follow pydantic's location through the schema, leaving out its tags for union members."""
    path: Path = ()
    annotation: Any = root
    section: Any = None
    tag: str | int | None = None
    parts = list(location)
    while parts:
        options = [one for one in schema.alternatives(annotation) if one is not type(None)]
        if len(options) > 1:
            inner = parts[1] if len(parts) > 1 else None
            chosen = [one for one in options if _is_member(one, parts[0], inner)]
            if len(chosen) != 1:
                return Location(path, annotation, section, undecided=True)
            annotation, tag = chosen[0], parts.pop(0)
            section = annotation
            continue
        if schema.is_section(options[0]) and options[0] is not section:
            section, tag = options[0], None
        part = parts.pop(0)
        if part == "[key]":
            break
        path = (*path, part)
        following = schema.child(annotation, part)
        annotation = following[0] if following else None
    return Location(path, annotation, section, tag)


def _is_member(annotation: Any, tag: str | int, inner: str | int | None) -> bool:
    """Is this the member of a union that pydantic's `tag` means (`penalty: l0`, a list's entry)?"""
    if not schema.is_section(annotation):
        return get_origin(annotation) is list and isinstance(inner, int)
    fields = annotation.model_fields.values()
    return any(tag in get_args(f.annotation) for f in fields if _is_literal(f.annotation))


def _is_literal(annotation: Any) -> bool:
    return get_origin(annotation) is Literal


def shown(value: Any) -> str:
    """A value as the user would recognise it, short."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(detail: Any, location: Location) -> tuple[Path, str]:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return location.path, _unknown_key(str(location.path[-1]), location)
    if kind == "union_tag_invalid":
        name = detail["ctx"]["discriminator"].strip("'")
        valid = _tags(location.annotation, name)
        return (*location.path, name), _unknown_choice(detail["input"].get(name), valid)
    if kind == "literal_error" and not location.undecided:
        literals = filter(_is_literal, schema.alternatives(location.annotation))
        valid = [str(choice) for literal in literals for choice in get_args(literal)]
        return location.path, _unknown_choice(detail["input"], valid)
    return location.path, _broken_rule(detail, location)


def _broken_rule(detail: Any, location: Location) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return f"missing; it must be given ({schema.describe(location.annotation)})"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{shown(value)} is out of range: it must be {words} {_bound(context[bound])}"
    if kind == "finite_number":
        return f"{shown(value)} is not a finite number"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "value_error":
        return str(context["error"])
    return _wrong_type(value, schema.describe(location.annotation))


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _unknown_key(name: str, location: Location) -> str:
    valid = sorted(location.section.model_fields)
    near = schema.nearest(name, valid)
    hint = f"did you mean '{near}'?" if near else f"the keys here are {', '.join(valid)}"
    return f"unknown key{f' with {location.tag}' if location.tag else ''}; {hint}"


def _unknown_choice(value: Any, valid: list[str]) -> str:
    near = schema.nearest(str(value), valid)
    hint = f"; did you mean '{near}'?" if near else ""
    return f"{shown(value)} is not one of {', '.join(valid)}{hint}"


def _tags(annotation: Any, name: str) -> list[str]:
    options = schema.sections(annotation)
    return [str(tag) for one in options for tag in get_args(one.model_fields[name].annotation)]


def _wrong_type(value: Any, expected: str) -> str:
    if "text" not in expected and isinstance(value, str) and _looks_numeric(value):
        return f"{shown(value)} is text, not {expected}: leave out the quotes"
    if expected == "text" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{shown(value)} is a number, not text: put it in quotes"
    if expected.startswith("a list") and not isinstance(value, list):
        return f"{shown(value)} is not {expected}: a list is written [a, b]"
    return f"{shown(value)} is not {expected}"


def _looks_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
