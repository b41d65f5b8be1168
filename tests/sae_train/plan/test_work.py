"""What `sae plan` counts: by hand, against real files, against the compiled step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.config import ModelConfig, TextConfig
from activation_cache.gemma.params import parameter_table
from activation_cache.language_model.published_sizes import (
    KNOWN_SIZES,
    config_for_planning,
    known_config,
)
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import write_shards
from activation_cache.text.token_table import count_layout, token_layout
from sae_train.config.run import MeshConfig
from sae_train.plan import work as work_module
from sae_train.plan.memory import Shape
from tests.sae_train.step.test_collectives import COLLECTIVE, SHAPE
from tests.support.plan_configs import cache_config, plan_of, scope_config
from tests.support.plan_shapes import compile_step
from tests.support.stores import make_manifest, write_store
from tests.support.tiny_gemma import write_tiny_gemma

TEXT = TextConfig(source=["*.txt"], sequence_length=1024, held_out_sequences=16)


# Parameters as the Gemma reports give them, in millions.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("2-2b", 2614),
        ("2-9b", 9242),
        ("2-27b", 27_227),
        ("3-270m", 268),
        ("3-1b", 1000),
        ("3-4b", 3880),
        ("3-12b", 11_766),
        ("3-27b", 27_009),
    ],
)
def test_known_sizes_are_the_published_models(name: str, millions: int) -> None:
    config = known_config(f"google/gemma-{name}-it")
    assert config is not None
    count = sum(math.prod(parameter.shape) for parameter in parameter_table(config))
    assert round(count / 1e6) == millions


def test_attention_widths_differ_from_the_model_s() -> None:
    widths = {}
    for name in ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"):
        config = known_config(name)
        assert config is not None
        widths[name] = (config.d_model, config.num_heads * config.head_dim)
    assert list(widths.values()) == [(2304, 2048), (3584, 4096), (4608, 4096)]
    assert len(KNOWN_SIZES) == 8


def test_a_checkpoint_at_hand_comes_before_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-2-2b"
    write_tiny_gemma(folder)
    config, source = config_for_planning(ModelConfig(weights=str(folder)))
    assert config.d_model < 2304
    assert source == str(folder)
    config, source = config_for_planning(ModelConfig(weights=str(tmp_path / "a" / "gemma-2-2b")))
    assert config.d_model == 2304
    assert "published" in source


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UserError, match="To plan without weights, name one of gemma-2-2b"):
        config_for_planning(ModelConfig(weights="nowhere/llama.gguf"))
    assert known_config("google/gemma-2-2bx") is None
    assert known_config("google/gemma-2-4b") is None


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1000, "float32"), (64, "bfloat16"), (65, "float32"), (65, "int8")]
)
def test_the_store_s_bytes_are_those_of_a_real_one(tmp_path: Path, rows: int, dtype: Any) -> None:
    """To the byte, but for `zarr.json` and the JSON records."""
    manifest = make_manifest(rows=rows, width=2304, dtype=dtype, shuffle_rows=60, block_rows=8)
    write_store(tmp_path, manifest)
    sites = [{"site": "resid_post", "layers": [1]}]
    cache = cache_config(tokens=rows, dtype=dtype, sites=sites, shuffle_rows=60, block_rows=8)
    gemma = known_config("gemma-2-2b")
    assert gemma is not None
    planned = work_module.store_plan(cache, TEXT, gemma)
    assert planned.tap_bytes == {"resid_post.1": array_bytes(tmp_path / "resid_post.1")}
    provenance = array_bytes(tmp_path / "sequence") + array_bytes(tmp_path / "position")
    assert planned.provenance_bytes == provenance
    assert planned.buckets == manifest.num_buckets
    assert planned.total_bytes > sum(planned.tap_bytes.values()) + provenance


def test_the_token_table_s_bytes_are_those_of_a_real_one(tmp_path: Path) -> None:
    cache = cache_config(tokens=10_000)
    gemma = known_config("gemma-2-2b")
    assert gemma is not None
    sequences = -(-10_000 // 1023) + 16
    for layout in (token_layout(tmp_path, sequences, 1024), count_layout(tmp_path, sequences)):
        rows = np.ones(layout.shape, np.int32)
        write_shards(layout.open(create=True), layout, start=0, rows=rows)
    planned = work_module.store_plan(cache, TEXT, gemma)
    assert planned.token_bytes == array_bytes(tmp_path)


def array_bytes(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json"]
    return sum(path.stat().st_size for path in files)


def test_gemma_scope_s_store_is_as_large_as_the_paper_says() -> None:
    """About 100 TiB for 8 billion tokens of one 9B site (section 3.3.2): 104.3 at d = 3584."""
    store = plan_of(scope_config()).store
    assert store.tap_bytes["resid_post.20"] / 2**40 == pytest.approx(104.3, abs=0.1)
    # One crc32c per block of 256 rows, and 16 bytes of index.
    assert store.tap_bytes["resid_post.20"] / (8e9 * 3584 * 4) - 1 < 1e-5


def test_flops_counted_by_hand() -> None:
    run = plan_of(scope_config()).runs[0]
    assert run.flops_per_step == 10 * 4096 * 3584 * 131_072
    assert run.paper_flops_per_step == 12 * 4096 * 3584 * 131_072
    assert run.steps == 1_953_125
    # Gemma Scope 3.3.1: 45 ms on eight TPUv3 (123 TFLOP/s each) is 50.8 % by their convention.
    assert run.paper_flops_per_step / 45e-3 / (8 * 123e12) == pytest.approx(0.508, abs=0.02)


def test_the_compiled_step_does_what_is_counted() -> None:
    shape = Shape(2048, 256, 1024, MeshConfig())  # one tile: XLA counts a loop's body once
    cost = compile_step(shape).cost_analysis()
    assert isinstance(cost, dict)
    # XLA adds everything elementwise, a few operations for each entry of [B, F] and [F, D].
    assert cost["flops"] == pytest.approx(work_module.step_flops(shape), rel=0.06)
    assert cost["flops"] > work_module.step_flops(shape)


def test_harvest_flops_counted_by_hand() -> None:
    gemma = known_config("gemma-3-270m")
    assert gemma is not None
    text = TextConfig(source=["*.txt"], sequence_length=1024)
    cache = cache_config(tokens=1023 * 2000)  # BOS makes no row
    work = work_module.harvest_work(cache, text, gemma, dtype="bfloat16")
    # D 640, heads 4 x 256, one key-value head, d_ff 2048; layers 0 and 1 are local, window 512.
    weights = 640 * (1024 + 256 + 256) + 1024 * 640 + 3 * 640 * 2048
    pairs = 512 * 513 // 2 + 512 * 512
    assert work.layers == 2
    assert work.positions == 2000 * 1024
    assert work.flops == 2000 * 2 * (1024 * 2 * weights + 4 * 4 * 256 * pairs)
    norms = 4 * 640 + 2 * 256
    assert work.weight_bytes == 2 * (262_144 * 640 + 2 * (weights + norms))
    global_layer = work_module.attention_flops(gemma, layer=5, length=1024)
    assert global_layer == 4 * 4 * 256 * 1024 * 1025 // 2


@pytest.mark.parametrize("mesh", [(1, 8), (8, 1), (2, 4)])
def test_collectives_are_those_of_the_compiled_step(mesh: tuple[int, int]) -> None:
    # One tile on every device: a loop's collectives stand in the program once.
    shape = Shape(512, 128, 1024, MeshConfig(data=mesh[0], model=mesh[1]))
    found = 0
    for match in COLLECTIVE.finditer(compile_step(shape).as_text()):
        for dims in SHAPE.findall(match["type"]):
            found += 4 * math.prod(int(size) for size in dims.split(",") if size)
    planned = work_module.collective_bytes(shape)
    assert set(planned) == {axis for axis in ("data", "model") if getattr(shape.mesh, axis) > 1}
    assert sum(planned.values()) == pytest.approx(found, rel=0.02)


def test_sent_bytes_of_a_ring() -> None:
    sizes = [("data", 2), ("model", 4)]
    sent = work_module.sent_bytes({"data": 100, "model": 1000}, sizes)
    assert sent == 100 + 1500
