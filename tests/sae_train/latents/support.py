"""SAEs whose latents are computed without a run: a table, a model and activations made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np

from activation_cache.language_model.model import LanguageModel
from activation_cache.language_model.tokenizer import load_tokenizer
from activation_cache.storage.files import StoragePath
from activation_cache.text.token_table import TokenTable
from sae_train.config.latents import LatentsConfig
from sae_train.evaluate.job import Job
from sae_train.evaluate.jobs import Models
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.latents.job import LatentsJob
from tests.support.configs import make_config
from tests.support.oracles.latents import Walked
from tests.support.saes import make_sae, make_trained_as
from tests.support.tiny_gemma import tiny_config, tiny_tensors, write_tiny_gemma

D, S, N = 20, 24, 26  # N sequences: batches of 3, the last of 2
PER_BATCH = 3
SETTINGS = LatentsConfig(top=6, per_interval=2, context=10)


@dataclasses.dataclass(frozen=True)
class World:
    """Text, the model's activations on it, and what loads them.

    Attributes:
        acts: [N, S, D], of every tap.
        table: its sequences 7 to 6 + N are walked.
    """

    acts: np.ndarray
    tokens: np.ndarray
    table: Any
    models: Models
    embedding: np.ndarray
    gain: np.ndarray

    def walked(self, sae: Sae) -> Walked:
        """What the SAE's own `encode` gives on the text."""
        usable = self.tokens > 2
        latents = np.asarray(sae.encode(self.acts))
        subsets = [("news", "law")[number % 2] for number in range(N)]
        latents = np.where(usable[:, :, None], latents, 0)
        return Walked(self.tokens, usable, latents, range(7, 7 + N), subsets)


def make_world(folder: Path, *, bad: float | None = None) -> World:
    """A tiny Gemma 3's tokenizer and embedding; `bad` is put among the activations."""
    random = np.random.default_rng(3)
    weights = write_tiny_gemma(folder / "gemma", d_model=D)
    config = tiny_config(d_model=D)
    tensors = tiny_tensors(config)
    tokens = random.integers(3, 60, (N, S)).astype(np.int32)
    tokens[:, 0] = 2
    tokens[3, 5] = tokens[4, 11] = 1  # ends of documents
    tokens[-1, 17:] = 0
    acts = random.standard_normal((N, S, D)).astype(np.float32)
    acts[5] = acts[6]  # equal values in two sequences
    if bad is not None:
        acts[4, 3, 2] = bad
    table = Mock(spec=TokenTable, sequence_length=S, path=folder / "tokens")
    special = SimpleNamespace(bos=2, pad=0)
    table.summary = SimpleNamespace(special_ids=special, subsets=["news", "law"])
    table.read = lambda sequences: tokens[np.array(sequences) - 7]
    table.usable = lambda found, _: found > 2
    table.subset_of = lambda sequences: (np.array(sequences, np.int32) - 7) % 2
    model = Mock(spec=LanguageModel, config=config, fingerprint="tiny", precision="float32")
    by_tokens = {tokens[row].tobytes(): acts[row] for row in range(N)}
    # Sequences 5 and 6 have activations in common, not tokens.
    nothing = np.zeros((S, D), np.float32)

    def activations(batch: np.ndarray, taps: Any) -> dict[Any, Any]:
        rows = [by_tokens.get(row.tobytes(), nothing) for row in batch]
        return {tap: jnp.asarray(np.stack(rows)) for tap in taps}

    model.activations = Mock(side_effect=activations)
    gain = 1 + tensors["model.norm.weight"]
    model.params = {
        "embedding": tensors["model.embed_tokens.weight"],
        "final_norm": {"scale": tensors["model.norm.weight"]},
    }
    run = make_config(sae={"site": "resid_post"})
    model_config = run.model.model_copy(update={"weights": str(weights)})
    models = Models(given=model)
    models.tokenizers[run.model] = load_tokenizer(model_config)
    return World(acts, tokens, table, models, model.params["embedding"], gain)


def make_job(
    world: World,
    folder: StoragePath,
    *,
    architecture: str = "jumprelu",
    F: int = 60,
    sae: Sae | None = None,
    target: str | None = None,
    settings: LatentsConfig = SETTINGS,
) -> LatentsJob:
    """A job of random weights; `target` makes a transcoder from mlp_in to it."""
    own: dict[str, Any] = {"site": "mlp_in", "target": target} if target else {}
    config = make_config(width=F, output=str(folder), sae=own)
    if sae is None:
        if architecture == "jumprelu":
            sae = make_sae(D=D, F=F)
            sae.threshold[:] += 2.0
            sae.threshold[-1] = 1e9  # never fires
        else:
            sae = fold(make_trained_as(architecture, D=D, F=F))
    job = Job(
        folder=folder,
        config=config,
        settings=config.evaluation.model_copy(update={"sequences_per_batch": PER_BATCH}),
        step=5,
        sae=sae,
        model=config.model,
        table=world.table,
        sequences=range(7, 7 + N),
        record={},
        fingerprints={"sae": sae.fingerprint, "model": "tiny", "tokens": "made up"},
    )
    return LatentsJob(job=job, settings=settings, name=folder.name)
