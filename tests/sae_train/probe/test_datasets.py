"""Files of data sets: which are found, how they are read, what is said of bad ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard

from activation_cache.runtime.errors import UserError
from sae_train.config.evaluation import ProbeConfig
from sae_train.probe import datasets
from sae_train.probe.datasets import data_files, read_data_set


def write(path: Path, *, rows: int = 400, header: str = "prompt,target", target: str = "") -> Path:
    """A file of prompts, the second of which has a comma, a quote and a line break."""
    lines = [header] + [f'"p{n}, ""q""\nr",{target or ("yes", "no")[n % 2]}' for n in range(rows)]
    content = "\n".join(lines).encode()
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a b.csv.zst"])
def test_a_file_is_read(tmp_path: Path, name: str):
    write(tmp_path / name)
    (found,) = data_files(ProbeConfig(data=str(tmp_path))).items()
    data = read_data_set(found[1], name=found[0], rows=300)
    assert (data.name, len(data.prompts)) == (name.partition(".")[0], 300)
    assert data.prompts[3] == 'p3, "q"\nr'
    np.testing.assert_array_equal(data.label_N[:4], [1, 0, 1, 0])  # no before yes


def test_targets_that_are_numbers_are_ordered_by_value(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,target\n" + "x,10\ny,9\n" * 100)
    assert read_data_set(path, name="a", rows=5000).label_N[:2].tolist() == [1, 0]


def test_the_packages_list_says_which_are_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tmp_path / "data"
    (data / "cleaned_data").mkdir(parents=True)
    names = [*datasets._SHORT, "7_other", "8_real"]
    rows = [f"cleaned_data/{name}.csv,Binary Classification" for name in names[:-1]]
    text = "\n".join(["Dataset save name,Data type", *rows, "cleaned_data/8_real.csv,Real"])
    content = zstandard.ZstdCompressor().compress(text.encode())
    (data / "probing_datasets_MASTER.csv.zst").write_bytes(content)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: spec)
    assert list(data_files(ProbeConfig())) == list(datasets._SHORT)
    assert list(data_files(ProbeConfig(datasets="all"))) == names[:-1]
    with pytest.raises(UserError, match=r"'7_othr'.* near it are 7_other"):
        data_files(ProbeConfig(datasets=["7_othr"]))
    path = data_files(ProbeConfig(datasets=["7_other"]))["7_other"]
    with pytest.raises(UserError, match=r"7_other.csv.zst is missing"):
        read_data_set(path, name="7_other", rows=5000)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps sae-probes"):
        data_files(ProbeConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"header": "text,target"}, r"a.csv has no column 'prompt' \(it has text, target\)"),
        ({"target": "yes"}, "has 1 different targets in its first 5000 rows .yes."),
        ({"rows": 60}, "a.csv has 30 rows of one of its targets, and a probe needs 100 of each"),
        ({"target": '""'}, "record 2 has no prompt or no target"),
        ({"header": '"prompt,target'}, "can't be read as CSV"),
    ],
)
def test_a_bad_file_is_told_of(tmp_path: Path, options: dict, message: str):
    path = write(tmp_path / "a.csv", **options)
    with pytest.raises(UserError, match=message):
        read_data_set(path, name="a", rows=5000)


def test_bad_bytes_and_empty_folders(tmp_path: Path):
    bad = tmp_path / "a.csv.zst"
    bad.write_bytes(b"no zstd")
    with pytest.raises(UserError, match=r"a\.csv\.zst can't be read"):
        read_data_set(bad, name="a", rows=5000)
    with pytest.raises(UserError, match="holds no data sets"):
        data_files(
            ProbeConfig(data=str(tmp_path / "a.csv.zst")).model_copy(
                update={"data": str(_empty(tmp_path))}
            )
        )
    with pytest.raises(UserError, match="is no folder"):
        data_files(ProbeConfig(data=str(bad)))
    with pytest.raises(ValueError, match=r"probe.k .* must rise: give \[1, 2\]"):
        ProbeConfig(k=[2, 1])


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"
