"""Folding computes what the trained SAE did, and every format reads back bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from typing import get_args

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file

from activation_cache.config import Site
from activation_cache.language_model.names import model_name
from activation_cache.runtime.errors import UserError
from sae_train import load_sae
from sae_train.inference.fold import fold
from sae_train.inference.hook_names import hugging_face_hook, parse_hook, transformer_lens_hook
from sae_train.inference.sae import TENSORS, Sae
from sae_train.inference.write_formats import write_gemma_scope, write_gemma_scope_2, write_sae_lens
from tests.support.saes import (
    make_sae,
    make_trained,
    reference_latents,
    reference_reconstruction,
    rewrite_json,
)

WRITERS = {
    "gemma_scope": write_gemma_scope,
    "gemma_scope_2": write_gemma_scope_2,
    "sae_lens": write_sae_lens,
}


def assert_same(one: Sae, other: Sae) -> None:
    for name in TENSORS:
        left, right = one.tensors[name], other.tensors[name]
        assert left.dtype == right.dtype == np.float32, name
        assert np.array_equal(left, right), name


def gap(z: np.ndarray, threshold: np.ndarray) -> float:
    """How near any pre-activation is to its threshold: float32 may fall on the other side of it."""
    return float(np.abs(z - threshold).min())


# Folding ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-2, 1e3),
    shape=st.sampled_from([(1, 1), (1, 30), (12, 1), (7, 5)]),  # each is compiled once
    pre_encoder_bias=st.booleans(),
)
def test_folded_equals_unfolded_maths(seed, scale, shape, pre_encoder_bias):
    D, F = shape
    trained = make_trained(D=D, F=F, scale=scale, seed=seed, pre_encoder_bias=pre_encoder_bias)
    p = {name: value.astype(np.float64) for name, value in trained.params.items()}
    raw = scale * np.random.default_rng(seed).standard_normal((7, D)).astype(np.float32)
    x = raw.astype(np.float64) / scale
    z = (x - p["b_dec"] * pre_encoder_bias) @ p["W_enc"].T + p["b_enc"]
    if gap(z, p["threshold"]) < 1e-5:
        return
    latents = z * (z > p["threshold"])
    reconstruction = latents @ p["W_dec"] + p["b_dec"]

    sae = fold(trained)
    # atol is relative to the scale: sums of numbers of size C lose their last bits.
    np.testing.assert_allclose(sae.encode(raw), scale * latents, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(sae(raw), scale * reconstruction, rtol=1e-5, atol=1e-5 * scale)


def test_fold_writes_appendix_a_exactly():
    trained = make_trained(scale=2.0)
    p, sae = trained.params, fold(trained)
    bias = p["b_enc"].astype(np.float64) - p["W_enc"].astype(np.float64) @ p["b_dec"]
    assert np.array_equal(sae.W_enc, p["W_enc"].T)
    assert np.array_equal(sae.W_dec, p["W_dec"])
    assert np.array_equal(sae.b_dec, 2 * p["b_dec"])
    assert np.array_equal(sae.threshold, 2 * p["threshold"])
    assert np.array_equal(sae.b_enc, (2 * bias).astype(np.float32))


def test_fold_refuses_weights_that_are_not_finite():
    trained = make_trained()
    W_dec = trained.params["W_dec"].copy()
    W_dec[3, 2] = np.nan
    broken = dataclasses.replace(trained, params={**trained.params, "W_dec": W_dec})
    with pytest.raises(UserError, match=r"W_dec of the checkpoint at step 128 .* 1 of 240"):
        fold(broken)


# The Sae itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_encode_and_decode_are_gemma_scopes_inference(lead):
    sae = make_sae()
    x = 4 * np.random.default_rng(1).standard_normal((*lead, 10)).astype(np.float32)
    latents = reference_latents(sae, x)
    assert 0 < (latents > 0).mean() < 1
    np.testing.assert_allclose(sae.encode(x), latents, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae(x), reference_reconstruction(sae, x), rtol=1e-5, atol=1e-5)


def test_a_latent_at_its_threshold_is_not_active():
    one = np.ones((1, 1), np.float32)
    sae = Sae(W_enc=one, W_dec=one, b_enc=one[0] * 0, b_dec=one[0] * 0, threshold=one[0])
    assert sae.encode(np.array([[1.0], [1.5]], np.float32)).tolist() == [[0.0], [1.5]]


def test_a_negative_threshold_lets_nothing_negative_through():
    one = np.ones((1, 1), np.float32)
    sae = Sae(W_enc=one, W_dec=one, b_enc=one[0] * 0, b_dec=one[0] * 0, threshold=-one[0])
    assert sae.encode(np.array([[-0.5], [0.5]], np.float32)).tolist() == [[0.0], [0.5]]


def test_one_compilation_serves_all_saes_of_a_shape():
    traces = []

    @jax.jit
    def reconstruct(sae, x):
        traces.append(1)
        return sae(x)

    x = jnp.ones((3, 10))
    for seed in (1, 2):
        sae = make_sae(seed=seed, layer=seed)
        assert sae.metadata["hook_name"] == f"blocks.{seed}.hook_resid_post"
        np.testing.assert_allclose(reconstruct(sae, x), sae(x), rtol=1e-6, atol=1e-6)
    assert len(traces) == 1


def test_fingerprint_sees_every_tensor():
    sae = make_sae()
    seen = {sae.fingerprint}
    for name in TENSORS:
        changed = sae.tensors[name].copy()
        changed.flat[0] = np.nextafter(changed.flat[0], np.float32(99))
        seen.add(dataclasses.replace(sae, **{name: changed}).fingerprint)
    assert len(seen) == 6
    assert make_sae().fingerprint in seen


def test_load_sae_loads_neither_the_trainer_nor_what_writes_checkpoints():
    program = (
        "import sys; from sae_train import load_sae; assert callable(load_sae);"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] in"
        " ('orbax', 'tensorstore', 'flax', 'optax') or name.startswith(('sae_train.train',"
        " 'sae_train.step', 'sae_train.checkpoint', 'sae_train.evaluate', 'launch'))))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.strip() == ""


# Round trips ------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), D=st.integers(1, 9), F=st.integers(1, 9))
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_back_bit_for_bit(tmp_path_factory, name, seed, D, F):
    sae, folder = make_sae(D=D, F=F, seed=seed), tmp_path_factory.mktemp(name)
    for path in WRITERS[name](sae, folder):
        assert path.stat().st_size > 0
    assert_same(load_sae(folder), sae)


def test_a_weights_file_and_its_folder_are_the_same(tmp_path):
    sae = make_sae()
    for name, write in WRITERS.items():
        for path in write(sae, tmp_path / name):
            if path.suffix != ".json":
                assert_same(load_sae(path), sae)
    renamed = shutil.copy(tmp_path / "gemma_scope/params.npz", tmp_path / "layer-1.npz")
    assert_same(load_sae(renamed), sae)
    assert_same(load_sae(str(tmp_path)), sae)  # a release folder: its sae_lens/


def test_no_temporary_file_remains(tmp_path):
    for write in WRITERS.values():
        write(make_sae(), tmp_path)
    expected = {"params.npz", "params.safetensors", "config.json", "cfg.json"}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"sae_weights.safetensors"}


def test_the_same_sae_gives_the_same_bytes(tmp_path):
    for name, write in WRITERS.items():
        first = [path.read_bytes() for path in write(make_sae(), tmp_path / name)]
        again = [path.read_bytes() for path in write(make_sae(), tmp_path / name)]
        assert first == again


def test_a_gemma_scope_file_is_as_deepmind_publishes_it(tmp_path):
    (path,) = write_gemma_scope(make_sae(D=10, F=24), tmp_path)
    with np.load(path) as file:
        shapes = {name: (file[name].shape, file[name].dtype.name) for name in file.files}
    assert shapes == {
        "W_enc": ((10, 24), "float32"),
        "W_dec": ((24, 10), "float32"),
        "b_enc": ((24,), "float32"),
        "b_dec": ((10,), "float32"),
        "threshold": ((24,), "float32"),
    }


@pytest.mark.parametrize(
    ("site", "hook"),
    [
        ("resid_post", "model.layers.1.output"),
        ("mlp_out", "model.layers.1.post_feedforward_layernorm.output"),
        ("attn_out_prelinear", "model.layers.1.self_attn.o_proj.input"),
    ],
)
def test_a_gemma_scope_2_folder_is_as_deepmind_publishes_it(tmp_path, site, hook):
    sae = make_sae(site=site)
    sae.metadata["l0"] = 59.7
    write_gemma_scope_2(sae, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "hf_hook_point_in": hook,
        "hf_hook_point_out": hook,
        "width": 24,
        "model_name": "google/gemma-3-270m",
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": False,
        "type": "sae",
    }
    names = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
    assert set(load_file(tmp_path / "params.safetensors")) == names
    metadata = load_sae(tmp_path).metadata
    assert metadata["hook_name"] == sae.metadata["hook_name"]
    assert metadata["model_name"] == "google/gemma-3-270m"


def test_sparsity_is_log10_of_the_frequencies_and_goes_when_they_do(tmp_path):
    frequency = np.linspace(0, 1, 24)
    write_sae_lens(make_sae(), tmp_path, frequency_F=frequency)
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert sparsity.dtype == np.float32
    np.testing.assert_allclose(sparsity, np.log10(frequency + 1e-10), rtol=1e-6)
    write_sae_lens(make_sae(), tmp_path)
    assert not (tmp_path / "sparsity.safetensors").exists()


def test_hook_names_go_both_ways():
    for site in get_args(Site):
        layer = 0 if site == "embedding" else 17
        assert parse_hook(transformer_lens_hook(site, layer)) == (site, layer)
        assert parse_hook(hugging_face_hook(site, layer)) == (site, layer)
    assert parse_hook("model.layers.3.self_attn.o_proj.input") == ("attn_out_prelinear", 3)
    assert parse_hook("blocks.3.hook_resid_mid") is None


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("google/gemma-2-9b", "gemma-2-9b"),
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("/data/gemma-2-2b", "gemma-2-2b"),
        ("/data/gemma-3-270m-q4_k_m.gguf", "gemma-3-270m-q4_k_m"),
    ],
)
def test_model_names(weights, name):
    assert model_name(weights) == name


# Other people's files ---------------------------------------------------------------------------


def test_metadata_come_from_the_hubs_folder_names_where_the_file_has_none(tmp_path):
    inside = "models--google--gemma-scope-9b-it-att/snapshots/x/layer_20/width_16k/average_l0_68"
    write_gemma_scope(make_sae(), tmp_path / inside)
    assert load_sae(tmp_path / inside).metadata == {
        "l0": 68,
        "model_name": "gemma-2-9b-it",
        "hook_name": "blocks.20.attn.hook_z",
        "hf_hook_name": "model.layers.20.self_attn.o_proj.input",
    }


def test_lower_case_npz_and_missing_config_are_read(tmp_path):
    sae = make_sae()
    np.savez(tmp_path / "params.npz", **{k.lower(): v for k, v in sae.tensors.items()})
    assert_same(load_sae(tmp_path), sae)
    write_gemma_scope_2(sae, tmp_path / "two")
    (tmp_path / "two/config.json").unlink()
    assert_same(load_sae(tmp_path / "two"), sae)


@pytest.mark.parametrize("key", [True, None])
def test_a_decoder_bias_the_encoder_subtracts_is_folded(tmp_path, key):
    sae = make_sae()
    write_sae_lens(sae, tmp_path)
    rewrite_json(tmp_path / "cfg.json", apply_b_dec_to_input=key)
    x = np.random.default_rng(5).standard_normal((9, 10)).astype(np.float32)
    expected = reference_latents(sae, x - sae.b_dec)
    assert not np.allclose(expected, reference_latents(sae, x), atol=0.1)
    np.testing.assert_allclose(load_sae(tmp_path).encode(x), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_tensors_are_read_as_float32(tmp_path):
    sae = make_sae()
    write_sae_lens(sae, tmp_path)
    short = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in sae.tensors.items()}
    save_file(short, tmp_path / "sae_weights.safetensors")
    assert_same(load_sae(tmp_path), Sae(**{k: v.astype(np.float32) for k, v in short.items()}))


def test_tensors_of_older_saelens_versions_are_read(tmp_path):
    sae = make_sae()
    write_sae_lens(sae, tmp_path)
    tensors = {**sae.tensors, "scaling_factor": np.ones(24, np.float32)}
    tensors["log_threshold"] = np.log(tensors.pop("threshold"))
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    rewrite_json(tmp_path / "cfg.json", metadata=None, hook_point="blocks.3.hook_mlp_out")
    read = load_sae(tmp_path)
    np.testing.assert_allclose(read.threshold, sae.threshold, rtol=1e-6)
    assert read.metadata == {"hook_name": "blocks.3.hook_mlp_out"}
    tensors["scaling_factor"][0] = 2
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="scaling_factor other than 1"):
        load_sae(tmp_path)
