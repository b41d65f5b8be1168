"""The trainers that are compared: their start, what is tried, and how each is asked for an L0.

Everybody's settings are searched alike (`study`): three runs, the start and two changes, each kept
if it is better than the best before. Theirs start from what an earlier, wider search chose at twice
the width, where there was none from the library's default. Ours start from the short recipe, whose
whitening, which trades FVU for delta loss, isn't searched: its powers are rows of their own.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.results import Settings
from benchmarks.quality.stores import LAYER, Rows
from benchmarks.quality.trainer import Budget, Trainer
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import with_values
from sae_train.config.run import Config
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.train.loop import train_cohort

WIDTH, BATCH, STEPS = 1024, 256, 200
MIDDLE = 50  # the L0 at which settings are searched
FRACTIONS = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
OURS = ("ours", "ours, Matryoshka", "ours, plain", "ours, TopK")
# The prefixes of the paper, at a tenth of the whole SAE's weight.
LIGHT = {"prefixes": [1 / 16, 1 / 8, 1 / 4, 1 / 2], "weights": [0.1, 0.1, 0.1, 0.1, 1.0]}

# How one trainer is made: the budget, the rows, settings and aim together.
Make = Callable[[Budget, Rows, dict[str, Any]], Trainer]
Aim = Callable[[int], Settings]  # a target L0 as the trainer is told it


@dataclass(frozen=True)
class Method:
    """One trainer.

    Attributes:
        make: None for ours, which `sae_train.train_cohort` trains from a config.
    """

    name: str
    start: Settings
    trials: tuple[Settings, ...]
    make: Make | None
    aim: Aim

    def train(
        self, rows: Rows, settings: Settings, aims: Sequence[Settings], *, seed: int, folder: Path
    ) -> list[Sae]:
        """Train an SAE for each aim; ours as a cohort in run folders below `folder`."""
        if self.make is None:
            return _by_us(rows, settings, aims, seed=seed, folder=folder)
        make = functools.partial(self.make, budget_of(rows, seed=seed), rows)
        return [_by_them(make(dict(settings | aim)), rows, seed=seed) for aim in aims]


def budget_of(rows: Rows, *, seed: int) -> Budget:
    """What everybody gets on a tap."""
    return Budget(
        d_model=rows.width,
        width=WIDTH,
        batch_size=BATCH,
        steps=STEPS,
        warmup_steps=STEPS // 10,
        sparsity_warmup_steps=STEPS // 5,
        decay_steps=STEPS // 5,
        input_scale=rows.input_scale,
        seed=seed,
    )


def _by_them(trainer: Trainer, rows: Rows, *, seed: int) -> Sae:
    for rows_BD in itertools.islice(rows.batches(size=BATCH, seed=seed), STEPS):
        trainer.step(rows_BD)
    return trainer.sae()


def _by_us(
    rows: Rows, settings: Settings, aims: Sequence[Settings], *, seed: int, folder: Path
) -> list[Sae]:
    configs = []
    for number, aim in enumerate(aims):
        own = settings | aim | {"output": str(folder / str(number))}
        configs.append(with_values(our_base(rows, seed=seed), own, source="benchmark"))
    train_cohort(configs, fresh=True)
    return [fold(load_trained(config.output)) for config in configs]


def our_base(rows: Rows, *, seed: int) -> Config:
    """Our config with everybody's budget: whatever it doesn't say the short recipe chooses."""
    own = {
        "sae": {"site": rows.site, "layer": LAYER, "width": WIDTH},
        "train": {
            "recipe": "short",
            "batch_size": BATCH,
            "tokens": BATCH * STEPS,
            "seed": seed,
            "sparsity": _match_l0(MIDDLE)["train.sparsity"],
        },
        "checkpoint": {"every_steps": STEPS, "keep": 1},
    }
    return with_values(rows.config, own, source="benchmark")


def _match_l0(target: int) -> Settings:
    return {"train.sparsity": {"penalty": "match_l0", "target": target, "coefficient": 1e-4}}


def _named(name: str) -> Aim:
    return lambda target: {name: target}


def _made(module: str, name: str, *, with_norms: bool = False) -> Make:
    """A trainer of a library, which is imported where it trains: tables need none.

    `b_dec: mean` starts b_dec where only ours can by a setting.
    """

    def make(budget: Budget, rows: Rows, settings: dict[str, Any]) -> Trainer:
        if settings.pop("b_dec", None) == "mean":
            settings["b_dec_D"] = rows.all_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        if with_norms:
            settings["norms"] = rows.batches(size=budget.batch_size, seed=budget.seed)
        kind = getattr(importlib.import_module(f"benchmarks.quality.{module}"), name)
        made: Trainer = kind(budget, **settings)
        return made

    return make


def _rates(*rates: float) -> tuple[Settings, ...]:
    return tuple({"learning_rate": rate} for rate in rates)


def _our_rates(*rates: float) -> tuple[Settings, ...]:
    return tuple({"train.learning_rate.peak": rate} for rate in rates)


METHODS = (
    Method(
        "ours",  # the short recipe as it is, not searched
        start={},
        trials=(),
        make=None,
        aim=_match_l0,
    ),
    Method(
        "ours, Matryoshka",
        start={"sae.matryoshka": LIGHT},
        trials=_our_rates(3.5e-3, 1e-2),
        make=None,
        aim=_match_l0,
    ),
    Method(
        "SAELens JumpReLU",
        start={"coefficient": 10.0, "learning_rate": 3e-3, "bandwidth": 0.05, "threshold": 0.01},
        trials=(*_rates(1e-2), {"coefficient": 1.0}),
        make=_made("of_sae_lens", "JumpRelu", with_norms=True),
        aim=_named("target_l0"),
    ),
    Method(
        "SAELens Matryoshka",
        start={"learning_rate": 3e-3, "fractions": FRACTIONS},
        trials=(*_rates(1e-2), {"b_dec": "mean"}),
        make=_made("of_sae_lens", "Matryoshka", with_norms=True),
        aim=_named("k"),
    ),
    Method(
        "sparsify TopK",
        start={"learning_rate": 5e-3 / (WIDTH / 2**14) ** 0.5},  # Signum, its default
        trials=(
            {"optimiser": "adam", "learning_rate": 3e-3},
            {"optimiser": "adam", "learning_rate": 1e-2},
        ),
        make=_made("of_sparsify", "TopK"),
        aim=_named("k"),
    ),
    Method(
        "dictionary_learning JumpReLU",
        start={"learning_rate": 3e-3, "bandwidth": 0.01},
        trials=(*_rates(1e-2), {"b_dec": "mean"}),
        make=_made("of_dictionary_learning", "JumpRelu"),
        aim=_named("target_l0"),
    ),
    Method(
        "dictionary_learning Matryoshka",
        start={
            "learning_rate": 2e-4 / (WIDTH / 2**14) ** 0.5,
            "fractions": FRACTIONS,
        },  # its default
        trials=(*_rates(3e-3), {"fractions": (1 / 4, 3 / 4)}),
        make=_made("of_dictionary_learning", "Matryoshka"),
        aim=_named("k"),
    ),
    Method(
        "ours, plain",  # Gemma Scope's loss and optimiser, at a rate for few steps
        start={
            "sae.whitening": 0.0,
            "sae.revive_coefficient": 0.0,
            "train.adam.beta1": 0.0,
            "train.learning_rate.bias_multiplier": 1.0,
        },
        trials=_our_rates(1e-3, 5e-3),
        make=None,
        aim=_match_l0,
    ),
    Method(
        "ours, TopK",
        start={"sae.architecture": "topk"},
        trials=_our_rates(3.5e-3, 5e-3),
        make=None,
        aim=lambda target: {"sae.k": target, "train.sparsity": {"penalty": "none"}},
    ),
)
