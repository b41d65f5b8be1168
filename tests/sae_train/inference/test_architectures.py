"""ReLU, Gated and TopK SAEs in SAELens' own form: theirs reads ours, ours reads theirs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_cache.runtime.errors import UserError
from sae_train import load_sae
from sae_train.checkpoint.trained import Trained
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.inference.write_formats import write_sae_lens
from sae_train.release.export import check_same
from tests.support.saes import make_trained

D, F, K = 10, 24, 5


@pytest.fixture
def x_raw() -> np.ndarray:
    return 4 * np.random.default_rng(3).standard_normal((40, D)).astype(np.float32)


def make(architecture: str, **options: Any) -> Trained:
    """Random trained weights of an architecture, every bias well away from 0."""
    own = {"k": K} if "topk" in architecture else {}
    trained = make_trained(D=D, F=F, **options)
    config = trained.config.sae.model_copy(update={"architecture": architecture, **own})
    params = dict(trained.params)
    if architecture != "batch_topk":
        del params["threshold"]
    if architecture == "gated":
        random = np.random.default_rng(1)
        params["b_gate"] = params.pop("b_enc") - 0.4
        params["b_mag"] = (0.3 * random.standard_normal(F)).astype(np.float32)
        params["r_mag"] = (0.3 * random.standard_normal(F)).astype(np.float32)
    config = trained.config.model_copy(update={"sae": config})
    return dataclasses.replace(trained, params=params, config=config)


def reference_latents(trained: Trained, x_raw: np.ndarray) -> np.ndarray:
    """What the trained weights give in float64, each architecture by its own definition."""
    p = {name: value.astype(np.float64) for name, value in trained.params.items()}
    linear = (x_raw / trained.input_scale - p["b_dec"]) @ p["W_enc"].T
    architecture = trained.config.sae.architecture
    if architecture == "gated":
        magnitude = np.maximum(linear * np.exp(p["r_mag"]) + p["b_mag"], 0)
        return np.where(linear + p["b_gate"] > 0, magnitude, 0)
    latents = np.maximum(linear + p["b_enc"], 0)
    if architecture == "topk":
        kth = np.sort(latents, axis=1)[:, -K]
        latents = np.where(latents >= kth[:, None], latents, 0)
    if architecture == "batch_topk":
        latents = np.where(latents > p["threshold"], latents, 0)
    return latents


@pytest.mark.parametrize("architecture", ["relu", "gated", "topk", "batch_topk"])
def test_released_latents_are_the_trained_ones(architecture: str, x_raw: np.ndarray):
    trained = make(architecture)
    sae, expected = fold(trained), reference_latents(trained, x_raw)
    assert 0.1 < (expected > 0).mean() < 0.9
    latents = np.asarray(sae.encode(x_raw)) / trained.input_scale
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-5)
    output = expected @ trained.params["W_dec"].astype(np.float64) + trained.params["b_dec"]
    np.testing.assert_allclose(sae(x_raw) / trained.input_scale, output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "theirs"),
    [
        ("relu", "StandardSAE"),
        ("gated", "GatedSAE"),
        ("topk", "TopKSAE"),
        ("batch_topk", "JumpReLUSAE"),
    ],
)
def test_sae_lens_loads_ours_and_we_load_ours(
    sae_lens, tmp_path: Path, x_raw: np.ndarray, architecture: str, theirs: str
):
    sae = fold(make(architecture))
    write_sae_lens(sae, tmp_path)
    module = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(module).__name__ == theirs
    with torch.no_grad():
        latents = module.encode(torch.from_numpy(x_raw))
        output = module.decode(latents).numpy()
    latents = latents.to_dense().numpy()
    np.testing.assert_allclose(latents, sae.encode(x_raw), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output, sae(x_raw), rtol=1e-5, atol=1e-5)
    read = load_sae(tmp_path)
    check_same(sae, read, path=tmp_path)
    assert read.architecture == sae.architecture
    assert read.k == sae.k
    np.testing.assert_allclose(read(x_raw), sae(x_raw), rtol=1e-5, atol=1e-5)


def make_theirs(sae_lens, architecture: str, **options: Any):
    """A random SAE of SAELens' own making, biases and decoder norms included."""
    shared = {"d_in": D, "d_sae": F, "apply_b_dec_to_input": True, **options}
    classes = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
    }
    made, config = classes[architecture]
    module = made(config(**shared))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("gated", {}),
        ("topk", {"k": K}),
        ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_we_load_theirs(
    sae_lens, tmp_path: Path, x_raw: np.ndarray, architecture: str, options: dict[str, Any]
):
    module = make_theirs(sae_lens, architecture, **options)
    module.save_model(tmp_path)
    sae = load_sae(tmp_path)
    with torch.no_grad():
        expected = module(torch.from_numpy(x_raw)).numpy()
    np.testing.assert_allclose(sae(x_raw), expected, rtol=1e-5, atol=1e-5)
    assert sae.architecture == {"standard": "relu"}.get(architecture, architecture)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk", "k": None}, "whole k of at least 1"),
        ({"architecture": "standard", "activation_fn": "tanh-relu"}, "activation 'tanh-relu'"),
        ({"architecture": "matryoshka"}, "architecture 'matryoshka'"),
        ({"architecture": "gated"}, r"lack \['b_gate', 'b_mag', 'r_mag'\]"),
    ],
)
def test_what_is_not_read_is_told(tmp_path: Path, changes: dict[str, Any], message: str):
    write_sae_lens(fold(make("relu")), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path)


def test_a_changed_k_is_another_sae():
    sae = fold(make("topk"))
    other = dataclasses.replace(sae, k=K + 1)
    assert sae.fingerprint != other.fingerprint
    with pytest.raises(UserError, match="reads back with k"):
        check_same(sae, other, path=Path("here"))


def test_an_sae_with_k_goes_through_jit(x_raw: np.ndarray):
    import jax

    sae: Sae = fold(make("topk"))
    latents = np.asarray(jax.jit(lambda s, x: s.encode(x))(sae, x_raw))
    np.testing.assert_allclose(latents, sae.encode(x_raw), rtol=1e-6, atol=1e-6)
    assert ((latents > 0).sum(axis=1) <= K).all()
