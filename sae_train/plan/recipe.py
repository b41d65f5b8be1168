"""What `train.recipe` chose for the runs of a plan, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sae_train.config.file import value_at
from sae_train.config.run import Config
from sae_train.recipe.fill import chosen_for, share_of


@dataclass(frozen=True)
class Setting:
    """One key that the recipe has a value for.

    Attributes:
        value: what the runs have.
        recipes: what the recipe chooses: another value where the config gives its own, or where a
            run was begun with other formulas.
        is_chosen: the value is the recipe's, not the config's own.
    """

    key: str
    value: Any
    recipes: Any
    is_chosen: bool
    why: str


@dataclass(frozen=True)
class RecipePlan:
    """A recipe, the budget it was given, what it chose, and the runs that have just that."""

    recipe: str
    steps: int
    batch_size: int
    share_of_short: float
    settings: tuple[Setting, ...]
    runs: tuple[str, ...]


def recipe_plans(runs: Sequence[tuple[str, Config]]) -> tuple[RecipePlan, ...]:
    """One for each group of (name, config) that have the same of everything; runs without a recipe
    are left out.
    """
    groups: dict[RecipePlan, list[str]] = {}
    for name, config in runs:
        if config.train.recipe is not None:
            groups.setdefault(_of(config), []).append(name)
    return tuple(replace(plan, runs=tuple(names)) for plan, names in groups.items())


def _of(config: Config) -> RecipePlan:
    train = config.train
    assert train.recipe is not None
    values = config.model_dump(include={"sae", "train"})
    return RecipePlan(
        recipe=train.recipe,
        steps=train.steps,
        batch_size=train.batch_size,
        share_of_short=share_of(values),
        settings=tuple(
            Setting(
                key=key,
                value=value_at(config, key),
                recipes=choice.value,
                is_chosen=key in train.recipe_chose,
                why=choice.why,
            )
            for key, choice in chosen_for(values).items()
        ),
        runs=(),
    )
