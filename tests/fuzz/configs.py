"""Broken configs and words of the command line."""

from __future__ import annotations

import functools
from typing import Any

import yaml

from launch.config.job import Job
from sae_train.config.schema import dotted_keys
from tests.fuzz.outcome import Input
from tests.fuzz.values import NASTY, Random, broken_bytes, changed, nasty, one_of
from tests.fuzz.world import World
from tests.support.paths import ROOT

# Suites of thousands of SAEs are left out: `sae plan` takes seconds for one.
_FILES = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name in ("configs", "clusters")
)
_SNIPPETS = (
    "<<: {a: 1}", "<<: *a", "&a [*a]", "*a", "!!python/object/apply:os.getcwd []", "!!binary x",
    "!!float x", "!x", "? ", "- ", "\t", "|", ">", "%YAML 1.1\n---", "---\n", "...\n", "{", "[",
    "}", "'", '"', "#", "\0", "\ufeff", "\x85", "1e5", "0x10", "0o7", "1_000", "1__0", "12:30:45",
    "yes",
    "2024-01-01", ".inf", "-.inf", ".nan", "~", "=", "9" * 5000, "1e999999", "{a: 1, a: 2}", "sae:",
    "[" * 400, "train: {seed: 1}\n", "a: &x {b: 1}\nc: *x\n",
)  # fmt: skip
# Values of these decide how long a stage takes, or how much memory: none of the large ones.
_SIZES = (
    "tokens", "width", "size", "sequence", "sequences", "sequence_length", "held_out_sequences",
    "rows", "batch", "batch_size", "steps", "every_steps", "data", "model", "processes", "k",
    "restarts", "heartbeat_seconds", "seconds", "max_members", "mesh", "launch", "also", "keep",
    "log_every_steps",
)  # fmt: skip
_STAGE_SECTIONS = ("text", "cache", "sae", "train", "checkpoint", "evaluation", "model", "name")


def broken_config(random: Random, world: World) -> Input:
    """A config with a value, a key or a letter changed, given to a command that computes little."""
    pick = int(random.integers(4))
    files = ("config.yaml", "sweep.yaml")
    text = world.files[files[pick]].decode() if pick < 2 else one_of(random, _FILES).read_text()
    kind = random.random()
    if kind < 0.6:
        value = changed(random, yaml.safe_load(text))
        data = yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode(
            "utf-8", "surrogatepass"
        )
    elif kind < 0.8:
        lines = text.splitlines(keepends=True)
        at = int(random.integers(len(lines) + 1))
        column = int(random.integers(1 + len(lines[at]))) if at < len(lines) else 0
        snippet = one_of(random, _SNIPPETS)
        if at < len(lines) and random.random() < 0.5:
            head, _, _ = lines[at].partition(":")
            lines[at] = f"{head}: {snippet}\n"
        else:
            lines.insert(at, " " * column + snippet + "\n")
        data = "".join(lines).encode("utf-8", "surrogatepass")
    else:
        data = broken_bytes(random, text.encode())
    return Input(_command(random, f"{world.folder}/broken.yaml"), {"broken.yaml": data})


def broken_overrides(random: Random, world: World) -> Input:
    """One to three overrides of any keys with any values, for a command that computes little."""
    config = str(world.folder / one_of(random, ("config.yaml", "config.yaml", "sweep.yaml")))
    words = [_override(random, one_of(random, _keys()), nasty(random))
             for _ in range(int(random.integers(1, 4)))]  # fmt: skip
    command = _command(random, config)
    if command[0] in ("status", "report"):
        command = ("plan", config)
    return Input((*command, *words))


def stage_overrides(random: Random, world: World) -> Input:
    """An override given to a stage that works with it: harvest, train or evaluate."""
    sections = [key for key in _keys() if key.partition(".")[0] in _STAGE_SECTIONS and "." in key]
    key, value = one_of(random, sections), nasty(random)
    if set(key.split(".")[1:]) & set(_SIZES) or not set(key.split(".")[1:]):
        value = one_of(random, [one for one in NASTY if not _is_large(one)])
    word = _override(random, key, value)
    config, folder = str(world.folder / "config.yaml"), world.folder
    stage = one_of(random, ("harvest", "train", "train", "evaluate"))
    if stage == "harvest":
        return Input(("harvest", config, f"cache.path={folder}/new", "cache.tokens=200", word))
    if stage == "train":
        place = [f"output={folder}/new", "train.tokens=128"]
        return Input(("train", config, *place, word))
    return Input(("evaluate", str(folder / "out"), "evaluation.sequences=2", word))


def _is_large(value: Any) -> bool:
    if isinstance(value, list | dict):
        inside = value.values() if isinstance(value, dict) else value
        return any(_is_large(one) for one in inside)
    return isinstance(value, int | float) and not abs(value) <= 300


@functools.cache
def _keys() -> list[str]:
    lists = ["cache.sites.0.layers", "cache.sites.7.site", "sweep.grid.sae.width", "sweep.zip.x",
             "train.sparsity.coefficient.x", "evaluation.also.0.label", "launch.env.X"]  # fmt: skip
    return [*dotted_keys(Job), *lists]


def _override(random: Random, key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    text = text.removesuffix("\n...").strip()
    if random.random() < 0.1:
        text = one_of(random, _SNIPPETS)
    if random.random() < 0.07:
        key = one_of(random, (key.upper(), key[:-1], f"{key}.x", f"{key}.0", f".{key}", "", "é"))
    return f"{key}={text}"


def _command(random: Random, config: str) -> tuple[str, ...]:
    """Words that read and check `config`; nothing is harvested or trained."""
    plan = ("plan", config)
    return one_of(
        random,
        (
            plan, plan, (*plan, "--json"), (*plan, "--accelerator", "h100", "--price", "2"),
            (*plan, "--devices", str(one_of(random, (0, -1, 1, 7, 2**70)))),
            (*plan, "--mfu", str(one_of(random, (0, -1, "nan", "inf", 1e-300)))),
            ("sweep", config, "--dry-run"), ("sweep", config, "--dry-run"), ("status", config),
            ("report", config), ("harvest", config, "--dry-run"), ("train", config, "--dry-run"),
        ),
    )  # fmt: skip
