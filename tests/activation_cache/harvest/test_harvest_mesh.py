"""Gemma cut over a mesh: the same rows, weights read in parts, no collective but of activations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from activation_cache.config import CacheConfig, MeshConfig, ModelConfig, SiteConfig, TextConfig
from activation_cache.gemma import replicas
from activation_cache.gemma.config import Family, GemmaConfig
from activation_cache.gemma.params import check_model_axis, parameter_table
from activation_cache.gemma.replicas import place_replicas
from activation_cache.gemma.taps import Splice, Tap
from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import (
    LanguageModel,
    _activations_on,
    load_model,
    load_replicas,
)
from activation_cache.mesh import make_mesh
from activation_cache.runtime.errors import UserError
from activation_cache.storage import safetensors_file
from activation_cache.store.order import Permutation
from activation_cache.store.store import Store, open_store
from tests.support.stores import file_hashes
from tests.support.tiny_gemma import tiny_config, write_tiny_gemma

pytestmark = pytest.mark.slow

# Sizes that eight devices can share.
EIGHT = {"num_heads": 8, "num_kv_heads": 8, "d_ff": 32, "vocab_size": 408}
TAPS = (Tap("resid_post", 3), Tap("attn_out_prelinear", 1), Tap("mlp_out", 2))
TOKENS = Permutation(400, 1).forward(np.arange(64)).astype(np.int32).reshape(4, 16) + 2


def model_of(path: Path, dtype: Any = "float32") -> ModelConfig:
    return ModelConfig(weights=str(path), dtype=dtype)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma"), **EIGHT)


def harvested(folder: Path, gemma: Path, mesh: tuple[int, int]) -> Store:
    """A store of a few hundred rows; `folder` is where its text goes too."""
    text = folder.parent / "text.txt"
    text.write_text("the state of the union and of an other thing\n\n" * 40)
    harvest(
        model=model_of(gemma),
        text=TextConfig(source=[str(text)], sequence_length=16, held_out_sequences=4),
        cache=CacheConfig(
            path=str(folder),
            sites=[
                SiteConfig(site="resid_post", layers=[0, 3]),
                SiteConfig(site="attn_out_prelinear", layers=[1]),
            ],
            tokens=700,
            shuffle_rows=256,
            block_rows=16,
            sequences_per_batch=4,
        ),
        mesh=MeshConfig(data=mesh[0], model=mesh[1]),
    )
    return open_store(folder)


def test_stores_of_all_meshes_agree(gemma: Path, tmp_path: Path):
    meshes = [(1, 1), (8, 1), (2, 4), (1, 4), (1, 8)]
    stores = {mesh: harvested(tmp_path / "{}x{}".format(*mesh), gemma, mesh) for mesh in meshes}
    alone = stores[1, 1]
    for store in stores.values():
        for tap in alone.taps:
            rows = store.read(tap, start=0, stop=700)
            wanted = alone.read(tap, start=0, stop=700)
            np.testing.assert_allclose(rows, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    # Replicas don't communicate: their number changes no bit, and nor does a second run.
    assert file_hashes(stores[8, 1].path) == file_hashes(alone.path)
    assert file_hashes(stores[2, 4].path) == file_hashes(stores[1, 4].path)


@pytest.mark.parametrize(("family", "size"), [("gemma2", 2), ("gemma3", 8)])
def test_what_cannot_be_cut_is_kept_whole(tmp_path: Path, family: Family, size: int):
    """Two key-value heads and 401 words, on up to eight devices."""
    changes = EIGHT | {"num_kv_heads": 2, "vocab_size": 401}
    config = model_of(write_tiny_gemma(tmp_path / "gemma", family=family, **changes))
    alone = load_model(config)
    cut = load_model(config, mesh=make_mesh(jax.devices()[:size]))
    assert shard_shapes(cut)["embedding"] == (401, 20)
    assert shard_shapes(cut)["layers_0.attention.W_Q"] == (20, 48 // size)
    assert shard_shapes(cut)["layers_0.attention.W_K"] == (20, 12 // size if size == 2 else 12)
    tokens = np.minimum(TOKENS, 400)
    found, wanted = cut.activations(tokens, TAPS), alone.activations(tokens, TAPS)
    for tap in TAPS:
        np.testing.assert_allclose(found[tap], wanted[tap], rtol=1e-5, atol=2e-5)
    splice = Splice(Tap("mlp_out", 1), zero)
    for one in (None, splice):
        np.testing.assert_allclose(cut.losses(tokens, one), alone.losses(tokens, one), rtol=1e-5)


def zero(acts: jax.Array, _: Any) -> jax.Array:
    return acts * 0


def test_bfloat16_is_summed_in_float32(gemma: Path):
    alone = load_model(model_of(gemma, "bfloat16"))
    cut = load_model(model_of(gemma, "bfloat16"), mesh=make_mesh(jax.devices()[:8]))
    exact = load_model(model_of(gemma)).activations(TOKENS, TAPS)
    found, wanted = cut.activations(TOKENS, TAPS), alone.activations(TOKENS, TAPS)
    for tap in TAPS:
        errors = [
            float(np.linalg.norm(np.asarray(one[tap], np.float32) - exact[tap]))
            for one in (found, wanted)
        ]
        assert errors[0] < 1.2 * errors[1], "no worse than on one device"


def shard_shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(model.params)[0]
    return {
        ".".join(key.key for key in path): array.sharding.shard_shape(array.shape)
        for path, array in leaves
    }


def test_each_weight_is_read_once_in_parts(gemma: Path, monkeypatch: pytest.MonkeyPatch):
    """Two replicas over four devices each: as many bytes as the file has, in quarters."""
    sizes: list[int] = []
    read = safetensors_file.SafetensorsFile.read

    def counted(self: Any, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        values = read(self, name, index)
        sizes.append(values.nbytes)
        return values

    monkeypatch.setattr(safetensors_file.SafetensorsFile, "read", counted)
    devices = jax.devices()
    two = load_replicas(model_of(gemma), meshes=[make_mesh(devices[:4]), make_mesh(devices[4:])])
    table = parameter_table(two[0].config)
    assert sum(sizes) == sum(4 * np.prod(parameter.shape) for parameter in table)
    assert max(sizes) == 408 * 20 * 4 // 4
    for model in two:
        whole = sum(4 * np.prod(p.shape) for p in table)
        here = sum(4 * np.prod(shape) for shape in shard_shapes(model).values())
        assert here < whole / 4 * 1.05, "all but the norms is cut"
    for left, right in zip(*(jax.tree.leaves(model.params) for model in two), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_forward_moves_activations_and_no_weights(gemma: Path):
    mesh = make_mesh(jax.devices()[:4])
    model = load_model(model_of(gemma), mesh=mesh)
    forward = _activations_on(mesh)
    lowered = forward.lower(model.config, "float32", (Tap("resid_post", 3),), model.params, TOKENS)
    kinds = re.findall(
        r"= .* (all-reduce|all-to-all|all-gather|reduce-scatter|collective-permute)(?:-start)?\(",
        lowered.compile().as_text(),
    )
    layers = model.config.num_layers
    # Of each layer's two sums: to be added, and back. Of the embedding: one addend isn't zero.
    assert sorted(kinds) == sorted(
        ["all-reduce"] + 2 * layers * ["all-to-all"] + 2 * layers * ["all-gather"]
    )


GEMMA_2_2B = tiny_config("gemma2", num_heads=8, num_kv_heads=4, d_ff=9216)
GEMMA_3_1B = tiny_config("gemma3", num_heads=4, num_kv_heads=1, d_ff=6912)
NARROW = tiny_config("gemma3", num_heads=8, d_ff=28)


@pytest.mark.parametrize(
    ("config", "size", "use"),
    [(GEMMA_2_2B, 3, "1, 2, 4, 8"), (GEMMA_3_1B, 8, "1, 2, 4"), (NARROW, 8, "1, 2, 4")],
)
def test_a_mesh_that_does_not_divide_is_refused(config: GemmaConfig, size: int, use: str):
    with pytest.raises(UserError, match=rf"axis 'model' \(size {size}\) must divide: use {use}\."):
        check_model_axis(config, size)


def test_refused_before_tokenising(tmp_path: Path):
    gemma = write_tiny_gemma(tmp_path / "gemma")
    with pytest.raises(UserError, match="4 query heads and 28 MLP width"):
        harvested(tmp_path / "store", gemma, (1, 8))
    assert not (tmp_path / "store" / "tokens").exists()
    with pytest.raises(UserError, match=r"mesh 3 x 4 .* needs 12 devices and JAX sees 8"):
        harvested(tmp_path / "store", gemma, (3, 4))


class FakeDevice:
    """A device of any process, which stands for one of this process's."""

    def __init__(self, number: int, process_index: int) -> None:
        self.number, self.process_index = number, process_index


