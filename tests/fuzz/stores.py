"""Broken activation stores, finished and half finished."""

from __future__ import annotations

import json

from activation_cache.storage.records import _checksum
from tests.fuzz.outcome import Input
from tests.fuzz.values import Random, broken_bytes, broken_json, changed, one_of
from tests.fuzz.world import World


def broken_store(random: Random, world: World) -> Input:
    """A file of a store broken or gone; a record often with the checksum that belongs to it."""
    half = random.random() < 0.3
    store = "half" if half else "out/store"
    names = [name for name in world.matching(f"{store}/") if not name.endswith("config.yaml")]
    records = [name for name in names if name.endswith(".json")]
    name = one_of(random, records if random.random() < 0.7 else names)
    data: bytes | None = world.files[name]
    if random.random() < 0.04:
        data = None
    elif name.endswith(".json") and random.random() < 0.85:
        data = broken_record(random, data or b"")
    else:
        other = world.files[one_of(random, names)]
        data = broken_bytes(random, data or b"", other=other)
    return Input(_command(random, world, half=half), {name: data})


def broken_record(random: Random, data: bytes) -> bytes:
    """A JSON record changed, mostly under a checksum that is right again."""
    value = json.loads(data)
    if "checksum" not in value or random.random() < 0.3:
        return broken_json(random, data)
    del value["checksum"]
    value = changed(random, value)
    if isinstance(value, dict):
        try:
            value["checksum"] = _checksum(value)
        except (ValueError, RecursionError):  # NaN, which no record holds
            value["checksum"] = "0" * 64
    return json.dumps(value).encode()


def _command(random: Random, world: World, *, half: bool) -> tuple[str, ...]:
    folder, config = world.folder, str(world.folder / "config.yaml")
    if half:
        harvest = ("harvest", config, f"cache.path={folder}/half")
        return one_of(random, (harvest, harvest, harvest, ("inspect", str(folder / "half"))))
    store = str(folder / "out/store")
    train = ("train", config, f"output={folder}/new", "train.tokens=128")
    return one_of(
        random,
        (
            ("inspect", store), ("inspect", store, "--verify"), ("inspect", store, "--verify"),
            train, ("harvest", config), ("status", config),
            ("evaluate", str(folder / "out"), "evaluation.sequences=2"),
        ),
    )  # fmt: skip
