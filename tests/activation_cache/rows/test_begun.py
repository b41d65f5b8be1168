"""What an import finds in its folder: other token ids, or a harvest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from activation_cache import write_rows
from activation_cache.rows.unpack import TOKEN_IDS
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.store.store import open_store
from tests.support.stores import file_hashes, make_manifest, write_store
from tests.support.training import stop_after

IDS = np.arange(120).reshape(20, 6) % 7
GIVEN = {"rows.0": np.random.default_rng(0).standard_normal((20, 6, 3)), TOKEN_IDS: IDS}


def write(to: Path, *, special: int, calls: int | None = None) -> None:
    stop = (lambda: False) if calls is None else stop_after(calls)
    write_rows(
        GIVEN, to=to, special_ids=[special], held_out=12, shuffle_rows=32, block_rows=8, stop=stop
    )


def test_other_special_ids_are_refused_once_rows_depend_on_them(tmp_path: Path):
    with pytest.raises(Interrupted):
        write(tmp_path / "a", special=3, calls=2)  # the tokens are there, and no bucket
    write(tmp_path / "a", special=4)
    store = open_store(tmp_path / "a")
    assert store.rows == (IDS[:18] != 4).sum()
    with pytest.raises(Interrupted):
        write(tmp_path / "b", special=3, calls=14)
    assert list((tmp_path / "b").rglob("bucket-*.json"))
    with pytest.raises(UserError, match="begun with other token ids, other special ones"):
        write(tmp_path / "b", special=4)
    write(tmp_path / "b", special=3)
    assert open_store(tmp_path / "b").rows == (IDS[:18] != 3).sum()


def test_a_harvest_is_left_alone(tmp_path: Path):
    write_store(tmp_path / "store", make_manifest(rows=60))
    before = file_hashes(tmp_path / "store")
    with pytest.raises(UserError, match="has a store that was harvested: choose another folder"):
        write(tmp_path / "store", special=3)
    after = file_hashes(tmp_path / "store")
    assert {name: after[name] for name in before} == before
