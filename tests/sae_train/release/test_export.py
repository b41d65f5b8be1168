"""`export`: the release tree of a run or a sweep, checked, described, tied to its evaluation."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from activation_cache.runtime.errors import UserError
from sae_train import load_sae
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import write_config
from sae_train.evaluate.result import (
    BOS_TREATMENT,
    FORMAT_VERSION,
    Evaluation,
    Losses,
    measures,
    read_evaluation,
    write_evaluation,
)
from sae_train.evaluate.sums import LossSums, SaeSums, SiteSums
from sae_train.inference.fold import fold
from sae_train.inference.sae import TENSORS, Sae
from sae_train.release import export as export_module
from sae_train.release.export import export
from tests.support.configs import as_job
from tests.support.saes import make_trained, save_run

F, S = 24, 6


def write_some_evaluation(folder, sae: Sae) -> Evaluation:
    """An evaluation of `sae` made of plausible sums: 100 tokens, latent i fires i times."""
    count = np.array([0, 20, 20, 20, 20, 20])
    fired = np.arange(F)
    fired[F - 1] += 1000 - fired.sum()  # L0 10 in all; the last latent is the busiest
    site = SiteSums(np.zeros(10, np.float32), np.zeros((S, 10)), 4.0 * count, count)
    site.usual_HD = np.zeros((1, 10))
    site.usual_square_H, site.usual_count_H = np.array([300.0]), np.array([99])
    sums = SaeSums(1.0 * count, 10 * count, fired)
    sums.usual_error_H, sums.error_TS = np.array([90.0]), np.full((20, S), 0.5, np.float32)

    def loss(mean):
        return LossSums(mean * count[:-1].astype(float), count[:-1])

    losses = Losses(loss(3.0), loss(3.5), loss(7.0), loss(4.0), loss(9.0))
    evaluation = Evaluation(
        format_version=FORMAT_VERSION,
        name="tiny",
        step=128,
        **measures(site=site, sae=sums, losses=losses),
        bos=dict(BOS_TREATMENT),
        sequences=20,
        sequence_length=S,
        loss_sequences=20,
        site="resid_post",
        layer=1,
        width=F,
        settings={},
        fingerprints={"sae": sae.fingerprint},
    )
    write_evaluation(evaluation, folder, fired_F=fired)
    return evaluation


def test_a_run_becomes_a_tree_that_reads_back(tmp_path):
    trained = make_trained(F=F)
    (release,) = export(save_run(tmp_path, trained))
    assert [str(path.relative_to(tmp_path / "release")) for path in release.files] == [
        "gemma_scope/params.npz",
        "gemma_scope_2/config.json",
        "gemma_scope_2/params.safetensors",
        "sae_lens/cfg.json",
        "sae_lens/sae_weights.safetensors",
        "README.md",
    ]
    expected = fold(load_trained(tmp_path))
    folders = ["release/gemma_scope", "release/gemma_scope_2", "release/sae_lens"]
    for folder in (*folders, "release", "."):
        sae = load_sae(tmp_path / folder)
        for name in TENSORS:
            assert np.array_equal(sae.tensors[name], expected.tensors[name]), (folder, name)
    # The checkpoint holds log θ: its round trip costs the last bit, which 1e-6 allows.
    scaled = trained.input_scale * trained.params["threshold"]
    np.testing.assert_allclose(expected.threshold, scaled, rtol=1e-6)


def test_an_export_quotes_its_evaluation(tmp_path):
    save_run(tmp_path, make_trained(F=F))
    write_some_evaluation(tmp_path, fold(load_trained(tmp_path)))
    (release,) = export(tmp_path)
    sparsity = load_file(tmp_path / "release/sae_lens/sparsity.safetensors")["sparsity"]
    np.testing.assert_allclose(10 ** sparsity[1:-1], np.arange(1, F - 1) / 100, rtol=1e-5)
    assert sparsity[0] == -10
    cfg = json.loads((tmp_path / "release/sae_lens/cfg.json").read_text())
    assert cfg["metadata"]["l0"] == 10.0
    assert json.loads((tmp_path / "release/gemma_scope_2/config.json").read_text())["l0"] == 10
    card = release.files[-1].read_text()
    for words in (
        "| L0 | 10.00 |",
        "| FVU (squared error over variance) | 0.2500 |",
        "| delta LM loss, nats per token | 0.5000 |",
        "| delta LM loss, spliced at BOS too | 1.0000 |",
        "| loss with the site zero-ablated | 7.0000 |",
        "| loss recovered | 0.8750 |",
        "8,192 tokens in 128 steps",
        "Gemma Terms of Use",
        'base_model: "google/gemma-3-270m"',
    ):
        assert words in card, words


def test_another_checkpoints_evaluation_is_not_quoted(tmp_path, caplog):
    save_run(tmp_path, make_trained(F=F))
    write_some_evaluation(tmp_path, fold(make_trained(F=F, seed=5)))
    (release,) = export(tmp_path)
    assert "of step 128 and other weights" in caplog.text
    assert release.evaluation is None
    assert "Not evaluated." in release.files[-1].read_text()
    assert not (tmp_path / "release/sae_lens/sparsity.safetensors").exists()


def test_firing_counts_of_another_evaluation_are_refused(tmp_path):
    save_run(tmp_path, make_trained(F=F))
    write_some_evaluation(tmp_path, fold(load_trained(tmp_path)))
    np.save(tmp_path / "firing_counts.npy", np.zeros(F, np.int64))
    with pytest.raises(UserError, match=r"firing_counts.npy is missing or doesn't belong"):
        export(tmp_path)


def test_a_sweep_exports_every_trained_run(tmp_path):
    config = make_trained(F=F).config
    write_config(as_job(config, sweep={"grid": {"train.seed": [0, 1, 2]}}), tmp_path)
    for seed in (0, 1):
        save_run(tmp_path / f"seed_{seed}", make_trained(F=F, seed=seed))
    third = config.model_copy(update={"output": str(tmp_path / "seed_2")})
    write_config(third, tmp_path / "seed_2")  # begun, no checkpoint yet
    releases = export(tmp_path)
    assert [release.folder.parent.name for release in releases] == ["seed_0", "seed_1"]
    assert not (tmp_path / "seed_2/release").exists()


def test_no_trained_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has no checkpoints"):
        export(tmp_path)


def test_a_file_that_reads_back_wrong_is_an_error(tmp_path, monkeypatch):
    save_run(tmp_path, make_trained(F=F))

    def lossy(sae, folder, **_):
        b_dec = np.nextafter(sae.b_dec, np.float32(99))
        return export_module.write_gemma_scope(dataclasses.replace(sae, b_dec=b_dec), folder)

    monkeypatch.setattr(export_module, "write_sae_lens", lossy)
    with pytest.raises(UserError, match="reads back with another b_dec"):
        export(tmp_path)


def test_a_full_disk_keeps_the_release_before(tmp_path, monkeypatch):
    save_run(tmp_path, make_trained(F=F))
    export(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("release/*/*")}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        export(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("release/*/*")} == before


def test_evaluations_read_back_and_other_versions_do_not(tmp_path):
    evaluation = write_some_evaluation(tmp_path, fold(make_trained(F=F)))
    read = read_evaluation(tmp_path)
    assert read.by_position == evaluation.by_position
    assert read.by_position["l0"] == [None, 10, 10, 10, 10, 10]
    assert read.by_position["loss"] == [None, 3, 3, 3, 3, None]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"l0": 1.0, "step": 3}))
    assert read_evaluation(tmp_path) is None
    path.unlink()
    assert read_evaluation(tmp_path) is None
