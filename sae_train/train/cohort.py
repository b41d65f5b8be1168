"""Which runs can train side by side: those that read the same batches. A group of them is a cohort.

A batch depends on the store, the tap, the batch size, the seed of the order and the step, and on
nothing else. Runs that agree in these and in the mesh share every read. They may differ in width,
penalty, learning rate, number of tokens and seed of the initial weights.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from activation_cache.runtime.errors import UserError
from sae_train.config.run import Config

Run = TypeVar("Run")


def _what_is_read(config: Config) -> dict[str, Any]:
    """Everything that a batch and its place on the devices depend on, by dotted key."""
    return {
        "model": config.model.model_dump(mode="json"),
        "text": config.text.model_dump(mode="json"),
        "cache": config.cache.model_dump(mode="json"),
        "sae.site": config.sae.site,
        "sae.layer": config.sae.layer,
        "sae.target": config.sae.target,
        "train.batch_size": config.train.batch_size,
        "train.data_seed": config.train.order_seed,
        "mesh": config.mesh.model_dump(mode="json"),
    }


def batch_key(config: Config) -> str:
    """A text that is equal for runs that read the same batches and put them on the same devices."""
    return json.dumps(_what_is_read(config), sort_keys=True)


# The step is given these as arrays, or doesn't use them: runs that differ in them alone share one
# compiled program.
_NOT_COMPILED_IN = (
    "sae.site",
    "sae.layer",
    "sae.threshold.init",
    "sae.b_dec_init",
    "sae.threshold_per_latent",
    "train.recipe",
    "train.recipe_chose",
    "train.seed",
    "train.data_seed",
    "train.learning_rate",
    "train.sparsity.coefficient",
    "train.sparsity.warmup_steps",
    "train.log_every_steps",
    "train.tensorboard",
    "train.wandb",
)


def step_key(config: Config) -> str:
    """A text that is equal for runs of a cohort that can use the same compiled step."""
    sections = config.model_dump(mode="json", include={"sae", "train"})
    for key in _NOT_COMPILED_IN:
        *path, last = key.split(".")
        holder = sections
        for part in path:
            holder = holder[part]
        holder.pop(last, None)
    return json.dumps(sections, sort_keys=True)


def group_cohorts(runs: Sequence[tuple[Run, Config]], *, max_members: int) -> list[tuple[Run, ...]]:
    """Sort runs into cohorts; runs keep their order, and a cohort has the place of its first run.

    If more than `max_members` runs read the same batches, they are split into as few cohorts as
    possible, of nearly equal size.
    """
    alike: dict[str, list[Run]] = {}
    for run, config in runs:
        alike.setdefault(batch_key(config), []).append(run)
    return [part for group in alike.values() for part in _split(group, max_members=max_members)]


def _split(group: Sequence[Run], *, max_members: int) -> list[tuple[Run, ...]]:
    parts = -(-len(group) // max_members)
    size, rest = divmod(len(group), parts)
    ends = [number * size + min(number, rest) for number in range(parts + 1)]
    return [tuple(group[start:end]) for start, end in itertools.pairwise(ends)]


def check_cohort(configs: Sequence[Config]) -> None:
    """Refuse runs that can't train side by side.

    Raises:
        UserError: two read different batches, or write to the same folder.
    """
    assert configs, "a cohort has a member"
    first = configs[0]
    expected = _what_is_read(first)
    for config in configs[1:]:
        found = _what_is_read(config)
        for key, value in found.items():
            if value != expected[key]:
                raise UserError(
                    f"{first.name} and {config.name} can't train together: {key} is "
                    f"{expected[key]} in the one and {value} in the other, and runs that share "
                    "their reads have the same. Train them with two commands"
                )
    outputs = [config.output for config in configs]
    for output in outputs:
        if outputs.count(output) > 1:
            raise UserError(f"two of the runs have the same output {output}: give each its own")
