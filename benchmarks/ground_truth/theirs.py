"""Other libraries' trainers on the rows of a known truth. Needs the extra `bench`."""

from __future__ import annotations

import itertools

from activation_cache.store.store import open_store
from benchmarks.quality.methods import METHODS
from benchmarks.quality.stores import Rows
from benchmarks.quality.trainer import Budget
from sae_train.config.run import Config
from sae_train.inference.sae import Sae

THEIRS = {method.name: method for method in METHODS if method.make is not None}


def train(name: str, config: Config, *, l0: float) -> Sae:
    """One SAE with the width, batches, steps, rate and schedule of one of our configs.

    All else is as `benchmarks.quality` begins its search with.
    """
    method, training, store = THEIRS[name], config.train, open_store(config.cache.path)
    assert method.make is not None
    rows = Rows(config.sae.site, "synthetic", config, store)
    budget = Budget(
        d_model=rows.width,
        width=config.sae.width,
        batch_size=training.batch_size,
        steps=training.steps,
        warmup_steps=training.learning_rate.warmup_steps,
        sparsity_warmup_steps=training.sparsity.warmup_steps,
        decay_steps=training.learning_rate.decay_steps,
        input_scale=rows.input_scale,
        seed=training.seed,
    )
    settings = method.start | method.aim(max(1, round(l0)))
    settings |= {"learning_rate": training.learning_rate.peak}
    if name.startswith("sparsify"):
        settings |= {"optimiser": "adam"}
    trainer = method.make(budget, rows, settings)
    batches = rows.batches(size=budget.batch_size, seed=budget.seed)
    for rows_BD in itertools.islice(batches, budget.steps):
        trainer.step(rows_BD)
    return trainer.sae()
