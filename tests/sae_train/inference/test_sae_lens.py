"""Other people's code reads our release, and ours reads theirs: same latents, same output.

sae-lens is the real package. DeepMind's tutorial for Gemma Scope is followed line by line: a torch
module whose parameters have the names of the npz.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_train import load_sae
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.inference.write_formats import write_gemma_scope, write_gemma_scope_2, write_sae_lens
from tests.support.saes import make_sae, make_trained, reference_latents, reference_reconstruction

D, F = 10, 24


@pytest.fixture
def x_raw() -> np.ndarray:
    return 4 * np.random.default_rng(3).standard_normal((40, D)).astype(np.float32)


def assert_agrees(module, sae: Sae, x: np.ndarray) -> None:
    """A torch SAE gives our latents, ours agree with float64, and many latents fire."""
    with torch.no_grad():
        latents = module.encode(torch.from_numpy(x))
        reconstruction = module.decode(latents).numpy()
    latents = latents.numpy()
    assert 0.1 < (latents > 0).mean() < 0.9
    assert np.array_equal(latents > 0, np.asarray(sae.encode(x)) > 0)
    np.testing.assert_allclose(latents, sae.encode(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reconstruction, sae(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(latents, reference_latents(sae, x), rtol=1e-5, atol=1e-5)
    expected = reference_reconstruction(sae, x)
    np.testing.assert_allclose(reconstruction, expected, rtol=1e-5, atol=1e-5)


def test_sae_lens_loads_our_folder(sae_lens, tmp_path, x_raw):
    trained = make_trained(D=D, F=F)
    sae = fold(trained)
    write_sae_lens(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(theirs).__name__ == "JumpReLUSAE"
    assert_agrees(theirs, sae, x_raw)

    # All the way back to what training computed: latents times C.
    p, scale = trained.params, trained.input_scale
    z = (x_raw / scale - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(x_raw)).numpy()
    expected = scale * z * (z > p["threshold"])
    np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-4)  # float32 both ways


def test_sae_lens_keeps_the_metadata(sae_lens, tmp_path):
    write_sae_lens(make_sae(), tmp_path)
    cfg = sae_lens.SAE.load_from_disk(tmp_path).cfg
    assert (cfg.d_in, cfg.d_sae, cfg.dtype) == (D, F, "float32")
    assert cfg.apply_b_dec_to_input is False
    assert (cfg.normalize_activations, cfg.reshape_activations) == ("none", "none")
    assert cfg.metadata.model_name == "google/gemma-3-270m"
    assert cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert cfg.metadata.hf_hook_name == "model.layers.1.output"
    assert cfg.metadata.prepend_bos is True
    assert cfg.metadata.context_size == 16
    assert cfg.metadata.dataset_path == "data/*.txt"
    assert cfg.metadata.exclude_special_tokens is True
    assert cfg.metadata.training["tokens"] == 8192


def test_sae_lens_reshapes_the_heads_of_hook_z(sae_lens, tmp_path, x_raw):
    sae = make_sae(D=D, F=F, site="attn_out_prelinear")
    write_sae_lens(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.metadata.hook_name == "blocks.1.attn.hook_z"
    heads = torch.from_numpy(x_raw.reshape(4, 10, 2, 5))
    with torch.no_grad():
        reconstruction = theirs(heads)
    assert reconstruction.shape == heads.shape
    joined = reconstruction.numpy().reshape(x_raw.shape)
    np.testing.assert_allclose(joined, sae(x_raw), rtol=1e-5, atol=1e-5)


def test_sae_lens_reads_our_sparsity(sae_lens, tmp_path):
    frequency = np.random.default_rng(0).uniform(size=F)
    *_, path = write_sae_lens(make_sae(), tmp_path, frequency_F=frequency)
    from safetensors.torch import load_file

    np.testing.assert_allclose(10 ** load_file(path)["sparsity"], frequency, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("apply_b_dec", [False, True])
def test_we_load_what_sae_lens_saves(sae_lens, tmp_path, x_raw, dtype, apply_b_dec):
    config = sae_lens.JumpReLUSAEConfig(
        d_in=D, d_sae=F, dtype=dtype, apply_b_dec_to_input=apply_b_dec
    )
    config.metadata.hook_name = "blocks.7.hook_mlp_out"
    theirs = sae_lens.JumpReLUSAE(config)
    with torch.no_grad():
        for name, tensor in make_sae(D=D, F=F).tensors.items():
            getattr(theirs, name).copy_(torch.from_numpy(tensor))
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    assert ours.metadata["hook_name"] == "blocks.7.hook_mlp_out"
    theirs = theirs.to(dtype=torch.float32)  # bfloat16 in the file; the arithmetic in float32
    assert_agrees(theirs, ours, x_raw)


class TutorialSae(torch.nn.Module):
    """The module of DeepMind's Gemma Scope tutorial."""

    def __init__(self, d_model, d_sae):
        super().__init__()
        self.W_enc = torch.nn.Parameter(torch.zeros(d_model, d_sae))
        self.W_dec = torch.nn.Parameter(torch.zeros(d_sae, d_model))
        self.threshold = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_model))

    def encode(self, input_acts):
        pre_acts = input_acts @ self.W_enc + self.b_enc
        mask = pre_acts > self.threshold
        return mask * torch.nn.functional.relu(pre_acts)

    def decode(self, acts):
        return acts @ self.W_dec + self.b_dec


