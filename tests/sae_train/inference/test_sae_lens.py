"""Other people's code reads our releases, and ours reads theirs: same latents, same output.

sae-lens is the real package, of which this file alone needs most. DeepMind's tutorial for Gemma
Scope is followed line by line: a torch module whose parameters have the names of the npz.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_cache.runtime.errors import UserError
from sae_train import load_sae
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.inference.write_formats import write_gemma_scope, write_gemma_scope_2, write_sae_lens
from sae_train.release.export import check_same, export
from tests.support.saes import (
    make_sae,
    make_trained,
    make_trained_as,
    reference_latents,
    reference_reconstruction,
    save_run,
)

pytestmark = pytest.mark.slow

D, F, K = 10, 24, 5
TRANSCODER: dict[str, Any] = {"site": "mlp_in", "target": "mlp_out", "target_scale": 1.9}
SKIPS = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


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


def test_a_matryoshka_release_is_a_plain_one_in_the_order_of_prefixes(sae_lens, tmp_path, x_raw):
    """What training holds lies dealt out; the first latents of every format are one prefix."""
    dealt = make_trained(D=D, F=F, matryoshka=[6, 12])
    (release,) = export(save_run(tmp_path, dealt))
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "release/sae_lens")
    assert type(theirs).__name__ == "JumpReLUSAE"
    assert_agrees(theirs, release.sae, x_raw)
    # Six runs of four positions, of which one is the first prefix's and one the second's.
    runs = dealt.params["W_dec"].reshape(6, 4, D)
    ordered = np.concatenate([runs[:, 0], runs[:, 1], runs[:, 2:].reshape(12, D)])
    for folder in ("gemma_scope", "gemma_scope_2", "sae_lens"):
        read = load_sae(tmp_path / "release" / folder)
        np.testing.assert_array_equal(read.W_dec, ordered, err_msg=folder)
    assert read.prefixes == (6, 12, 24)
    assert "| Matryoshka | the first 6, 12, 24 latents" in release.files[-1].read_text()


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

    def download(repo_id, filename, subfolder=None, **_):
        return str(folder / subfolder / filename) if subfolder else str(folder / filename)

    return download


def test_sae_lens_gemma_scope_loader_reads_our_npz(sae_lens, tmp_path, x_raw, monkeypatch):
    loaders = sae_lens.loading.pretrained_sae_loaders
    monkeypatch.setattr(loaders, "hf_hub_download", hub_file(tmp_path))
    sae = make_sae(D=D, F=F)
    name = "layer_12/width_16k/average_l0_82"
    write_gemma_scope(sae, tmp_path / name)
    cfg, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", name, cfg_overrides={"d_in": D, "d_sae": F}
    )
    assert_agrees(built(sae_lens, cfg, state), sae, x_raw)


def test_sae_lens_gemma_scope_2_loader_reads_our_folder(sae_lens, tmp_path, x_raw, monkeypatch):
    loaders = sae_lens.loading.pretrained_sae_loaders
    monkeypatch.setattr(loaders, "hf_hub_download", hub_file(tmp_path))
    shapes = {"w_enc": [D, F], "w_dec": [F, D]}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    sae = make_sae(D=D, F=F)
    name = "resid_post/layer_1_width_16k_l0_small"
    write_gemma_scope_2(sae, tmp_path / name)
    cfg, state, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-270m-pt", name)
    assert cfg["model_name"] == "google/gemma-3-270m"
    assert cfg["hf_hook_name"] == "model.layers.1.output"
    assert_agrees(built(sae_lens, cfg, state), sae, x_raw)


def built(sae_lens, cfg, state):
    """The SAE that sae-lens makes from what a loader returns, as its from_pretrained does."""
    loaders = sae_lens.loading.pretrained_sae_loaders
    cfg = loaders.handle_config_defaulting(cfg)
    module = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig.from_dict(cfg))
    module.load_state_dict(state)
    return module


# Architectures other than JumpReLU --------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "theirs"),
    [
        ("relu", "StandardSAE"),
        ("gated", "GatedSAE"),
        ("topk", "TopKSAE"),
        ("batch_topk", "JumpReLUSAE"),
    ],
)
def test_sae_lens_loads_every_architecture(
    sae_lens, tmp_path: Path, x_raw: np.ndarray, architecture: str, theirs: str
):
    sae = fold(make_trained_as(architecture, k=K))
    write_sae_lens(sae, tmp_path)
    module = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(module).__name__ == theirs
    with torch.no_grad():
        latents = module.encode(torch.from_numpy(x_raw))
        output = module.decode(latents).numpy()
    np.testing.assert_allclose(latents.to_dense(), sae.encode(x_raw), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output, sae(x_raw), rtol=1e-5, atol=1e-5)
    read = load_sae(tmp_path)
    check_same(sae, read, path=tmp_path)
    assert (read.architecture, read.k) == (sae.architecture, sae.k)
    np.testing.assert_allclose(read(x_raw), sae(x_raw), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    [
        ("Standard", "relu", {}),
        ("Gated", "gated", {}),
        ("TopK", "topk", {"k": K}),
        ("TopK", "topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_we_load_every_architecture_sae_lens_saves(
    sae_lens, tmp_path: Path, x_raw: np.ndarray, theirs: str, ours: str, options: dict[str, Any]
):
    config = getattr(sae_lens, f"{theirs}SAEConfig")
    module = getattr(sae_lens, f"{theirs}SAE")(
        config(d_in=D, d_sae=F, apply_b_dec_to_input=True, **options)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
        expected = module(torch.from_numpy(x_raw)).numpy()
    module.save_model(tmp_path)
    sae = load_sae(tmp_path)
    np.testing.assert_allclose(sae(x_raw), expected, rtol=1e-5, atol=1e-5)
    assert sae.architecture == ours


# Transcoders ------------------------------------------------------------------------------------


def assert_same_outputs(theirs: Any, sae: Sae, x: np.ndarray) -> None:
    with torch.no_grad():
        outputs = theirs(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(outputs, sae(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs, reference_reconstruction(sae, x), rtol=1e-5, atol=1e-5)


@SKIPS
@pytest.mark.parametrize("architecture", ["jumprelu", "relu"])
def test_sae_lens_loads_transcoders(
    sae_lens, tmp_path: Path, x_raw: np.ndarray, skip: bool, architecture: Any
):
    sae = make_sae(**TRANSCODER, affine_skip=skip)
    if architecture == "relu":
        sae = dataclasses.replace(sae, threshold=np.zeros(F, np.float32), architecture="relu")
    write_sae_lens(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    names = {
        ("jumprelu", False): "JumpReLUTranscoder",
        ("jumprelu", True): "JumpReLUSkipTranscoder",
        ("relu", False): "Transcoder",
        ("relu", True): "SkipTranscoder",
    }
    assert type(theirs).__name__ == names[architecture, skip]
    assert theirs.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(x_raw)).numpy()
    assert 0.1 < (latents > 0).mean() < 0.9
    np.testing.assert_allclose(latents, sae.encode(x_raw), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(latents, reference_latents(sae, x_raw), rtol=1e-5, atol=1e-5)
    assert_same_outputs(theirs, sae, x_raw)
    back = load_sae(tmp_path)
    assert back.is_transcoder
    assert back.architecture == architecture
    for name, tensor in sae.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], tensor, err_msg=name)


@SKIPS
def test_sae_lens_gemma_scope_2_loader_reads_our_transcoder(
    sae_lens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x_raw: np.ndarray, skip: bool
):
    loaders = sae_lens.loading.pretrained_sae_loaders
    sae = make_sae(**TRANSCODER, affine_skip=skip)
    name = f"transcoder_all/layer_1_width_16k_l0_small{'_affine' if skip else ''}"
    folder = tmp_path / name
    write_gemma_scope_2(sae, folder)
    monkeypatch.setattr(loaders, "hf_hub_download", hub_file(tmp_path))
    shapes = {name.lower(): list(t.shape) for name, t in sae.tensors.items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    config, tensors, _ = loaders.gemma_3_sae_huggingface_loader(
        "google/gemma-scope-2-270m-pt", name
    )
    assert config["architecture"] == f"jumprelu_{'skip_' if skip else ''}transcoder"
    assert config["hf_hook_name"] == "model.layers.1.pre_feedforward_layernorm.output"
    assert config["hf_hook_name_out"] == "model.layers.1.post_feedforward_layernorm.output"
    theirs = sae_lens.SAE.from_dict(config)
    theirs.load_state_dict(tensors)
    assert_same_outputs(theirs, sae, x_raw)
    back = load_sae(folder)
    assert back.is_transcoder
    np.testing.assert_array_equal(back(x_raw), sae(x_raw))
    (folder / "config.json").unlink()  # Gemma Scope 2 has none for the 27B model
    again = load_sae(folder)
    assert again.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    np.testing.assert_array_equal(again(x_raw), sae(x_raw))


def test_sae_lens_gemma_scope_loader_reads_our_transcoder(
    sae_lens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x_raw: np.ndarray
):
    loaders = sae_lens.loading.pretrained_sae_loaders
    sae = make_sae(**TRANSCODER)
    repository, name = "google/gemma-scope-2b-pt-transcoders", "layer_7/width_16k/average_l0_9"
    write_gemma_scope(sae, tmp_path / repository / name)
    monkeypatch.setattr(loaders, "hf_hub_download", hub_file(tmp_path / repository))
    config, tensors, _ = loaders.gemma_2_transcoder_huggingface_loader(repository, name)
    theirs = sae_lens.SAE.from_dict(config | {"d_in": D, "d_out": D, "d_sae": F})
    theirs.load_state_dict(tensors)
    assert_same_outputs(theirs, sae, x_raw)
    back = load_sae(tmp_path / repository / name)
    assert back.metadata["hook_name"] == config["hook_name"] == "blocks.7.ln2.hook_normalized"
    assert back.metadata["hook_name_out"] == config["hook_name_out"] == "blocks.7.hook_mlp_out"
    np.testing.assert_array_equal(back(x_raw), sae(x_raw))


# The embedding ----------------------------------------------------------------------------------


def test_our_embedding_sae_reads_the_table_and_sae_lens_the_scaled_one(
    sae_lens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x_raw: np.ndarray
):
    """SAELens scales the weights, for use on the embedding times sqrt(D): the same latents."""
    loaders = sae_lens.loading.pretrained_sae_loaders
    sae = make_sae(site="embedding", layer=0)
    repository, name = "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_111"
    write_gemma_scope(sae, tmp_path / repository / name)
    monkeypatch.setattr(loaders, "hf_hub_download", hub_file(tmp_path / repository))
    _, tensors, _ = loaders.gemma_2_sae_huggingface_loader(
        repository, name, cfg_overrides={"d_in": D, "d_sae": F}
    )
    scaled = torch.from_numpy(x_raw) * D**0.5
    pre = scaled @ tensors["W_enc"].float() + tensors["b_enc"].float()
    latents = (torch.relu(pre) * (pre > tensors["threshold"])).numpy()
    assert 0.1 < (latents > 0).mean() < 0.9
    np.testing.assert_allclose(latents, sae.encode(x_raw), rtol=1e-4, atol=1e-5)
    back = load_sae(tmp_path / repository / name)
    assert back.metadata["hook_name"] == "model.embed_tokens.weight"
    np.testing.assert_array_equal(back(x_raw), sae(x_raw))


def test_sae_lens_own_hook_of_the_embedding_is_refused(tmp_path: Path):
    sae = make_sae()
    sae.metadata["hook_name"] = "hook_embed"
    write_sae_lens(sae, tmp_path)
    with pytest.raises(UserError, match=r"is for hook_embed, the embedding times sqrt"):
        load_sae(tmp_path)
