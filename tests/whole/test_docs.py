"""The pages name what exists: files, links, modules, make targets; every key with its default."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from activation_cache.config import Section
from launch.config.job import Job
from sae_train.checkpoint.same_run import FREE_FIELDS
from sae_train.config.schema import alternatives, child, dotted_keys, sections
from sae_train.config.strict_yaml import parse
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", PAGE, flags=re.MULTILINE)

# The changelog names modules that are gone; its links are checked all the same.
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
LIVING = [page for page in PAGES if page.name != "CHANGELOG.md"]
PACKAGES = "activation_cache|sae_train|launch|tests|benchmarks"
NAMED_PATH = re.compile(rf"(?<![\w/.<])(?:{PACKAGES}|configs|docs|examples)/[\w./*-]*[\w*/]")
LONE_PYTHON_FILE = re.compile(r"`(?!__init__)([\w/]+\.py)`")
DOTTED_NAME = re.compile(rf"\b(?:{PACKAGES})(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\((?!https?://)([^)#]+)[^)]*\)")
MAKE_TARGET = re.compile(r"(?:`|^)make ([a-z][a-z-]*)", flags=re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def unresolved_part(dotted: str) -> str | None:
    """What is left of `package.module.name` when no module or definition answers to it."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:count])
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if not file.is_file() and not folder.is_dir():
            continue
        rest = parts[count : count + 1]
        code = file.read_text(encoding="utf-8") if file.is_file() else ""
        defined = not rest or re.search(rf"^(?:def |class )?{rest[0]}\b", code, re.MULTILINE)
        return None if defined or f'"{rest[0]}"' in code else rest[0]
    return dotted


def field_defaults(key: str) -> list[Any]:
    """The defaults as the page should give them: sections of a union may share a key's name."""
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    annotations: list[Any] = [Job]
    for part in parents:
        annotations = [one for each in annotations for one in child(each, part)]
    owners = [one for each in annotations for one in sections(each) if last in one.model_fields]
    return [_shown(owner.model_fields[str(last)]) for owner in owners]


def _shown(field: FieldInfo) -> Any:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "section" if isinstance(value, Section) else value


def expected_keys(annotation: Any = Job, prefix: str = "") -> set[str]:
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
    # A run's config doesn't have the last two: they say where it is started, and with which others.
    assert re.findall(r"`([a-z._]+)`", tail) == [*FREE_FIELDS, "launch", "sweep"]


@pytest.mark.parametrize("page", LIVING, ids=name_of)
def test_files_named_on_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {*NAMED_PATH.findall(text), *LONE_PYTHON_FILE.findall(text)}
    assert {path for path in named if not any(ROOT.glob(path))} == set()


@pytest.mark.parametrize("page", LIVING, ids=name_of)
def test_modules_and_names_on_a_page_exist(page: Path) -> None:
    named = set(DOTTED_NAME.findall(page.read_text(encoding="utf-8")))
    named -= expected_keys()  # launch.nodes and its like
    assert {dotted for dotted in named if unresolved_part(dotted)} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_resolve(page: Path) -> None:
    links = set(LINK.findall(page.read_text(encoding="utf-8")))
    assert {link for link in links if not (page.parent / link).exists()} == set()


def test_make_targets_on_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in LIVING:
        named = set(MAKE_TARGET.findall(page.read_text(encoding="utf-8")))
        assert named <= targets, name_of(page)


def test_the_picture_of_the_rooms_is_of_today_s_imports() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "draw_rooms.py"))
    drawn = script["PICTURE"].read_text(encoding="utf-8")
    assert script["picture"]() == drawn, "docs/rooms.svg: run make rooms"
