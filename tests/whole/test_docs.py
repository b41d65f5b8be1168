"""docs/config.md names every key with the default it has."""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from activation_cache.config import Section
from sae_train.checkpoint.same_run import FREE_FIELDS
from sae_train.config.run import Config
from sae_train.config.schema import alternatives, child, dotted_keys, sections
from sae_train.config.strict_yaml import parse
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", PAGE, flags=re.MULTILINE)


def field_defaults(key: str) -> list[Any]:
    """The defaults as the page should give them: sections of a union may share a key's name."""
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    annotations: list[Any] = [Config]
    for part in parents:
        annotations = [one for each in annotations for one in child(each, part)]
    owners = [one for each in annotations for one in sections(each) if last in one.model_fields]
    return [_shown(owner.model_fields[str(last)]) for owner in owners]


def _shown(field: FieldInfo) -> Any:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "section" if isinstance(value, Section) else value


def expected_keys(annotation: Any = Config, prefix: str = "") -> set[str]:
    """Every key; entries of lists of sections as `.0.`, values of named sections as `.NAME.`."""
    keys = set(dotted_keys(annotation, prefix)) if not prefix else set()
    for section in sections(annotation):
        for name, field in section.model_fields.items():
            keys |= {prefix + name} | expected_keys(field.annotation, f"{prefix}{name}.")
    for one in alternatives(annotation):
        if get_origin(one) is list:
            keys |= expected_keys(get_args(one)[0], f"{prefix}0.")
        if get_origin(one) is dict:
            keys |= expected_keys(get_args(one)[1], f"{prefix}NAME.")
    return keys


def test_every_key_is_documented_and_no_other() -> None:
    assert {key for key, _ in ROWS} == expected_keys()


def test_defaults_are_the_code_s() -> None:
    for key, shown in ROWS:
        found = parse(shown.strip(), name=key).value
        allowed = field_defaults(key)
        same = [one for one in allowed if found == one and type(found) is type(one)]
        assert same, f"{key}: {found!r}, not one of {allowed}"


def test_what_may_change_is_what_resume_allows() -> None:
    tail = PAGE[PAGE.index("## What may change") :]
    assert re.findall(r"`([a-z._]+)`", tail) == list(FREE_FIELDS)
