"""The cluster examples: each loads, expands, and what is rendered from it Kubernetes takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from activation_cache.gemma.params import check_model_axis
from activation_cache.language_model.published_sizes import known_config
from launch.clusters.jobset import render
from launch.config.job import load_job
from launch.sweep.expand import expand
from sae_train.config.strict_yaml import parse
from tests.support.paths import ROOT
from tests.support.servers.kubernetes_checks import check

EXAMPLES = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^```yaml\n(launch:\n.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_load_and_expand(path: Path) -> None:
    config = load_job(path)
    assert len(expand(config)) == 4
    gemma, (_, mesh) = known_config(config.model.weights), config.harvest_mesh
    assert gemma is not None
    check_model_axis(gemma, mesh.model)
    assert mesh.data * mesh.model == config.mesh.data * config.mesh.model, "all devices harvest"
    if config.launch.on == "kubernetes":
        manifests = render(config, command="sweep")
        assert len(manifests) == 4, "the runs are one cohort"
        for manifest in manifests:
            for document in manifest.documents:
                check(document)


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_on_the_page_are_configs(section: str) -> None:
    launch: dict[str, Any] = parse(section, name="page").value["launch"]
    example = next(path for path in EXAMPLES if load_job(path).launch.on == launch["on"])
    assert load_job(example, [f"launch={json.dumps(launch)}"]).launch.on == launch["on"]


def test_the_page_names_files_that_are_there() -> None:
    named = set(re.findall(r"(?:configs|docs|tests)/[\w./]*\w", PAGE))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
