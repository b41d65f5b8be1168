"""Cohorts: which runs read the same batches, and so can train side by side on each.

A batch is a pure function of (store, tap, batch size, seed, step). Runs for which all of that is
the same, and the mesh the batch is put on, share every read, whatever their widths, penalties,
learning rates, lengths or seeds of initialisation.
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
    """By dotted key, all that a batch on its devices depends on."""
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
    """Runs with equal keys read the same batches and put them on the same devices."""
    return json.dumps(_what_is_read(config), sort_keys=True)


# What the step is given as arrays, or never looks at: it may differ without another compilation.
_NOT_COMPILED_IN = (
    "sae.site",
    "sae.layer",
    "sae.threshold.init",
    "sae.b_dec_init",
    "train.seed",
    "train.data_seed",
    "train.learning_rate",
    "train.sparsity.coefficient",
    "train.sparsity.warmup_steps",
    "train.log_every_steps",
    "train.tensorboard",
)


def step_key(config: Config) -> str:
    """Runs of a cohort with equal keys have one compiled step (`step.make_train_step`)."""
    sections = config.model_dump(mode="json", include={"sae", "train"})
    for key in _NOT_COMPILED_IN:
        *path, last = key.split(".")
        holder = sections
        for part in path:
            holder = holder[part]
        holder.pop(last, None)
    return json.dumps(sections, sort_keys=True)


def group_cohorts(runs: Sequence[tuple[Run, Config]], *, max_members: int) -> list[tuple[Run, ...]]:
    """Runs by cohort: in their order, each cohort where its first run stands.

    Of more than `max_members` runs that could train together as many cohorts of nearly equal size
    are made as are needed.
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
    """Check that runs can train side by side.

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
