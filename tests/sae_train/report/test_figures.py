"""The report's figures: everything stands where its number says, and words cover nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sae_train.config.file import with_values
from sae_train.config.run import Config
from sae_train.report.bars import RowBars, RowChart, render_rows
from sae_train.report.figures import frontier_chart
from sae_train.report.page import describe_runs
from sae_train.report.svg import Axis, Bars, Chart, Series, compact, render
from sae_train.runs.folder import read_run
from tests.support.run_folders import sweep_config, write_run


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (0.3 - 0.1, "0.2"),
        (12_000, "12k"),
        (1.2e6, "1.2M"),
        (4e9, "4G"),
        (3.1e-4, "3.1e-4"),
        (1e-5, "1e-5"),
        (-0.25, "-0.25"),
        (9999, "9999"),
    ],
)
def test_numbers_on_axes(value: float, text: str) -> None:
    assert compact(value) == text


def numbers(pattern: str, svg: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, found.groups())) for found in re.finditer(pattern, svg)]


def test_points_stand_where_their_numbers_say() -> None:
    chart = Chart(
        title="t",
        x=Axis("x", log=True),
        y=Axis("y", low=0.0),
        series=[Series(x=[10, 100, 1000, 0], y=[0.0, 1.0, 2.0, 5.0], color="red", marks=True)],
    )
    marks = numbers(r'cx="([\d.]+)" cy="([\d.]+)"', render(chart))
    assert len(marks) == 3, "no place for 0 on a log axis"
    (x0, y0), (x1, y1), (x2, y2) = marks
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2), "decades are equally long"
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x1 < x2
    assert y0 > y1 > y2, "SVG counts downwards"


def test_bars_are_as_high_as_their_counts() -> None:
    chart = Chart(
        title="t",
        x=Axis("x", tight=True),
        y=Axis("y", low=0.0),
        bars=[Bars(edges=[0, 1, 2, 3], heights=[2, 0, 4], color="red")],
    )
    heights = numbers(r'<rect .*?height="([\d.]+)"', render(chart))
    assert len(heights) == 2
    assert heights[1][0] == pytest.approx(2 * heights[0][0], abs=0.2)


def test_labels_cover_no_mark_and_no_label() -> None:
    x = [10.0 * 1.02**index for index in range(20)] + [100.0]
    labels = [f"λ {value:.4f}" for value in x]
    chart = Chart(
        title="t",
        x=Axis("x", log=True),
        y=Axis("y"),
        series=[Series(x=x, y=[1 / a for a in x], color="red", marks=True, labels=labels)],
    )
    svg = render(chart)
    corners = numbers(r'class="label" x="([\d.]+)" y="([\d.]+)"', svg)
    assert 3 < len(corners) < len(x), "some find a place, the crowd does not"
    for index, (left, top) in enumerate(corners):
        for other_left, other_top in corners[:index]:
            assert abs(top - other_top) >= 12 or abs(left - other_left) > 50
        for mark_x, mark_y in numbers(r'cx="([\d.]+)" cy="([\d.]+)"', svg):
            assert not (left < mark_x < left + 50 and top - 11 < mark_y < top)


def test_bars_are_as_long_as_their_values() -> None:
    chart = RowChart(
        title="t",
        axis="x",
        names=["a", "b", "c"],
        bars=[RowBars([1.0, -0.5, None], "#112233", "run", "run")],
    )
    svg = render_rows(chart)
    bars = numbers(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    assert len(bars) == 2
    (positive, long), (negative, short) = bars
    assert long == pytest.approx(2 * short, rel=0.01)
    assert negative + short == pytest.approx(positive, abs=0.2), "both begin at 0"


# L0 and FVU of the suite of docs/results.md, whose attention SAEs crowd in a corner.
SMALL_SUITE = (
    (72.5, 0.1781), (165.8, 0.1313), (334.4, 0.0963), (229.5, 0.1951), (472.6, 0.1298),
    (803.1, 0.0876), (21.4, 0.0157), (56.8, 0.0111), (145.5, 0.0078), (224.3, 0.1065),
    (424.2, 0.0679), (721.7, 0.0438), (16.5, 0.0291), (36.2, 0.0209), (84.0, 0.0148),
    (64.6, 0.1312), (147.0, 0.0878), (308.1, 0.0547),
)  # fmt: skip


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


def test_of_many_families_each_is_named_once(tmp_path: Path) -> None:
    found = []
    for config, (l0, fvu) in zip(six_taps(tmp_path), SMALL_SUITE, strict=True):
        path = write_run(config, l0=l0) / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fvu": fvu}))
        found.append(read_run(path.parent))
    runs = describe_runs(found)
    svg = render(frontier_chart(runs, metric="fvu", label="FVU"))
    names = re.findall(r'class="label" style="[^"]*" x="([\d.]+)" y="([\d.]+)">([^<]+)<', svg)
    assert sorted(name for *_, name in names) == sorted({run.family for run in runs})
    assert "resid_post.12" in {run.family for run in runs}
    assert svg.count('class="label"') == 6, "what a mark's λ is, its tooltip says"
    marks = numbers(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    for left, top, name in names:
        right = float(left) + 6 * len(name)
        assert right < 400
        for x, y in marks:
            assert not (float(left) < x < right and float(top) - 11 < y < float(top))


def test_costs_that_differ_much_stand_on_a_log_axis(tmp_path: Path) -> None:
    runs = []
    for number, config in enumerate(six_taps(tmp_path)):
        runs.append(read_run(write_run(config, l0=5.0 * 2**number)))
    assert frontier_chart(describe_runs(runs), metric="delta_loss", label="y").y.log
    few = describe_runs(runs[:3] + runs[-3:])
    assert not frontier_chart(few, metric="delta_loss", label="y").y.log, "two families"


def test_a_label_crosses_no_line_where_there_is_room() -> None:
    values = [1.0, 2.0, 3.0]
    rising = Series(x=values, y=values, color="red", marks=True, labels=["", "aaaa", ""])
    svg = render(Chart(title="t", x=Axis("x"), y=Axis("y"), series=[rising]))
    ((left, base),) = numbers(r'class="label" x="([\d.]+)" y="([\d.]+)">a', svg)
    ((x0, y0), _, (x1, y1)) = numbers(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    for share in (i / 100 for i in range(101)):
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        assert not (left < x < left + 26 and base - 11 < y < base + 2)
