"""Training begins with a released SAE, and a released SAE is evaluated as it is."""

from __future__ import annotations

import csv
import dataclasses
import gzip
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest

from activation_cache.language_model.published_sizes import known_config
from activation_cache.runtime.errors import UserError
from launch.cli import main
from launch.config.job import load_job
from launch.sweep.suite_cells import all_cells
from launch.sweep.suite_runs import suite_runs
from sae_train import load_sae
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.inference.write_formats import write_gemma_scope, write_sae_lens
from sae_train.train.loop import train
from sae_train.train.warm_start import starting_params
from tests.support.configs import make_config
from tests.support.paths import DATA
from tests.support.pipeline import ROOT, write_pipeline
from tests.support.saes import make_trained
from tests.support.training import WIDTH, make_run

pytestmark = pytest.mark.slow

F = 24
NONE = {"penalty": "none"}
L1 = {"penalty": "l1", "coefficient": 0.03, "warmup_steps": 0}


def released(folder: Path, **changes: Any) -> Sae:
    """An SAE in Gemma Scope's form whose decoder rows aren't of unit norm."""
    sae = fold(make_trained(D=WIDTH, F=F, scale=2.5))
    sae = dataclasses.replace(sae, W_dec=sae.W_dec * np.linspace(0.5, 2, F)[:, None].astype("f4"))
    sae = dataclasses.replace(sae, **changes)
    write_gemma_scope(sae, folder)
    return sae


def run_from(folder: Path, source: Path, **options: Any) -> Config:
    return make_run(folder, width=F, sae={"start_from": str(source)}, **options)


@pytest.mark.parametrize("parametrisation", ["log", "direct"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_step_at_no_rate_is_the_released_sae(tmp_path: Path, parametrisation: str, bias: bool):
    sae = released(tmp_path / "theirs")
    config = make_run(
        tmp_path,
        width=F,
        steps=1,
        parametrisation=parametrisation,
        sae={
            "start_from": str(tmp_path / "theirs"),
            "pre_encoder_bias": bias,
            "matryoshka": [6, 12] if bias else None,
        },
        learning_rate={"peak": 1e-30, "warmup_steps": 0},
    )
    train(config)
    trained = load_trained(tmp_path / "run")
    np.testing.assert_allclose(np.linalg.norm(trained.params["W_dec"], axis=1), 1, rtol=1e-6)
    x = 3 * np.random.default_rng(0).standard_normal((50, WIDTH)).astype(np.float32)
    assert 0.05 < (np.asarray(sae.encode(x)) > 0).mean() < 0.95
    np.testing.assert_allclose(fold(trained)(x), sae(x), rtol=1e-4, atol=1e-4)
    active = [np.asarray(one.encode(x)) > 0 for one in (fold(trained), sae)]
    assert (active[0] == active[1]).mean() > 0.999, "latents in another order"


def test_it_goes_on_from_there_and_resumes_without_the_source(tmp_path: Path):
    released(tmp_path / "theirs")
    train(run_from(tmp_path, tmp_path / "theirs", output="tuned", mesh=(2, 4)))
    train(make_run(tmp_path, width=F, output="scratch"))
    tuned, scratch = (load_trained(tmp_path / name).params for name in ("tuned", "scratch"))
    assert np.abs(tuned["W_enc"] - scratch["W_enc"]).max() > 0.1
    (tmp_path / "theirs" / "params.npz").unlink()
    assert train(run_from(tmp_path, tmp_path / "theirs", output="tuned", mesh=(2, 4))).step == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 48}, "has 24 latents and sae.width is 48: make it 24"),
        (
            {"sae": {"architecture": "relu"}, "sparsity": L1},
            "is a jumprelu SAE .* make it jump",
        ),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, options: dict[str, Any], message: str):
    released(tmp_path / "theirs")
    sae = {"start_from": str(tmp_path / "theirs")} | options.pop("sae", {})
    config = make_config(**{"width": F} | options, sae=sae)
    with pytest.raises(UserError, match=message):
        starting_params(config.sae, d_model=WIDTH, input_scale=1.0, target_scale=1.0)


def test_another_input_and_another_architecture_are_told(tmp_path: Path):
    released(tmp_path / "theirs")
    config = make_config(width=F, sae={"start_from": str(tmp_path / "theirs")})
    with pytest.raises(UserError, match=r"reads vectors of 16 and resid_post of layer 1 has 20"):
        starting_params(config.sae, d_model=20, input_scale=1.0, target_scale=1.0)
    with pytest.raises(ValueError, match=r"a gated SAE can't start from sae.start_from"):
        make_config(sae={"start_from": "x", "architecture": "gated"}, sparsity=L1)


