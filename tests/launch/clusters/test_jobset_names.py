"""Names of jobs on Kubernetes, and text that a user types into a manifest."""

from __future__ import annotations

import re
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.clusters.jobset import dns_name, render
from sae_train.config.strict_yaml import parse
from tests.launch.clusters.test_jobset import cluster_config, container_of


@settings(deadline=None, max_examples=200)
@given(st.text(), st.text(), st.text())
def test_names_are_dns_labels_and_distinct(text: str, one: str, other: str) -> None:
    name = dns_name(text, identity=one)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-node-0-9999-abcde") <= 63
    assert (dns_name(text, identity=other) == name) == (one == other)


def test_names_stay_readable() -> None:
    name = dns_name("Gemma2-2B, layer_12", identity="runs/x")
    assert re.fullmatch(r"gemma2-2b-layer-12-[0-9a-f]{6}", name)
    assert dns_name("27b", identity="x").startswith("sae-27b-")


typed = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1)


TRAPS = [
    "on",
    "1e3",
    "0o7",
    "0x1F",
    "1:30",
    "~",
    "a: b",
    "#",
    "'",
    '"',
    "a\n---\nkind: Pod",
    "\x85",
]


def with_traps(test: Any) -> Any:
    for trap in TRAPS:
        test = example(name=trap, value=trap, why=trap)(test)
    return example(name="x", value="$(A) $$ $5", why="$(A)")(test)


def expanded(value: str) -> str:
    """What Kubernetes makes of a variable's value: $$ is $, $(NAME) another variable's."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else "?", value)


@settings(deadline=None, max_examples=40)
@with_traps
@given(name=typed, value=typed, why=typed)
def test_nothing_typed_breaks_out(name: str, value: str, why: str) -> None:
    config = cluster_config({"env": {"A": value}, "annotations": {"why": why}}, name=name)
    (manifest,) = render(config, command="train")
    assert list(yaml.safe_load_all(manifest.text)) == list(manifest.documents)
    first, *documents = re.split(r"^---\n", manifest.text, flags=re.MULTILINE)
    assert first == f"# train: kubectl apply -f {manifest.file_name}\n"
    by_another_reader = [parse(document, name="test").value for document in documents]
    assert by_another_reader == list(manifest.documents)
    variable = container_of(manifest)["env"][-1]
    assert expanded(variable["value"]) == value
