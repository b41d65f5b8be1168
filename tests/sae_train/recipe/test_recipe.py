"""`train.recipe`: what it fills, what it leaves, and that a run keeps what it began with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from activation_cache.runtime.errors import UserError
from launch.config.job import Job, load_job, read_job
from launch.show.plan_tables import show_plan
from launch.sweep.expand import expand
from sae_train.checkpoint.same_run import numeric_differences
from sae_train.config.file import value_at, with_values, write_config
from sae_train.plan.recipe import recipe_plans
from sae_train.recipe import fill
from sae_train.recipe.formulas import NAMES, Budget, Choice, choices
from tests.sae_train.config.test_config import BASE

# 600 steps of 512 rows.
SHORT = (
    BASE.replace("tokens: 4e9\n  learning_rate: {peak: 7e-5}", "tokens: 307_200")
    .replace("  adam: {beta1: 0}\n", "")
    .replace("train:\n", "train:\n  recipe: auto\n  batch_size: 512\n")
)
PEAK, BANDWIDTH = "train.learning_rate.peak", "sae.bandwidth"


def load(tmp_path: Path, *overrides: str, text: str = SHORT) -> Job:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_job(path, overrides)


def budget(steps: int, **other: Any) -> Budget:
    own = {"architecture": "jumprelu", "penalty": "l0", "can_whiten": True} | other
    return Budget(steps=steps, batch_size=4096, **own)


def values(name: Any, steps: int, **other: Any) -> dict[str, Any]:
    return {key: one.value for key, one in choices(name, budget(steps, **other)).items()}


def test_auto_begins_at_short_and_ends_at_gemma_scope() -> None:
    assert values("auto", 300) == values("short", 300)
    assert values("auto", 1000) == values("short", 1000)
    assert values("auto", 1_000_000) == values("gemma_scope", 1_000_000)
    assert values("auto", 4_000_000) == values("gemma_scope", 4_000_000)


@pytest.mark.parametrize("steps", [1, 2, 11, 300, 999, 1000, 5_000, 60_000, 999_999, 10**7])
def test_numbers_go_from_short_to_gemma_scope_without_a_leap(steps: int) -> None:
    here, there = values("auto", steps), values("auto", steps + max(1, steps // 100))
    assert here.keys() == there.keys()
    assert here["train.learning_rate.warmup_steps"] <= steps
    for key, value in here.items():
        if isinstance(value, float) and value and there[key] and steps > 20:
            assert there[key] == pytest.approx(value, rel=0.05), key
        elif isinstance(value, int) and key != "train.dead_after_tokens":
            assert abs(there[key] - value) <= 1 + steps // 100, key


def test_gemma_scope_is_what_a_config_without_a_recipe_has(tmp_path: Path) -> None:
    named = load(tmp_path, "train.recipe=gemma_scope")
    none = load(tmp_path, "train.recipe=null")
    assert numeric_differences(named, none) == []
    assert (none.train.recipe, none.train.recipe_chose) == (None, [])
    assert none.train.learning_rate.peak == 7e-5


def test_what_is_given_stays_and_the_rest_is_filled(tmp_path: Path) -> None:
    given = (
        "train.learning_rate={peak: 0.002}",
        "train.gradient_clip=null",
        "sae.threshold.init=3",
    )
    config = load(tmp_path, *given)
    found = choices("auto", Budget(**vars(budget(600)) | {"batch_size": 512}))
    for key, choice in found.items():
        if key in (PEAK, "train.gradient_clip", "sae.threshold.init"):
            assert key not in config.train.recipe_chose
        else:
            assert value_at(config, key) == choice.value, key
            assert key in config.train.recipe_chose
    assert config.train.learning_rate.peak == 0.002
    assert config.train.gradient_clip is None
    assert config.sae.threshold.init == 3


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        (["sae.architecture=topk", "sae.k=8", "train.sparsity={penalty: none}"], "train.sparsity"),
        (["sae.architecture=relu", "train.sparsity={penalty: l1, coefficient: 1}"], BANDWIDTH),
        (["sae.site=mlp_out", "sae.layer=3"], "nothing"),
        (["train.end_to_end={tokens: 1000}", "text.sequence_length=64"], "nothing"),
        (["train.dead_after_tokens=307200"], "train.dead_after_tokens"),
        (["train.tokens=512"], "nothing"),
        (["train.tokens=4e3", "train.batch_size=4000"], "nothing"),
    ],
)
@pytest.mark.parametrize("recipe", ["auto", "short"])
def test_every_config_that_may_have_a_recipe_passes_the_checks_with_it(
    tmp_path: Path, recipe: str, overrides: list[str], left_out: str
) -> None:
    config = load(tmp_path, f"train.recipe={recipe}", *overrides)
    assert PEAK in config.train.recipe_chose
    assert not any(key.startswith(left_out) for key in config.train.recipe_chose)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.recipe=shrot"], "did you mean 'short'?"),
        (
            ["train.recipe=gemma_scope", "sae.architecture=batch_topk", "sae.k=8",
             "train.sparsity={penalty: none}"],
            "set train.recipe to auto or short",
        ),
        (["train.tokens=many"], "'many' is not a whole number"),
        (["sae.threshold=3"], "3 is not a section"),
        (["sae.whitening=0.5", "train.end_to_end={tokens: 1000}"], "can't be combined"),
    ],
)  # fmt: skip
def test_what_contradicts_a_recipe_is_told(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value), "one mistake, one line"


def test_a_missing_penalty_is_still_told(tmp_path: Path) -> None:
    text = SHORT.replace("  sparsity: {penalty: l0, coefficient: .5}\n", "")
    with pytest.raises(UserError, match=r"train\.sparsity: missing"):
        load(tmp_path, text=text)


def test_a_list_of_choices_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no train\.recipe: leave it out"):
        load(tmp_path, "train.recipe_chose=[sae.bandwidth]", text=BASE)


def test_a_run_keeps_its_numbers_whatever_the_formulas_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = load(tmp_path, f"output={tmp_path}/run")
    write_config(begun, tmp_path / "run")
    other = {PEAK: Choice(0.5, "another formula"), BANDWIDTH: Choice(0.5, "another formula")}
    monkeypatch.setattr(fill, "choices", lambda name, budget: other)
    assert numeric_differences(read_job(tmp_path / "run"), begun) == []
    kept = read_job(tmp_path / "run", ["checkpoint.keep=9", "sae.bandwidth=0.02"])
    assert kept.train.learning_rate.peak == begun.train.learning_rate.peak
    assert kept.sae.bandwidth == 0.02
    assert BANDWIDTH not in kept.train.recipe_chose
    with_a_new_key = other | {"train.adam.beta2": Choice(0.5, "a key that recipes didn't have")}
    monkeypatch.setattr(fill, "choices", lambda name, budget: with_a_new_key)
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("    beta2: 0.999\n", ""))
    assert read_job(tmp_path / "run").train.adam.beta2 == 0.999
    anew = read_job(tmp_path / "run", ["train.tokens=1e6", f"output={tmp_path}/other"])
    assert anew.train.learning_rate.peak == 0.5


def test_each_run_of_a_sweep_has_the_recipe_of_its_own_budget(tmp_path: Path) -> None:
    sweep = "sweep={grid: {train.tokens: [307200, 5e6], sae.bandwidth: [0.02]}}"
    job = load(tmp_path, sweep, f"output={tmp_path}/sweep")
    write_config(job, tmp_path / "sweep")
    for base in (job, read_job(tmp_path / "sweep")):
        few, many = (run.config for run in expand(base))
        assert few.train.learning_rate.peak == job.train.learning_rate.peak
        assert many.train.learning_rate.peak == values("auto", 5_000_000 // 512)[PEAK]
        assert many.sae.bandwidth == 0.02
        assert BANDWIDTH not in many.train.recipe_chose


def test_a_recipe_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    begun = load(tmp_path, "train.recipe=null", f"output={tmp_path}/run")
    write_config(begun, tmp_path / "run")
    with pytest.raises(UserError, match="auto would fill nothing"):
        read_job(tmp_path / "run", ["train.recipe=auto"])
    sweep = "sweep={grid: {train.recipe: [short, gemma_scope]}}"
    with pytest.raises(UserError, match="short would fill nothing"):
        expand(load(tmp_path, "train.recipe=null", sweep))
    own = {"train": {"recipe": "short", "tokens": 9e6, "sparsity": {"coefficient": 1}}}
    assert PEAK in with_values(begun, own, source="test").train.recipe_chose
    short, long = expand(load(tmp_path, "train.recipe=gemma_scope", sweep))
    assert short.config.train.learning_rate.peak > 20 * long.config.train.learning_rate.peak


@pytest.mark.parametrize("recipe", ["auto", "short"])
def test_what_goes_on_from_a_release_has_gemma_scopes_rate(tmp_path: Path, recipe: str) -> None:
    config = load(tmp_path, f"train.recipe={recipe}", "sae.start_from=runs/a/release")
    assert config.train.learning_rate.peak == 7e-5
    assert (config.sae.whitening, config.train.learning_rate.warmup_steps) == (0.0, 50)


def test_a_section_that_is_set_as_a_whole_is_filled_again(tmp_path: Path) -> None:
    job = load(tmp_path)
    own = {"train.learning_rate": {"decay_steps": 7}}
    found = with_values(job, own, source="test").train
    assert found.learning_rate == job.train.learning_rate.model_copy(update={"decay_steps": 7})
    assert "train.learning_rate.decay_steps" not in found.recipe_chose
    assert PEAK in found.recipe_chose


def test_another_architecture_drops_what_was_jumprelus(tmp_path: Path) -> None:
    job = load(tmp_path)
    own = {"sae.architecture": "topk", "sae.k": 8, "train.sparsity": {"penalty": "none"}}
    topk = with_values(job, own, source="test")
    assert job.sae.revive_coefficient > 0 == topk.sae.revive_coefficient
    assert topk.train.learning_rate == job.train.learning_rate


def test_the_plan_says_what_was_chosen_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = load(tmp_path, "sae.bandwidth=0.5", "sweep={grid: {train.seed: [0, 1]}}")
    arguments = argparse.Namespace(accelerator="h100", mfu=0.4, devices=None, price=None, json=True)
    show_plan(job, arguments)
    (plan,) = json.loads(capsys.readouterr().out)["recipes"]
    assert (plan["recipe"], plan["steps"], len(plan["runs"])) == ("auto", 600, 2)
    by_key = {one["key"]: one for one in plan["settings"]}
    assert by_key[PEAK]["value"] == job.train.learning_rate.peak
    assert "times (a million / steps) to the power 0.6" in by_key[PEAK]["why"]
    assert (by_key[BANDWIDTH]["value"], by_key[BANDWIDTH]["is_chosen"]) == (0.5, False)
    arguments.json = False
    show_plan(job, arguments)
    shown = " ".join(capsys.readouterr().out.split())
    assert "train.recipe auto for 600 steps of 512 rows" in shown
    assert "the config's own; auto would take 0.01" in shown


@pytest.mark.parametrize("name", NAMES)
def test_values_are_plain_and_every_one_has_a_reason(name: Any, tmp_path: Path) -> None:
    job = load(tmp_path, f"train.recipe={name}")
    (plan,) = recipe_plans([("a", job)])
    assert all(one.is_chosen and one.value == one.recipes and one.why for one in plan.settings)
    assert len(plan.settings) == 14


def test_without_momentum_the_rate_is_lower(tmp_path: Path) -> None:
    with_it = load(tmp_path).train
    assert with_it.adam.beta1 == 0.9
    for override in ("train.adam.beta1=0", "train.step=sparse"):
        found = load(tmp_path, override).train
        assert found.adam.beta1 == 0
        assert found.learning_rate.peak < 0.6 * with_it.learning_rate.peak
        assert found.learning_rate.decay_steps < with_it.learning_rate.decay_steps
    long = load(tmp_path, "train.tokens=1e8").train
    assert (long.steps > 100_000, long.adam.beta1) == (True, 0.0)
    assert long.learning_rate.decay_steps > 0


def test_whitening_and_rate_are_those_of_the_site(tmp_path: Path) -> None:
    found = {}
    for site in ("resid_post", "mlp_out", "attn_out_prelinear"):
        cache = f"cache.sites=[{{site: {site}, layers: [12]}}]"
        job = load(tmp_path, f"sae.site={site}", cache)
        found[site] = (job.sae.whitening, job.train.learning_rate.peak)
    rate = found["resid_post"][1]
    assert found == {
        "resid_post": (0.25, rate),
        "mlp_out": (0.25, rate),
        "attn_out_prelinear": (0.0, pytest.approx(rate / 2, rel=0.01)),
    }
