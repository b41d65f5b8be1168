"""The suites in configs/ are the released ones cell by cell; bad ones are refused in words."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from activation_cache.language_model.published_sizes import known_config
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import open_store
from launch.cli import main
from launch.config.job import Job, load_job
from launch.sweep.expand import expand
from launch.sweep.suite_cells import Cell, all_cells, cells_of, target_l0
from launch.sweep.suite_runs import stores
from sae_train.config.file import resolved_yaml
from sae_train.config.run import Config
from sae_train.release.suite_names import released_folder, width_name
from sae_train.runs.folder import run_folders
from tests.support.paths import DATA, ROOT
from tests.support.pipeline import write_pipeline

GEMMA_SCOPE = sorted((ROOT / "configs" / "gemma_scope").glob("*.yaml"))
GEMMA_SCOPE_2 = sorted((ROOT / "configs" / "gemma_scope_2").glob("*.yaml"))
SITES = {"attn_out": "attn_out_prelinear", "mlp_out": "mlp_out", "resid_post": "resid_post"}


def released(name: str) -> list[dict[str, str]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(io.StringIO(file.read())))


def suite(path: Path, *overrides: str) -> list[Cell]:
    config = load_job(path, overrides)
    return cells_of(config, shape_of(config))


def shape_of(config: Job) -> Any:
    gemma = known_config(config.model.weights)
    assert gemma is not None
    return gemma


@pytest.mark.parametrize("path", GEMMA_SCOPE, ids=lambda path: path.stem)
def test_gemma_scope_is_the_released_one(path: Path) -> None:
    model, base = f"gemma-2-{path.stem}", f"google/gemma-scope-{path.stem}-"
    cells = suite(path)
    ours: Counter[tuple[str, str, str, int]] = Counter()
    folders: list[str] = []
    for cell in cells:
        site = cell.site or {"transcoder": "mlp_transcoder"}.get(cell.kind, cell.kind)
        layer = "" if cell.layer is None else str(cell.layer)
        ours[model, site, layer, cell.width] += 1
        folder = released_folder(cell.folder, tree=cell.tree, average_l0=7.4)
        folders.append(base + folder.rpartition("/average_l0_7")[0])
    rows = [row for row in released("gemma_scope_released.csv.gz") if row["model"] == model]
    theirs = Counter((model, row["site"], row["layer"], int(row["width"])) for row in rows)
    assert ours == theirs
    assert Counter(folders) == Counter(row["repo_path"].rpartition("/")[0] for row in rows)


@pytest.mark.parametrize("path", GEMMA_SCOPE_2, ids=lambda path: path.stem)
def test_gemma_scope_2_is_the_released_one_folder_and_target(path: Path) -> None:
    model, base = f"gemma-3-{path.stem}", f"google/gemma-scope-2-{path.stem}/"
    ours = {}
    for cell in suite(path):
        folder = base + released_folder(cell.folder, tree=cell.tree, average_l0=1.0)
        assert folder == base + cell.folder
        site = cell.site or cell.kind
        ours[folder] = (site, cell.layer, cell.width, cell.target, cell.label, cell.affine)
        ours[folder] += (cell.seed,)
    theirs = {}
    for row in released("gemma_scope_2_released.csv.gz"):
        if row["model"] == model:
            site = row["site"].removesuffix("_all")
            theirs[row["repo_path"]] = (
                SITES.get(site, site),
                int(row["layer"]),
                int(row["width"]),
                int(row["target_l0"]),
                row["l0_label"],
                row["affine_skip"] == "1",
                int(row["seed"] or 0),
            )
    assert ours == theirs


def test_the_suites_are_all_there_and_as_large_as_they_say() -> None:
    totals = {"gemma_scope": 0, "gemma_scope_2": 0}
    for path in (*GEMMA_SCOPE, *GEMMA_SCOPE_2):
        count = len(suite(path))
        heading = " ".join(path.read_text(encoding="utf-8").splitlines()[:3])
        assert f"{count:,}" in heading, path
        assert path.read_text(encoding="utf-8").count("\n") < 90, "short enough to read"
        totals[path.parent.name] += count
    assert totals == {"gemma_scope": 2430, "gemma_scope_2": 8784}


def test_budgets_follow_the_width() -> None:
    budget = {16_384: 4, 32_768: 8, 65_536: 8, 131_072: 8, 262_144: 8, 524_288: 8, 2**20: 16}
    for path in (*GEMMA_SCOPE, *GEMMA_SCOPE_2):
        for cell in suite(path):
            if cell.kind != "embedding":
                assert cell.tokens == budget[cell.width] * 10**9, cell.folder


def test_the_rule_of_targets() -> None:
    assert [target_l0(30, 60, layer=layer, num_layers=18) for layer in (0, 5, 6, 17)] == [
        30,
        55,
        60,
        60,
    ]
    assert [width_name(w) for w in (4096, 16_384, 524_288, 2**20, 64)] == [
        "4k",
        "16k",
        "524k",
        "1m",
        "64",
    ]


SUITE = """\
name: small
model: {weights: google/gemma-3-270m, dtype: float32}
text: {source: [a.txt], held_out_sequences: 1}
cache:
  path: out/store
  sites: [{site: resid_post, layers: all}, {site: mlp_out, layers: [3]}]
  tokens: 1000
