"""Transcoders for circuit-tracer: what it computes from our files, whole sets, what is left out."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import sys
import zlib
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from activation_cache.runtime.errors import UserError
from launch.cli import main
from launch.config.job import Job
from sae_train import load_sae
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import write_config
from sae_train.config.run import Config
from sae_train.inference import circuit_tracer
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.latents.reader import open_latents
from sae_train.latents.records import Histogram
from sae_train.release.circuit_tracer_features import percentiles, write_features
from sae_train.release.transcoder_sets import export_sets
from sae_train.runs.folder import run_folders
from tests.support.oracles import latents as brute_force
from tests.support.paths import DATA
from tests.support.saes import make_sae, make_trained, make_trained_as, save_run
from tests.support.tiny_gemma import write_tiny_gemma

D, F, LAYERS = 10, 24, 2
MLP = {"site": "mlp_in", "target": "mlp_out"}


def _with_threshold_0(sae: Sae, **changes) -> Sae:
    return dataclasses.replace(sae, threshold=np.zeros_like(sae.threshold), **changes)


def transcoders(kind: str) -> list[Sae]:
    """The transcoders of a set, by layer."""
    site = "mlp_in_normalized" if kind == "normalized" else "mlp_in"
    found = []
    for layer in range(LAYERS):
        own = {"site": site, "layer": layer, "seed": layer, "affine_skip": kind == "relu_affine"}
        sae = make_sae(D=D, F=F, target_scale=2.0, **MLP | own)
        if kind == "relu_affine":
            sae = _with_threshold_0(sae, architecture="relu")
        if kind == "topk":
            sae = _with_threshold_0(sae, architecture="topk", k=4)
        found.append(sae)
    return found


KINDS = ("jumprelu", "normalized", "relu_affine", "topk")


def write_set(kind: str, folder: Path) -> list[Sae]:
    """A set of random transcoders as circuit-tracer reads it."""
    found = transcoders(kind)
    for sae in found:
        circuit_tracer.write_layer(sae, folder)
    circuit_tracer.write_set_config(circuit_tracer.set_config(found[0]), folder)
    return found


def inputs() -> np.ndarray:
    """Rows of every layer, on which each has at least k positive pre-activations."""
    rows_LBD = np.random.default_rng(7).standard_normal((LAYERS, 6, D))
    return np.round(4 * rows_LBD, 3).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_circuit_tracer_computes_the_same(kind: str, tmp_path: Path):
    """Its own outputs, stored with the hash of the files they are of (their_circuit_tracer.py)."""
    theirs = json.loads((DATA / "circuit_tracer.json").read_text())["sets"][kind]
    saes = write_set(kind, tmp_path)
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()
    }
    assert hashes == theirs["sha256"], "the files changed: let circuit-tracer read them again"
    for layer, (sae, x_BD) in enumerate(zip(saes, inputs(), strict=True)):
        latents_BF = np.asarray(sae.encode(x_BD))
        assert 0 < (latents_BF > 0).mean() < 1
        np.testing.assert_allclose(latents_BF, theirs["latents"][layer], rtol=1e-5, atol=2e-5)
        for name in ("predictions", "sparse_predictions"):
            np.testing.assert_allclose(sae(x_BD), theirs[name][layer], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_read_back(kind: str, tmp_path: Path):
    for layer, sae in enumerate(write_set(kind, tmp_path / "circuit_tracer")):
        read = load_sae(tmp_path / "circuit_tracer" / f"layer_{layer}.safetensors")
        assert read.fingerprint == sae.fingerprint
        assert read.metadata.items() <= sae.metadata.items()
        assert len(read.metadata) == 5
    with pytest.raises(UserError, match=r"the transcoders of 2 layers: name one of its files"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"config.yaml is missing: it says what the transcoders beside it read"),
        ("[1]", "must have model_kind transcoder_set"),
        ("model_kind: cross_layer_transcoder", "it has 'cross_layer_transcoder'"),
        (
            "model_kind: transcoder_set\nactivation: topk\nk: 25",
            r"has k 25; .* 1 to the 24",
        ),
        ("model_kind: transcoder_set\nactivation: topk", "has k None"),
        (
            "model_kind: transcoder_set\nfeature_input_hook: 3",
            "_hook 3, which must be text",
        ),
    ],
)
def test_a_damaged_config_is_refused(config: str | None, message: str, tmp_path: Path):
    write_set("topk", tmp_path)
    (tmp_path / "config.yaml").unlink()
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path / "layer_0.safetensors")


def save_sweep(root: Path, *, layers: range, weights: str = "google/gemma-3-270m") -> Path:
    """A suite's trained transcoders of these layers, in one set."""
    for layer in layers:
        trained = make_trained(F=F, seed=layer, layer=layer, **MLP)
        run = root / f"transcoder_all/layer_{layer}_width_24_l0_small"
        config = trained.config.model_copy(update={"output": str(run)})
        save_run(run, dataclasses.replace(trained, config=config))
    values = make_trained(F=F, layer=layers[0], **MLP).config.model_dump()
    values["model"]["weights"] = weights
    values["train"] |= {"sparsity": {"penalty": "target_l0", "target": 5}}
    cells = [{"kind": "transcoder", "layers": "all", "folder_suffix": "_all", "widths": [F]}]
    cells[0]["targets"] = {"small": [5, 5]}
    values["cache"]["sites"] = [{"site": one, "layers": "all"} for one in MLP.values()]
    sweep = {"tree": "gemma_scope_2", "cells": cells}
    write_config(Job.model_validate(values | {"output": str(root), "sweep": sweep}), root)
    return root


