"""A config's plain values with what its recipe chooses: keys that are given stay as they are.

`train.recipe_chose` lists the keys that were filled. The config that a run keeps has every number,
and is read back as it is. Where a value set over a config (by an override, for a run of a sweep)
changes what the formulas read, the recipe chooses anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard, get_args

from sae_train.recipe.formulas import (
    ARCHITECTURE,
    BATCH_SIZE,
    Budget,
    Choice,
    Name,
    choices,
    share_of_short,
)

RECIPE, CHOSE = "train.recipe", "train.recipe_chose"


def filled(values: Any) -> Any:
    """The values with the recipe's where they have none; the same where no recipe is asked for.

    What is no config, or has a mistake in a key that formulas read, is left to the config's checks.
    """
    found = chosen_for(values)
    if not found:
        return values
    whole = copy.deepcopy(values)
    listed = value_at(whole, CHOSE, None)
    earlier = listed if isinstance(listed, list) else []
    # A config that was filled before has what its recipe was then: a key that is new in a recipe
    # must not change a run that was begun without it.
    fillable = earlier or list(found)
    put = [key for key in found if key in fillable and _put(whole, key, found[key].value)]
    whole["train"]["recipe_chose"] = [key for key in found if key in put or key in earlier]
    return whole


def share_of(values: Any) -> float:
    """The share of `short` in what `chosen_for` gives; 0 without a recipe."""
    name, budget = _read(values)
    return share_of_short(name, budget) if _is_name(name) and budget is not None else 0.0


def chosen_for(values: Any) -> dict[str, Choice]:
    """What the recipe of these values chooses, whether or not they have a value of their own."""
    name, budget = _read(values)
    if not _is_name(name) or budget is None or mistake(name, architecture=budget.architecture):
        return {}
    return choices(name, budget)


def mistake(name: Name, *, architecture: Any) -> str | None:
    """Why a recipe doesn't go with an SAE; None where it does."""
    if name != "gemma_scope" or architecture == "jumprelu":
        return None
    return (
        f"train.recipe gemma_scope is for sae.architecture jumprelu, as Gemma Scope's SAEs are, "
        f"and it is {architecture}: set train.recipe to auto or short, which choose what "
        f"{architecture} has of these settings, or leave it out"
    )


def forget(values: dict[str, Any], *, keys: Iterable[str], before: Mapping[str, Any]) -> None:
    """After `keys` were set in values that held `before`: they are the user's, not the recipe's.

    Where what the formulas read is another now, or a whole section was set, all that the recipe had
    chosen is taken out, to be chosen anew.
    """
    chosen = value_at(values, CHOSE, None)
    if not isinstance(chosen, list):
        return
    keys = list(keys)
    chose = [one for one in chosen if not any(_touches(key, one) for key in keys)]
    is_section = any(one.startswith(f"{key}.") for key in keys for one in chosen)
    if is_section or _read(before) != _read(values):
        for key in chose:
            _take_out(values, key)
        chose = []
    values["train"]["recipe_chose"] = chose


def value_at(values: Any, key: str, default: Any) -> Any:
    """The value of a dotted key in nested mappings; the default where there is none."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return default
        values = values[part]
    return values


def _is_name(name: Any) -> TypeGuard[Name]:
    return name in get_args(Name)


def _read(values: Any) -> tuple[Any, Budget | None]:
    return value_at(values, RECIPE, None), _budget(values)


def _budget(values: Any) -> Budget | None:
    tokens = _count(value_at(values, "train.tokens", None))
    batch_size = _count(value_at(values, "train.batch_size", BATCH_SIZE))
    if tokens is None or batch_size is None:
        return None
    chose = value_at(values, CHOSE, None)
    filled_before = chose if isinstance(chose, list) else []

    def given(key: str) -> Any:
        return None if key in filled_before else value_at(values, key, None)

    beta1 = given("train.adam.beta1")
    hinders = ("sae.target", "sae.start_from", "train.end_to_end")
    plain = all(value_at(values, key, None) is None for key in hinders)
    return Budget(
        steps=max(1, tokens // batch_size),
        batch_size=batch_size,
        architecture=value_at(values, "sae.architecture", ARCHITECTURE),
        penalty=value_at(values, "train.sparsity.penalty", "l0"),
        starts_trained=value_at(values, "sae.start_from", None) is not None,
        can_whiten=plain and value_at(values, "sae.site", None) != "embedding",
        site=value_at(values, "sae.site", None),
        beta1=beta1 if isinstance(beta1, int | float) else None,
        is_sparse=value_at(values, "train.step", None) == "sparse",
        dead_after_tokens=_count(given("train.dead_after_tokens")),
    )


def _count(value: Any) -> int | None:
    """A whole number above 0, also written 4e9; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        return None
    return int(value) if value == value // 1 and value < float("inf") else None


def _put(values: dict[str, Any], key: str, value: Any) -> bool:
    """Set a dotted key that has no value; no section is made of what isn't one."""
    *sections, last = key.split(".")
    holder: Any = values
    for section in sections:
        if section not in holder:
            if key.startswith("train.sparsity."):
                return False  # the penalty must be given, and its lack be told
            holder[section] = {}
        holder = holder[section]
        if not isinstance(holder, dict):
            return False
    if last in holder:
        return False
    holder[last] = value
    return True


def _take_out(values: Any, key: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.get(section) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(last, None)


def _touches(key: str, chosen: str) -> bool:
    """Does setting `key` set `chosen`, a section that holds it, or what it holds?"""
    return f"{chosen}.".startswith(f"{key}.") or f"{key}.".startswith(f"{chosen}.")
