"""ReLU, Gated and TopK SAEs and transcoders as released: the latents that training computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from activation_cache.runtime.errors import UserError
from sae_train.checkpoint.trained import Trained
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.release.export import check_same
from tests.support.saes import make_trained, make_trained_as

D, F, K = 10, 24, 5


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
    trained = make_trained_as(architecture)
    sae, expected = fold(trained), reference_latents(trained, x_raw)
    assert 0.1 < (expected > 0).mean() < 0.9
    latents = np.asarray(sae.encode(x_raw)) / trained.input_scale
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-5)
    output = expected @ trained.params["W_dec"].astype(np.float64) + trained.params["b_dec"]
    np.testing.assert_allclose(sae(x_raw) / trained.input_scale, output, rtol=1e-5, atol=1e-5)


def test_a_changed_k_is_another_sae():
    sae = fold(make_trained_as("topk"))
    other = dataclasses.replace(sae, k=K + 1)
    assert sae.fingerprint != other.fingerprint
    with pytest.raises(UserError, match="reads back with k"):
        check_same(sae, other, path=Path("here"))


def test_an_sae_with_k_goes_through_jit(x_raw: np.ndarray):
    import jax

    sae: Sae = fold(make_trained_as("topk"))
    latents = np.asarray(jax.jit(lambda s, x: s.encode(x))(sae, x_raw))
    np.testing.assert_allclose(latents, sae.encode(x_raw), rtol=1e-6, atol=1e-6)
    assert ((latents > 0).sum(axis=1) <= K).all()


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_released_transcoder_predicts_what_the_trained_one_did(skip: bool, x_raw: np.ndarray):
    """On raw activations: the trained prediction and latents from x / C, times T."""
    own = {"site": "mlp_in", "target": "mlp_out", "affine_skip": skip}
    trained = make_trained(D=D, F=F, target_scale=1.9, **own)
    p, x = trained.params, x_raw.astype(np.float64) / trained.input_scale
    z = x @ p["W_enc"].T + p["b_enc"]
    latents = z * (z > p["threshold"])
    expected = latents @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"] if skip else 0)
    sae = fold(trained)
    np.testing.assert_allclose(sae.encode(x_raw), 1.9 * latents, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae(x_raw), 1.9 * expected, rtol=1e-4, atol=1e-4)
    assert sae.metadata["hook_name"] == "blocks.1.hook_mlp_in"
    assert sae.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert sae.metadata["training"]["target_scale"] == 1.9
