"""What `load_sae` refuses, and what it says: other tensors, other configs, damaged files."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from activation_cache.runtime.errors import UserError
from sae_train import load_sae
from sae_train.inference.fold import fold
from sae_train.inference.write_formats import write_gemma_scope, write_gemma_scope_2, write_sae_lens
from tests.support.saes import make_sae, make_trained_as, rewrite_json

WRITERS = (write_gemma_scope, write_gemma_scope_2, write_sae_lens)
CHANGES = {
    "missing threshold": ({"threshold": None}, r"missing \['threshold'\], unknown nothing"),
    "unknown tensor": ({"r_mag": np.ones(24)}, r"unknown \['r_mag'\]"),
    "a skip of another width": ({"W_skip": np.ones((10, 9))}, r"skip \[D, D\] with D 10.*10, 9"),
    "transposed encoder": ({"W_enc": np.ones((24, 10))}, "transposed"),
    "transposed decoder": ({"W_dec": np.ones((10, 24))}, "transposed"),
    "other output": ({"W_dec": np.ones((24, 7)), "b_dec": np.ones(7)}, "transcoders of one width"),
    "short bias": ({"b_enc": np.ones(23)}, r"b_enc \[23\]"),
    "three dims": ({"W_dec": np.ones((24, 2, 5))}, r"W_dec \[24, 2, 5\]"),
    "integers": ({"b_enc": np.ones(24, int)}, "floating point, not int64"),
    "not finite": (
        {"b_dec": np.full(10, np.inf)},
        r"b_dec of .* must be finite; 10 of 10",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_tensors_that_are_no_jumprelu_sae_are_refused(tmp_path, case):
    changes, message = CHANGES[case]
    tensors = {**make_sae().tensors, **changes}
    np.savez(tmp_path / "params.npz", **{k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "matryoshka"}, "architecture 'matryoshka'"),
        ({"architecture": "jump_relu"}, "architecture 'jump_relu'"),
        ({"d_in": 11}, "says d_in 11, the tensors have 10"),
        ({"d_sae": 25}, "says d_sae 25, the tensors have 24"),
    ],
)
def test_saelens_configs_we_cannot_honour_are_refused(tmp_path, changes, message):
    write_sae_lens(make_sae(), tmp_path)
    rewrite_json(tmp_path / "cfg.json", **changes)
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk", "k": None}, "whole k of at least 1"),
        ({"architecture": "gated"}, r"lack \['b_gate', 'b_mag', 'r_mag'\]"),
    ],
)
def test_architectures_of_saelens_we_cannot_express_are_refused(tmp_path, changes, message):
    write_sae_lens(fold(make_trained_as("relu")), tmp_path)
    rewrite_json(tmp_path / "cfg.json", **changes)
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "only 'jump_relu'"),
        ({"type": "crosscoder"}, "describes a crosscoder"),
        ({"affine_connection": True}, "affine_connection True, and the tensors lack"),
        (
            {"hf_hook_point_in": 5, "affine_connection": True},
            "hf_hook_point_in 5, which must be text",
        ),
    ],
)
def test_gemma_scope_2_configs_we_cannot_honour_are_refused(tmp_path, changes, message):
    write_gemma_scope_2(make_sae(), tmp_path)
    rewrite_json(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("length", [0, 5, 100, -100])
def test_a_truncated_file_is_called_damaged(tmp_path, write, length):
    weights = next(path for path in write(make_sae(), tmp_path) if path.suffix != ".json")
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(UserError, match=weights.name):
        load_sae(tmp_path)


def test_a_flipped_byte_in_an_npz_is_called_damaged(tmp_path):
    (path,) = write_gemma_scope(make_sae(), tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="can't be read"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"'<f4'", b"'|O'"),
        (b"(10, 24)", b"(10, 9**9)"),
        (b"(10, 24)", b"(99999999999999,)"),
        (b"'descr'", b"'other'"),
    ],
)
def test_an_array_whose_header_is_odd_is_called_damaged(tmp_path, before, after):
    (path,) = write_gemma_scope(make_sae(), tmp_path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    member = members["W_enc.npy"]
    start = member.index(b"\n")  # of the data: the header keeps its length
    members["W_enc.npy"] = (
        member[:start].replace(before, after).rstrip().ljust(start) + member[start:]
    )
    assert members["W_enc.npy"] != member
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    with pytest.raises(UserError, match="can't be read"):
        load_sae(tmp_path)


def test_a_hook_that_is_no_text_is_named(tmp_path):
    write_gemma_scope_2(make_sae(), tmp_path)
    rewrite_json(tmp_path / "config.json", hf_hook_point_in=["model.layers.1.output"])
    with pytest.raises(UserError, match=r"hf_hook_point_in \['model.*must be text"):
        load_sae(tmp_path)


def test_missing_foreign_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"params.npz \(Gemma Scope\)"):
        load_sae(tmp_path)
    (tmp_path / "ae.pt").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(UserError, match="dictionary_learning"):
            load_sae(path)
    write_sae_lens(make_sae(), tmp_path / "lens")
    (tmp_path / "lens/cfg.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_sae(tmp_path / "lens")
    (tmp_path / "lens/cfg.json").write_text("[]")
    with pytest.raises(UserError, match="JSON object"):
        load_sae(tmp_path / "lens")
    (tmp_path / "lens/cfg.json").unlink()
    with pytest.raises(UserError, match=r"cfg.json is missing"):
        load_sae(tmp_path / "lens")
