"""The report: one page, whole by itself, right in its numbers and links."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from activation_cache.runtime.errors import UserError
from launch.cli import main
from launch.sweep.expand import expand
from sae_train.config.file import write_config
from sae_train.config.run import Config
from sae_train.report.page import describe_runs, write_report
from sae_train.runs.folder import read_run, record_failure, run_folders
from tests.support.configs import make_config
from tests.support.report_pages import charts_of, published_sweep
from tests.support.run_folders import STEPS, sweep_config, write_run

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what a page links to and loads; fails on tags that don't match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if tag == "a" and name == "href":
                self.links.append(value or "")
            elif name in ("src", "href", "srcset", "data", "poster", "action"):
                self.loads.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).replace("\u00a0", " ").split())


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Eight runs: five whole, one stopped, one not evaluated, one failed at once."""
    root = tmp_path / "a sweep"
    config = sweep_config(root, coefficients=[2e-4, 1e-3, 4e-3, 1e-2], widths=[2048, 4096])
    write_config(config, root)
    for index, (run, l0) in enumerate(
        zip(expand(config), (139, 121, 96, 82, 55, 47, 21, 18), strict=True)
    ):
        if index == 7:
            write_config(run.config, run.folder)
            record_failure(run.folder, stage="train", reason="loss <nan> is not finite")
        else:
            write_run(
                run.config,
                l0=l0,
                steps=STEPS if index != 6 else 200,
                evaluated=index not in (5, 6),
            )
    return root


def single(folder: Path) -> Config:
    config = sweep_config(folder, coefficients=[1e-3], widths=[2048])
    return config.model_copy(update={"sweep": None})


def test_the_page_is_whole_by_itself(sweep: Path) -> None:
    page = Page(write_report(sweep))
    assert page.loads == []
    assert not re.search(r"url\(|@import|https?://", page.source)
    assert len(charts_of(page.source)) == 3 + 6 + 2 + 3 + 2, "two sparsities have both widths"


def test_the_same_runs_make_the_same_bytes(sweep: Path) -> None:
    first = write_report(sweep).read_bytes()
    assert write_report(sweep).read_bytes() == first


def test_every_link_leads_to_a_file(sweep: Path) -> None:
    path = write_report(sweep)
    page = Page(path)
    assert len(page.links) == 5 * 5 + 2 * 2 + 1
    for link in page.links:
        assert not link.startswith("/")
        assert (path.parent / unquote(link)).is_file(), link


def test_the_numbers_of_the_table(sweep: Path) -> None:
    words = Page(write_report(sweep)).words
    assert (
        "width 2048, λ 0.0002 trained 139.0 0.051 0.076 0.068 0.0984 0.1279 98.9% 86.1% 400 / 400"
        in words
    )
    assert "width 4096, λ 0.01 failed – – – – – – – – 0 / 400 –" in words
    assert "6 of 8 runs trained" in words
    assert "55–139 L0" in words
    assert "up to 31 of a run's, hold 46% of the variance" in words
    assert "loss is 3.162 nats per token" in words
    assert "to 11.874, that is +8.712" in words


def test_sites_zeroed_at_different_cost_are_told_as_a_range(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, coefficients=[1e-3, 4e-3], widths=[2048])
    write_config(config, tmp_path)
    for run in expand(config):
        write_run(run.config, l0=50)
    file = run_folders(tmp_path)[1] / "evaluation.json"
    evaluation = json.loads(file.read_text())
    file.write_text(json.dumps(evaluation | {"loss_zero_ablated": 20.5}))
    words = Page(write_report(tmp_path)).words
    assert "to between 11.874 and 20.500, depending on the site" in words


def test_incomplete_runs_are_named(sweep: Path) -> None:
    page = Page(write_report(sweep))
    assert "width 2048, λ 0.01 is stopped, not trained to its end" in page.words
    assert "width 4096, λ 0.004 has not been evaluated" in page.words
    assert "width 4096, λ 0.01 failed: loss <nan> is not finite" in page.words
    assert "<nan>" not in page.source, "what others wrote is escaped"


def test_families_join_runs_that_differ_in_sparsity_alone(sweep: Path) -> None:
    runs = describe_runs([read_run(path) for path in run_folders(sweep)])
    assert [run.family for run in runs] == ["width\u00a02048"] * 4 + ["width\u00a04096"] * 4
    first = [run.measured("l0") for run in runs[:3]]
    assert first == [139, 96, 55], "dense to sparse"
    assert len({run.color for run in runs}) == 8