@pytest.mark.slow
def test_export_writes_whole_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_tiny_gemma(tmp_path / "gemma")
    root = save_sweep(tmp_path / "suite", layers=range(4), weights=str(tmp_path / "gemma"))
    assert main(["export", str(root), "--circuit-tracer"]) == 0
    folder = root / "release" / "circuit_tracer" / "transcoder_all" / "width_24_l0_small"
    files = {f"layer_{layer}.safetensors" for layer in range(4)}
    assert {path.name for path in folder.iterdir()} == files | {"config.yaml"}
    for layer, run in enumerate(run_folders(root)):  # release/ holds no run
        sae = fold(load_trained(run))
        assert load_sae(folder / f"layer_{layer}.safetensors").fingerprint == sae.fingerprint
    run = root / "transcoder_all" / "layer_0_width_24_l0_small"
    assert main(["export", str(run), "--circuit-tracer"]) == 2
    assert "is one run: give the config or the folder of a sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_an_incomplete_set_is_refused(tmp_path: Path):
    root = save_sweep(tmp_path / "suite", layers=range(2, 4))
    runs = sorted(root.glob("*/layer*"))
    with pytest.raises(UserError, match=r"small has 2 of the model's 5 layers and lacks 0, 1, 4"):
        export_sets(root, runs, is_suite=True, num_layers=5)
    with pytest.raises(UserError, match=r"it has no such transcoder"):
        export_sets(root, [], is_suite=True, num_layers=5)
    twice = [*runs, save_run(root / "again", make_trained(F=F, layer=2, **MLP))]
    with pytest.raises(UserError, match=r"has two runs of layer 2, .*small and again"):
        export_sets(root, twice, is_suite=False, num_layers=5)


@pytest.mark.slow
def test_a_topk_transcoder_is_released_for_circuit_tracer_alone(tmp_path: Path):
    trained = make_trained_as("topk")
    values = trained.config.model_dump()
    values["sae"] |= MLP | {"pre_encoder_bias": False}
    values["cache"]["sites"] = [{"site": site, "layers": [1]} for site in MLP.values()]
    values["train"]["sparsity"] = {"penalty": "none"}
    config = Config.model_validate(values)
    run = save_run(tmp_path / "run", dataclasses.replace(trained, config=config))
    assert main(["export", str(run)]) == 0
    release = run / "release"
    assert {path.name for path in release.iterdir()} == {"README.md", "circuit_tracer"}
    assert 'load_sae("circuit_tracer")' in (release / "README.md").read_text()
    assert "sae_lens" not in (release / "README.md").read_text()
    read = load_sae(run)
    assert (read.k, read.architecture) == (5, "topk")
    assert read.fingerprint == fold(load_trained(run)).fingerprint


def test_the_features_are_what_circuit_tracer_s_page_reads(tmp_path: Path):
    """Read as its page does; the schema is its own model's (their_circuit_tracer.py)."""
    theirs = json.loads((DATA / "circuit_tracer.json").read_text())["features"]
    brute_force.write_latents_folder(tmp_path / "run", F=F)
    latents = open_latents(tmp_path / "run")
    folder = write_features({0: latents, 3: latents}, tmp_path)
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    assert index.keys() == {"0", "3"}
    assert theirs["read"] == F == len(index["3"]["offsets"]) - 1
    data = (folder / index["3"]["filename"]).read_bytes()
    for number, begin in enumerate(index["3"]["offsets"][:-1]):
        length = int.from_bytes(data[begin : begin + 4], "little")
        found = json.loads(zlib.decompress(data[begin + 4 : begin + 4 + length]))
        jsonschema.validate(found, theirs["schema"])
        latent = latents[number]
        assert found["index"] == number
        assert found["act_max"] == latent.maximum
        assert [len(one["examples"]) for one in found["examples_quantiles"]] == [
            len(list(group)) for _, group in itertools.groupby(c.interval for c in latent.contexts)
        ]
        if latent.count:
            example = found["examples_quantiles"][0]["examples"][0]
            peak = example["tokens_acts_list"][example["train_token_ind"]]
            assert peak == pytest.approx(latent.maximum, abs=1e-4)
            assert found["quantile_values"][-1] == pytest.approx(latent.maximum, rel=1e-6)
            assert found["quantile_values"] == sorted(found["quantile_values"])


def test_percentiles_are_those_of_values_spread_over_their_bins():
    histogram = Histogram((0.0, 1.0, 2.0, 3.0), (50, 0, 50))
    found = percentiles(histogram)
    assert len(found) == 100
    assert found[:50] == pytest.approx([n / 50 for n in range(1, 51)])
    assert found[50:] == pytest.approx([2 + n / 50 for n in range(1, 51)])


if __name__ == "__main__":  # what tests/support/oracles/their_circuit_tracer.py reads
    for kind in KINDS:
        write_set(kind, Path(sys.argv[1], kind))
    brute_force.write_latents_folder(Path(sys.argv[1], "run"), F=F)
    write_features({0: open_latents(Path(sys.argv[1], "run"))}, Path(sys.argv[1]))
    Path(sys.argv[1], "inputs.json").write_text(json.dumps(inputs().tolist()))
