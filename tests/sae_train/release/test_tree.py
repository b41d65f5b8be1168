"""The release of a sweep: a suite's tree, its card and index, and what goes to the Hub."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml

from activation_cache.runtime.errors import UserError
from activation_cache.storage import hub
from launch.cli import main
from launch.config.job import Job
from launch.run_state import needs_release
from sae_train import load_sae
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import read_run_config, with_values, write_config
from sae_train.inference.fold import fold
from sae_train.release import tree as tree_module
from sae_train.release.index import Entry, with_canonical
from sae_train.release.tree_card import suite_card
from sae_train.runs.folder import run_folders
from tests.sae_train.release.test_export import write_some_evaluation
from tests.support.saes import make_trained, save_run

pytestmark = pytest.mark.slow

F = 24
FILES = {
    "gemma_scope": ["params.npz"],
    "gemma_scope_2": ["config.json", "params.safetensors"],
    "sae_lens": ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"],
}


def save_member(root: Path, name: str, *, l0: float | None, seed: int = 0, **sae: Any) -> Path:
    """A trained run of a sweep, with an evaluation that found this L0."""
    trained = make_trained(F=F, seed=seed, **sae)
    train = trained.config.train.model_copy(update={"seed": seed})
    config = trained.config.model_copy(update={"output": str(root / name), "train": train})
    run = save_run(root / name, dataclasses.replace(trained, config=config))
    if l0 is not None:
        evaluation = write_some_evaluation(run, fold(load_trained(run)))
        path = run / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"l0": l0}))
        assert evaluation.l0 == 10
    return run


def write_sweep(root: Path, sweep: dict[str, Any]) -> Path:
    config = make_trained(F=F).config.model_dump() | {"name": "small", "output": str(root)}
    if sweep.get("tree") == "gemma_scope_2":
        config["train"] |= {"sparsity": {"penalty": "target_l0", "target": 5}}
    write_config(Job.model_validate(config | {"sweep": sweep}), root)
    return root


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of Gemma Scope's: two cells of two SAEs, and one SAE that wasn't evaluated."""
    cells = [{"sites": ["resid_post"], "layers": [1], "widths": [F], "coefficients": [1e-3]}]
    root = write_sweep(tmp_path_factory.mktemp("template") / "suite", {"cells": cells})
    save_member(root, "res/layer_1/width_24/coefficient_0.001", l0=140.4)
    save_member(root, "res/layer_1/width_24/coefficient_0.002", l0=81.6, seed=1)
    save_member(root, "res/layer_2/width_24/coefficient_0.001", l0=30, seed=2, layer=2)
    save_member(root, "res/layer_2/width_24/coefficient_0.002", l0=None, seed=3, layer=2)
    return root


@pytest.fixture
def suite(template: Path, tmp_path: Path) -> Path:
    """A suite of one's own, nothing exported yet."""
    return shutil.copytree(template, tmp_path / "suite")


