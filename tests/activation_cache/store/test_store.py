"""The store on disk: its layout, its manifest, and what is told when it isn't the one asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.config import CacheConfig, ModelConfig, SiteConfig, TextConfig
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import (
    SHARD_BYTES,
    ArrayLayout,
    bucket_rows,
    shard_rows,
    write_shards,
)
from activation_cache.storage.records import write_record
from activation_cache.store.manifest import Manifest, first_difference
from activation_cache.store.store import MANIFEST_FILE, PLAN_FILE, open_store, tap_layout
from activation_cache.store.writer import read_commits, sum_of_squares
from tests.support.stores import TAP, file_hashes, make_manifest, numbered_rows, write_store


@settings(deadline=None)
@given(
    shuffle_rows=st.integers(1, 3_000_000),
    block_rows=st.integers(1, 2000),
    row_bytes=st.integers(2, 40_000),
)
def test_buckets_are_whole_shards_of_whole_blocks(shuffle_rows, block_rows, row_bytes):
    bucket = bucket_rows(shuffle_rows=shuffle_rows, block_rows=block_rows)
    shard = shard_rows(bucket=bucket, block_rows=block_rows, row_bytes=row_bytes)
    assert bucket % shard == 0
    assert shard % block_rows == 0
    assert shuffle_rows <= bucket < shuffle_rows * (1 + 1 / 32) + block_rows
    blocks = shard // block_rows
    assert shard * row_bytes <= SHARD_BYTES or blocks % 2 == 1 or blocks <= 63


def test_gemma_scope_sized_shards():
    bucket = bucket_rows(shuffle_rows=1_000_000, block_rows=256)
    assert bucket == 1_015_808
    shard = shard_rows(bucket=bucket, block_rows=256, row_bytes=4 * 2304)
    assert shard * 4 * 2304 <= SHARD_BYTES < 2 * shard * 4 * 2304


def test_the_file_is_as_docs_store_says(tmp_path: Path):
    """Read a shard with nothing but the page: chunks, their checksums, the index at the end."""
    store = write_store(tmp_path, make_manifest(rows=203, width=5))
    layout = store.layout(TAP)
    assert layout.shard_rows == 64
    content = layout.shard_file(130).read_bytes()
    chunks, chunk_bytes = 8, 8 * 5 * 4
    index = np.frombuffer(content[-(16 * chunks + 4) : -4], "<u8").reshape(chunks, 2)
    for chunk, (offset, length) in enumerate(index.tolist()):
        assert length == chunk_bytes + 4
        rows = np.frombuffer(content[offset : offset + chunk_bytes], "<f4").reshape(8, 5)
        first = 128 + 8 * chunk
        np.testing.assert_array_equal(rows, numbered_rows(first, first + 8, 5))
    last = layout.shard_file(202)
    assert last.name == "0"
    assert last.parent.name == "3"
    description = json.loads((tmp_path / TAP.name / "zarr.json").read_bytes())
    assert description["shape"] == [203, 5]
    assert description["data_type"] == "float32"


def test_the_bytes_depend_on_the_values_alone(tmp_path: Path):
    manifest = make_manifest(rows=203, width=5)
    write_store(tmp_path / "a", manifest)
    write_store(tmp_path / "b", manifest)
    write_store(tmp_path / "b", manifest)  # over what is there
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")


def test_rows_of_zeros_are_stored_and_missing_ones_are_not_zeros(tmp_path: Path):
    layout = ArrayLayout(tmp_path / "a", (64, 4), "float32", chunk_rows=8, shard_rows=32)
    array = layout.open(create=True)
    write_shards(array, layout, start=0, rows=np.zeros((32, 4), np.float32))
    assert not array[:32].read().result().any()
    with pytest.raises(ValueError, match="NOT_FOUND"):
        array[32:].read().result()


def test_the_sum_of_squares_is_in_float64():
    rows = np.full((10_000, 3), 1.1, np.float32)
    exact = 30_000 * float(np.float32(1.1)) ** 2
    assert sum_of_squares(rows) == pytest.approx(exact, rel=1e-13)


def test_provenance_and_identity(tmp_path: Path):
    manifest = make_manifest(rows=100)
    store = write_store(tmp_path / "a", manifest)
    np.testing.assert_array_equal(store.provenance(start=60, stop=70).sequence, np.arange(60, 70))
    assert store.identity == write_store(tmp_path / "b", manifest).identity
    other = write_store(tmp_path / "c", make_manifest(rows=100, mean_squared_norm=2.0))
    assert store.identity != other.identity


def test_a_store_of_an_older_version_keeps_its_identity(tmp_path: Path):
    """Written before a field with a default was added, and known by that to the runs on it."""
    write_store(tmp_path, make_manifest(rows=100))
    file = tmp_path / MANIFEST_FILE
    content = json.loads(file.read_text())
    del content["checksum"], content["text"]["subset_field"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    checksum = hashlib.sha256(canonical.encode()).hexdigest()
    file.write_text(json.dumps(content | {"checksum": checksum}))
    store = open_store(tmp_path)
    assert store.manifest.text.subset_field is None
    assert store.identity == checksum


def test_a_missing_and_an_unfinished_store(tmp_path: Path):
    with pytest.raises(UserError, match="there is no activation store"):
        open_store(tmp_path)
    write_record(tmp_path / PLAN_FILE, make_manifest(rows=100))
    with pytest.raises(UserError, match="has not finished"):
        open_store(tmp_path)


def test_a_store_may_be_named_by_way_of_the_folder_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "far/here").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/here")
    monkeypatch.chdir(tmp_path / "far/here")
    written = write_store(Path("../store"), make_manifest(rows=20))
    assert written.read(TAP, start=0, stop=1).shape == (1, 8)
    for name in (tmp_path / "link/../store", tmp_path / "far/store"):
        assert open_store(name).identity == written.identity
        assert open_store(name).read(TAP, start=19, stop=20)[0, 0] == 19


def test_a_shard_cut_short_before_its_bucket_was_committed_is_written_anew(tmp_path: Path):
    manifest = make_manifest(rows=100)
    store = write_store(tmp_path, manifest)
    for name in ("sequence", TAP.name):
        shard = max(
            (tmp_path / name / "c").rglob("*"), key=lambda path: (path.is_file(), str(path))
        )
        shard.write_bytes(shard.read_bytes()[:-60])
    with pytest.raises(UserError, match="damaged"):
        store.read(TAP, start=99, stop=100)
    first = tmp_path / TAP.name / "c/0/0"
    first.write_bytes(first.read_bytes()[-200:])  # its index alone, of chunks that aren't there
    with pytest.raises(UserError, match="damaged"):
        store.read(TAP, start=0, stop=1)
    again = write_store(tmp_path, manifest)
    assert again.read(TAP, start=99, stop=100)[0, 0] == 99


def test_a_manifest_with_one_byte_flipped_is_refused(tmp_path: Path):
    manifest = tmp_path / MANIFEST_FILE
    write_record(manifest, make_manifest(rows=100))
    good = manifest.read_bytes()
    for place in range(0, len(good) - 1, 7):
        damaged = bytearray(good)
        damaged[place] ^= 1
        manifest.write_bytes(damaged)
        if damaged.split() == good.split():  # a space for another kind of white space
            continue
        with pytest.raises(UserError, match=str(manifest)):
            open_store(tmp_path)


def test_a_manifest_with_a_number_that_is_none_is_refused(tmp_path: Path):
    manifest = tmp_path / MANIFEST_FILE
    write_record(manifest, make_manifest(rows=100))
    manifest.write_text(manifest.read_text().replace('"rows": 100', '"rows": NaN'))
    with pytest.raises(UserError, match="is damaged"):
        open_store(tmp_path)


def test_records_are_looked_for_by_name_and_not_by_number(tmp_path: Path):
    plan = make_manifest(rows=2**60)  # a plan may be anything; its buckets are more than time has
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits/bucket-x.json").touch()
    assert read_commits(tmp_path, plan) == {}


def test_a_manifest_of_another_version_is_refused(tmp_path: Path):
    newer = make_manifest(rows=10).model_copy(update={"format_version": 2})
    write_record(tmp_path / MANIFEST_FILE, newer)
    with pytest.raises(UserError, match=r"format version 2 .* reads 1"):
        open_store(tmp_path)


MODEL = ModelConfig(weights="tiny", dtype="float32")
TEXT = TextConfig(source=["*.txt"], sequence_length=16, held_out_sequences=1)
CACHE = CacheConfig(
    path="anywhere",
    sites=[SiteConfig(site="resid_post", layers=[1])],
    tokens=100,
    shuffle_rows=64,
    block_rows=8,
    sequences_per_batch=4,
)


def difference(manifest: Manifest, **changes: object) -> str | None:
    sections = {"model": MODEL, "text": TEXT, "cache": CACHE}
    for name, value in changes.items():
        section, field = name.split("__")
        sections[section] = sections[section].model_copy(update={field: value})
    return first_difference(manifest, **sections)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.dtype", "bfloat16"),
        ("text.source", ["other.txt"]),
        ("text.field", "content"),
        ("text.sequence_length", 32),
        ("text.held_out_sequences", 2),
        ("cache.sites", [SiteConfig(site="resid_post", layers=[1, 2])]),
        ("cache.tokens", 101),
        ("cache.dtype", "bfloat16"),
        ("cache.shuffle_rows", 65),
        ("cache.block_rows", 4),
        ("cache.seed", 1),
        ("cache.sequences_per_batch", 8),
    ],
)
def test_the_field_that_differs_is_named(field: str, value: object):
    manifest = make_manifest(rows=100)
    assert difference(manifest) is None
    found = difference(manifest, **{field.replace(".", "__"): value})
    assert found is not None
    assert found.startswith(f"{field}: the store has ")


def test_every_config_field_is_compared():
    """A field added to the config must be compared, or named here as one that needn't be."""
    compared = {"sites", "tokens", "dtype", "shuffle_rows", "block_rows", "seed", "rolling"}
    compared |= {"max_norm_over_median"}
    assert set(CacheConfig.model_fields) == compared | {"path", "sequences_per_batch", "mesh"}
    assert set(ModelConfig.model_fields) == {"weights", "revision", "dtype", "precision"}


