"""What a run must keep to if its store is a rolling one (`cache.rolling`)."""

from __future__ import annotations

from collections.abc import Iterator

from activation_cache.config import CacheConfig


def mistakes(cache: CacheConfig, *, batch_size: int, steps: int) -> Iterator[str]:
    """A line for each rule of the config that a rolling store's use breaks.

    Args:
        steps: that read rows of the store.
    """
    if cache.rolling is None:
        return
    if batch_size > cache.shuffle_rows:
        yield (
            f"train.batch_size {batch_size} is larger than a bucket of the rolling store, "
            f"cache.shuffle_rows {cache.shuffle_rows}: raise cache.shuffle_rows, or lower "
            "train.batch_size"
        )
    rows = steps * batch_size
    if rows > cache.tokens:
        yield (
            f"train.tokens makes {steps} batches of {batch_size}, which read {rows} rows of the "
            f"store, and cache.tokens {cache.tokens} is fewer. A rolling store deletes a row once "
            f"it is read: raise cache.tokens to {rows} (more text, no more disk) or lower "
            "train.tokens. To read the same rows in several epochs leave cache.rolling out: then "
            "the disk holds them all, and `sae plan` says what they take"
        )
