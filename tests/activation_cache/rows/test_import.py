"""Rows of other programs become a store: the kinds of files, what is refused, going on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import tensorstore as ts

from activation_cache import write_rows
from activation_cache.gemma.taps import Tap
from activation_cache.harvest.matching_store import open_matching_store
from activation_cache.rows import columns, unpack
from activation_cache.rows.settings import ImportSettings
from activation_cache.rows.source import find_rows
from activation_cache.rows.write_rows import import_rows
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.store.store import Store, open_store
from launch.cli import main
from launch.show.inspect import inspect_store
from tests.support.stores import file_hashes
from tests.support.training import stop_after

ROWS_0 = Tap("rows", 0)
SMALL = {"shuffle_rows": 64, "block_rows": 8}
SETTINGS = ImportSettings(**SMALL, sequence_length=10, held_out=0.1)
SEQUENCES, LENGTH, WIDTH = 40, 6, 5


@pytest.fixture(scope="module")
def sequences() -> np.ndarray:
    """Sequences of rows, float32 [sequences, rows, width]."""
    return np.random.default_rng(0).standard_normal((SEQUENCES, LENGTH, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def rows(sequences: np.ndarray) -> np.ndarray:
    return sequences.reshape(-1, WIDTH)


def imported(place: object, to: Path, settings: ImportSettings = SETTINGS, **options: Any) -> Store:
    import_rows({ROWS_0: find_rows(str(place))}, to=to, settings=settings, **options)
    return open_store(to)


def arrays_of(store: Store) -> dict[str, str]:
    """The files of a store's arrays with their hashes; not the manifests, which name the source."""
    found = file_hashes(Path(str(store.path)))
    return {name: one for name, one in found.items() if not name.endswith((".json", ".lock"))}


def check_rows(store: Store, rows: np.ndarray, *, length: int) -> None:
    """Every row is the source's row that its provenance says, and each is there once."""
    places = []
    for part in (store, store.held_out):
        found = part.provenance(start=0, stop=part.rows)
        place = found.sequence.astype(np.int64) * length + found.position
        read = part.read(part.taps[0], start=0, stop=part.rows)
        np.testing.assert_array_equal(read, rows[place].astype(read.dtype))
        places.append(place)
    assert sorted(np.concatenate(places)) == list(range(len(rows)))
    assert (np.diff(places[0]) != 1).mean() > 0.9  # shuffled
    assert list(places[1]) == list(range(len(rows) - len(places[1]), len(rows)))


def write_npy(folder: Path, rows: np.ndarray) -> str:
    np.save(folder / "0.npy", rows[:100])
    np.save(folder / "1.npy", rows[100:])
    return "*.npy"


def write_half_npy(folder: Path, rows: np.ndarray) -> str:
    np.save(folder / "0.npy", rows.astype(ml_dtypes.bfloat16))
    return "0.npy"


def write_tensors(folder: Path, rows: np.ndarray) -> str:
    file = folder / "a.safetensors"
    safetensors.numpy.save_file({"x": rows, "ids": np.arange(3)}, file)
    return "a.safetensors::x"


def write_zarr(folder: Path, rows: np.ndarray, *, driver: str = "zarr3") -> str:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder}/z.zarr/"}}
    array = ts.open(spec, create=True, dtype=ts.float32, shape=rows.shape).result()
    array.write(rows).result()
    return "z.zarr"


def write_zarr2(folder: Path, rows: np.ndarray) -> str:
    return write_zarr(folder, rows, driver="zarr")


def write_parquet(folder: Path, rows: np.ndarray) -> str:
    """Two files of several row groups, a column of another type beside the rows."""
    for number, part in enumerate((rows[:150], rows[150:])):
        table = pyarrow.table({"x": list(part), "n": list(range(len(part)))})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=40)
    return ""


@pytest.mark.parametrize(
    "write", [write_npy, write_half_npy, write_tensors, write_zarr, write_zarr2, write_parquet]
)
def test_every_kind_of_file_gives_the_same_rows(
    write: Callable[[Path, np.ndarray], str], rows: np.ndarray, tmp_path: Path
):
    (tmp_path / "rows").mkdir()
    place = tmp_path / "rows" / write(tmp_path / "rows", rows)
    store = imported(place, tmp_path / "store")
    expected = rows.astype(ml_dtypes.bfloat16) if write is write_half_npy else rows
    check_rows(store, expected, length=10)
    assert store.rows == 210  # 30 held out: a tenth, in whole sequences of 10
    assert not (tmp_path / "store" / "unpacked").exists()
    info = store.tap_info(ROWS_0)
    read = store.read(ROWS_0, start=0, stop=store.rows).astype(np.float64)
    assert info.mean_squared_norm == pytest.approx(np.square(read).sum(axis=1).mean(), rel=1e-12)


