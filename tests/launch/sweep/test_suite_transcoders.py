"""A suite's transcoders and embedding SAEs from text to release, read by sae-lens."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_cache.gemma.taps import Tap
from activation_cache.store.store import open_store
from launch.cli import main
from sae_train import load_sae
from sae_train.evaluate.result import read_evaluation
from sae_train.runs.folder import run_folders
from tests.support.pipeline import write_pipeline

pytestmark = pytest.mark.slow

SWEEP = """\
sweep:
  tree: {tree}
  stores: per_layer
  cells:
    - {{kind: transcoder, layers: [1], widths: [32], coefficients: [1e-3], affine: {affine}}}
    - {{kind: embedding, widths: [32], coefficients: [1e-3]}}
"""
TREES = {
    "gemma_scope": (
        "[false]",
        "mlp_in_normalized",
        ["res/embedding/width_32", "transcoders/layer_1/width_32/coefficient_0.001"],
    ),
    "gemma_scope_2": (
        "[false, true]",
        "mlp_in",
        [
            "embedding/width_32",
            "transcoder/layer_1_width_32_coefficient_0.001",
            "transcoder/layer_1_width_32_coefficient_0.001_affine",
        ],
    ),
}


@pytest.mark.parametrize("tree", list(TREES))
def test_from_text_to_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tree: str
) -> None:
    affine, site, names = TREES[tree]
    path = write_pipeline(tmp_path, sweep=SWEEP.format(tree=tree, affine=affine))
    sites = f"cache.sites=[{{site: {site}, layers: [1]}}, {{site: mlp_out, layers: [1]}}]"
    base = ["sae.site=mlp_out"]
    assert main(["sweep", str(path), sites, *base]) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    runs = {str(run.relative_to(out)): run for run in run_folders(out)}
    assert len(runs) == len(names)
    assert all(any(run.startswith(name) for run in runs) for name in names)
    pair = open_store(out / "store" / "layer_1")
    assert {tap.name for tap in pair.taps} == {f"{site}.1", "mlp_out.1"}
    assert open_store(out / "store" / "embedding").rows == 401 - 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
    for name, run in runs.items():
        found = read_evaluation(run)
        assert found is not None
        assert found.delta_loss is not None
        sae = load_sae(run)
        assert sae.is_transcoder == ("transcoder" in name)
        assert found.target == ("mlp_out" if sae.is_transcoder else None)
        assert (sae.W_skip is not None) == name.endswith("_affine")
        formats = {folder.name for folder in (run / "release").iterdir() if folder.is_dir()}
        assert formats >= {"gemma_scope_2", "sae_lens"}
        assert ("gemma_scope" in formats) == (sae.W_skip is None)
        theirs = sae_lens.SAE.load_from_disk(run / "release" / "sae_lens")
        x = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
        if sae.is_transcoder:
            x = pair.read(Tap(site, 1), start=0, stop=30)  # type: ignore[arg-type]
        with torch.no_grad():
            outputs = theirs(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(outputs, sae(x), rtol=1e-5, atol=1e-5)
        card = (run / "release" / "README.md").read_text()
        assert ("| predicts | mlp_out" in card) == sae.is_transcoder
    capsys.readouterr()
    for command in ("sweep", "evaluate", "status"):
        assert main([command, str(out)]) == 0
    assert "trained" in capsys.readouterr().out
    last = next(run for name, run in runs.items() if name.startswith("transcoder"))
    assert main(["inspect", str(last / "release" / "sae_lens")]) == 0
    shown = capsys.readouterr().out
    assert "hook name out" in shown
    assert "blocks.1.hook_mlp_out" in shown
