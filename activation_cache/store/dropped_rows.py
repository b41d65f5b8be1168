"""Outlying rows of a bucket (`activation_cache.outlying`), dropped before it is written.

With `max_norm_over_median` k a row goes if, at any tap of the store, its norm is above k times the
median norm of its bucket there. The median is that of the bucket's own rows, so that a bucket stays
a function of the plan alone and needs no other bucket.

A dropped row's place is taken by another row of the bucket, drawn by a hash of the place: the
number of rows, and with it every order and step, is what it is without dropping. Legend: N rows,
D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int64

from activation_cache.gemma.taps import Tap
from activation_cache.outlying import largest_usual_norm
from activation_cache.runtime.errors import UserError
from activation_cache.store.manifest import Manifest
from activation_cache.store.order import derive_key, mix

_OUTLYING = 6  # the first word after the seed in the key, beside those of `order`
_ROWS_AT_ONCE = 4096


def replaced_rows(
    activations: Mapping[Tap, Float[np.ndarray, "N _"]], *, bucket: int, manifest: Manifest
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
    """The places of a bucket's outlying rows, and for each the place of the row to put there.

    Raises:
        UserError: rows are not finite, so that they have no median; or all would be dropped.
    """
    none = np.zeros(0, np.int64)
    if manifest.outlying is None:
        return none, none
    limit = manifest.outlying.max_norm_over_median
    too_long = np.zeros(len(next(iter(activations.values()))), bool)
    for tap, rows in activations.items():
        norms_N = _norms(rows)
        longest = largest_usual_norm(norms_N, over_median=limit)
        if not np.isfinite(norms_N).all():
            raise UserError(
                f"bucket {bucket} of {tap.name} holds NaN or infinity: activations must be "
                "finite. Check the weights, or set model.dtype to float32."
            )
        too_long |= norms_N > longest
    places, kept = np.flatnonzero(too_long), np.flatnonzero(~too_long)
    if not len(kept):
        raise UserError(
            f"cache.max_norm_over_median {limit:g} drops every row of bucket {bucket}, each at one "
            "of the taps: raise it, or put fewer taps into one store"
        )
    key = np.uint64(derive_key(manifest.shuffling.seed, _OUTLYING, bucket))
    drawn = mix(places.astype(np.uint64) + key) % np.uint64(len(kept))
    return places, kept[drawn.astype(np.int64)]


def _norms(rows_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    parts = (
        np.square(rows_ND[first : first + _ROWS_AT_ONCE].astype(np.float64)).sum(axis=1)
        for first in range(0, len(rows_ND), _ROWS_AT_ONCE)
    )
    return np.sqrt(np.concatenate(list(parts)))