@pytest.mark.slow
def test_cached_activations_of_sae_lens(
    sae_lens: ModuleType, sequences: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Consolidated by SAELens' own code; the hook and the token ids are found by their names."""
    import datasets

    hook, ids = "blocks.3.hook_resid_post", np.arange(SEQUENCES * LENGTH).reshape(-1, LENGTH) % 50
    features = datasets.Features(
        {
            hook: datasets.Array2D(shape=(LENGTH, WIDTH), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=LENGTH),
        }
    )
    for number, part in enumerate((slice(0, 25), slice(25, None))):
        own = {hook: sequences[part], "token_ids": ids[part]}
        shard = datasets.Dataset.from_dict(own, features=features)
        shard.save_to_disk(str(tmp_path / f"shards/shard_{number:05d}"), num_shards=1)
    (tmp_path / "cache").mkdir()
    sae_lens.CacheActivationsRunner._consolidate_shards(tmp_path / "shards", tmp_path / "cache")
    words = ["import", "-q", str(tmp_path / "cache"), "--to", str(tmp_path / "store")]
    assert main([*words, "--special-ids", "0,1", "--held-out", "12", "--shuffle-rows", "64"]) == 0
    store = open_store(tmp_path / "store")
    (tap,) = store.taps
    assert tap == Tap("resid_post", 3)
    for part in (store, store.held_out):
        found = part.provenance(start=0, stop=part.rows)
        read = part.read(tap, start=0, stop=part.rows)
        np.testing.assert_array_equal(read, sequences[found.sequence, found.position])
        assert not np.isin(ids[found.sequence, found.position], [0, 1]).any()
    assert store.rows + store.held_out.rows == (ids > 1).sum()
    table = store.tokens
    np.testing.assert_array_equal(table.read(range(SEQUENCES)), ids)
    assert list(table.held_out) == [38, 39]
    inspect_store(tmp_path / "store", verify=True)
    assert "40 of 6 rows, 2 of them held out" in " ".join(capsys.readouterr().out.split())


def test_lists_of_lists_in_parquet_and_rows_in_int8(
    sequences: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A data set of the Hub has its sequences so; SAEs may be trained on packed rows."""
    hook, ids = "blocks.3.hook_resid_post", np.arange(SEQUENCES * LENGTH).reshape(-1, LENGTH)
    lists = pyarrow.array(sequences.tolist(), pyarrow.list_(pyarrow.list_(pyarrow.float32())))
    table = pyarrow.table({hook: lists, "token_ids": ids.tolist()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    words = ["import", "-q", str(tmp_path / "a.parquet"), "--to", str(tmp_path / "store")]
    assert main([*words, "--dtype", "int8", "--held-out", "12", "--shuffle-rows", "64"]) == 0
    store = open_store(tmp_path / "store")
    assert store.taps == (Tap("resid_post", 3),)
    for part in (store, store.held_out):
        found = part.provenance(start=0, stop=part.rows)
        read = part.read(store.taps[0], start=0, stop=part.rows)
        exact = sequences[found.sequence, found.position]
        np.testing.assert_allclose(read, exact, atol=0.03)  # a 254th of what a block spans
    np.testing.assert_array_equal(store.tokens.read(range(SEQUENCES)), ids)
    inspect_store(tmp_path / "store", verify=True)
    capsys.readouterr()


def test_an_iterator_gives_the_store_of_its_rows_in_a_file(sequences: np.ndarray, tmp_path: Path):
    np.save(tmp_path / "0.npy", sequences)
    settings = ImportSettings(**SMALL, held_out=30)
    expected = imported(tmp_path / "0.npy", tmp_path / "a", settings)
    batches = (sequences[start : start + 7] for start in range(0, SEQUENCES, 7))
    write_rows(batches, to=tmp_path / "b", **settings.model_dump())
    assert arrays_of(open_store(tmp_path / "b")) == arrays_of(expected)
    write_rows((), to=tmp_path / "b", **settings.model_dump())  # finished: nothing is asked for
    with pytest.raises(UserError, match="dtype was float32 and is bfloat16"):
        write_rows((), to=tmp_path / "b", **(settings.model_dump() | {"dtype": "bfloat16"}))


def test_a_killed_import_goes_on_after_the_last_bucket(rows: np.ndarray, tmp_path: Path):
    np.save(tmp_path / "0.npy", rows)
    whole = imported(tmp_path / "0.npy", tmp_path / "whole")
    to = tmp_path / "store"
    with pytest.raises(Interrupted, match="finished buckets"):
        imported(tmp_path / "0.npy", to, stop=stop_after(14))
    committed = {file: file.stat().st_mtime_ns for file in (to / "commits").iterdir()}
    assert 0 < len(committed) < 4
    with pytest.raises(UserError, match=r"seed was 0 and is 1"):
        imported(tmp_path / "0.npy", to, SETTINGS.model_copy(update={"seed": 1}))
    np.save(tmp_path / "0.npy", rows + 1)
    with pytest.raises(UserError, match=r"the file 0\.npy is another or new"):
        imported(tmp_path / "0.npy", to)
    np.save(tmp_path / "0.npy", rows)
    assert file_hashes(Path(str(imported(tmp_path / "0.npy", to).path))) == file_hashes(
        Path(str(whole.path))
    )
    assert {file: file.stat().st_mtime_ns for file in committed} == committed


@pytest.mark.parametrize("counts", [False, True], ids=["iterator", "function"])
def test_what_came_before_a_kill_is_kept(
    counts: bool, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(unpack, "PART_BYTES", 500)
    asked = []

    def batches(start: int, *, plus: float = 0.0) -> Iterator[np.ndarray]:
        asked.append(start)
        for first in range(start, len(rows), 20):
            yield rows[first : first + 20] + np.float32(plus)

    def given(**change: float) -> Any:
        return (lambda start: batches(start, **change)) if counts else batches(0, **change)

    to = tmp_path / "store"
    with pytest.raises(Interrupted, match=r"in .*unpacked are kept"):
        write_rows(given(), to=to, **SETTINGS.model_dump(), stop=stop_after(8))
    kept = sorted((to / "unpacked").glob("*.bin"))
    assert 2 < len(kept) < 6
    if not counts:
        with pytest.raises(UserError, match="rows 0 to 40 are others than when this import began"):
            write_rows(given(plus=1.0), to=to, **SETTINGS.model_dump())
    write_rows(given(), to=to, **SETTINGS.model_dump())
    check_rows(open_store(to), rows, length=10)
    assert asked[-1] == (40 * len(kept) if counts else 0)


def test_parquet_goes_on_after_the_last_part(
    rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(unpack, "PART_BYTES", 500)
    monkeypatch.setattr(columns, "_BATCH_BYTES", 400)
    (tmp_path / "rows").mkdir()
    write_parquet(tmp_path / "rows", rows)
    with pytest.raises(Interrupted, match="unpacked"):
        imported(tmp_path / "rows", tmp_path / "store", stop=stop_after(13))
    kept = len(list((tmp_path / "store" / "unpacked" / "rows.0").glob("*.bin")))
    assert kept > 2
    check_rows(imported(tmp_path / "rows", tmp_path / "store"), rows, length=10)


def test_two_taps_have_rows_of_the_same_tokens(sequences: np.ndarray, tmp_path: Path):
    both = {"mlp_in.2": sequences, "mlp_out.2": sequences[..., :3] * 2}
    write_rows([both], to=tmp_path / "store", **SMALL, held_out=12)
    store = open_store(tmp_path / "store")
    read = [store.read(tap, start=0, stop=store.rows) for tap in store.taps]
    np.testing.assert_array_equal(read[0][:, :3] * 2, read[1])
    np.save(tmp_path / "a.npy", sequences)
    np.save(tmp_path / "b.npy", sequences[1:])
    words = [f"mlp_in.2={tmp_path}/a.npy", f"mlp_out.2={tmp_path}/b.npy"]
    assert main(["import", "-q", *words, "--to", str(tmp_path / "other")]) == 2


def spoil(rows: np.ndarray, row: int, value: float) -> np.ndarray:
    spoilt = rows.copy()
    spoilt[row, 1] = value
    return spoilt


BAD: dict[str, tuple[Callable[[Path, np.ndarray], Any], str]] = {
    "nan": (
        lambda f, x: [np.save(f / "a.npy", x), np.save(f / "b.npy", spoil(x, 17, np.nan))],
        r"b\.npy, row 17 holds NaN or infinity",
    ),
    "above float32": (
        lambda f, x: np.save(f / "a.npy", spoil(x.astype(np.float64), 3, 1e300)),
        r"a\.npy, row 3 holds NaN or infinity \(or a number that float32 can't hold\)",
    ),
    "width": (
        lambda f, x: [np.save(f / "a.npy", x), np.save(f / "b.npy", x[:, :4])],
        r"b\.npy has rows of shape \[4\] and a\.npy of \[5\]",
    ),
    "dtypes": (
        lambda f, x: [np.save(f / "a.npy", x), np.save(f / "b.npy", x.astype(np.float16))],
        r"b\.npy holds float16 and a\.npy float32",
    ),
    "integers": (
        lambda f, x: np.save(f / "a.npy", x.astype(np.int64)),
        r"a\.npy holds int64: activations are",
    ),
    "short": (
        lambda f, x: [np.save(f / "a.npy", x), (f / "a.npy").write_bytes(_cut(f / "a.npy", 30))],
        r"a\.npy has 4898 bytes and its header promises 4928: it ends in row 238 of 240",
    ),
    "short tensor": (
        lambda f, x: [write_tensors(f, x), (f / "a.safetensors").write_bytes(
            _cut(f / "a.safetensors", 8))],
        r"a\.safetensors has \d+ bytes and its header promises \d+: the file is truncated",
    ),
    "two kinds": (
        lambda f, x: [np.save(f / "a.npy", x), write_tensors(f, x)],
        r"has files of 2 kinds \(\.npy, \.safetensors\)",
    ),
    "none": (lambda f, x: None, "has no rows: neither"),
    "missing chunk": (
        lambda f, x: [write_zarr(f, x), (f / "z.zarr" / "c" / "0" / "0").unlink()],
        r"z\.zarr can't be read from row \d+ to \d+: a chunk is missing",
    ),
    "list": (
        lambda f, x: pyarrow.parquet.write_table(
            pyarrow.table({"x": [*x[:9], x[9][:4], *x[10:]]}), f / "a.parquet"
        ),
        r"a\.parquet, row 9 of column x has shape \[4\] and the first has \[5\]",
    ),
    "nan in parquet": (
        lambda f, x: pyarrow.parquet.write_table(
            pyarrow.table({"x": list(spoil(x, 99, np.inf))}), f / "a.parquet"
        ),
        r"a\.parquet, row 99 of column x: rows\.0 holds NaN",
    ),
    "cut parquet": (
        lambda f, x: [write_parquet(f, x), (f / "1.parquet").write_bytes(
            _cut(f / "1.parquet", 50))],
        r"1\.parquet is not readable Parquet",
    ),
}  # fmt: skip


def _cut(file: Path, count: int) -> bytes:
    return file.read_bytes()[:-count]


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_told_with_file_and_row(name: str, rows: np.ndarray, tmp_path: Path):
    (tmp_path / "rows").mkdir()
    write, message = BAD[name]
    write(tmp_path / "rows", rows)
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "rows", tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        ([np.zeros((4, 3)), np.zeros((4, 2))], {}, r"row or sequence 4 of those given: .*\[4, 2\]"),
        ([np.full((4, 3), np.nan)], {}, "row or sequence 0 of those given: rows.0 holds NaN"),
        ([np.zeros((4, 3))], {"held_out": 5.0}, "4 rows in 4 sequences of 1 are all held out"),
        ([], {}, "no rows were given"),
        ([np.zeros(3)], {}, r"a batch has arrays of shapes \[\[3\]\]"),
        ([{"nowhere.1": np.zeros((4, 3))}], {}, "nowhere.1 is not where rows can be from"),
        ([np.zeros((4, 3))], {"heldout": 3}, "the settings of an import are dtype, shuffle_rows"),
        ([np.zeros((4, 3))], {"special_ids": [1]}, "no token ids are given"),
        (
            [{"rows.0": np.zeros((2, 2, 3)), "token_ids": np.array([[1, 2], [3, -4]])}],
            {},
            "sequence 1: token id -4 at position 1 is outside of 0 to",
        ),
    ],
)
def test_what_is_given_wrongly_is_told(
    batches: list[Any], settings: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(UserError, match=message):
        write_rows(batches, to=tmp_path / "store", **settings)


def test_an_imported_store_and_a_harvest_are_told_apart(rows: np.ndarray, tmp_path: Path):
    from tests.support.configs import make_config

    np.save(tmp_path / "0.npy", rows)
    store = imported(tmp_path / "0.npy", tmp_path / "store")
    harvested = make_config(cache_path=str(store.path))
    with pytest.raises(UserError, match=r"cache\.sites: the store was imported"):
        open_matching_store(model=harvested.model, text=harvested.text, cache=harvested.cache)
    with pytest.raises(UserError, match="imported without token ids"):
        _ = store.tokens
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["imported"]["sources"][0]["name"] == "0.npy"


def test_every_option_of_the_command_is_a_setting():
    from launch.importing import SETTINGS as OPTIONS

    parser = argparse.ArgumentParser()
    options = {parser.add_argument(flag, **how).dest for flag, how in OPTIONS}
    assert options == {*ImportSettings.model_fields, "to", "tokens", "tokenizer", "scratch"}
