"""The Dockerfile, without Docker: what it copies is there, each accelerator's extras exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support.paths import ROOT

Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """Each instruction of the Dockerfile with its arguments, continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "\n ")
    found: list[Instruction] = []
    for line in filter(str.strip, lines.splitlines()):
        if line[0].isspace():
            name, rest = found.pop()
            found.append((name, f"{rest} {line.strip()}"))
        else:
            name, _, rest = line.partition(" ")
            found.append((name, rest.strip()))
    return found


def arguments_of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def ignored(path: str) -> bool:
    """By .dockerignore, whose last matching line counts."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch(part, pattern) for part in (path, path.split("/")[0])):
                kept = line.startswith("!")
    return not kept


def test_it_has_the_instructions_of_a_service_that_needs_no_root_and_no_home():
    names = [name for name, _ in instructions()]
    known = "FROM ARG WORKDIR COPY RUN ENV USER ENTRYPOINT CMD"
    assert set(names) <= set(known.split())
    assert names[0] == "FROM"
    assert arguments_of("FROM") == ["python:3.12-slim"], "a tag, and not latest"
    (user,) = arguments_of("USER")
    assert int(user.partition(":")[0]) > 0, "a number, for Kubernetes' runAsNonRoot"
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert arguments_of("ENTRYPOINT") == ['["sae"]']
    assert all(path.startswith("/") for path in arguments_of("WORKDIR"))
    assert "XDG_CACHE_HOME=/cache" in arguments_of("ENV")[0]
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python == ">=3.11,<3.14", "which the image's Python is in"


def test_what_it_copies_is_there_and_not_ignored():
    copied = [name for rest in arguments_of("COPY") for name in shlex.split(rest)[:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [
        one.rstrip("*") for one in project["tool"]["setuptools"]["packages"]["find"]["include"]
    ]
    needed = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]]
    assert set(copied) == {*needed, *packages, "configs"}
    for name in copied:
        assert (ROOT / name).exists(), name
        assert not ignored(name), name
    for name in ("demo-data", "runs", ".venv", ".git", "tests"):
        assert ignored(name), f"{name} would be sent to the builder"


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", "tpu", "gpu"])
def test_each_accelerator_installs_extras_that_exist(accelerator: str, tmp_path: Path):
    """The RUN line itself, with a pip and a mkdir that only say what they were asked for."""
    for name in ("pip", "mkdir"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    (line,) = arguments_of("RUN")
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        env={"PATH": str(tmp_path), "ACCELERATOR": accelerator},
        capture_output=True,
        text=True,
    )
    if accelerator == "gpu":
        assert done.returncode == 1
        assert done.stderr == "ACCELERATOR is cpu, cuda or tpu, and not 'gpu'\n"
        return
    pip, mkdir = done.stdout.splitlines()
    extras = re.fullmatch(r"pip install --no-cache-dir \.\[(.*)\]", pip)
    assert extras is not None, pip
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = extras[1].split(",")
    assert set(names) <= set(known)
    assert [name for name in names if name in ("cuda", "tpu")] == [accelerator][
        accelerator == "cpu" :
    ]
    assert mkdir == "mkdir -m 1777 /cache /data"


def test_the_pages_name_its_argument():
    page = (ROOT / "docs" / "clusters.md").read_text()
    for accelerator in ("tpu", "cuda"):
        assert f"--build-arg ACCELERATOR={accelerator}" in page