def test_a_topk_sae_can_be_gone_on_with(tmp_path: Path):
    sae = fold(make_trained(D=WIDTH, F=F))
    zero = np.zeros(F, np.float32)
    sae = dataclasses.replace(sae, threshold=zero, architecture="topk", k=4)
    write_sae_lens(sae, tmp_path / "theirs")
    own = {"start_from": str(tmp_path / "theirs"), "architecture": "topk", "k": 4}
    train(make_run(tmp_path, width=F, steps=2, sae=own, sparsity=NONE))
    assert fold(load_trained(tmp_path / "run")).k == 4


def in_hub_cache(cache: Path, repository: str, files: dict[str, Path]) -> None:
    """The Hub's local cache as huggingface_hub leaves it, with these files of one revision."""
    root = cache / f"models--{repository.replace('/', '--')}"
    revision = "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    for name, source in files.items():
        target = root / "snapshots" / revision / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


def test_what_the_hub_gave_before_is_read_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sae = released(tmp_path / "theirs")
    name = "layer_12/width_16k/average_l0_82"
    repository = "google/gemma-scope-2b-pt-res"
    files = {f"{name}/params.npz": tmp_path / "theirs" / "params.npz"}
    in_hub_cache(tmp_path / "hub", repository, files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = load_sae(f"{repository}/{name}")
    np.testing.assert_array_equal(found.W_enc, sae.W_enc)
    assert found.metadata["hook_name"] == "blocks.12.hook_resid_post"
    assert found.metadata["l0"] == 82
    with pytest.raises(UserError, match="no SAE at layer_99"):
        load_sae(f"{repository}/layer_99")
    with pytest.raises(UserError, match=r"the Hub does not give google/other"):
        load_sae("google/other/layer_1")


# Suites -----------------------------------------------------------------------------------------

TUNED = sorted((ROOT / "configs" / "gemma_scope_2").glob("*-it.yaml"))
# Of each suite's SAEs, how many base ones aren't on the list (docs/suites.md).
NOT_LISTED = {"270m-it": 70, "1b-it": 0, "4b-it": 0, "12b-it": 0, "27b-it": 640}


@pytest.mark.parametrize("path", TUNED, ids=lambda path: path.stem)
def test_the_tuned_suites_begin_with_the_base_ones(path: Path):
    config = load_job(path, ["sweep.only=['*/layer_1?_width_16k_l0_small*']"])
    base = f"google/gemma-scope-2-{path.stem.replace('-it', '-pt')}"
    chosen = list(suite_runs(config))
    assert chosen
    for run in chosen:
        assert run.config.sae.start_from == f"{base}/{run.name}"
    with gzip.open(DATA / "gemma_scope_2_released.csv.gz", "rt", encoding="utf-8") as file:
        listed = {row["repo_path"] for row in csv.DictReader(file)}
    gemma = known_config(config.model.weights)
    assert gemma is not None
    folders = {f"{base}/{cell.folder}" for cell in all_cells(config, gemma)}
    assert len(folders - listed) == NOT_LISTED[path.stem]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.start_from=google/gemma-scope-2-270m-pt", "must have {folder}"),
        ("sweep.start_from='google/{folder}/{size}'", "no other braces"),
        ("sweep={start_from: 'a/b/{folder}', grid: {train.seed: [0]}}", "is for sweep.cells"),
    ],
)
def test_bad_templates_are_told(override: str, words: str):
    with pytest.raises(UserError, match=words):
        load_job(TUNED[0], [override])


def test_a_suite_trains_on_from_released_saes(tmp_path: Path):
    base = write_pipeline(tmp_path, sweep=BASE_SUITE)
    assert main(["sweep", str(base)]) == 0
    text = base.read_text().replace("{cells:", f"{{start_from: '{tmp_path}/out/{{folder}}', cells:")
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text(text)
    still = ["train.learning_rate.peak=1e-30"]
    assert main(["sweep", str(tuned), f"output={tmp_path}/tuned", *still]) == 0
    name = "res/layer_1/width_64/coefficient_0.001"
    before, after = (load_trained(tmp_path / o / name).params["W_enc"] for o in ("out", "tuned"))
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


BASE_SUITE = """\
sweep: {cells: [{sites: [resid_post], layers: [1], widths: [64], coefficients: [1e-3]}]}
"""
