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
    if steps * batch_size > cache.tokens:
        yield (
            f"train reads {steps} batches of {batch_size}, {steps * batch_size} rows, and a "
            f"rolling store has each of its rows once: cache.tokens is {cache.tokens}. Raise "
            "cache.tokens, lower train.tokens, or leave cache.rolling out for several epochs"
        )