sae: {site: resid_post, layer: 5}
train:
  tokens: 9000
  data_seed: 0
  sparsity: {coefficient: 1e-3}
output: out
sweep:
  cells:
    - {sites: [resid_post], layers: [3, 5], widths: [64, 128], tokens: [500, 2000],
       coefficients: [1e-3, 1e-2]}
    - {sites: [mlp_out], layers: [3], widths: [64], coefficients: [1e-3], seeds: [0, 4]}
"""


def write(tmp_path: Path, text: str = SUITE) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def runs(tmp_path: Path, *overrides: str, text: str = SUITE) -> Iterator[tuple[str, Config]]:
    for run in expand(load_job(write(tmp_path, text), overrides)):
        yield run.name, run.config


def test_a_suite_s_runs_have_their_own_settings_and_released_names(tmp_path: Path) -> None:
    found = dict(runs(tmp_path))
    assert list(found) == [
        "res/layer_3/width_64/coefficient_0.001",
        "res/layer_3/width_64/coefficient_0.01",
        "res/layer_3/width_128/coefficient_0.001",
        "res/layer_3/width_128/coefficient_0.01",
        "res/layer_5/width_64/coefficient_0.001",
        "res/layer_5/width_64/coefficient_0.01",
        "res/layer_5/width_128/coefficient_0.001",
        "res/layer_5/width_128/coefficient_0.01",
        "mlp/layer_3/width_64/coefficient_0.001",
        "mlp/layer_3/width_64/coefficient_0.001_seed_4",
    ]
    one = found["mlp/layer_3/width_64/coefficient_0.001_seed_4"]
    assert (one.sae.site, one.sae.layer, one.sae.width) == ("mlp_out", 3, 64)
    assert (one.train.tokens, one.train.seed) == (9000, 4)
    assert one.train.sparsity.coefficient == 1e-3
    assert one.output == "out/mlp/layer_3/width_64/coefficient_0.001_seed_4"
    assert one.name == "small-mlp-layer_3-width_64-coefficient_0.001_seed_4"
    assert one.sweep is None
    assert found["res/layer_3/width_128/coefficient_0.01"].train.tokens == 2000


@pytest.mark.parametrize(
    ("stores", "expected"),
    [
        ("one", {"out/store": (["mlp_out.3", "resid_post.3", "resid_post.5"], 5000)}),
        (
            "per_layer",
            {
                "out/store/layer_3": (["mlp_out.3", "resid_post.3"], 5000),
                "out/store/layer_5": (["resid_post.5"], 2000),
            },
        ),
        (
            "per_tap",
            {
                "out/store/resid_post.3": (["resid_post.3"], 2000),
                "out/store/resid_post.5": (["resid_post.5"], 2000),
                "out/store/mlp_out.3": (["mlp_out.3"], 5000),
            },
        ),
    ],
)
def test_stores_hold_what_their_runs_read(tmp_path: Path, stores: str, expected: Any) -> None:
    def held(*overrides: str) -> dict[str, tuple[list[str], int]]:
        found = {}
        for _, config in runs(tmp_path, f"sweep.stores={stores}", "cache.tokens=5000", *overrides):
            taps = sorted(
                f"{entry.site}.{layer}" for entry in config.cache.sites for layer in entry.layers
            )
            found[config.cache.path] = (taps, config.cache.tokens)
        return found

    assert held() == expected
    chosen = held("sweep.only=['res/layer_3/*']")
    assert chosen, "what a store holds doesn't depend on the runs chosen"
    assert chosen.items() <= expected.items()


def test_a_store_s_config_stands_by_itself(tmp_path: Path) -> None:
    # It is handed to other processes as a file.
    suite = load_job(write(tmp_path), ["sweep.stores=per_layer"])
    found = stores(suite)
    assert [one.cache.path for one in found] == ["out/store/layer_3", "out/store/layer_5"]
    for one in found:
        file = tmp_path / "one.yaml"
        file.write_text(resolved_yaml(one), encoding="utf-8")
        again = load_job(file)
        assert again == one
        assert stores(again) == [one]


def refusal(tmp_path: Path, *overrides: str, text: str = SUITE) -> str:
    with pytest.raises(UserError) as caught:
        list(runs(tmp_path, *overrides, text=text))
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.cells.0.layers=[3, 18]", "sweep.cells.0 of small: layer 18 of site resid_post"),
        ("sweep.cells.1.layers=[9]", "mlp_out of layer 9, which cache.sites does not harvest"),
        ("sweep.cells.1.layers=[]", "layers must be given"),
        ("sweep.cells.1.sites=[]", "sites must be given with kind sae"),
        ("sweep.cells.1.kind=transcoder", "and with no other kind"),
        ("sweep.cells.1.affine=[true]", "a skip is for kind transcoder"),
        ("sweep.cells.1.coefficients=[]", "either coefficients or targets"),
        ("sweep.cells.0.tokens=[1]", "tokens has 1 entries and widths 2"),
        ("sweep.cells.1.widths=[64, 64]", "twice"),
        ("sweep.only=['att/*']", "choose none of the cells"),
        ("sweep.grid={train.seed: [1]}", "sweep.cells stands alone"),
        ("sweep={stores: per_layer}", "are for sweep.cells, which is empty"),
    ],
)
def test_bad_suites_are_refused_in_words(tmp_path: Path, override: str, words: str) -> None:
    assert words in refusal(tmp_path, override)


def test_targets_are_checked_against_widths_and_the_penalty(tmp_path: Path) -> None:
    text = SUITE.replace("coefficients: [1e-3], seeds", "targets: {big: [60, 90]}, seeds")
    assert "targets.big is 75 in layer 3 and the width 64" in refusal(tmp_path, text=text)
    text = text.replace("[60, 90]", "[9, 6]")
    assert "the second not the smaller one" in refusal(tmp_path, text=text)
    text = text.replace("[9, 6]", "[6, 9]")
    words = refusal(tmp_path, text=text)
    assert "targets are for train.sparsity.penalty target_l0 or match_l0, and it is l0" in words
    text = text.replace("coefficients: [1e-3, 1e-2]", "targets: {a: [3, 4]}")
    matched = dict(runs(tmp_path, "train.sparsity={penalty: match_l0, target: 5}", text=text))
    name = "mlp/layer_3/width_64/target_big"
    assert matched[name].train.sparsity.target == 7.0  # type: ignore[union-attr]


def test_a_suite_of_a_model_that_lacks_its_layers(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs" / "gemma_scope_2" / "4b-pt.yaml")
    assert main(["plan", path, "model.weights=google/gemma-3-270m"]) == 2
    message = capsys.readouterr().err
    assert "layer 22 of site" in message
    assert "the model has 18 layers" in message


def test_transcoders_and_embeddings_are_runs_like_the_others() -> None:
    folder = ROOT / "configs"
    runs = {run.name: run for run in expand(load_job(folder / "gemma_scope" / "2b-pt.yaml"))}
    assert len(runs) == 862
    first = runs["transcoders/layer_3/width_16k/coefficient_0.001"].config
    assert [tap.name for tap in first.sae.taps] == ["mlp_in_normalized.3", "mlp_out.3"]
    assert not first.sae.pre_encoder_bias
    store = {entry.site: entry.layers for entry in first.cache.sites}
    assert store == {
        site: [3] for site in ("attn_out_prelinear", "mlp_in_normalized", "mlp_out", "resid_post")
    }
    assert first.cache.path == runs["mlp/layer_3/width_16k/coefficient_0.001"].config.cache.path
    table = runs["res/embedding/width_4k/coefficient_0.001"].config
    assert table.sae.tap.name == "embedding"
    assert (table.cache.path[-10:], table.cache.tokens) == ("/embedding", 256_000 - 3)
    path = folder / "gemma_scope_2" / "1b-pt.yaml"
    overrides = ['sweep.only=["transcoder/layer_7_*", "mlp_out/layer_7_*"]']
    config = load_job(path, [*overrides, "sae.matryoshka=[0.0625, 0.125, 0.5]"])
    second = {run.name: run.config.sae for run in expand(config)}
    skips = [name for name, sae in second.items() if sae.affine_skip]
    assert skips
    assert all(name.startswith("transcoder/") and "_affine" in name for name in skips)
    assert {sae.site for sae in second.values()} == {"mlp_in", "mlp_out"}
    assert len({sae.width for sae in second.values()}) > 1
    for sae in second.values():
        assert sae.prefixes == (sae.width // 16, sae.width // 8, sae.width // 2, sae.width)


def test_all_cells_are_those_of_every_kind() -> None:
    config = load_job(ROOT / "configs" / "gemma_scope" / "2b-pt.yaml", ["sweep.kinds=[embedding]"])
    gemma = shape_of(config)
    assert len(cells_of(config, gemma)) == 4
    assert len(all_cells(config, gemma)) == 862


SWEEP = """\
sweep:
  stores: per_layer
  cells:
    - {sites: [resid_post], layers: [0, 1], widths: [32], tokens: 160, coefficients: [1e-3]}
    - {sites: [resid_post], layers: [1], widths: [64], coefficients: [1e-2]}