@pytest.mark.parametrize(
    ("data", "model", "processes", "teams", "members"),
    [(8, 1, 4, 4, 1), (4, 2, 4, 4, 1), (2, 4, 4, 2, 2), (1, 8, 4, 1, 4), (4, 2, 1, 1, 1)],
)
def test_who_computes_what(
    monkeypatch: pytest.MonkeyPatch, data: int, model: int, processes: int, teams: int, members: int
):
    """Every device of the mesh in one replica, and every replica in one team."""
    devices, real = [FakeDevice(d, d * processes // 8) for d in range(8)], jax.devices()
    monkeypatch.setattr(
        replicas, "make_mesh", lambda some: make_mesh([real[d.number] for d in some])
    )
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    seen: dict[int, list[Any]] = {}
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        placed = place_replicas(MeshConfig(data=data, model=model))
        assert (placed.num_teams, placed.num_members) == (teams, members)
        assert (placed.team, placed.member) == divmod(index, members)
        assert all(mesh.shape == {"data": 1, "model": model} for mesh in placed.meshes)
        own = [real[d] for d in range(8) if d * processes // 8 == index]
        assert set(own) & set(placed.meshes[0].devices.flat)
        assert seen.setdefault(placed.team, placed.meshes) == placed.meshes
    used = [device for meshes in seen.values() for mesh in meshes for device in mesh.devices.flat]
    assert used == real


def test_replicas_in_parts_of_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "devices", lambda: [FakeDevice(p, p // 3) for p in range(6)])
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"make mesh\.model a multiple or a divisor of 3"):
        place_replicas(MeshConfig(data=3, model=2))
    with pytest.raises(UserError, match="needs 3 devices, equally many of each of 2 processes"):
        place_replicas(MeshConfig(data=3, model=1))
