"""A sweep of two SAEs of a tiny Gemma with latents, and the browser's server on it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_cache.config import ModelConfig
from activation_cache.language_model.checkpoint import open_checkpoint
from activation_cache.storage.records import read_record, write_record
from launch.sweep.expand import expand
from sae_train.browser.catalogue import catalogue
from sae_train.browser.server import Site, bound_socket, serve
from sae_train.config.file import write_config
from sae_train.latents.schema import EXPLANATIONS, EXPLANATIONS_SCHEMA, RECORD, Record
from tests.support.configs import as_job, make_config
from tests.support.oracles.latents import write_latents_folder
from tests.support.run_folders import write_run
from tests.support.saes import make_sae
from tests.support.tiny_gemma import write_tiny_gemma

F = 200
SAES = ("coefficient_0.001", "coefficient_0.004")
# What a page must show and never run.
NASTY = "<img src=x onerror=\"document.title='run'\"> & words about \u202e cats"


def browsed_sweep(root: Path) -> Path:
    """The sweep's folder; the first SAE's latent 17 has `NASTY` for an explanation."""
    gemma = write_tiny_gemma(root / "gemma")
    model = {"weights": str(gemma), "dtype": "float32"}
    base = make_config(output=str(root / "sweep"), width=F)
    grid = {"train.sparsity.coefficient": [1e-3, 4e-3]}
    config = as_job(base, name="tiny", model=model, sweep={"grid": grid})
    write_config(config, root / "sweep")
    fingerprint = open_checkpoint(ModelConfig.model_validate(model)).fingerprint()
    saes = [make_sae(D=20, F=F, seed=seed) for seed in (0, 1)]
    for number, run in enumerate(expand(config)):
        folder = write_run(run.config, l0=(80.0, 20.0)[number])
        shutil.rmtree(folder / "checkpoints")
        np.savez(folder / "params.npz", **saes[number].tensors)
        others = [name for name in SAES if name != folder.name]
        latents = write_latents_folder(folder, F=F, name=folder.name, others=others, seed=number)
        record = read_record(latents / RECORD, Record)
        ordered = [saes[number], saes[1 - number]]
        entries = [
            entry.model_copy(update={"fingerprint": sae.fingerprint})
            for entry, sae in zip(record.saes, ordered, strict=True)
        ]
        own = {"model": str(gemma), "saes": entries}
        own["fingerprints"] = record.fingerprints | {"model": fingerprint}
        write_record(latents / RECORD, record.model_copy(update=own))
    _explain(root / "sweep" / SAES[0] / "latents" / EXPLANATIONS)
    return root / "sweep"


def _explain(path: Path) -> None:
    scores = '{"detection": {"balanced_accuracy": 0.75, "shuffled": 0.5, "chance": 0.5}}'
    none = '{"fuzzing": {"balanced_accuracy": null, "texts": 0, "unanswered": 20}}'
    rows = [
        {"latent": 17, "text": "words", "method": "examples", "model": "small", "scores": none},
        {"latent": 17, "text": NASTY, "method": "examples", "model": "a model", "scores": scores},
        {"latent": 3, "text": "numbers", "method": "examples", "model": "a model", "scores": "{}"},
    ]
    pq.write_table(pa.Table.from_pylist(rows, EXPLANATIONS_SCHEMA), path)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The server on a free port; gives its address."""
    own = bound_socket("127.0.0.1", 0)
    stop = threading.Event()
    thread = threading.Thread(
        target=serve,
        args=(Site(catalogue([folder])), own),
        kwargs={"host": "127.0.0.1", "stop": stop.is_set},
    )
    address = f"http://127.0.0.1:{own.getsockname()[1]}/"
    thread.start()
    try:
        yield address
    finally:
        stop.set()
        thread.join()