def test_deepminds_tutorial_reads_our_npz(tmp_path, x_raw):
    sae = make_sae(D=D, F=F)
    (path,) = write_gemma_scope(sae, tmp_path)
    params = np.load(path)
    pt_params = {k: torch.from_numpy(v) for k, v in params.items()}
    module = TutorialSae(params["W_enc"].shape[0], params["W_enc"].shape[1])
    module.load_state_dict(pt_params)
    params.close()
    assert_agrees(module, sae, x_raw)


def hub_file(folder):
    """`hf_hub_download` of a repository that lies in `folder`."""

    def download(repo_id, filename, subfolder=None, force_download=False):
        return str(folder / subfolder / filename) if subfolder else str(folder / filename)

    return download


def test_sae_lens_gemma_scope_loader_reads_our_npz(sae_lens, tmp_path, x_raw, monkeypatch):
    loaders = sae_lens.loading.pretrained_sae_loaders
    monkeypatch.setattr(loaders, "hf_hub_download", hub_file(tmp_path))
    sae = make_sae(D=D, F=F)
    place = "layer_12/width_16k/average_l0_82"
    write_gemma_scope(sae, tmp_path / place)
    cfg, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", place, cfg_overrides={"d_in": D, "d_sae": F}
    )
    assert_agrees(built(sae_lens, cfg, state), sae, x_raw)


def test_sae_lens_gemma_scope_2_loader_reads_our_folder(sae_lens, tmp_path, x_raw, monkeypatch):
    loaders = sae_lens.loading.pretrained_sae_loaders
    monkeypatch.setattr(loaders, "hf_hub_download", hub_file(tmp_path))
    shapes = {"w_enc": [D, F], "w_dec": [F, D]}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    sae = make_sae(D=D, F=F)
    place = "resid_post/layer_1_width_16k_l0_small"
    write_gemma_scope_2(sae, tmp_path / place)
    cfg, state, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-270m-pt", place)
    assert cfg["model_name"] == "google/gemma-3-270m"
    assert cfg["hf_hook_name"] == "model.layers.1.output"
    assert_agrees(built(sae_lens, cfg, state), sae, x_raw)


def built(sae_lens, cfg, state):
    """The SAE that sae-lens makes of what a loader returns, as its from_pretrained does."""
    loaders = sae_lens.loading.pretrained_sae_loaders
    cfg = loaders.handle_config_defaulting(cfg)
    module = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig.from_dict(cfg))
    module.load_state_dict(state)
    return module
