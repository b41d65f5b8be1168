"""The last step of a harvest or an import: the manifest, which makes the folder a store."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from activation_cache.storage.files import StoragePath
from activation_cache.storage.records import write_record
from activation_cache.store.centring import gamma_of
from activation_cache.store.manifest import Manifest
from activation_cache.store.store import MANIFEST_FILE, PLAN_FILE, open_store
from activation_cache.store.writer import Commit

logger = logging.getLogger(__name__)


def finish_store(path: StoragePath, plan: Manifest, commits: Mapping[int, Commit]) -> Manifest:
    """Write the manifest: the plan with what the records of all buckets add up to.

    Of a rolling store those are the buckets of the first window, and the plan stays.
    """
    rows = sum(commit.rows for commit in commits.values())
    sites = []
    for entry in plan.sites:
        total = math.fsum(c.sum_of_squares[entry.tap.name] for c in commits.values())
        sites.append(entry.model_copy(update={"mean_squared_norm": total / rows}))
    manifest = plan.model_copy(update={"sites": sites})
    if plan.outlying is not None:
        dropped = sum(commit.dropped for commit in commits.values())
        outlying = plan.outlying.model_copy(update={"dropped": dropped})
        manifest = manifest.model_copy(update={"outlying": outlying})
        logger.info(
            "%d of %d rows (%.3g %%) had a norm above %g times the median of their bucket and were "
            "dropped; other rows have their places",
            dropped,
            rows,
            100 * dropped / rows,
            outlying.max_norm_over_median,
        )
    write_record(path / MANIFEST_FILE, manifest)
    if plan.window is None:
        (path / PLAN_FILE).unlink()
    what = "finished" if plan.window is None else "begun, its first window is there"
    logger.info("the store at %s is %s: %d rows", path, what, rows)
    store = open_store(path)
    far = ", ".join(f"{tap.name} {gamma_of(store, tap):.2f}" for tap in store.taps)
    logger.info("γ, the length of the mean over the spread around it: %s", far)
    return manifest
