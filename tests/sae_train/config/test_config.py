"""The config file: what is read as what, and what is refused in which words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from activation_cache.runtime.errors import UserError
from sae_train.config.file import (
    differing_fields,
    load_config,
    with_values,
)
from sae_train.config.run import Config
from sae_train.config.strict_yaml import parse
from tests.support.configs import make_config

BASE = """\
name: demo
model: {weights: google/gemma-2-2b, dtype: bfloat16}
text: {source: [a.txt]}
cache:
  path: store
  sites: [{site: resid_post, layers: [12]}, {site: mlp_out, layers: all}]
  tokens: 4e9
  shuffle_rows: 1_000_000
sae: {site: resid_post, layer: 12}
train:
  tokens: 4e9
  learning_rate: {peak: 7e-5}
  adam: {beta1: 0}
  sparsity: {penalty: l0, coefficient: .5}
output: runs/demo
launch: {on: local}
"""


# Ten of ten of ten ...: a text of a few lines that stands for 10⁹ values.
MANY_ALIASES = "a0: &a0 [1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


def load(tmp_path: Path, *overrides: str, text: str = BASE) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def refusal(tmp_path: Path, *overrides: str, text: str = BASE) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, text=text)
    return str(caught.value)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.cache.tokens == 4_000_000_000
    assert type(config.cache.tokens) is int
    assert config.cache.shuffle_rows == 1_000_000
    assert config.train.learning_rate.peak == 7e-5
    assert config.train.sparsity.coefficient == 0.5
    assert config.train.adam.beta1 == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7e-5", 7e-5),
        ("-7E+5", -7e5),
        ("1_000_000", 1_000_000),
        ("1_000.5", 1000.5),
        ("+3", 3),
        (".5", 0.5),
        ("5.", 5.0),
        ("1.5e3", 1500.0),
        ("010", 10),
        ("1:30", "1:30"),
        ("1_", "1_"),
        ("0x10", "0x10"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("'7e-5'", "7e-5"),
        ("!!str 5", "5"),
        ("-.inf", float("-inf")),
        ("1e", "1e"),
        ("[on, 1e3]", ["on", 1000.0]),
        ("{on: off}", {"on": "off"}),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = parse(text, name="test").value
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.tokens=1.9", "1.9 is not a whole number"),
        ("train.tokens='5'", "'5' is text, not a whole number: leave out the quotes"),
        ("train.batch_size=true", "true is not a whole number"),
        ("train.batch_size=0", "0 is out of range: it must be at least 1"),
        ("train.batch_size=null", "null is not a whole number"),
        ("train.tensorboard=1", "1 is not true or false"),
        ("train.tensorboard=yes", "'yes' is not true or false"),
        ("train.learning_rate.peak=fast", "'fast' is not a number"),
        ("train.learning_rate.peak=.inf", "inf is not a finite number"),
        ("train.learning_rate.peak=0", "0 is out of range: it must be at least 1e-30"),
        ("train.sparsity.coefficient=-1", "-1 is out of range: it must be at least 0"),
        ("name=5", "5 is a number, not text: put it in quotes"),
        ("name=''", "must not be empty"),
        ("text.source=a.txt", "'a.txt' is not a list of texts: a list is written [a, b]"),
        ("text.source=[1]", "text.source[0]: 1 is a number, not text"),
        ("sae.site=resid_pst", "'resid_pst' is not one of resid_post, mlp_out, attn_out_prelinear"),
        ("sae.site=resid_pst", "did you mean 'resid_post'?"),
        ("cache.sites.1.site=mpl_out", "did you mean 'mlp_out'?"),
        ("cache.sites.0.layers=[1.5]", "cache.sites[0].layers[0]: 1.5 is not a whole number"),
        ("cache.sites.0.layers=al", "'al' is not a list of whole numbers or 'all'"),
        ("cache.sites.0.layers=[3, 3]", "without repeats"),
        ("model.dtype=float16", "did you mean 'bfloat16'?"),
        ("train=3", "3 is not a section"),
        ("train.sparsity=3", "3 is not a section"),
        (
            "train.sparsity.penalty=l2",
            "train.sparsity.penalty=l2: 'l2' is not one of l0, target_l0",
        ),
        ("train.sparsity.target=80", "unknown key with l0; the keys here are"),
        ("train.sparsity={penalty: target_l0}", "train.sparsity.target: missing"),
        ("train.batchsize=3", "unknown key 'train.batchsize'; did you mean 'train.batch_size'?"),
        ("batch_size=3", "unknown key 'batch_size'; did you mean 'train.batch_size'?"),
        ("train.tokens.deep=3", "unknown key 'train.tokens.deep'"),
        ("cache.sites.7.site=mlp_out", "there is no entry 7 to set; the list has 2"),
        ("sweep.grid.sae.width=[1]", "unknown key 'sweep.grid.sae.width'"),
        ("text.source=[*.txt]", "not valid YAML"),
        ("train.batch_size", "write it as key=value"),
        ("=3", "write it as key=value"),
    ],
)
def test_bad_values_are_refused_in_words(tmp_path: Path, override: str, words: str) -> None:
    message = refusal(tmp_path, override)
    assert words in message
    assert override in message
    assert "\n" not in message, "one mistake, one line"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mesh.data=3", "train.batch_size 4096 is not divisible by mesh axis 'data' (size 3)"),
        ("mesh.model=3", "sae.width 16384 is not divisible by mesh axis 'model' (size 3)"),
        ("sae.layer=3", "cache.sites does not harvest"),
        ("sae.site=attn_out_prelinear", "cache.sites does not harvest"),
    ],
)
def test_values_that_do_not_fit_together(tmp_path: Path, override: str, words: str) -> None:
    assert words in refusal(tmp_path, override)


@pytest.mark.parametrize(
    ("addition", "words"),
    [
        ("trian: {}\n", "line 17, trian: unknown key; did you mean 'train'?"),
        ("name: again\n", "line 17, name: the key is given twice (first on line 1)"),
        ("mesh: {data: 1, data: 2}\n", "line 17, mesh.data: the key is given twice"),
        ("mesh: !!python/object:os.system x\n", "the tag !!python/object:os.system is not allowed"),
        ("mesh: !!set {a}\n", "the tag !!set is not allowed"),
        ("mesh: !custom {data: 1}\n", "the tag !custom is not allowed"),
        ("mesh: &self {data: *self}\n", "mesh.data: the value contains itself"),
        ("5: x\n", "line 17: a key must be text, not '5'"),
        ("true: x\n", "a key must be text"),
        ("? [a]\n: b\n", "a key must be text, not a list or mapping"),
        ("mesh: {data: 1\n", "line 18, column 1: not valid YAML"),
        ("mesh:\n\tdata: 1\n", "line 18, column 1: not valid YAML"),
        ("mesh:\n\tdata: 1\n", "Indent with spaces: YAML takes no tabs there"),
        ("mesh: {<<: 3}\n", "line 17, mesh.<<: << merges mappings: write <<: *anchor"),
        ("mesh: {<<: [{data: 1}, 3]}\n", "line 17, mesh.<<: << merges mappings"),
        ("mesh: {<<: {data: 1}, <<: {}}\n", "line 17, mesh.<<: the key is given twice"),
        ("mesh: &m {<<: *m}\n", "line 17, mesh: the value contains itself"),
        (MANY_ALIASES, "aliases repeat more than 50000 values"),
        ("---\nname: second\n", "not valid YAML"),
        ("mesh: {data: !!int x}\n", "line 17, mesh.data: 'x' is not a valid int"),
        (
            "checkpoint:\n  every_steps: 1.5\n",
            "line 18, checkpoint.every_steps: 1.5 is not a whole",
        ),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, addition: str, words: str) -> None:
    message = refusal(tmp_path, text=BASE + addition)
    assert words in message
    assert str(tmp_path / "config.yaml") in message


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: {z: 2}}\nb: {<<: *a, x: 3}",
        "a: &a {x: 1}\nb: &b {x: 2, y: 3}\nc: {z: 4, <<: [*a, *b]}",
        "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b}",
        "a: {<<: {x: 1}, x: 2}",
        "a: {'<<': 1}",
        "a: &a [1, {x: 2}]\nb: [*a, *a]",
    ],
)
def test_merge_keys_and_aliases_are_read_as_yaml_has_them(text: str) -> None:
    assert parse(text, name="test").value == yaml.safe_load(text)


def test_a_merged_section_and_its_lines(tmp_path: Path) -> None:
    text = BASE.replace("sparsity: {penalty: l0, coefficient: .5}", "sparsity: {<<: &p {}}")
    text = text.replace("{<<: &p {}}", "{<<: &p {penalty: l0, coefficient: .5}, warmup_steps: 7}")
    sparsity = load(tmp_path, text=text).train.sparsity
    assert (sparsity.penalty, sparsity.coefficient, sparsity.warmup_steps) == ("l0", 0.5, 7)
    text = BASE + "mesh:\n  <<: &m {data: x}\ncheckpoint:\n  <<: {keep: 1}\n  keep: 1.5\n"
    message = refusal(tmp_path, text=text)
    assert "line 18, mesh.data: 'x' is not" in message
    assert "line 21, checkpoint.keep: 1.5 is not" in message, "the line of its own key"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "this file is empty"),
        (b"- a\n", "a config is a mapping of sections"),
        (b"name: \xff\n", "not UTF-8 text (byte 6)"),
        (b"name: \x00\n", "not valid YAML"),
        (b"[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_config_at_all(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = BASE.replace("tokens: 4e9", "tokens: 1.9").replace("penalty: l0", "penalty: l7")
    message = refusal(tmp_path, "sae.width=x", text=text + "typo: 1\n")
    assert "has 5 mistakes" in message
    for words in (
        "line 7, cache.tokens: 1.9",
        "line 11, train.tokens: 1.9",
        "line 14, train.sparsity.penalty: 'l7'",
        "override sae.width=x: 'x'",
        "line 17, typo: unknown key",
    ):
        assert words in message


def test_all_inconsistencies_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "sae.layer=3", "mesh.data=3", "mesh.model=5")
    assert "has 3 mistakes" in message


def test_no_pydantic_words_reach_the_user(tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.sparsity={penalty: target_l0, target: 0.5, form: x}")
    assert "target_l0." not in message
    assert "train.sparsity.target: 0.5 is out of range" in message
    assert "train.sparsity.form: 'x' is not one of batch_mean, per_token" in message
    for word in ("Input should", "type=", "Value error"):
        assert word not in message


@pytest.mark.parametrize("penalty", ["target_l0", "match_l0"])
def test_a_target_no_sae_of_that_width_can_have(tmp_path: Path, penalty: str) -> None:
    low = refusal(tmp_path, f"train.sparsity={{penalty: {penalty}, target: 0.9}}")
    assert "train.sparsity.target: 0.9 is out of range: it must be at least 1" in low
    high = refusal(tmp_path, f"train.sparsity={{penalty: {penalty}, target: 65}}", "sae.width=64")
    assert "train.sparsity.target 65 is above sae.width 64" in high
    assert "from 1 to 64" in high
    most = load(tmp_path, f"train.sparsity={{penalty: {penalty}, target: 64}}", "sae.width=64")
    assert most.sae.width == 64


def test_a_frequency_penalty_beside_a_target_needs_its_own_price(tmp_path: Path) -> None:
    section = "train.sparsity={penalty: target_l0, target: 80, frequency: {scale: 0.1}}"
    assert "frequency.coefficient must be given: try 1e-3" in refusal(tmp_path, section)
    section = "train.sparsity={coefficient: 1e-3, frequency: {}}"
    frequency = load(tmp_path, section).train.sparsity.frequency
    assert frequency is not None
    assert (frequency.scale, frequency.coefficient) == (0.1, None)


def test_a_site_may_be_listed_twice(tmp_path: Path) -> None:
    sites = "cache.sites=[{site: resid_post, layers: [12]}, {site: resid_post, layers: [3]}]"
    assert load(tmp_path, sites).sae.layer == 12


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "train.batch_size=2048",
        "sae.threshold.init=1e-2",
        "cache.sites.0.layers=[12, 13]",
        "train.sparsity={penalty: target_l0, target: 80}",
        "train.sparsity.warmup_steps=1e3",
        "text.source=['*.txt', a=b]",
        "train.batch_size=1024",
    )
    assert config.train.batch_size == 1024, "the last one counts"
    assert config.sae.threshold.init == 0.01
    assert config.cache.sites[0].layers == [12, 13]
    assert config.train.sparsity.penalty == "target_l0"
    assert config.train.sparsity.warmup_steps == 1000
    assert config.text.source == ["*.txt", "a=b"]


def test_a_penalty_left_out_is_gemma_scopes(tmp_path: Path) -> None:
    assert load(tmp_path, "train.sparsity={coefficient: 1}").train.sparsity.penalty == "l0"


def test_with_values_checks_again() -> None:
    config = make_config()
    changed = with_values(config, {"train.seed": 7, "sae.width": 256}, source="here")
    assert differing_fields(config, changed) == ["sae.width", "train.seed"]
    with pytest.raises(UserError, match=r"here, sae\.width: 1\.5 is not a whole number"):
        with_values(config, {"sae.width": 1.5}, source="here")
    with pytest.raises(UserError, match=r"here: unknown key 'sae\.witdh'"):
        with_values(config, {"sae.witdh": 2}, source="here")


def test_differing_fields_across_penalties(tmp_path: Path) -> None:
    one, other = load(tmp_path), load(tmp_path, "train.sparsity={penalty: target_l0, target: 80}")
    assert differing_fields(one, other) == [
        "train.sparsity.penalty",
        "train.sparsity.coefficient",
        "train.sparsity.target",
        "train.sparsity.form",
    ]
    assert differing_fields(one, one) == []