def test_each_architecture_has_a_frontier(tmp_path: Path) -> None:
    l1, none = {"penalty": "l1"}, {"penalty": "none"}
    for k in (32, 64):
        sae = {"architecture": "topk", "k": k}
        run = make_config(output=str(tmp_path / f"top{k}"), sae=sae, sparsity=none)
        write_run(run, l0=k)
        sae = {"architecture": "relu"}
        sparsity = l1 | {"coefficient": 1 / k}
        run = make_config(output=str(tmp_path / f"relu{k}"), sae=sae, sparsity=sparsity)
        write_run(run, l0=k + 5)
    runs = describe_runs([read_run(path) for path in sorted(tmp_path.iterdir())])
    found = {(run.family, run.sparsity) for run in runs}
    assert found == {
        ("architecture\u00a0topk", "k\u00a064"),
        ("architecture\u00a0topk", "k\u00a032"),
        ("architecture\u00a0relu", "λ\u00a00.015625, warmup_steps\u00a00"),
        ("architecture\u00a0relu", "λ\u00a00.03125, warmup_steps\u00a00"),
    }


def test_a_single_run_and_one_without_anything(tmp_path: Path) -> None:
    write_run(single(tmp_path / "one"), l0=60)
    page = Page(write_report(tmp_path / "one"))
    assert page.links[0] == "../config.yaml"
    assert len(charts_of(page.source)) == 3 + 6 + 1 + 3

    write_config(single(tmp_path / "bare"), tmp_path / "bare")
    page = Page(write_report(tmp_path / "bare"))
    assert "No run has been evaluated yet" in page.words
    assert "is not started" in page.words
    assert charts_of(page.source) == []
    assert page.words.count("Nothing measured yet.") == 2 + 6


def test_a_store_inside_the_sweep_is_no_run(sweep: Path) -> None:
    store = sweep / "store"
    store.mkdir()
    (store / "config.yaml").write_text((sweep / "config.yaml").read_text())
    (store / "manifest.json").write_text("{}")
    assert len(run_folders(sweep)) == 8


def test_metrics_with_a_torn_last_line(tmp_path: Path) -> None:
    folder = write_run(single(tmp_path / "one"), l0=60)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 410, "lo')
    write_report(folder)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nothing")
    config = sweep_config(tmp_path / "empty", coefficients=[1e-3], widths=[2048])
    write_config(config, tmp_path / "empty")
    with pytest.raises(UserError, match="without any run yet"):
        write_report(tmp_path / "empty")
    folder = write_run(single(tmp_path / "one"), l0=60)
    (folder / "evaluation.json").write_text("{")
    assert main(["report", str(folder)]) == 2
    assert "evaluation.json is not valid JSON" in capsys.readouterr().err


def test_evaluations_with_nothing_finite(tmp_path: Path) -> None:
    folder = write_run(single(tmp_path / "one"), l0=60)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for name in ("fvu", "delta_loss", "loss", "loss_spliced", "loss_zero_ablated"):
        evaluation[name] = None
    evaluation["by_position"]["fvu"][0] = None
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    Page(write_report(folder))


# What the paper measures beyond its headline ----------------------------------------------------


def section(page: Path, heading: str) -> str:
    (text,) = re.findall(rf"<h2>{heading}</h2>(.*?)(?=<h2>)", page.read_text(), flags=re.DOTALL)
    return text


def test_each_published_figure_has_its_numbers(tmp_path: Path) -> None:
    page = write_report(published_sweep(tmp_path / "sweep"))
    Page(page)
    widths = charts_of(section(page, "Firing frequencies by width"), of=page)
    assert [len(chart["data"]) for chart in widths] == [2, 2]
    counts = widths[0]["data"][0]["y"]
    assert counts[14] == pytest.approx(260 / 2048, rel=1e-4), "the highest, of the smaller SAE"
    (importance,) = charts_of(section(page, "Importance of active latents"), of=page)
    hovers = [trace["hovertext"][0] for trace in importance["data"] if "hovertext" in trace]
    assert "uniformity of importance 0.604" in hovers[1], "after the sparser one"
    subsets = charts_of(section(page, "By subset"), of=page)
    assert len(subsets) == 3
    order = subsets[0]["layout"]["yaxis"]["ticktext"]
    assert order == ["&lt;b&gt;DM Math", "Europarl", "silent"], "from best to worst"
    assert subsets[0]["data"][0]["y"] == [0, 1], "silent has no bar"
    prefixes = charts_of(section(page, "By prefix"), of=page)
    assert [chart["data"][0]["x"] for chart in prefixes] == [[512, 2048]] * 4
    assert section(page, "Precision").count("<tr>") == 5
    for chart in charts_of(section(page, "Precision"), of=page):
        hollow = [t for t in chart["data"] if t["marker"]["symbol"].endswith("-open")]
        assert (len(hollow), len(chart["data"])) == (4, 8)
    delta, _ = charts_of(section(page, "In gemma-it"), of=page)
    assert delta["data"][0]["x"] == [96.0]
    assert delta["data"][1]["x"] == [48.0]
    assert delta["data"][1]["y"] == pytest.approx([2 * delta["data"][0]["y"][0]], rel=1e-4)
    assert "λ\u00a00.001, gemma-it</b><br>L0 48.0" in delta["data"][1]["hovertext"][0]


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    words = Page(write_report(published_sweep(tmp_path / "sweep", more=False))).words
    for heading in ("By subset", "By prefix", "Importance", "Precision", "In gemma-it"):
        assert heading not in words
