"""Checkpoints read from folders and GGUF files, converted once, found in the Hub's cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from activation_cache.config import CacheConfig, ModelConfig, SiteConfig
from activation_cache.gemma.params import parameter_table
from activation_cache.gemma.taps import Splice, Tap, resolve_taps, tap_width
from activation_cache.language_model.checkpoint import (
    Params,
    load_parameters,
    open_checkpoint,
    weight_fingerprint,
)
from activation_cache.language_model.gguf_file import open_gguf
from activation_cache.language_model.model import LanguageModel, conversion_folder, load_model
from activation_cache.language_model.shape import read_gemma_config
from activation_cache.mesh import make_mesh
from activation_cache.runtime.errors import UserError
from tests.support.tiny_gemma import tiny_config, tiny_tensors, write_tiny_gemma
from tests.support.tiny_gguf import write_gguf

TOKENS = np.array([[2, 40, 301, 17, 222, 90, 5, 333]], np.int32)


def model_of(path: Path | str) -> ModelConfig:
    return ModelConfig(weights=str(path), dtype="float32")


def parameters_of(path: Path) -> Params:
    mesh = make_mesh(jax.devices()[:1])
    checkpoint = open_checkpoint(model_of(path))
    return load_parameters(checkpoint, dtype="float32", meshes=[mesh])[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_gemma(tmp_path / "tiny")


def test_folder_and_gguf_and_converted_copy_agree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(model_of(path))
    for name, values in tiny_tensors(checkpoint.config).items():
        parameter = next(p for p in parameter_table(checkpoint.config) if f"model.{p.hf}" == name)
        np.testing.assert_allclose(checkpoint.read(parameter), values, atol=1e-6)
    direct = load_model(model_of(path))
    with caplog.at_level(logging.INFO):
        converted = load_model(model_of(path), converted=tmp_path / "weights")
        assert "converting" in caplog.text
        caplog.clear()
        again = load_model(model_of(path), converted=tmp_path / "weights")
        assert "converting" not in caplog.text
    copy = tmp_path / "weights" / direct.fingerprint[:16]
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == [copy.name]
    from_folder = load_model(model_of(copy))
    for other in (converted, again, from_folder):
        assert other.config == direct.config
        assert other.tokenizer.fingerprint == direct.tokenizer.fingerprint
        _assert_same_tree(other.params, direct.params)
    assert converted.fingerprint == again.fingerprint == direct.fingerprint
    assert weight_fingerprint(model_of(path)) == direct.fingerprint


def _assert_same_tree(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        if isinstance(value, dict):
            _assert_same_tree(value, theirs[key])
        else:
            np.testing.assert_array_equal(value, theirs[key])


def test_a_gguf_header_is_read_anew_only_when_the_file_has_changed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    first = open_gguf(path)
    assert open_gguf(path) is first
    write_gguf(path, num_layers=6)
    changed = open_gguf(path)
    assert changed.metadata["gemma3.block_count"] == 6 != first.metadata["gemma3.block_count"]


def test_gguf_quantised_blocks(tmp_path: Path) -> None:
    """Q8_0 keeps 8 bits of each block of 32; the values are the gguf package's own."""
    sizes = {"d_model": 32, "d_ff": 64, "num_heads": 4, "head_dim": 8, "num_layers": 1}
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "q8.gguf", quantisation=kind, **sizes)
    checkpoint = open_checkpoint(model_of(path))
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for parameter in parameter_table(checkpoint.config):
        theirs = reader[parameter.gguf]
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        np.testing.assert_array_equal(
            checkpoint.read(parameter), expected - 1 if parameter.is_norm else expected
        )


@pytest.mark.parametrize(
    ("family", "layers", "query_scalar"), [("gemma2", 46, 5.0), ("gemma2", 4, 6.0)]
)
def test_gguf_gemma2_metadata(
    tmp_path: Path, family: Any, layers: int, query_scalar: float
) -> None:
    """Soft caps and RoPE base by default; 46 layers (27B) divide by d_model / heads."""
    config = read_gemma_config(
        model_of(write_gguf(tmp_path / "g.gguf", family=family, num_layers=layers))
    )
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    assert config.rope_base_global == config.rope_base_local == 10_000.0
    assert config.global_layers[:4] == (False, True, False, True)
    assert config.query_scalar == query_scalar
    assert config.norm_epsilon == 1e-6


