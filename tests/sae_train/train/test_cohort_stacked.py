"""`train.stacked`: members whose steps differ in numbers alone step as one program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted, UserError
from sae_train.config.run import Config
from sae_train.runs.metrics_file import read_metrics
from sae_train.train import cohort_step
from sae_train.train.loop import train, train_cohort
from tests.support.training import TIMINGS, assert_same_run, make_run

pytestmark = pytest.mark.slow

STEPS = 20
COEFFICIENTS = {"sparse": 0.05, "middle": 0.02, "dense": 0.005}


def members(folder: Path, place: str, **options: Any) -> list[Config]:
    """Three of one shape, and one of another width that can only step by itself."""
    alike = [
        make_run(
            folder,
            steps=STEPS,
            output=f"{place}/{name}",
            sparsity={"coefficient": coefficient},
            **options,
        )
        for name, coefficient in COEFFICIENTS.items()
    ]
    return [*alike, make_run(folder, steps=STEPS, output=f"{place}/wide", width=128, **options)]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many members each stacked program that was made is for."""
    made, original = [], cohort_step.make_stacked_step

    def counting(*arguments: Any, members: int, **options: Any) -> Any:
        made.append(members)
        return original(*arguments, members=members, **options)

    monkeypatch.setattr(cohort_step, "make_stacked_step", counting)
    return made


def assert_close(a: Path, b: Path) -> None:
    for left, right in zip(read_metrics(a), read_metrics(b), strict=True):
        for key in left.keys() - TIMINGS:
            np.testing.assert_allclose(left[key], right[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_stacked_members_agree_with_themselves_alone(
    tmp_path: Path, programs: list[int], mesh: tuple[int, int]
):
    for config in members(tmp_path, "alone", mesh=mesh):
        train(config)
    assert programs == []
    train_cohort(members(tmp_path, "stacked", mesh=mesh, stacked=True))
    assert programs == [3]
    for name in (*COEFFICIENTS, "wide"):
        assert_close(tmp_path / "alone" / name, tmp_path / "stacked" / name)


def test_stopped_and_gone_on_it_ends_the_same(tmp_path: Path, programs: list[int]):
    train_cohort(members(tmp_path, "whole", stacked=True))
    calls = iter(range(7))
    parts = members(tmp_path, "parts", stacked=True)
    with pytest.raises(Interrupted):
        train_cohort(parts, stop=lambda: next(calls, None) is None)
    train_cohort(parts)
    assert programs == [3, 3, 3]
    for name in (*COEFFICIENTS, "wide"):
        assert_same_run(tmp_path / "whole" / name, tmp_path / "parts" / name, step=STEPS)


def test_one_that_fails_leaves_the_stack(tmp_path: Path, programs: list[int]):
    configs = members(tmp_path, "mixed", stacked=True, parametrisation="direct")
    rates = {"peak": 1e37, "warmup_steps": 10, "warmup_from": 0.0}
    train_section = configs[0].train.model_copy(
        update={"learning_rate": configs[0].train.learning_rate.model_copy(update=rates)}
    )
    configs[0] = configs[0].model_copy(update={"train": train_section})
    with pytest.raises(UserError, match="1 of 4 runs failed"):
        train_cohort(configs)
    assert programs == [3, 2]
    for config in configs[1:]:
        assert read_metrics(config.output)[-1]["step"] == STEPS
