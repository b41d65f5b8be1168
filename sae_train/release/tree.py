"""The release of a sweep: every run's SAE in one tree, named as released suites are.

    release/
      README.md, saes.json                             the card and the index, written last
      gemma_scope/res/layer_12/width_16k/average_l0_82/params.npz
      gemma_scope_2/..., sae_lens/...                  the same folders, in the other formats

The files of each run's own `release/` are linked where the file system allows it, else copied. A
tree without its index was interrupted; nothing publishes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from activation_cache.storage.files import (
    StoragePath,
    make_folder,
    on_disk,
    remove_tree,
    replacing,
    write_json,
    write_text,
)
from sae_train.config.run import Config
from sae_train.inference.read_formats import load_sae
from sae_train.release.export import CARD, Release, check_same, export_run, is_weights
from sae_train.release.index import INDEX, Entry, index, with_canonical
from sae_train.release.suite_names import GEMMA_SCOPE_SITES, Tree, released_folder, width_name
from sae_train.release.tree_card import suite_card
from sae_train.runs.folder import RELEASE

logger = logging.getLogger(__name__)

# What an entry has of the evaluation.
_MEASURED = (
    "l0", "fvu", "fvu_without_outlying", "fvu_median_token", "delta_loss", "loss_recovered",
    "alive_fraction", "sequences",
)  # fmt: skip


def export_tree(
    folder: StoragePath, config: Config, runs: Sequence[StoragePath], *, suite: Tree | None
) -> StoragePath:
    """Release every run, and gather what they released in `folder`/release.

    One SAE is in memory at a time.

    Args:
        config: of the sweep.
        runs: trained runs below `folder`.
        suite: whose names the runs' folders have; None: no suite's.

    Returns:
        The tree.

    Raises:
        UserError: as `export_run`; a file of the tree that reads back other than it was written.
    """
    tree = folder / RELEASE
    (tree / INDEX).unlink(missing_ok=True)  # from here on the tree is unfinished
    remove_tree(tree)
    make_folder(tree)
    entries: list[Entry] = []
    configs: dict[str, Config] = {}
    for run in runs:
        release = export_run(run)
        relative = PurePosixPath(str(run)[len(str(folder)) + 1 :].replace(os.sep, "/"))
        cell, name = tree_folder(
            relative, release, suite=suite, taken={entry.folder for entry in entries}
        )
        files = _gather(release, tree, name)
        configs[str(relative)] = release.config
        entries.append(_entry(release, cell=cell, folder=name, run=str(relative), files=files))
    entries = with_canonical(entries)
    write_text(tree / CARD, suite_card(config, entries, configs=configs))
    write_json(tree / INDEX, index(config, entries))
    logger.info("%s: %d SAEs, every file read back", tree, len(entries))
    return tree


def tree_folder(
    run: PurePosixPath, release: Release, *, suite: Tree | None, taken: set[str]
) -> tuple[str, str]:
    """Cell and folder of a run in the tree.

    In a suite they are those of its cell (docs/suites.md); in any other sweep
    `res/layer_12/width_16k/average_l0_82`, an architecture other than JumpReLU behind the width.
    Where two of a cell round to one L0 the later has its seed or a number behind it. What wasn't
    evaluated keeps the run's name.
    """
    evaluation = release.evaluation
    if suite == "gemma_scope_2":
        return re.sub(r"_l0_[^_/]+|_seed_\d+$", "", str(run)), str(run)
    cell = str(run.parent) if suite else _cell(release.config)
    if evaluation is None:
        logger.warning("%s was not evaluated: its folder is called after the run", run)
        return cell, f"{cell}/{run.name}"
    name = released_folder(f"{cell}/", tree="gemma_scope", average_l0=evaluation.l0)
    seed = release.config.train.seed
    endings = ["", *([f"_seed_{seed}"] if seed else []), *(f"_{n}" for n in range(2, 10_000))]
    return cell, next(name + ending for ending in endings if name + ending not in taken)


def _cell(config: Config) -> str:
    """The cell of a run, named as a suite names it."""
    sae = config.sae
    kind = "" if sae.architecture == "jumprelu" else f"_{sae.architecture}"
    affine = "_affine" if sae.affine_skip else ""
    if sae.site == "embedding":
        return f"res/embedding/width_{width_name(sae.width)}{kind}"
    site = "transcoders" if sae.is_transcoder else GEMMA_SCOPE_SITES.get(sae.site, sae.site)
    return f"{site}/layer_{sae.layer}/width_{width_name(sae.width)}{kind}{affine}"


def _gather(release: Release, tree: StoragePath, name: str) -> dict[str, int]:
    """Link a run's released files into the tree, and read the weights back from it.

    Returns:
        The size of each file in bytes, by path in the tree.
    """
    files: dict[str, int] = {}
    for source in release.files:
        if source.name == CARD:
            continue  # a run's own card stays with the run
        path = f"{source.parent.name}/{name}/{source.name}"
        target = make_folder((tree / path).parent) / source.name
        _link(source, target)
        files[path] = target.stat().st_size
    for path in files:
        if is_weights(PurePosixPath(path).name):
            check_same(release.sae, load_sae(tree / path), path=tree / path)
    return files


def _link(source: StoragePath, target: StoragePath) -> None:
    """Link the file under a second name; copy it where the file system can't."""
    if isinstance(source, Path) and isinstance(target, Path):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    with on_disk(source.parent, (source.name,)) as folder, replacing(target) as temporary:
        shutil.copyfile(folder / source.name, temporary)


def _entry(release: Release, *, cell: str, folder: str, run: str, files: dict[str, int]) -> Entry:
    config, measured = release.config, release.evaluation
    training = release.sae.metadata["training"]
    return Entry(
        folder=folder,
        cell=cell,
        canonical=False,
        run=run,
        site=config.sae.site,
        layer=config.sae.layer,
        width=config.sae.width,
        architecture=config.sae.architecture,
        hook_name=release.sae.metadata["hook_name"],
        **{name: getattr(measured, name, None) for name in _MEASURED},
        sparsity=training["sparsity"],
        tokens=training["tokens"],
        steps=training["step"],
        seed=training["seed"],
        fingerprint=release.sae.fingerprint,
        files=files,
    )