@pytest.fixture(scope="module")
def exported(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite after `sae export`."""
    root = shutil.copytree(template, tmp_path_factory.mktemp("exported") / "suite")
    assert main(["export", str(root)]) == 0
    return root


def test_a_suite_s_tree_has_the_released_names_in_every_format(exported: Path):
    names = {
        "res/layer_1/width_24/average_l0_140": "res/layer_1/width_24/coefficient_0.001",
        "res/layer_1/width_24/average_l0_82": "res/layer_1/width_24/coefficient_0.002",
        "res/layer_2/width_24/average_l0_30": "res/layer_2/width_24/coefficient_0.001",
        "res/layer_2/width_24/coefficient_0.002": "res/layer_2/width_24/coefficient_0.002",
    }
    tree = exported / "release"
    expected = {
        f"{kind}/{name}/{file}"
        for name in names
        for kind, files in FILES.items()
        for file in files
        if file != "sparsity.safetensors" or "average" in name
    }
    found = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert found == expected | {"README.md", "saes.json"}
    for name, run in names.items():
        sae = fold(load_trained(exported / run))
        for kind in FILES:
            np.testing.assert_array_equal(load_sae(tree / kind / name).W_dec, sae.W_dec)
        own = exported / run / "release" / "gemma_scope" / "params.npz"
        assert own.samefile(tree / "gemma_scope" / name / "params.npz"), "linked, not copied"
    assert run_folders(exported) == [exported / run for run in sorted(names.values())]


def test_the_index_says_what_each_is_and_which_is_canonical(exported: Path):
    index = json.loads((exported / "release" / "saes.json").read_text())
    assert index["canonical"] == {
        "res/layer_1/width_24/canonical": "res/layer_1/width_24/average_l0_82",
        "res/layer_2/width_24/canonical": "res/layer_2/width_24/average_l0_30",
    }
    assert index["model"] == "google/gemma-3-270m"
    first = index["saes"][0]
    assert (first["l0"], first["fvu"], first["canonical"]) == (140.4, 0.25, False)
    assert (first["tokens"], first["steps"], first["seed"]) == (8192, 128, 0)
    assert first["sparsity"]["coefficient"] == 1e-3
    assert first["hook_name"] == "blocks.1.hook_resid_post"
    assert first["run"] == "res/layer_1/width_24/coefficient_0.001"
    for entry in index["saes"]:
        assert len(entry["fingerprint"]) == 64
        for file, size in entry["files"].items():
            assert (exported / "release" / file).stat().st_size == size
    assert index["saes"][3]["l0"] is None
    assert not index["saes"][3]["canonical"]


def test_the_card_has_the_table_and_the_hub_s_front_matter(exported: Path):
    card = (exported / "release" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "jumprelu", "interpretability"],
        "base_model": "google/gemma-3-270m",
    }
    row = (
        "| resid_post | 1 | 24 | jumprelu | 81.6 | 0.2500 | 0.3000 | 0.1650 | 0.5000 | 95.8% "
        "| λ 0.001 | 1 | 8,192 | `res/layer_1/width_24/average_l0_82` **canonical** |"
    )
    assert row in card
    assert "`res/layer_2/width_24/coefficient_0.002` |" in card
    assert "L0 is nearest to 100" in card
    loading = 'load_sae("gemma_scope/res/layer_1/width_24/average_l0_82")'
    assert loading in card


def test_the_card_names_what_an_earlier_config_had_otherwise(exported: Path):
    """In a folder of two sweeps the config on the card is the last one's."""
    config = read_run_config(exported)
    entries = [
        Entry(**one) for one in json.loads((exported / "release/saes.json").read_text())["saes"]
    ]
    other = with_values(config, {"train.batch_size": 32, "sae.width": 128}, source="test")
    card = suite_card(config, entries, configs={"new": config, "old": other})
    assert "| `old` | train.batch_size 32 |" in card, "the table has the width"
    assert "`new`" not in card
    assert "differ from this config" not in suite_card(config, entries, configs={"new": config})
    counts = [dataclasses.replace(entry, sequences=n) for n, entry in enumerate(entries, 7)]
    assert "On 7 to 10 held-out sequences" in suite_card(config, counts, configs={})


def test_gemma_scope_2_keeps_its_names_and_other_sweeps_get_theirs(tmp_path: Path):
    cells = [{"sites": ["resid_post"], "layers": [1], "widths": [F], "targets": {"big": [5, 6]}}]
    sweep = {"cells": cells, "tree": "gemma_scope_2"}
    root = write_sweep(tmp_path / "two", sweep)
    save_member(root, "resid_post/layer_1_width_24_l0_big", l0=5)
    save_member(root, "resid_post/layer_1_width_24_l0_big_seed_1", l0=6, seed=1)
    assert main(["export", str(root)]) == 0
    index = json.loads((root / "release" / "saes.json").read_text())
    assert [entry["folder"] for entry in index["saes"]] == [e["run"] for e in index["saes"]]
    big = "resid_post/layer_1_width_24"
    assert index["canonical"] == {f"{big}/canonical": f"{big}_l0_big_seed_1"}

    root = write_sweep(tmp_path / "grid", {"grid": {"train.seed": [0, 1, 2]}})
    save_member(root, "seed_0", l0=9.9)
    save_member(root, "seed_1", l0=10.1, seed=1)
    save_member(root, "other", l0=10.2, layer=1)
    assert main(["export", str(root)]) == 0
    index = json.loads((root / "release" / "saes.json").read_text())
    assert {entry["run"]: entry["folder"] for entry in index["saes"]} == {
        "other": "res/layer_1/width_24/average_l0_10",
        "seed_0": "res/layer_1/width_24/average_l0_10_2",
        "seed_1": "res/layer_1/width_24/average_l0_10_seed_1",
    }


def test_of_two_equally_near_the_sparser_is_canonical(exported: Path):
    names = [f.name for f in dataclasses.fields(tree_module.Entry)]
    saes = json.loads((exported / "release" / "saes.json").read_text())["saes"][:2]
    entries = [tree_module.Entry(**{name: sae[name] for name in names}) for sae in saes]
    tied = [dataclasses.replace(e, l0=l0) for e, l0 in zip(entries, (110, 90), strict=True)]
    assert [entry.canonical for entry in with_canonical(tied)] == [False, True]


def test_an_interrupted_export_has_no_index(suite: Path, monkeypatch):
    calls = []

    def dies(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 5:
            raise KeyboardInterrupt
        os.link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(tree_module, "_link", dies)
        with pytest.raises(KeyboardInterrupt):
            main(["export", str(suite)])
    tree = suite / "release"
    assert any(tree.rglob("params.npz"))
    assert not (tree / "saes.json").exists()
    assert not (tree / "README.md").exists()
    assert main(["export", str(suite)]) == 0
    assert (tree / "saes.json").exists()


def test_a_run_s_release_without_its_card_is_made_again(suite: Path):
    run = suite / "res/layer_1/width_24/coefficient_0.001"
    assert main(["export", str(run)]) == 0
    assert not needs_release(run)
    (run / "release" / "README.md").unlink()
    assert needs_release(run)


def test_files_are_copied_where_the_file_system_cannot_link(suite: Path, monkeypatch):
    def no(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no)
    assert main(["export", str(suite)]) == 0
    name = "res/layer_1/width_24/average_l0_82"
    own = suite / "res/layer_1/width_24/coefficient_0.002/release/gemma_scope/params.npz"
    copy = suite / "release" / "gemma_scope" / name / "params.npz"
    assert not own.samefile(copy)
    assert own.read_bytes() == copy.read_bytes()


def test_a_file_that_reads_back_wrong_is_refused(suite: Path, monkeypatch, capsys):
    def damages(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())
        if source.name == "params.safetensors":
            content = bytearray(target.read_bytes())
            content[-3] ^= 1
            target.write_bytes(content)

    monkeypatch.setattr(tree_module, "_link", damages)
    assert main(["export", str(suite)]) == 2
    message = capsys.readouterr().err
    assert "params.safetensors reads back with another" in message
    assert not (suite / "release" / "saes.json").exists()


# The Hub ----------------------------------------------------------------------------------------


class FakeApi:
    """Takes what `HfApi` takes and remembers it."""

    sent: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 (one for all, as the Hub is)

    def create_repo(self, repository: str, **options: Any) -> str:
        self.sent.append((repository, options))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **options: Any) -> None:
        root = Path(options["folder_path"])
        files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        chosen = list(
            huggingface_hub.utils.filter_repo_objects(
                files,
                allow_patterns=options.get("allow_patterns"),
                ignore_patterns=options.get("ignore_patterns"),
            )
        )
        self.sent.append((options["repo_id"], {"files": sorted(chosen)}))


@pytest.fixture
def api(monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "sent", [])
    return FakeApi.sent


def test_the_card_and_the_index_are_sent_last(suite: Path, api, capsys):
    assert main(["export", str(suite), "--upload", "org/small"]) == 0
    tree = suite / "release"
    (tree / ".cache").mkdir()
    files = {p.relative_to(tree).as_posix() for p in tree.rglob("*") if p.is_file()}
    created, weights, last = api
    assert created == ("org/small", {"private": True, "exist_ok": True})
    assert last == ("org/small", {"files": ["README.md", "saes.json"]})
    assert set(weights[1]["files"]) == files - {"README.md", "saes.json"}
    assert "sent to https://huggingface.co/org/small" in capsys.readouterr().out


def test_a_dry_run_lists_everything_and_sends_nothing(suite: Path, monkeypatch, capsys):
    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(hub, "upload", no)
    monkeypatch.setattr(huggingface_hub, "HfApi", no)
    assert main(["export", str(suite), "--upload", "org/small", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    tree = suite / "release"
    files = [path for path in tree.rglob("*") if path.is_file()]
    assert f"{len(files)} files, " in printed
    assert printed.rstrip().endswith("nothing was sent")
    for path in files:
        assert str(path.relative_to(tree)) in printed


def test_one_run_can_be_sent(suite: Path, api):
    run = suite / "res/layer_1/width_24/coefficient_0.001"
    assert main(["export", str(run), "--upload", "org/one"]) == 0
    assert api[-1] == ("org/one", {"files": ["README.md"]})
    assert "sae_lens/cfg.json" in api[-2][1]["files"]


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_is_one_message(suite: Path, offline: bool, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert main(["export", str(suite), "--upload", "org/small"]) == 2
    message = capsys.readouterr().err
    assert "the Hub doesn't take org/small" in message
    assert "Traceback" not in message
    assert (suite / "release" / "saes.json").exists(), "what was made stays"


def test_bad_names_are_refused_before_anything_is_written(suite: Path, capsys):
    assert main(["export", str(suite), "--upload", "small"]) == 2
    assert "write organisation/name" in capsys.readouterr().err
    assert main(["export", str(suite), "--dry-run"]) == 2
    assert "--dry-run lists what --upload would send" in capsys.readouterr().err
    assert not (suite / "release").exists()


def test_without_the_package_upload_says_so(suite: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install open-gemma-scope\[hub\]"):
        hub.upload(suite, repository="org/small", last=[])
