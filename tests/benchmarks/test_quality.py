"""`benchmarks.quality`: curves read at an L0, the choice of settings, and a study that goes on.

The trainers and the language model are stand-ins here: `make bench-quality` runs the real ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality.measure import Score
from benchmarks.quality.methods import METHODS, Method
from benchmarks.quality.results import Record, Results
from benchmarks.quality.stores import TAPS
from benchmarks.quality.study import Study, worth
from benchmarks.quality.tables import Curves, ahead_table, at_l0, report
from sae_train.inference.sae import Sae


def score(l0: float, *, fvu: float = 0.1, delta: float = 1.0) -> Score:
    return Score(l0, fvu, fvu / 2, fvu / 4, delta, (delta - 0.5, delta + 0.5), 0.75)


def record(l0: float, *, trainer: str = "sparsify TopK", **own: Any) -> Record:
    measured = score(l0, **own)
    settings: dict[str, Any] = {"rate": 1}
    return Record("grid", trainer, *TAPS[0], 0, round(l0), settings, {}, measured, 1.0)


def test_a_curve_is_straight_between_its_saes_and_ends_near_them():
    curve = [record(100, fvu=0.05, delta=0.4), record(25, fvu=0.2, delta=0.8)]
    found = at_l0(curve, 50)
    assert found is not None
    assert found.fvu == pytest.approx(0.1)
    assert (found.median_fvu, found.typical_fvu) == pytest.approx((0.05, 0.025))
    assert found.delta_loss == pytest.approx(0.6)
    assert found.delta_by_sequence == pytest.approx((0.1, 1.1))
    assert found.alive == pytest.approx(0.75)
    below = at_l0(curve, 20)
    assert below is not None
    assert below.fvu == pytest.approx(0.25)
    assert at_l0(curve, 19) is None
    assert at_l0(curve, 131) is None
    assert at_l0(curve[:1], 100) is not None
    assert at_l0([], 100) is None


def test_settings_are_chosen_by_fvu_and_delta_loss_alike():
    assert worth(record(50, fvu=0.2, delta=0.4)) == pytest.approx(
        worth(record(50, fvu=0.4, delta=0.2))
    )
    assert worth(record(50, fvu=0.2)) < worth(record(60, fvu=0.2))
    far, further = worth(record(80)), worth(record(10))
    assert worth(record(70, fvu=0.9)) < far < further < float("inf")
    assert worth(record(50, delta=-0.1)) == worth(record(50, fvu=float("nan"))) == float("inf")


@dataclass
class Rows:
    """One tap's rows, all alike."""

    site: str = TAPS[0][0]
    text: str = TAPS[0][1]
    width: int = 4
    input_scale: float = 1.0

    def batches(self, *, size: int, seed: int) -> Any:
        return itertools.repeat(np.full((1, self.width), seed, np.float32))


@dataclass
class Trainer:
    """Counts steps; its SAE has what it was asked for in its bias."""

    k: int
    quality: float
    trained: list[int]
    steps: int = 0

    def step(self, rows_BD: np.ndarray) -> None:
        self.steps += 1

    def sae(self) -> Sae:
        self.trained.append(self.k)
        zeros = np.zeros((4, 2), np.float32)
        bias = np.array([self.k, self.quality], np.float32)
        return Sae(zeros, zeros.T, bias, np.zeros(4, np.float32), np.zeros(2, np.float32))


class HeldOut:
    """Measures what the stand-in's bias says."""

    base = 2.0

    def score(self, sae: Sae, rows: Rows) -> Score:
        k, quality = np.asarray(sae.b_enc).tolist()
        return score(k, fvu=quality)


@dataclass
class Bench:
    """A study of one stand-in on one tap, opened anew each time."""

    folder: Path
    trained: list[int] = field(default_factory=list)

    def run(self) -> Results:
        method = Method(
            "sparsify TopK",
            start={"quality": 0.5},
            trials=({"quality": 0.25}, {"quality": 0.75}),
            make=lambda budget, rows, settings: Trainer(**settings, trained=self.trained),
            aim=lambda target: {"k": target},
        )
        study = Study(self.folder)
        study._rows, study._held_out = Rows(), {TAPS[0][1]: HeldOut()}  # type: ignore[assignment]
        study.run([method], [0, 1], TAPS[:1])
        return Results(self.folder)


def test_a_study_goes_on_where_it_was_left(tmp_path):
    bench = Bench(tmp_path)
    results = bench.run()
    # Two changes are tried after the start; the grid has the first's settings, and the search's SAE
    # of the middle L0.
    assert bench.trained == [50, 50, 50, 20, 100, 20, 50, 100]
    assert {record.settings["quality"] for record in results.of(phase="grid")} == {0.25}
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = bench.run()
    assert bench.trained[8:] == [100]
    assert again.records[:-1] == results.records[:-1]
    assert again.records[-1].score == results.records[-1].score
    text = report(results)
    assert "| sparsify TopK | 0.2500 ± 0.0000 / 0.2500 ± 0.0000 / 0.2500 ± 0.0000 |" in text
    assert "| 2 / 2 / 2 |" in text


def test_ours_is_set_beside_the_best_other_of_each_number(tmp_path):
    results = Results(tmp_path)
    by = {
        "ours": {"fvu": 0.09, "delta": 0.4},
        "sparsify TopK": {"fvu": 0.1, "delta": 1.0},
        "SAELens JumpReLU": {"fvu": 0.2, "delta": 0.5},
    }
    for name, own in by.items():
        for phase in ("search", "grid"):
            one = record(50, trainer=name, **own)
            results.records.append(Record(**(vars(one) | {"phase": phase})))
    assert {method.name for method in METHODS} > set(by)
    lines = ahead_table(Curves(results), "ours").splitlines()[2:]
    told = "-20%: 0.400, 0.500 ± 0.000, SAELens JumpReLU"
    assert f"| 50 | -10%: sparsify TopK | {told} |" in lines[0]
    assert lines[-1] == "| all |  |  | -10% | -20% |  |"
    for name, own in by.items():
        worse = {"fvu": own["fvu"] * 2, "delta": own["delta"] * (3 if name == "ours" else 2)}
        one = record(50, trainer=name, **worse)
        results.records.append(Record(**(vars(one) | {"seed": 1})))
    line = ahead_table(Curves(results), "ours").splitlines()[2]
    assert "-10% (-10% to -10%): sparsify TopK" in line
    assert "+7% (-20% to +20%): 0.800, 0.750" in line
