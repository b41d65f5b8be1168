"""The world made: tests' tiny pipeline run once, and beside it what it leaves out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.numpy import save_file

from activation_cache.storage.records import read_record, write_record
from activation_cache.store.manifest import Manifest
from launch.cli import main
from launch.config.job import load_job
from launch.sweep.expand import expand
from sae_train.config.file import write_config
from tests.fuzz.world import World
from tests.support.pipeline import write_pipeline
from tests.support.tiny_gemma import tiny_config, tiny_tensors
from tests.support.tiny_gguf import write_gguf

_SWEEP = "sweep: {grid: {train.sparsity.coefficient: [1e-3, 2e-3], sae.width: [64]}}\n"


def make_world(folder: Path) -> World:
    """Harvest, train, evaluate, export and report; the commands run in `folder/work/here`.

    `stopped` is a run with a checkpoint of step 10 of 20, `half` a store of one bucket of two,
    `sweep` a sweep with the finished run in it, `shards` the model in two files and `model.gguf`
    the model as llama.cpp has it.
    """
    config = write_pipeline(folder)
    for work in ("work/here", "home"):
        (folder / work).mkdir(parents=True)
    for words in (
        ["harvest", str(config)],
        ["train", str(config)],
        ["evaluate", str(folder / "out")],
        ["export", str(folder / "out")],
    ):
        assert main([*words, "-q"]) == 0, words
    _models(folder)
    _texts(folder)
    _unfinished(folder)
    _sweep(folder)
    world = World(folder)
    world.remember()
    return world


def environment(folder: Path) -> dict[str, str]:
    """Home and cache are in the world; nothing asks the Hub."""
    return {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "home/.cache"),
            "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}  # fmt: skip


def _models(folder: Path) -> None:
    write_gguf(folder / "model.gguf")
    named = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
    (folder / "gemma/tokenizer_config.json").write_text(json.dumps(named))
    shards = folder / "shards"
    shutil.copytree(folder / "gemma", shards)
    (shards / "model.safetensors").unlink()
    tensors = tiny_tensors(tiny_config())
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors"
             for number, name in enumerate(names)}  # fmt: skip
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, shards / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))


def _texts(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    documents = (folder / "text.txt").read_text().split("\n\n")
    rows = [{"text": one, "meta": {"set": "ab"[len(one) % 2]}} for one in documents]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    texts = folder / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(documents))
    (texts / "b.jsonl").write_bytes(lines)
    (texts / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), texts / "d.parquet")


def _unfinished(folder: Path) -> None:
    shutil.copytree(
        folder / "out", folder / "stopped", ignore=shutil.ignore_patterns("store", "20")
    )
    for name in ("evaluation.json", "firing_counts.npy"):
        (folder / "stopped" / name).unlink()
    shutil.rmtree(folder / "stopped/release")
    (folder / "stopped/failure.json").write_text(json.dumps({"stage": "train", "reason": "x"}))
    half = folder / "half"
    shutil.copytree(folder / "out/store", half)
    (half / "commits/bucket-000001.json").unlink()
    os.replace(half / "manifest.json", half / "plan.json")  # its norms are the plan's nulls
    plan = read_record(half / "plan.json", Manifest)
    sites = [site.model_copy(update={"mean_squared_norm": None}) for site in plan.sites]
    write_record(half / "plan.json", plan.model_copy(update={"sites": sites}))


def _sweep(folder: Path) -> None:
    """Two runs that say they were trained with other coefficients; one was, nearly."""
    text = (folder / "config.yaml").read_text().replace(f"{folder}/out\n", f"{folder}/sweep\n")
    (folder / "sweep.yaml").write_text(text + _SWEEP)
    sweep = load_job(folder / "sweep.yaml")
    write_config(sweep, folder / "sweep")
    for run in expand(sweep):
        shutil.copytree(folder / "out", run.folder, ignore=shutil.ignore_patterns("store"))
        write_config(run.config, run.folder)
