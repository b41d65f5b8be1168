"""Config files written and read back: the resolved one, overrides, and old run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.runtime.errors import UserError
from sae_train.config.file import (
    load_config,
    read_run_config,
    resolved_yaml,
    with_values,
    write_config,
)
from sae_train.config.run import Config
from sae_train.config.strict_yaml import dump, parse
from tests.sae_train.config.test_config import BASE, load
from tests.support.configs import make_config


def test_a_run_folder_keeps_its_config(tmp_path: Path) -> None:
    output = f"output={tmp_path}/run"
    config = load(tmp_path, output, "train.learning_rate.peak=1e-17", "model.revision='1e5'")
    write_config(config, tmp_path / "run")
    assert read_run_config(tmp_path / "run") == config
    with pytest.raises(UserError, match="does not exist"):
        read_run_config(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        read_run_config(tmp_path / "bare")


def test_sections_of_the_command_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Users write them into their YAML, and older runs into their folders and checkpoints."""
    with caplog.at_level("DEBUG", logger="sae_train.config.run"):
        config = load(tmp_path, text=BASE + "sweep: {grid: {no.such.key: [1]}}\n")
    assert "leaves out sweep and launch" in caplog.text
    assert not {"sweep", "launch"} & set(config.model_dump())
    old = config.model_dump(mode="json") | {"sweep": None, "launch": {"on": "local"}}
    assert Config.model_validate(old) == config


def test_any_yaml_reader_reads_the_resolved_config(tmp_path: Path) -> None:
    config = load(tmp_path, "name='on'", "model.revision='7e-5'", "train.learning_rate.peak=1e-17")
    assert yaml.safe_load(resolved_yaml(config)) == config.model_dump()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(plain)
def test_plain_data_round_trip(value: Any) -> None:
    found = parse(dump(value), name="test").value
    assert found == value
    assert repr(found) == repr(value), "types too"


# What people name things; YAML's traps among them.
names = st.text(min_size=1) | st.sampled_from(["on", "no", "1e5", "007", "1:30", "~", "a: b", "#"])

paths = names.filter(lambda text: "$" not in text and not text.startswith("~"))


positive = st.floats(min_value=1e-30, max_value=1e30)


@settings(deadline=None, max_examples=100)
@given(
    name=names,
    source=st.lists(paths, min_size=1, max_size=3),
    peak=positive,
    coefficient=positive,
    tokens=st.integers(min_value=1, max_value=10**11),
    clip=st.none() | positive,
    target=st.none() | st.floats(min_value=1, max_value=128),
)
def test_resolved_config_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    source: list[str],
    peak: float,
    coefficient: float,
    tokens: int,
    clip: float | None,
    target: float | None,
) -> None:
    penalty: dict[str, Any] = {"penalty": "l0", "coefficient": coefficient}
    if target is not None:
        penalty |= {"penalty": "target_l0", "target": target}
    config = with_values(
        make_config(),
        {
            "name": name,
            "text.source": source,
            "train.learning_rate.peak": peak,
            "train.sparsity": penalty,
            "train.tokens": tokens,
            "train.gradient_clip": clip,
        },
        source="test",
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@settings(deadline=None, max_examples=50)
@given(value=st.integers(min_value=1, max_value=10**12), peak=positive, name=names)
def test_an_override_is_what_the_file_would_say(
    tmp_path_factory: pytest.TempPathFactory, value: int, peak: float, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "override.yaml"
    path.write_text(BASE)
    overrides = [
        f"train.tokens={value}",
        f"train.learning_rate.peak={peak!r}",
        "name=" + dump([name]).removeprefix("- ").removesuffix("\n"),
    ]
    config = load_config(path, overrides)
    assert (config.train.tokens, config.train.learning_rate.peak) == (value, peak)
    assert config.name == name
