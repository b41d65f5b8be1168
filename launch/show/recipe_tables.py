"""`sae plan`: what the recipe of a config chose, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sae_train.plan.recipe import RecipePlan, Setting


def recipe_tables(plans: Sequence[RecipePlan]) -> list[Table]:
    """A table for each group of runs: key, value, and the formula in words."""
    return [_table(plan, alone=len(plans) == 1) for plan in plans]


def _table(plan: RecipePlan, *, alone: bool) -> Table:
    title = f"train.recipe {plan.recipe} for {plan.steps:,} steps of {plan.batch_size:,} rows"
    if not alone:
        more = f" and {len(plan.runs) - 1} more" if len(plan.runs) > 1 else ""
        title += f", {plan.runs[0]}{more}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("value", no_wrap=True, justify="right")
    table.add_column("why")
    for one in plan.settings:
        table.add_row(one.key, _text(one.value), _why(one, plan))
    if plan.recipe == "auto":
        table.caption = (
            f"s is {plan.share_of_short:.3g}: 1 up to 1,000 steps, 0 from a million on, straight "
            "in the logarithm between (docs/recipes.md)"
        )
    return table


def _why(one: Setting, plan: RecipePlan) -> str:
    if not one.is_chosen:
        return f"the config's own; {plan.recipe} would take {_text(one.recipes)}"
    if one.value != one.recipes:
        return f"chosen when the run began; {plan.recipe} now takes {_text(one.recipes)}"
    return one.why


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:,}" if isinstance(value, int) else str(value)