"""


@pytest.mark.slow
def test_a_suite_harvests_trains_and_reports_store_by_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pipeline(tmp_path, sweep=SWEEP)
    sites = "cache.sites=[{site: resid_post, layers: [0, 1]}]"
    assert main(["sweep", str(path), sites]) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    rows = {layer: open_store(out / "store" / f"layer_{layer}").rows for layer in (0, 1)}
    assert rows[0] == 160
    assert rows[1] > 160
    names = [
        "res/layer_0/width_32/coefficient_0.001",
        "res/layer_1/width_32/coefficient_0.001",
        "res/layer_1/width_64/coefficient_0.01",
    ]
    assert [str(run.relative_to(out)) for run in run_folders(out)] == names
    for name in names:
        assert (out / name / "evaluation.json").exists()
        assert (out / name / "release" / "gemma_scope" / "params.npz").exists()
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert len(set(re.findall(r'data-run="([^"]+)"', page))) == 3
    assert "cache.path" not in page
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    table = capsys.readouterr().out
    assert table.count("trained") == 3
    times = {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in names}
    for command in ("sweep", "evaluate", "harvest"):
        assert main([command, str(out)]) == 0
    assert not (out / "store" / "manifest.json").exists(), "there is no store of all layers"
    assert times == {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in names}
