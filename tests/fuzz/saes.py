"""Broken SAEs in Gemma Scope's, Gemma Scope 2's and SAELens' formats, of our and others' making."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from tests.fuzz.models import broken_safetensors
from tests.fuzz.outcome import Input
from tests.fuzz.values import NASTY, Random, broken_bytes, broken_json, one_of
from tests.fuzz.world import World

_FOLDERS = ("gemma_scope", "gemma_scope_2", "sae_lens", "sae_lens")
_KEYS = (
    "architecture", "activation_fn", "activation_fn_str", "activation_fn_kwargs", "k", "d_in",
    "d_sae", "d_out", "dtype", "apply_b_dec_to_input", "normalize_activations", "metadata",
    "rescale_acts_by_decoder_norm", "hook_name", "model_name", "finetuning_scaling_factor", "type",
    "hf_hook_point_in", "hf_hook_point_out", "affine_connection", "l0", "width", "hook_point",
    "prepend_bos", "reshape_activations", "jumprelu_init_threshold",
)  # fmt: skip
_WORDS = (
    "standard", "gated", "topk", "batchtopk", "jumprelu", "jump_relu", "relu", "transcoder",
    "skip_transcoder", "jumprelu_transcoder", "crosscoder", "matryoshka_batchtopk", "temporal",
    "layer_norm", "expected_average_only_in", "none", "tanh-relu", "blocks.1.hook_resid_post",
    "hook_embed", "blocks.x.hook_mlp_out", "model.layers.1.output", "blocks.1.attn.hook_z",
)  # fmt: skip


def broken_sae(random: Random, world: World) -> Input:
    """One file of a release broken, or its tensors, given to `inspect` or to a run's start."""
    form = one_of(random, _FOLDERS)
    folder = f"out/release/{form}"
    names = [name for name in world.matching(f"{folder}/") if "sparsity" not in name]
    name = one_of(random, names)
    data = world.files[name]
    if name.endswith(".json"):
        data = _broken_json(random, data)
    elif random.random() < 0.4:
        data = broken_safetensors(random, data) if ".safe" in name else broken_bytes(random, data)
    else:
        data = _broken_tensors(random, data, npz=name.endswith(".npz"))
    target = str(world.folder / folder)
    inspect = ("inspect", target)
    start = ("train", f"{world.folder}/config.yaml", f"output={world.folder}/new",
             "train.tokens=64", f"sae.start_from={target}")  # fmt: skip
    return Input(one_of(random, (inspect,) * 9 + (start,)), {name: data})


def _broken_json(random: Random, data: bytes) -> bytes:
    if random.random() < 0.5:
        return broken_json(random, data)
    value = json.loads(data)
    for _ in range(int(random.integers(1, 4))):
        key = one_of(random, _KEYS)
        value[key] = one_of(random, _WORDS if random.random() < 0.7 else NASTY)
    return json.dumps(value).encode()


def _broken_tensors(random: Random, data: bytes, *, npz: bool) -> bytes:
    """A readable file whose tensors are others."""
    if npz:
        with np.load(io.BytesIO(data)) as file:
            tensors = {name: file[name] for name in file.files}
    else:
        tensors = load(data)
    name = one_of(random, sorted(tensors))
    was = tensors.pop(name)
    new = _other_array(random, was)
    if new is not None:
        tensors[one_of(random, (name, name, name, name.upper(), name.lower(), "x", "r_mag"))] = new
    if npz:
        return _zipped(random, tensors)
    return save({key: np.ascontiguousarray(one) for key, one in tensors.items()
                 if one.dtype.kind in "fiub"})  # fmt: skip


def _other_array(random: Random, was: np.ndarray) -> np.ndarray | None:
    nan, huge = was.copy(), was.copy()
    nan.reshape(-1)[:1] = one_of(random, (np.nan, np.inf, -np.inf, 3e38))
    huge[...] = one_of(random, (0, -1, 3e38, 1e-45))
    changes: tuple[Any, ...] = (
        None, nan, huge, was.T, was[None], was[..., :-1], was[:0], was.reshape(-1), was[0],
        was.astype(np.float64) * 1e300, was.astype(np.float16), was.astype(np.int32),
        was.astype(np.uint8), was > 0, np.float32(1.0) * np.ones(()), was[..., None],
        np.concatenate([was, was]),
    )  # fmt: skip
    return one_of(random, changes)


def _zipped(random: Random, tensors: dict[str, np.ndarray]) -> bytes:
    """params.npz, sometimes with a member that is no array or says it is another."""
    file = io.BytesIO()
    np.savez(file, **tensors)
    if random.random() < 0.7:
        return file.getvalue()
    source, out = zipfile.ZipFile(file), io.BytesIO()
    chosen = one_of(random, source.namelist())
    with zipfile.ZipFile(out, "w", one_of(random, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED,
                                                   zipfile.ZIP_BZIP2))) as target:  # fmt: skip
        for name in source.namelist():
            data = source.read(name)
            if name == chosen:
                data = _other_member(random, data)
                name = one_of(random, (name, name, name, "x.txt", "../" + name, name[:-4]))
            target.writestr(name, data)
    return out.getvalue()


def _other_member(random: Random, data: bytes) -> bytes:
    swaps = (
        (b"'<f4'", b"'|O'"), (b"'<f4'", b"'<U9'"), (b"'<f4'", b"'<c8'"), (b"'<f4'", b"'>f4'"),
        (b"'<f4'", b"'<M8[s]'"), (b"'<f4'", b"[('a','<f4')]"), (b"'<f4'", b"'|V4'"),
        (b"'shape': (", b"'shape': (2**9,"), (b"'shape': (", b"'shape': (-1,"),
        (b"'shape': (", b"'shape': (99999999999,"), (b"False", b"True"), (b"False", b"None"),
        (b"'descr'", b"'descx'"), (b"\x93NUMPY", b"\x94NUMPY"), (b"NUMPY\x01", b"NUMPY\x09"),
        (b"{", b"(" * 300), (b"64", b"65"), (b"20", b"0x14"),
    )  # fmt: skip
    before, after = one_of(random, swaps)
    if random.random() < 0.25:
        return broken_bytes(random, data, header=130)
    start = data.find(b"\n")  # the header keeps its length: what is added is taken from its padding
    head = data[:start].replace(before, after, 1)
    return head.rstrip(b" ").ljust(start)[: max(start, len(head.rstrip(b" ")))] + data[start:]
