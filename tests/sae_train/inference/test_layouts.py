"""Every layout that SAELens wrote since version 3: the numbers of sae-lens itself, or words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from activation_cache.runtime.errors import UserError
from sae_train import load_sae

D, F, K = 10, 24, 5
# cfg.json as versions 3 and 5 wrote it, and as version 6 does.
V3 = {
    "model_name": "gpt2-small", "hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3,
    "hook_point_head_index": None, "dataset_path": "openwebtext", "context_size": 128,
    "d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu",
}  # fmt: skip
V5 = V3 | {
    "architecture": "standard", "hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3,
    "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False, "normalize_activations": "none", "noise_scale": 0.0,
    "prepend_bos": True, "sae_lens_training_version": "5.9.1", "dtype": "float32",
}  # fmt: skip
V6 = {
    "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
    "normalize_activations": "none", "reshape_activations": "none", "architecture": "standard",
    "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_mlp_out"},
}  # fmt: skip
LOADED: dict[str, dict[str, Any]] = {
    "3, bare": V3,
    "3, normalize false": V3 | {"normalize_activations": False},
    "3, topk as an activation": V3
    | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"},
    "5": V5,
    "5, nothing subtracted": V5 | {"apply_b_dec_to_input": False},
    "5, null": V5 | {"normalize_activations": None},
    "5, noise of training": V5 | {"noise_scale": 0.5},
    "5, gated": V5 | {"architecture": "gated"},
    "5, jumprelu": V5 | {"architecture": "jumprelu"},
    "5, topk": V5
    | {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "5, topk, k null beside": V5
    | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "k": None},
    "6": V6,
    "6, subtracting": V6 | {"apply_b_dec_to_input": True},
    "6, key absent": {k: v for k, v in V6.items() if k != "apply_b_dec_to_input"},
    "6, gated, subtracting": V6 | {"architecture": "gated", "apply_b_dec_to_input": True},
    "6, a training checkpoint": V6 | {"l1_coefficient": 1.0, "lp_norm": 1.0, "decoder_init": 0.1},
    "6, topk": V6 | {"architecture": "topk", "k": K},
    "6, topk, rescaled": V6
    | {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
    "6, transcoder": V6 | {"architecture": "transcoder", "d_out": D},
    "6, skip": V6 | {"architecture": "skip_transcoder", "d_out": D},
    "6, jumprelu transcoder": V6 | {"architecture": "jumprelu_transcoder", "d_out": D},
    "6, jumprelu skip": V6 | {"architecture": "jumprelu_skip_transcoder", "d_out": D},
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "torch.float32": torch.float32}
LOADED |= {f"6, {dtype}": V6 | {"architecture": "jumprelu", "dtype": dtype} for dtype in DTYPES}


def write_layout(folder: Path, config: dict[str, Any], **changes: Any) -> dict[str, torch.Tensor]:
    """A folder with this cfg.json and random tensors of its architecture."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(*shape, generator=random)

    architecture = config.get("architecture", "standard")
    tensors = {"W_enc": normal(D, F), "W_dec": normal(F, D), "b_dec": normal(D)}
    if architecture == "gated":
        tensors |= {name: normal(F) for name in ("b_gate", "b_mag", "r_mag")}
    else:
        tensors["b_enc"] = normal(F)
    if "jumprelu" in architecture:
        tensors["threshold"] = normal(F).abs()
    if "skip" in architecture:
        tensors["W_skip"] = normal(D, D)
    tensors |= changes
    dtype = DTYPES.get(str(config["dtype"]), torch.float32)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors


