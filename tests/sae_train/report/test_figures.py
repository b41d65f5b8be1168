"""The report's figures: the traces hold the runs' numbers, in what plotly understands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import plotly.graph_objects as go
import pytest

from sae_train.config.file import with_values
from sae_train.config.run import Config
from sae_train.report.charts import Axis, Charts, curve, mark, row_bars
from sae_train.report.described_runs import ReportRun, describe_runs
from sae_train.report.figures import compact, frontier, training_figures
from sae_train.report.page import write_report
from sae_train.runs.folder import read_run
from tests.support.report_pages import charts_of, published_sweep
from tests.support.run_folders import sweep_config, write_run


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (12_000, "12k"),
        (1.2e6, "1.2M"),
        (4e9, "4G"),
        (9999, "9999"),
    ],
)
def test_numbers_on_tiles(value: float, text: str) -> None:
    assert compact(value) == text


def test_plotly_knows_every_property(tmp_path: Path) -> None:
    page = write_report(published_sweep(tmp_path / "sweep"))
    charts = charts_of(page.read_text())
    assert len(charts) > 20
    for chart in charts:
        go.Figure(chart)  # refuses a name or a value that is not in plotly's schema


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    (run,) = described([single(tmp_path)], tmp_path)
    points = [(1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 0.123456789)]
    trace = curve(run, points, hover="")
    assert (trace["x"], trace["y"]) == ([1.0, 4.0], [2.0, 0.12346])
    assert mark(run, (4.0, math.nan), hover="")["y"] == [None], "JSON has no NaN"
    bars = row_bars(run, {"a": 1.0, "b": None, "c": math.nan, "d": -0.5}, label="FVU")
    assert (bars["x"], bars["y"]) == ([1.0, -0.5], [0, 3])
    assert bars["hovertext"][1].endswith("d<br>FVU -0.5")


def single(folder: Path) -> Config:
    config = sweep_config(folder, coefficients=[1e-3], widths=[2048])
    return config.model_copy(update={"sweep": None})


def six_taps(folder: Path) -> list[Config]:
    """Three sites at two layers, three coefficients each."""
    base = sweep_config(folder, coefficients=[1e-3], widths=[2048])
    base = base.model_copy(update={"sweep": None})
    sites = ("attn_out_prelinear", "mlp_out", "resid_post")
    taps = [{"site": site, "layers": [5, 12]} for site in sites]
    found = []
    for site in sites:
        for layer in (5, 12):
            for coefficient in (1e-4, 1e-3, 1e-2):
                name = f"{site}-{layer}-{coefficient:g}"
                own = {
                    "cache.sites": taps,
                    "sae.site": site,
                    "sae.layer": layer,
                    "train.sparsity.coefficient": coefficient,
                    "name": name,
                    "output": str(folder / name),
                }
                found.append(with_values(base, own, source="test"))
    return found


def described(configs: list[Config], folder: Path) -> list[ReportRun]:
    """The runs of these configs, each twice as dense as the one before."""
    return describe_runs(
        [read_run(write_run(config, l0=5.0 * 2**n)) for n, config in enumerate(configs)]
    )


def test_a_frontier_joins_the_runs_of_a_family(tmp_path: Path) -> None:
    runs = described(six_taps(tmp_path), tmp_path)
    charts = Charts()
    html = frontier(charts, runs, heading="FVU", metric="fvu", label="FVU")
    (chart,) = charts_of(f'{html}<script id="charts">{charts.packed()}</script>')
    lines = [trace for trace in chart["data"] if trace["mode"] == "lines"]
    marks = [trace for trace in chart["data"] if trace["mode"] == "markers"]
    assert len(lines) == 6
    assert [len(line["meta"]) for line in lines] == [3] * 6
    assert lines[0]["x"] == [5.0, 10.0, 20.0]
    assert lines[0]["y"] == pytest.approx([0.6 / math.sqrt(l0) for l0 in (5, 10, 20)], rel=1e-4)
    assert len({mark["meta"] for mark in marks}) == 18
    assert len({mark["marker"]["symbol"] for mark in marks}) == 6, "families have their own marks"
    assert "resid_post.12" in {run.family for run in runs}


def test_costs_that_differ_much_stand_on_a_log_axis(tmp_path: Path) -> None:
    runs = described(six_taps(tmp_path), tmp_path)

    def kind(shown: list[ReportRun]) -> str:
        charts = Charts()
        html = frontier(charts, shown, heading="", metric="delta_loss", label="y")
        (chart,) = charts_of(f'{html}<script id="charts">{charts.packed()}</script>')
        found: str = chart["layout"]["yaxis"]["type"]
        return found

    assert kind(runs) == "log"
    assert kind(runs[:3] + runs[-3:]) == "linear", "two families"


def test_many_long_runs_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    folder = write_run(single(tmp_path / "run"), l0=50)
    rows = [{"step": i, "tokens": 1000 * i, "loss": 1 / i} for i in range(1, 5_001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = describe_runs([read_run(folder)])
    for count, most in ((1, 400), (20, 222)):
        charts = Charts()
        html = training_figures(charts, [run] * count)
        chart = charts_of(f'{html}<script id="charts">{charts.packed()}</script>')[0]
        xs = chart["data"][0]["x"]
        assert most * 0.9 < len(xs) <= most + 1
        assert (xs[0], xs[-1]) == (1000, 5_000_000)


def test_a_chart_without_a_point_says_so() -> None:
    charts = Charts()
    html = charts.figure("<Loss>", [], x=Axis("x"), y=Axis("y"))
    assert "&lt;Loss&gt;" in html
    assert "Nothing measured yet." in html
    assert charts_of(f'{html}<script id="charts">{charts.packed()}</script>') == []