def test_all_layers_may_be_written_out():
    manifest = make_manifest(rows=100)
    every = [manifest.sites[0].model_copy(update={"layer": layer}) for layer in range(4)]
    manifest = manifest.model_copy(update={"sites": every})
    asked = [SiteConfig(site="resid_post", layers="all")]
    assert difference(manifest, cache__sites=asked) is None


def test_weights_may_move_but_not_change(tmp_path: Path):
    store = write_store(tmp_path / "store", make_manifest(rows=100))
    moved = MODEL.model_copy(update={"weights": str(tmp_path / "gemma")})
    assert store.names_weights(MODEL)
    assert not store.names_weights(moved)
    assert not store.names_weights(MODEL.model_copy(update={"revision": "main"}))
    store.check_matches(model=moved, fingerprint="f" * 64)
    with pytest.raises(UserError, match=r"model\.weights: .* fingerprint ffffffff.* have eeeeeeee"):
        store.check_matches(model=moved, fingerprint="e" * 64)


def test_a_layout_knows_its_files(tmp_path: Path):
    manifest = make_manifest(rows=1000, width=3)
    layout = tap_layout(tmp_path, manifest, TAP)
    assert layout.row_bytes == 12
    assert layout.shard_file(999) == tmp_path / "resid_post.1" / "c" / "15" / "0"
    assert dataclasses.replace(layout, shape=(1000,)).shard_file(64).name == "1"
