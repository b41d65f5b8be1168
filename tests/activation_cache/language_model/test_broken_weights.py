"""Broken, foreign and quantised weights: named from the files' headers, with the remedy."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from activation_cache.config import ModelConfig
from activation_cache.language_model.checkpoint import open_checkpoint
from activation_cache.language_model.gguf_file import open_gguf
from activation_cache.runtime.errors import UserError
from tests.support.tiny_gemma import tiny_config, tiny_tensors, write_tiny_gemma
from tests.support.tiny_gguf import write_gguf

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_gemma(tmp_path / "tiny")


def _refused(path: Path | str, *fragments: str) -> None:
    with pytest.raises(UserError) as caught:
        open_checkpoint(
            ModelConfig(weights=str(path))
        )  # from headers alone: no weight, no tokenizer, no text
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_no_such_weights(tmp_path: Path) -> None:
    _refused(tmp_path / "absent", "there is no such file or folder")
    _refused("absent.gguf", "there is no such file or folder")
    _refused(tmp_path, "has no config.json")
    (tmp_path / "model.bin").write_bytes(b"x")
    _refused(tmp_path / "model.bin", "must be a .gguf file, a folder")


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    _refused(folder, "neither model.safetensors nor")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(folder, "of which 1 are missing: model-00001-of-00002.safetensors")
    for damaged in ([], {"weight_map": {"a": 5}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(damaged))
        _refused(folder, "has no weight_map from tensors to files")


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    _refused(folder, f"has {len(whole) - 10} bytes", f"promises {len(whole)}", "truncated")
    path.write_bytes(whole[:100])
    _refused(folder, "not a whole safetensors file")
    path.write_bytes(b"")
    _refused(folder, "not a whole safetensors file")
    path.write_bytes(whole + b"more")
    _refused(folder, "damaged")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    _refused(folder, "git lfs pull")


@pytest.mark.parametrize(
    ("before", "after", "fragment"),
    [
        (b'"F32"', b'"F8_E4M3"', "embed_tokens.weight is stored as F8_E4M3; one of F64, F32"),
        (b"[401, 20]", b"[401, 19]", "not a whole safetensors file"),
        (b"[401, 20]", b'[401,"20"]', "not a whole safetensors file"),
        (b'"F32"', b'["F32"]', "not a whole safetensors file"),
    ],
)
def test_a_header_that_its_bytes_dont_fit(
    folder: Path, before: bytes, after: bytes, fragment: str
) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].replace(before, after, 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    _refused(folder, fragment)


def _edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"model_type": "llama"}, "architecture 'llama'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"num_attention_heads": 3}, "3 attention heads and 2 key-value heads"),
        ({"head_dim": 5}, "RoPE needs an even one"),
        # The config of a larger model beside these weights.
        ({"hidden_size": 24}, "has shape [401, 20] and needs [401, 24]"),
        ({"num_hidden_layers": 5, "layer_types": None}, "lacks 13 of the 67"),
        ({"num_hidden_layers": 3, "layer_types": None}, "13 tensors that its architecture"),
    ],
)
def test_wrong_config(folder: Path, changes: dict[str, Any], fragment: str) -> None:
    _edit_config(folder, **changes)
    _refused(folder, fragment)


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_bytes(LFS_POINTER)
    _refused(folder, "config.json is a Git LFS pointer", "git lfs pull")
    (folder / "config.json").write_text("[" * 100_000)
    _refused(folder, "not valid JSON")
    (folder / "config.json").write_text("{")
    _refused(folder, "not valid JSON")
    (folder / "config.json").write_text("[]")
    _refused(folder, "not a JSON object")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "lacks 1 of the 54"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}),
            "norm.weight has shape [3] and needs [20]",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.lora_A": np.zeros(3, np.float32)}),
            "merge adapters",
        ),
        (lambda t: t.pop("model.embed_tokens.weight"), "0 tensors named *embed_tokens.weight"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(20, np.int8)}),
            "norm.weight is stored as I8",
        ),
    ],
)
def test_wrong_tensors(
    folder: Path, change: Callable[[dict[str, np.ndarray]], Any], fragment: str
) -> None:
    tensors = tiny_tensors(tiny_config())
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    _refused(folder, fragment)


def test_bad_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    _refused(path, f"has {len(whole) // 2} bytes", "truncated")
    path.write_bytes(whole[:400])
    _refused(path, "ends inside its header, at 400 bytes")
    path.write_bytes(b"GGML" + whole[4:])
    _refused(path, "starts with b'GGML'")
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    _refused(path, "GGUF version 1")
    with pytest.raises(UserError, match=r"^(?!.*damaged header)"):
        open_gguf(path)
    path.write_bytes(b"")
    _refused(path, "not a GGUF file")
    path.write_bytes(LFS_POINTER)
    _refused(path, "git lfs pull")
    at = whole.index(b"general.architecture")
    alignment = _key(b"general.alignment", 4, struct.pack("<I", 0))
    one_more = struct.pack("<Q", struct.unpack("<Q", whole[16:24])[0] + 1)
    path.write_bytes(whole[:16] + one_more + alignment + whole[at - 8 :])
    _refused(path, "damaged header (general.alignment is 0")
    _refused(write_gguf(tmp_path / "l.gguf", architecture="llama"), "architecture 'llama'")
    missing = write_gguf(tmp_path / "m.gguf", leave_out="blk.1.ffn_up.weight")
    _refused(missing, "lacks 1 of the", "blk.1.ffn_up.weight")
    gain = np.zeros(7, np.float32)
    wrong = write_gguf(tmp_path / "w.gguf", tensors={"model.norm.weight": gain})
    _refused(wrong, "output_norm.weight has shape [7] and needs [20]")


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize(("kind", "name"), [(15, "Q8_K"), (99, "new"), (24, "I8")])
def test_a_gguf_type_that_cannot_be_undone_is_named(tmp_path: Path, kind: int, name: str) -> None:
    """When the header is read, before any text is."""
    path = write_gguf(tmp_path / "m.gguf", d_model=256, d_ff=256, head_dim=64, num_layers=1)
    data, tensor = bytearray(path.read_bytes()), b"blk.0.ffn_up.weight"
    at = data.index(tensor) + len(tensor)
    at += 4 + 8 * int.from_bytes(data[at : at + 4], "little")  # the number of dims, and the dims
    data[at : at + 4] = kind.to_bytes(4, "little")
    path.write_bytes(data)
    _refused(path, f"blk.0.ffn_up.weight is of GGML type {kind} ({name})", "--upgrade gguf")


def test_one_part_of_a_gguf_is_told(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", num_layers=1, split=3)
    _refused(path, "is one of 3 parts of a model", "llama-gguf-split --merge")


def test_a_gguf_row_that_is_not_made_of_blocks(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", num_layers=1)  # rows of 20
    data, tensor = bytearray(path.read_bytes()), b"blk.0.ffn_up.weight"
    at = data.index(tensor) + len(tensor) + 4 + 16
    data[at : at + 4] = int(gguf.GGMLQuantizationType.Q8_0).to_bytes(4, "little")
    path.write_bytes(data)
    _refused(path, "damaged header", "[28, 20] isn't made of Q8_0 blocks")
