"""What every number and every path of the config may be, whichever key has it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from activation_cache.config import LARGEST_INT32, Section
from activation_cache.runtime.errors import UserError
from launch.config.job import Job, load_job
from sae_train.config import schema
from sae_train.config.file import resolved_yaml, with_values
from tests.sae_train.config.test_config import BASE
from tests.support.configs import make_config

HUGE = int("9" * 400)  # more than a float holds


def sections_below(annotation: Any) -> Iterator[type[Section]]:
    for one in schema.alternatives(annotation):
        if schema.is_section(one):
            yield one
            for field in one.model_fields.values():
                yield from sections_below(field.annotation)
        elif get_origin(one) in (list, dict):
            yield from sections_below(get_args(one)[-1])


def numbers(kind: type) -> list[Any]:
    """Every key of the config that holds a number of a kind, as its section and its name."""
    return [
        pytest.param(section, name, id=f"{section.__name__}.{name}")
        for section in dict.fromkeys(sections_below(Job))
        for name, field in section.model_fields.items()
        if kind in schema.alternatives(field.annotation)
    ]


def refused(section: type[Section], name: str, value: Any) -> bool:
    """Is a value refused for its key, and not for others that are missing?"""
    try:
        section.model_validate({name: value})
    except ValueError as error:
        mistakes: Any = error.errors()  # type: ignore[attr-defined]
        return any(one["loc"][:1] == (name,) and one["type"] != "missing" for one in mistakes)
    return False


@pytest.mark.parametrize(("section", "name"), numbers(int))
def test_whole_numbers_have_bounds(section: type[Section], name: str) -> None:
    for value in (True, math.nan, math.inf, -math.inf, -1, 1.5, 2**64, 10**30, 1e300, HUGE, "1"):
        assert refused(section, name, value), value


@pytest.mark.parametrize(("section", "name"), numbers(float))
def test_numbers_have_bounds(section: type[Section], name: str) -> None:
    for value in (True, math.nan, math.inf, -math.inf, -1.0, 1e300, HUGE, "1"):
        assert refused(section, name, value), value
    if refused(section, name, 0.0):
        assert refused(section, name, 1e-300), "0 in float32"


def test_the_walk_finds_the_numbers() -> None:
    assert len(numbers(int)) > 50
    assert len(numbers(float)) > 15


def test_bounds_are_told_exactly() -> None:
    config = make_config()
    with pytest.raises(UserError, match=r"2147483648 is out of range: .* at most 2147483647"):
        with_values(config, {"sae.width": 2**31}, source="here")
    with pytest.raises(UserError, match="1e-31 is out of range: it must be at least 1e-30"):
        with_values(config, {"train.adam.epsilon": 1e-31}, source="here")
    assert with_values(config, {"train.seed": 2**64 - 1}, source="here").train.seed == 2**64 - 1
    with pytest.raises(UserError, match=r"at most 18446744073709551615"):
        with_values(config, {"train.seed": 2**64}, source="here")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train.tokens": 2**37 + 64}, "are 2147483649 steps, and at most 2147483647"),
        ({"train.sparse_capacity": 2**26}, "are 4294967296 places for active pairs"),
    ],
)
def test_what_is_counted_in_32_bits(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        with_values(make_config(), values, source="here")


def test_as_many_steps_as_can_be_counted() -> None:
    config = with_values(make_config(), {"train.tokens": 2**37 - 64}, source="here")
    assert config.train.steps == LARGEST_INT32


PATHS = (
    "cache.path",
    "output",
    "model.weights",
    "text.source",
    "sae.start_from",
    "evaluation.also.model.weights",
    "evaluation.also.text.source",
    "launch.python",
)


def job_with(folder: Path, key: str, path: str) -> Job:
    """A config with a path in one of its places."""
    also, value = "evaluation.also=[{label: x, ", f"{key}='{path}'"
    if key == "text.source":
        value = f"{key}=['{path}']"
    elif key == "evaluation.also.model.weights":
        value = f"{also} model: {{weights: '{path}'}}}}]"
    elif key == "evaluation.also.text.source":
        value = f"{also} text: {{source: ['{path}']}}}}]"
    elif key == "launch.python":
        value = f"launch={{on: slurm, python: '{path}'}}"
    (folder / "config.yaml").write_text(BASE)
    return load_job(folder / "config.yaml", [value])


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    monkeypatch.setenv("SCRATCH", "/scratch/mine")
    monkeypatch.setenv("MINE", "~/mine")
    monkeypatch.delenv("NO_SUCH", raising=False)
    for written, meant in (
        ("~/a", "/home/of/mine/a"),
        ("$SCRATCH/a", "/scratch/mine/a"),
        ("${SCRATCH}_2/a", "/scratch/mine_2/a"),
        ("$MINE/a", "/home/of/mine/mine/a"),
        ("a~/$5/$", "a~/$5/$"),
    ):
        config = job_with(tmp_path, key, written)
        assert re.search(rf"[ ']{re.escape(meant)}'?\n", resolved_yaml(config)), written
        (tmp_path / "again.yaml").write_text(resolved_yaml(config))
        monkeypatch.setenv("SCRATCH", "/elsewhere")
        assert load_job(tmp_path / "again.yaml") == config, "it has the whole path"
        monkeypatch.setenv("SCRATCH", "/scratch/mine")
    for written, words in (
        ("$NO_SUCH/a", "the environment variable NO_SUCH is not set"),
        ("${NO_SUCH}", "the environment variable NO_SUCH is not set"),
        ("~nobody-at-all/a", "there is no home folder for ~nobody-at-all"),
    ):
        with pytest.raises(UserError, match=words):
            job_with(tmp_path, key, written)


def test_a_variable_that_names_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTER", "/a/$INNER")
    with pytest.raises(UserError, match=r"becomes /a/\$INNER/b, which has \$INNER in it"):
        job_with(tmp_path, "output", "$OUTER/b")


def test_urls_are_taken_as_they_are(tmp_path: Path) -> None:
    assert job_with(tmp_path, "output", "gs://bucket/~/$X").output == "gs://bucket/~/$X"
    source = "hf://org/set?split=train&x=$Y"
    assert job_with(tmp_path, "text.source", source).text.source == [source]
