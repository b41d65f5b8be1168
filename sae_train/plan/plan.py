"""`sae plan`: what a config needs, computed before anything is spent.

Everything here follows from the config, the language model's shape and a table of accelerators:
no store is opened, but for the manifest of an imported one, no device asked, nothing allocated.
docs/plan.md says how to read the result and how good it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from activation_cache.language_model.published_sizes import config_for_planning
from sae_train.config.run import Config
from sae_train.plan.accelerators import Accelerator
from sae_train.plan.imported import NO_HARVEST, ImportedRows
from sae_train.plan.recipe import RecipePlan, recipe_plans
from sae_train.plan.runs import CohortPlan, RunPlan, plan_cohorts, plan_run
from sae_train.plan.verdict import AcceleratorPlan, Assumptions, on_accelerator
from sae_train.plan.work import HarvestWork, StorePlan, harvest_work, store_plan


@dataclass(frozen=True)
class Plan:
    """What `sae plan` prints."""

    name: str
    model: str
    model_from: str
    model_dtype: str
    assumptions: Assumptions
    recipes: tuple[RecipePlan, ...]
    store: StorePlan
    harvest: HarvestWork
    runs: tuple[RunPlan, ...]
    cohorts: tuple[CohortPlan, ...]
    accelerators: tuple[AcceleratorPlan, ...]


def make_plan(
    config: Config,
    *,
    runs: Sequence[tuple[str, Config]],
    max_members: int,
    accelerators: Sequence[Accelerator],
    assumptions: Assumptions,
) -> Plan:
    """Compute everything that a config needs.

    Args:
        runs: (name, config) of every SAE it trains: itself, or the members of its sweep.
        max_members: the most runs that train together.

    Raises:
        UserError: the model's shape is neither at hand nor known, or has no such layer; or there
            is no imported store.
    """
    if config.cache.is_imported:
        rows = ImportedRows.of(config)
        ((_, config), *runs) = rows.with_dtype([("", config), *runs])
        source, store, harvest = "imported rows", rows.plan, NO_HARVEST
        run_plans = tuple(plan_run(one, name=name, gemma=rows.width(one)) for name, one in runs)
    else:
        gemma, source = config_for_planning(config.model)
        store = store_plan(config.cache, config.text, gemma)
        harvest = harvest_work(config.cache, config.text, gemma, dtype=config.model.dtype)
        run_plans = tuple(plan_run(one, name=name, gemma=gemma) for name, one in runs)
    cohorts = plan_cohorts([one for _, one in runs], plans=run_plans, max_members=max_members)
    return Plan(
        name=config.name,
        model=config.model.weights,
        model_from=source,
        model_dtype=config.model.dtype,
        assumptions=assumptions,
        recipes=recipe_plans(runs),
        store=store,
        harvest=harvest,
        runs=run_plans,
        cohorts=cohorts,
        accelerators=tuple(
            on_accelerator(
                one,
                config,
                harvest=harvest,
                runs=run_plans,
                cohorts=cohorts,
                assumptions=assumptions,
            )
            for one in accelerators
        ),
    )


def plan_record(plan: Any) -> Any:
    """A plan, or a suite's, as JSON holds it: every field, and the sums that are properties."""
    if isinstance(plan, BaseModel):
        return plan.model_dump()
    if isinstance(plan, Mapping):
        return {key: plan_record(value) for key, value in plan.items()}
    if isinstance(plan, list | tuple):
        return [plan_record(value) for value in plan]
    if not is_dataclass(plan):
        return plan
    kind = type(plan)
    sums = [name for name, value in vars(kind).items() if isinstance(value, property)]
    names = [*(field.name for field in fields(plan)), *sums]
    return {name: plan_record(getattr(plan, name)) for name in names}
