"""How time and memory of `sae latents` grow with width and with text, for `benchmarks.latents`.

Random SAEs with 64 active latents per token, at D = 256, on random activations: the model costs
nothing, so that the SAE's own work is seen. The vocabulary has 16,384 ids. Each size has a process
of its own, whose peak memory is that size's.

    python -m benchmarks.support.growth_of_latents WIDTH TOKENS      # one size, as JSON
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np

D, S, L0, VOCABULARY = 256, 256, 64, 16_384
SIZES = (
    *((width, 65_536) for width in (2048, 8192, 16_384, 65_536)),
    *((16_384, tokens) for tokens in (16_384, 262_144)),
)


def growth(logger: logging.Logger) -> None:
    """Log a row of the table for each size."""
    logger.info("| width | tokens | CPU s | wall s | peak GB | on disk MB | files MB |")
    for width, tokens in SIZES:
        words = [sys.executable, "-m", __name__, str(width), str(tokens)]
        found = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
        logger.info(
            "| %d | %d | %.1f | %.1f | %.2f | %.0f | %.0f |",
            width,
            tokens,
            found["cpu"],
            found["wall"],
            found["peak_gb"],
            found["disk_mb"],
            found["files_mb"],
        )


def one(width: int, tokens: int) -> dict[str, float]:
    """Seconds and bytes of one size."""
    from sae_train.config.latents import LatentsConfig
    from sae_train.evaluate.job import Job
    from sae_train.evaluate.jobs import Models
    from sae_train.latents import compute
    from sae_train.latents.job import LatentsJob
    from tests.support.configs import make_config

    random = np.random.default_rng(0)
    sae, table, model = random_sae(random, width), random_text(random, tokens), random_model(random)
    models, config = Models(given=model), make_config(width=width)
    backend: Any = SimpleNamespace(id_to_token=str)
    models.tokenizers[config.model] = SimpleNamespace(backend=backend)  # type: ignore[assignment]
    disk = 0
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(
            folder=Path(scratch),
            config=config,
            settings=config.evaluation,
            step=1,
            sae=sae,
            model=config.model,
            table=table,
            sequences=range(tokens // S),
            record={},
            fingerprints={"sae": "random", "model": "random"},
        )
        latents_job = LatentsJob(job=job, settings=LatentsConfig(), name="random")
        join = compute._Work._finish

        def watched(work: Any, parts: Any) -> None:
            nonlocal disk
            disk = sum(file.stat().st_size for file in latents_job.scratch.iterdir())
            join(work, parts)

        compute._Work._finish = watched  # type: ignore[method-assign]
        wall, cpu = time.perf_counter(), time.process_time()
        compute.compute_jobs([latents_job], models)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        files = sum(file.stat().st_size for file in latents_job.folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return seconds | {"peak_gb": peak, "disk_mb": disk / 1e6, "files_mb": files / 1e6}


def random_sae(random: np.random.Generator, width: int) -> Any:
    """An SAE of which `L0` latents are active on a random row."""
    from sae_train.inference.sae import Sae

    W_dec = random.standard_normal((width, D), np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    return Sae(
        W_enc=np.ascontiguousarray(W_dec.T),
        W_dec=W_dec,
        b_enc=np.zeros(width, np.float32),
        b_dec=np.zeros(D, np.float32),
        threshold=np.full(width, NormalDist().inv_cdf(1 - L0 / width), np.float32),
    )


def random_text(random: np.random.Generator, tokens: int) -> Any:
    """What a walk asks of a table of tokens."""
    ids = random.integers(3, VOCABULARY, (tokens // S, S)).astype(np.int32)
    ids[:, 0] = 2
    special = SimpleNamespace(bos=2, pad=0)
    return SimpleNamespace(
        sequence_length=S,
        path=Path("tokens"),
        summary=SimpleNamespace(special_ids=special, subsets=[]),
        read=lambda sequences: ids[np.array(sequences)],
        usable=lambda found, sequences: found > 2,
        subset_of=lambda sequences: np.zeros(len(sequences), np.int32),
    )


def random_model(random: np.random.Generator) -> Any:
    """What the walk and the logits ask of a model."""
    import jax.numpy as jnp

    acts = jnp.asarray(random.standard_normal((8, S, D), np.float32))
    return SimpleNamespace(
        config=SimpleNamespace(vocab_size=VOCABULARY),
        fingerprint="random",
        precision="float32",
        params={
            "embedding": random.standard_normal((VOCABULARY, D), np.float32),
            "final_norm": {"scale": np.zeros(D, np.float32)},
        },
        # Other rows for each batch, at no cost: the same ones moved by the first token.
        activations=lambda batch, taps: {
            tap: jnp.roll(acts, int(batch[0, 1]), axis=(1, 2)) for tap in taps
        },
    )


if __name__ == "__main__":
    print(json.dumps(one(*map(int, sys.argv[1:3]))))  # noqa: T201
