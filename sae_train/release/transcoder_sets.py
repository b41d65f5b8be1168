"""Sets of transcoders for circuit-tracer: one for every layer of the model, alike in all else.

    release/circuit_tracer/transcoder_all/width_16k_l0_small/
      layer_0.safetensors ...      one file per layer
      features/                    where all runs have latents (circuit_tracer_features.py)
      config.yaml                  written last

circuit-tracer replaces every MLP of the model, so a set with a layer missing is of no use to it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, make_folder, on_disk, remove_tree
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import read_run_config
from sae_train.config.run import Config
from sae_train.inference.circuit_tracer import (
    read_layer,
    set_config,
    stands_for_mlp,
    write_layer,
    write_set_config,
)
from sae_train.inference.fold import fold
from sae_train.latents.reader import has_latents, open_latents
from sae_train.release.circuit_tracer_features import write_features
from sae_train.release.export import check_same
from sae_train.release.suite_names import sparsity_name, width_name
from sae_train.runs.folder import RELEASE

logger = logging.getLogger(__name__)

SETS = "circuit_tracer"


@dataclass(frozen=True)
class TranscoderSet:
    """Runs that make a set: by layer, one each."""

    name: str
    runs: dict[int, StoragePath]


def export_sets(
    folder: StoragePath, runs: Sequence[StoragePath], *, is_suite: bool, num_layers: int
) -> list[StoragePath]:
    """Write every complete set of a sweep's transcoders; one SAE is in memory at a time.

    Incomplete sets are named in a warning.

    Args:
        folder: the sweep's; its `release/` is written.
        runs: trained runs below `folder`.
        is_suite: the runs' folders are named as a suite's, with the layer in them.
        num_layers: of the model.

    Returns:
        The folders of the sets.

    Raises:
        UserError: no set is complete; a file reads back other than it was written.
    """
    complete: list[TranscoderSet] = []
    problems: list[str] = []
    for found in find_sets(folder, runs, is_suite=is_suite, problems=problems):
        missing = sorted(set(range(num_layers)) - set(found.runs))
        if missing:
            problems.append(
                f"{found.name} has {len(found.runs)} of the model's {num_layers} layers and lacks "
                + ", ".join(map(str, missing))
            )
        else:
            complete.append(found)
    if not complete:
        raise UserError(
            f"{folder} has no whole set for circuit-tracer, which needs a transcoder from an MLP's "
            f"input to its output in each of the model's {num_layers} layers, all of one width: "
            + ("; ".join(problems) or "it has no such transcoder. Train some (docs/transcoders.md)")
        )
    for problem in problems:
        logger.warning("left out: %s", problem)
    return [_write(found, folder / RELEASE / SETS / found.name) for found in complete]


def find_sets(
    folder: StoragePath, runs: Sequence[StoragePath], *, is_suite: bool, problems: list[str]
) -> list[TranscoderSet]:
    """The runs that are transcoders of an MLP, grouped by all but their layer.

    Args:
        problems: gets a line for each group in which one layer has two runs.
    """
    sets: dict[str, TranscoderSet] = {}
    doubled: dict[str, str] = {}
    for run in runs:
        config = read_run_config(run)
        if config.sae.target != "mlp_out":
            continue
        relative = PurePosixPath(run.as_posix()[len(folder.as_posix()) + 1 :])
        name = re.sub(r"layer_\d+[_/]?", "", str(relative)) if is_suite else _name(config)
        group = sets.setdefault(name, TranscoderSet(name, {})).runs
        other = group.setdefault(config.sae.layer, run)
        if other != run:
            doubled[name] = (
                f"{name} has two runs of layer {config.sae.layer}, {other.name} and {run.name}, "
                "that differ in other settings: export them from sweeps of their own"
            )
    problems += doubled.values()
    return [found for name, found in sets.items() if name not in doubled]


def _name(config: Config) -> str:
    """A set's name from what its runs share, as a suite would call it."""
    sae = config.sae
    kind = "" if sae.architecture == "jumprelu" else f"_{sae.architecture}"
    affine = "_affine" if sae.affine_skip else ""
    read = "" if sae.site == "mlp_in" else f"{sae.site}_"
    return f"transcoders/{read}width_{width_name(sae.width)}{kind}{affine}/{sparsity_name(config)}"


def _write(found: TranscoderSet, target: StoragePath) -> StoragePath:
    remove_tree(target)
    config: dict[str, Any] = {}
    for layer in sorted(found.runs):
        sae = fold(load_trained(found.runs[layer]))
        assert stands_for_mlp(sae), found
        config = set_config(sae)
        path = write_layer(sae, make_folder(target))
        with on_disk(target, (path.name,)) as here:
            check_same(sae, read_layer(here / path.name, config=config), path=path)
    without = [run for run in found.runs.values() if not has_latents(run)]
    if without:
        logger.warning(
            "%s has no features for circuit-tracer's page, for %d of its runs have no latents: "
            "write them with `sae latents` and export again",
            target,
            len(without),
        )
    else:
        write_features({layer: open_latents(run) for layer, run in found.runs.items()}, target)
    write_set_config(config, target)
    logger.info("%s: %d transcoders, every file read back", target, len(found.runs))
    return target
