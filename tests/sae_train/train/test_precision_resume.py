"""Runs whose products are in bfloat16: they go on to the bit, and change only when told to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from activation_cache.runtime.errors import Interrupted, UserError
from launch.run_state import check_begun, is_trained
from sae_train.checkpoint.checkpoints import Checkpoints
from sae_train.config.run import Config
from sae_train.train import cohort_member
from sae_train.train.loop import train, train_cohort
from tests.support.configs import as_job
from tests.support.training import assert_same_run, make_run, stop_after

pytestmark = pytest.mark.slow

STEPS = 12


def run_of(folder: Path, precision: str, *, accept: str | None = None, **options: Any) -> Config:
    checkpoint = {"every_steps": 5, "keep": 9, "accept_precision": accept}
    common: dict[str, Any] = {"steps": STEPS, "precision": precision, "checkpoint": checkpoint}
    return make_run(folder, **common | options)


def begin(config: Config, *, until: int = 5) -> None:
    with pytest.raises(Interrupted):
        train(config, stop=stop_after(until))


def precisions(folder: Path) -> list[str | None]:
    """What the checkpoints of a run say, the oldest first."""
    with Checkpoints(folder) as checkpoints:
        return [checkpoints.read_meta(step).get("precision") for step in checkpoints.steps()]


@pytest.mark.parametrize("sae", [{}, {"architecture": "topk", "k": 4}], ids=["dense", "autodiff"])
def test_bfloat16_goes_on_to_the_bit(tmp_path: Path, sae: dict[str, Any]):
    options: dict[str, Any] = {"sae": sae}
    if sae:
        options["sparsity"] = {"penalty": "none"}
    train(run_of(tmp_path, "bfloat16", output="whole", **options))
    begin(run_of(tmp_path, "bfloat16", output="parts", **options), until=7)
    train(run_of(tmp_path, "bfloat16", output="parts", **options))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=STEPS)
    assert set(precisions(tmp_path / "parts")) == {"bfloat16"}


@pytest.mark.parametrize(
    ("before", "after", "means"),
    [("bfloat16", "auto", "float32"), ("auto", "bfloat16", "bfloat16")],
)
def test_another_precision_is_refused_until_it_is_accepted(
    tmp_path: Path, before: str, after: str, means: str, caplog: pytest.LogCaptureFixture
):
    begin(run_of(tmp_path, before))
    was = {"auto": "float32"}.get(before, before)
    found = (
        rf"products in {was}, and train.precision {after} makes them in {means} on these devices. "
        rf"Set train.precision={was} to .*or checkpoint.accept_precision={was} to go on in {means}"
    )
    for accept in (None, means):
        with pytest.raises(UserError, match=found):
            train(run_of(tmp_path, after, accept=accept))
    assert precisions(tmp_path / "run") == [was]
    caplog.set_level(logging.WARNING)
    begin(run_of(tmp_path, after, accept=was), until=3)
    assert f"from step 5 on products are made in {means}" in caplog.text
    assert precisions(tmp_path / "run") == [was, means]
    caplog.clear()
    train(run_of(tmp_path, after, accept=was))
    train(run_of(tmp_path, before))  # trained: nothing is left to refuse
    assert not caplog.records


def test_the_same_precision_by_another_word_is_the_same_run(tmp_path: Path):
    train(run_of(tmp_path, "auto", output="whole"))
    begin(run_of(tmp_path, "auto", output="parts"))
    train(run_of(tmp_path, "float32", output="parts"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=STEPS)


def test_a_checkpoint_that_says_nothing_is_of_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = cohort_member.checkpoint_meta

    def silent(*arguments: Any, **options: Any) -> dict[str, Any]:
        meta = own(*arguments, **options)
        del meta["precision"], meta["config"]["train"]["precision"]
        return meta

    with monkeypatch.context() as patched:
        patched.setattr(cohort_member, "checkpoint_meta", silent)
        begin(run_of(tmp_path, "auto"))
    assert precisions(tmp_path / "run") == [None]
    with pytest.raises(UserError, match=r"products in float32, and train.precision bfloat16"):
        train(run_of(tmp_path, "bfloat16"))
    train(run_of(tmp_path, "auto"))
    assert precisions(tmp_path / "run") == [None, "float32", "float32"]


def test_in_a_cohort_the_others_go_on(tmp_path: Path):
    begin(run_of(tmp_path, "bfloat16", output="a"))
    members = [
        run_of(tmp_path, precision, output=output)
        for output, precision in (("a", "auto"), ("b", "bfloat16"), ("c", "tf32"), ("d", "auto"))
    ]
    with pytest.raises(UserError, match="2 of 4 runs failed") as raised:
        train_cohort(members)
    assert "a: " in str(raised.value)
    assert "train.precision is tf32" in str(raised.value)
    found = [precisions(tmp_path / name)[-1] for name in "abd"]
    assert found == ["bfloat16", "bfloat16", "float32"]


def test_a_sweep_judges_by_what_configs_say(tmp_path: Path):
    """Before there are devices: two words that differ are another run, `auto` may be the same."""
    begin(run_of(tmp_path, "bfloat16"))
    for precision, accept in (("bfloat16", None), ("auto", None), ("float32", "bfloat16")):
        check_begun([as_job(run_of(tmp_path, precision, accept=accept))])
    with pytest.raises(UserError, match=r"train.precision was bfloat16 and is now float32"):
        check_begun([as_job(run_of(tmp_path, "float32"))])
    train(run_of(tmp_path, "bfloat16"))
    assert [
        is_trained(as_job(run_of(tmp_path, precision)))
        for precision in ("bfloat16", "auto", "float32")
    ] == [True, True, False]