def assert_same(theirs: Any, folder: Path, x: np.ndarray) -> None:
    ours = load_sae(folder)
    theirs = theirs.to(dtype=torch.float32)  # the file's numbers, the arithmetic of float32
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(x))
        output = theirs(torch.from_numpy(x)).numpy()
    assert 0.1 < (latents > 0).float().mean() < 0.9
    np.testing.assert_allclose(latents.to_dense(), ours.encode(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output, ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LOADED)
def test_a_layout_has_the_numbers_of_sae_lens(
    sae_lens: Any, tmp_path: Path, x_raw: np.ndarray, layout: str
):
    write_layout(tmp_path, LOADED[layout])
    assert_same(sae_lens.SAE.load_from_disk(tmp_path), tmp_path, x_raw)


@pytest.mark.slow
def test_a_factor_of_ones_and_a_row_of_zeros_are_as_in_sae_lens(
    sae_lens: Any, tmp_path: Path, x_raw: np.ndarray
):
    write_layout(tmp_path, V5, scaling_factor=torch.ones(F))
    assert_same(sae_lens.SAE.load_from_disk(tmp_path), tmp_path, x_raw)
    tensors = write_layout(tmp_path, LOADED["6, topk, rescaled"])
    tensors["W_dec"][3] = 0
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path), load_sae(tmp_path)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(x_raw))
        np.testing.assert_allclose(latents, ours.encode(x_raw), rtol=1e-5, atol=1e-5)
        # sae-lens decodes 0 / 0 to NaN: leave the latent out.
        theirs.W_dec[3] = 1.0
        output = theirs.decode(latents).numpy()
    np.testing.assert_allclose(ours(x_raw), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_factor_learnt_after_training_scales_what_is_decoded(tmp_path: Path, name: str):
    """sae-lens 6 has none any more; versions 3 to 5 decoded factor * latents."""
    plain, x = tmp_path / "plain", np.random.default_rng(0).standard_normal((5, D))
    write_layout(plain, V5)
    factor = torch.linspace(0.5, 2, F)
    write_layout(tmp_path / "tuned", V5 | {"finetuning_scaling_factor": True}, **{name: factor})
    before, tuned = load_sae(plain), load_sae(tmp_path / "tuned")
    latents = np.asarray(before.encode(x))
    np.testing.assert_array_equal(tuned.encode(x), latents)
    np.testing.assert_allclose(
        tuned.decode(latents), before.decode(factor.numpy() * latents), rtol=1e-5, atol=1e-5
    )


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "average norm": (
        {"normalize_activations": "expected_average_only_in"}, {}, "isn't in the files. Fold it",
    ),
    "average norm, as a bool": ({"normalize_activations": True}, {}, "isn't in the files. Fold it"),
    "whitening": (
        {"normalize_activations": "covariance_whitening"}, {}, "fold_activation_whitening",
    ),
    "constant norm": (
        {"normalize_activations": "constant_norm_rescale"}, {}, "each row by its own norm",
    ),
    "layer norm": ({"normalize_activations": "layer_norm"}, {}, "takes mean and spread out"),
    "unknown": (
        {"normalize_activations": "constant_scalar_rescale"}, {}, "SAELens' values are 'none', ",
    ),
    "no value": ({"normalize_activations": ["none"]}, {}, r"has normalize_activations \['none'\]"),
    "batchtopk": ({"architecture": "batchtopk"}, {}, "a checkpoint of SAELens' training"),
    "matryoshka": ({"architecture": "matryoshka_batchtopk"}, {}, "save_inference_model"),
    "temporal": ({"architecture": "temporal"}, {}, "has architecture 'temporal'"),
    "k too large": ({"architecture": "topk", "k": F + 1}, {}, "at most its 24 latents .* has 25"),
    "k a bool": ({"architecture": "topk", "k": True}, {}, "whole k"),
    "kwargs a list": ({"architecture": "topk", "activation_fn_kwargs": [1]}, {}, "whole k"),
    "tanh": ({"activation_fn_str": "tanh-relu"}, {}, "activation 'tanh-relu'"),
    "a transcoder subtracts": (
        {"architecture": "transcoder", "apply_b_dec_to_input": True}, {}, "Set the key to false",
    ),
    "a factor nobody names": (
        {}, {"scaling_factor": torch.full((F,), 2.0)}, "don't belong together",
    ),
    "a factor too short": (
        {"finetuning_scaling_factor": True}, {"scaling_factor": torch.full((3,), 2.0)},
        "for each latent",
    ),
    "shapes": (
        {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True},
        {"W_enc": torch.ones(F, D)}, "the shapes of its tensors don't fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_we_cannot_express_is_refused_by_name(tmp_path: Path, case: str):
    changes, tensors, words = REFUSED[case]
    write_layout(tmp_path, V6 | changes, **tensors)
    with pytest.raises(UserError, match=words):
        load_sae(tmp_path)
