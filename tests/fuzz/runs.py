"""Broken folders of runs and sweeps: metrics, evaluations, failures, configs, checkpoints."""

from __future__ import annotations

import json

import yaml

from tests.fuzz.outcome import Input
from tests.fuzz.values import NASTY, Random, broken_bytes, broken_json, changed, one_of
from tests.fuzz.world import World

_FILES = (
    "metrics.jsonl", "metrics.jsonl", "evaluation.json", "evaluation.json", "evaluation-x.json",
    "failure.json", "starts.jsonl", "config.yaml", "firing_counts.npy", ".lock",
)  # fmt: skip


def broken_run(random: Random, world: World) -> Input:
    """A small file of a run's folder broken, given to what reads runs."""
    folder = one_of(random, ("out", "out", "stopped", "sweep"))
    run = "sweep/coefficient_0.002-width_64" if folder == "sweep" else folder
    name = f"{run}/{one_of(random, _FILES)}"
    data = _broken(random, name, world)
    return Input(_command(random, world, folder), {name: data})


def _broken(random: Random, name: str, world: World) -> bytes:
    """Of a file that isn't there, one of another run or of its kind is broken."""
    own = name.rpartition("/")[2].replace("-x", "")
    data = world.files.get(name) or world.files.get(f"out/{own}") or b'{"stage": 1, "reason": "x"}'
    if own == "metrics.jsonl" and random.random() < 0.8:
        lines = data.splitlines()
        at = int(random.integers(len(lines)))
        if random.random() < 0.3:
            lines[at] = json.dumps(one_of(random, NASTY)).encode()
        else:
            lines[at] = broken_json(random, lines[at])
        return b"\n".join(lines) + b"\n"
    if own == "config.yaml" and random.random() < 0.8:
        value = changed(random, yaml.safe_load(data))
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    if own.endswith(".json") and random.random() < 0.8:
        return broken_json(random, data)
    return broken_bytes(random, data)


def _command(random: Random, world: World, folder: str) -> tuple[str, ...]:
    target = str(world.folder / folder)
    reads = [("status", target), ("report", target), ("inspect", target), ("status", target),
             ("report", target), ("export", target), ("sweep", target, "--dry-run")]  # fmt: skip
    if folder != "sweep":
        reads += [("train", target), ("evaluate", target, "evaluation.sequences=2")]
    return one_of(random, reads)


def broken_checkpoint(random: Random, world: World) -> Input:
    """A file of a checkpoint broken or gone, given to what goes on from it or reads the SAE."""
    folder = one_of(random, ("out", "stopped"))
    names = world.matching(f"{folder}/checkpoints/")
    meta = [name for name in names if name.endswith("meta/metadata")]
    name = one_of(random, meta if random.random() < 0.4 else names)
    data: bytes | None = world.files[name]
    if random.random() < 0.08:
        data = None
    elif data and data[:1] == b"{" and random.random() < 0.8:
        data = broken_json(random, data)
    else:
        data = broken_bytes(random, data or b"", other=world.files[one_of(random, names)])
    target = str(world.folder / folder)
    words = (("train", target), ("export", target), ("status", target), ("inspect", target),
             ("evaluate", target, "evaluation.sequences=2"))  # fmt: skip
    return Input(one_of(random, words), {name: data})
