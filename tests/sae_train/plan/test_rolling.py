"""The plan of a rolling store: its disk, its hours, and who waits for whom."""

from __future__ import annotations

import json

import pytest

from launch.cli import main
from launch.show.plan_tables import tables
from sae_train.config.file import with_values
from sae_train.plan.rolling import shared_hours
from tests.support.paths import ROOT
from tests.support.plan_configs import plan_of, scope_config

BUCKET = 1_015_808  # rows: a million, in blocks of 256 and to six significant bits


@pytest.mark.parametrize("size", [{"buckets": 64}, {"bytes": 65 * BUCKET * (3584 * 4 + 8) + 1}])
@pytest.mark.parametrize("beside", [False, True])
def test_the_disk_holds_a_window_and_a_bucket(size: dict[str, int], beside: bool) -> None:
    mesh = {"data": 4} if beside else {"model": 8}
    rolling = {"cache.rolling": size | {"beside": beside}, "cache.mesh": mesh}
    whole = plan_of(scope_config(), "h200", price=3.0)
    plan = plan_of(with_values(scope_config(), rolling, source="test"), "h200", price=3.0)
    assert plan.store.window == 64
    assert plan.store.rows_on_disk == 65 * BUCKET
    (before,), (after,) = whole.store.tap_bytes.values(), plan.store.tap_bytes.values()
    assert after / before == pytest.approx(65 * BUCKET / whole.store.rows, rel=1e-3)
    on, plain = plan.accelerators[0], whole.accelerators[0]
    assert on.sides is not None
    assert plain.sides is None
    assert on.train_hours is not None
    weights = 0 if beside else plan.harvest.weight_bytes // 8
    assert plain.usable_bytes - on.usable_bytes == weights
    if not beside:
        assert on.total_hours == plain.total_hours
        assert on.total_cost == plain.total_cost
        assert on.sides.waiting_hours == on.harvest_hours == plain.harvest_hours
    else:  # half the devices
        assert on.harvest_hours == pytest.approx(2 * plain.harvest_hours)
        assert on.total_hours == pytest.approx(max(on.harvest_hours, on.train_hours))
        assert on.total_cost == pytest.approx(on.total_hours * 12 * 3.0)
    named = "the model" if on.harvest_hours > on.train_hours else "the trainer"
    assert on.sides.slower == named
    assert f"the slower side is {named}" in str(tables(plan)[-1].caption)


def test_each_cohort_has_the_text_harvested_again() -> None:
    sides = shared_hours(4.0, [1.0, 7.0], beside=True)
    assert (sides.hours, sides.waiting_hours, sides.slower) == (11.0, 3.0, "the trainer")
    sides = shared_hours(4.0, [1.0, 6.0], beside=False)
    assert (sides.hours, sides.waiting_hours, sides.slower) == (15.0, 8.0, "the model")


def test_the_example_has_one_cohort_and_fits_the_disk_it_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = ROOT / "configs" / "gemma2_2b_rolling.yaml"
    assert main(["plan", str(path), "--json", "--accelerator", "h200"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [len(cohort["runs"]) for cohort in plan["cohorts"]] == [5]
    store = plan["store"]
    rows = sum(store["tap_bytes"].values()) + store["provenance_bytes"]
    assert store["window"] + 1 == 64
    assert rows <= 600e9 < rows * 65 / 64
    assert 15.5e9 < store["token_bytes"] < 16.5e9
