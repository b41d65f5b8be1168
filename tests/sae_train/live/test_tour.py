"""examples/tour.ipynb, cell by cell, on a tiny model."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_train.inference.write_formats import write_sae_lens
from tests.support.oracles.latents import write_latents_folder
from tests.support.paths import ROOT
from tests.support.saes import make_sae
from tests.support.tiny_gemma import write_tiny_gemma


def run_cells(notebook: Path, parameters: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Run all code cells, `parameters` over those of the first; what each ends in is its output."""
    names: dict[str, Any] = {}
    outputs = []
    cells = [one for one in json.loads(notebook.read_text())["cells"] if one["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        tree = ast.parse("".join(cell["source"]))
        *statements, last = tree.body
        if not isinstance(last, ast.Expr):
            statements.append(last)
        exec(compile(ast.Module(statements, []), str(notebook), "exec"), names)
        if isinstance(last, ast.Expr):
            outputs.append(eval(compile(ast.Expression(last.value), str(notebook), "eval"), names))
        if number == 0:
            assert parameters.keys() <= names.keys()
            names |= parameters
    return names, outputs


@pytest.mark.slow
def test_the_tour_runs(tmp_path: Path) -> None:
    gemma, run = write_tiny_gemma(tmp_path / "gemma"), tmp_path / "run"
    write_latents_folder(run, F=300)
    write_sae_lens(make_sae(D=20, F=300), run / "release" / "sae_lens")
    parameters = {"weights": str(gemma), "run": str(run), "converted": str(tmp_path / "weights")}
    names, outputs = run_cells(ROOT / "examples" / "tour.ipynb", parameters)
    assert outputs[0] == ("blocks.1.hook_resid_post", (300, 20))
    assert outputs[-1] is True
    assert names["steered"].steered != names["steered"].plain
    assert isinstance(names["explored"].values([0]), np.ndarray)
    for shown in (names["explored"], names["latents"][names["index"]], names["steered"]):
        assert shown._repr_html_().startswith("<")