@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.Q4_0])
def test_a_gguf_is_read_in_parts(tmp_path: Path, kind: gguf.GGMLQuantizationType | None) -> None:
    """Four devices: dequantised part by part, the values are those of the whole."""
    sizes = {"d_model": 32, "d_ff": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
    path = write_gguf(tmp_path / "model.gguf", quantisation=kind, **sizes)
    whole = load_model(model_of(path))
    cut = load_model(model_of(path), mesh=make_mesh(jax.devices()[:4]))
    split = jax.tree.map(lambda array: array.sharding.is_fully_replicated, cut.params)
    assert not split["layers_0"]["attention"]["W_O"], "cut along its rows in the file"
    assert not split["layers_0"]["attention"]["W_Q"], "and across them"
    _assert_same_tree(cut.params, whole.params)


def test_multimodal_prefixes(folder: Path) -> None:
    """4B and up: other tensors stand beside the language model's."""
    expected = parameters_of(folder)
    tensors = tiny_tensors(tiny_config())
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {prefix + name.removeprefix("model."): v for name, v in tensors.items()}
        renamed["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
        renamed["language_model.lm_head.weight"] = tensors["model.embed_tokens.weight"]
        save_file(renamed, folder / "model.safetensors")
        loaded = parameters_of(folder)
        _assert_same_tree(loaded, expected)


def test_bfloat16_files_are_viewed_not_copied(folder: Path) -> None:
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in tiny_tensors(tiny_config()).items()}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(model_of(folder))
    embedding = parameter_table(checkpoint.config)[0]
    assert checkpoint.read(embedding).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(checkpoint.read(embedding), tensors["model.embed_tokens.weight"])


def test_fingerprint_follows_weights_and_config(folder: Path, tmp_path: Path) -> None:
    first = weight_fingerprint(model_of(folder))
    assert weight_fingerprint(model_of(write_tiny_gemma(tmp_path / "copy"))) == first
    assert weight_fingerprint(model_of(write_tiny_gemma(tmp_path / "other", seed=1))) != first
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"sliding_window": 5', '"sliding_window": 6')
    )
    assert weight_fingerprint(model_of(folder)) != first


def test_an_id_past_the_embedding_is_never_read_as_another(folder: Path) -> None:
    model = load_model(model_of(folder))
    for bad in (401, -1):
        tokens = np.array([[2, 40, bad]], np.int32)
        with pytest.raises(UserError, match=rf"{bad}.* the model embeds 0 to 400"):
            model.losses(tokens)
        with pytest.raises(UserError, match="the model embeds 0 to 400"):
            model.activations(tokens, [Tap("resid_post", 0)])


def test_damaged_conversion_names_the_folder(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", num_layers=1)
    model = load_model(model_of(path), converted=tmp_path)
    copy = tmp_path / model.fingerprint[:16]
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"truncated.*Delete that folder") as caught:
        load_model(model_of(path), converted=tmp_path)
    assert str(copy) in str(caught.value)


def test_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", num_layers=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("activation_cache.language_model.gguf_conversion.os.fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        load_model(model_of(path), converted=tmp_path / "weights")
    assert list((tmp_path / "weights").iterdir()) == []


def test_hub_id_from_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Hub's cache holds works without a network; what it doesn't is refused in words."""
    cached = tmp_path / "hub" / "models--google--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / "abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_gemma_config(model_of("google/tiny")) == tiny_config()
    assert load_model(model_of("google/tiny")).source == "google/tiny"
    with pytest.raises(UserError, match=r"the Hub does not give google/absent .*hf auth login"):
        open_checkpoint(model_of("google/absent"))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install open-gemma-scope\[hub\]"):
        open_checkpoint(model_of("google/tiny"))


# --- taps ----------------------------------------------------------------------------------------


def test_taps_resolve_in_order() -> None:
    config = tiny_config()
    sites = [SiteConfig(site="resid_post", layers=[3, 0]), SiteConfig(site="mlp_out", layers="all")]
    taps = resolve_taps(sites, config)
    assert [tap.name for tap in taps] == [
        "mlp_out.0", "resid_post.0", "mlp_out.1", "mlp_out.2", "mlp_out.3", "resid_post.3",
    ]  # fmt: skip
    assert tap_width(config, "attn_out_prelinear") == 24
    assert tap_width(config, "mlp_out") == tap_width(config, "resid_post") == 20
    with pytest.raises(UserError, match=r"layer 4 .* has 4 layers, numbered 0 to 3"):
        resolve_taps([SiteConfig(site="mlp_out", layers=[4])], config)
    twice = [SiteConfig(site="mlp_out", layers=[1]), SiteConfig(site="mlp_out", layers="all")]
    with pytest.raises(UserError, match=r"mlp_out.1 twice"):
        resolve_taps(twice, config)


def test_layers_that_do_not_exist(folder: Path) -> None:
    model: LanguageModel = load_model(model_of(folder))
    with pytest.raises(UserError, match="layer 9"):
        model.activations(TOKENS, [Tap("mlp_out", 9)])
    with pytest.raises(UserError, match="layer 9"):
        model.losses(TOKENS, Splice(Tap("mlp_out", 9), lambda acts, _: acts))


def test_conversions_lie_beside_the_store() -> None:
    cache = CacheConfig(path="data/store", sites=[{"site": "mlp_out", "layers": "all"}], tokens=1)  # type: ignore[list-item]
    assert conversion_folder(cache.path) == Path("data/weights")
