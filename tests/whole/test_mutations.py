"""The mutations of `tests/mutations` still find their lines, and docs/exactness.md has them all.

Whether each turns its test red is checked by `make mutations`, which takes minutes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations.__main__ import ROOT, Mutation
from tests.mutations.table import MUTATIONS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_mutation_finds_its_line(mutation: Mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.right) == 1
    assert mutation.right != mutation.wrong


def test_the_tests_of_all_mutations_exist(request: pytest.FixtureRequest):
    collected = {item.nodeid for item in request.session.items}
    collected |= {name.partition("[")[0] for name in collected}
    # Alone this file collects no others: then those are looked for here.
    tests = sorted({one.test for one in MUTATIONS} - collected)
    if not tests:
        return
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    found = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_docs_have_every_mutation():
    told = Path(ROOT, "docs", "exactness.md").read_text()
    rows = [f"| {one.what} | `{one.file}` | `{one.test.partition('::')[2]}` |" for one in MUTATIONS]
    assert [row for row in rows if row not in told] == []
