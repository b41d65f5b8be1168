"""The report in Chromium: it asks for nothing, answers a pointer, fits phone, night and paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_train.report.page import write_report
from tests.support.browser import Browser, open_browser
from tests.support.report_pages import published_sweep

pytestmark = pytest.mark.slow

READY = "specs && document.querySelector('#chart-1 .main-svg')"
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_report(published_sweep(tmp_path_factory.mktemp("report") / "a sweep")))


@pytest.fixture(scope="module")
def desktop(page: Path) -> Iterator[Browser]:
    """The page in a wide window; tests leave it as they found it."""
    with open_browser() as browser:
        browser.show(page, width=1280, until=READY)
        yield browser


def test_it_is_small_and_asks_for_nothing(desktop: Browser, page: Path) -> None:
    assert page.stat().st_size < MOST_BYTES
    asked = [url for url in desktop.requests if not url.startswith(("data:", "blob:"))]
    assert asked == [page.as_uri()]
    assert desktop.complaints == []


def test_a_pointer_over_a_mark_tells_its_run_and_numbers(desktop: Browser) -> None:
    desktop.point_at("#chart-0 .scatterlayer .point")
    desktop.wait("document.querySelector('#chart-0 .hovertext')")
    told = desktop.evaluate("document.querySelector('#chart-0 .hovertext').textContent")
    for words in ("width\u00a02048, λ\u00a00.004", "L0 21.0", "FVU 0.1309", "delta loss 0.3058"):
        assert words in told


def marks(browser: Browser, chart: int) -> int:
    return int(browser.evaluate(f"document.querySelectorAll('#chart-{chart} .point').length"))


def test_a_click_in_the_legend_switches_a_run_off_in_every_chart(desktop: Browser) -> None:
    assert (marks(desktop, 0), marks(desktop, 1)) == (4, 4)
    run, family = ".legend [data-run]", ".legend [data-family]"
    desktop.point_at(run, click=True)
    assert (marks(desktop, 0), marks(desktop, 1)) == (3, 3)
    off = "document.querySelectorAll('.legend [data-run][aria-pressed=false]').length"
    legends = desktop.evaluate("document.querySelectorAll('.legend').length")
    assert desktop.evaluate(off) == legends > 3, "one entry of each legend"
    desktop.point_at(run, click=True)
    assert marks(desktop, 0) == 4
    desktop.point_at(family, click=True)
    assert marks(desktop, 0) == 2
    twice = (
        f"document.querySelector('{run}').dispatchEvent(new Event('dblclick', {{bubbles: true}}))"
    )
    desktop.evaluate(twice)
    assert marks(desktop, 0) == 1, "a double click leaves one run alone"
    desktop.evaluate(twice)
    assert marks(desktop, 0) == 4, "and brings the others back"


def test_a_frame_drawn_in_a_chart_zooms(desktop: Browser) -> None:
    ticks = "[...document.querySelectorAll('#chart-1 .ytick')].map(tick => tick.textContent).sort()"
    before = desktop.evaluate(ticks)
    desktop.drag("#chart-1 .nsewdrag", (0.2, 0.2), (0.6, 0.6))
    assert desktop.evaluate(ticks) != before
    desktop.evaluate(
        "document.querySelector('#chart-1 [data-val=reset]').dispatchEvent(new Event('click'))"
    )
    assert desktop.evaluate(ticks) == before


def test_a_log_axis_has_a_few_ticks_wherever_it_begins(desktop: Browser) -> None:
    for low, high in ((50.02, 1500), (20, 280)):
        desktop.evaluate(
            f"void Plotly.relayout('chart-0', 'xaxis.range', [{low}, {high}].map(Math.log10))"
        )
        assert 3 <= desktop.evaluate("document.querySelectorAll('#chart-0 .xtick').length") <= 6
    desktop.evaluate("void Plotly.relayout('chart-0', 'xaxis.autorange', true)")


def test_it_has_a_dark_side(desktop: Browser) -> None:
    colors = (
        "[getComputedStyle(document.body).backgroundColor, ...['.xtick text', '.gridlayer path',"
        "'.infolayer text'].map(name => { const style = getComputedStyle(document.querySelector("
        "'#chart-0 ' + name)); return name.endsWith('path') ? style.stroke : style.fill })]"
    )
    light = desktop.evaluate(colors)
    desktop.prefer("dark")
    dark = desktop.evaluate(colors)
    desktop.prefer("light")
    assert all(by_day != by_night for by_day, by_night in zip(light, dark, strict=True))


def test_paper_shows_every_chart(desktop: Browser) -> None:
    empty = "[...document.querySelectorAll('.chart')].filter(div => !div.data).length"
    assert desktop.evaluate(empty) > 0, "charts are drawn when they come near"
    assert desktop.paper().startswith(b"%PDF")
    assert desktop.evaluate(empty) == 0


def test_it_fits_a_phone(desktop: Browser, page: Path) -> None:
    desktop.show(page, width=390, until=READY)
    desktop.evaluate("document.querySelectorAll('.chart').forEach(draw)")
    found = desktop.evaluate(
        "(names => [document.documentElement.scrollWidth, Math.max(...names.flatMap(name =>"
        "[...document.querySelectorAll(name)].map(part => part.getBoundingClientRect().right)))])"
        "(['figure', '.chart', '.main-svg', '.legend button', '.tiles li'])"
    )
    assert found[0] == 390
    assert found[1] < 390
    sizes, widths = desktop.evaluate(
        "[[...document.querySelectorAll('.chart text')].map(t => parseFloat("
        "getComputedStyle(t).fontSize)), [...document.querySelectorAll('.chart')].map("
        "chart => chart.clientWidth)]"
    )
    assert min(sizes) > 9.5
    assert min(widths) > 300
