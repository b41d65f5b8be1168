"""What a config with a rolling store must keep to."""

from __future__ import annotations

import re
from typing import Any

import pytest

from activation_cache.runtime.errors import UserError
from activation_cache.store.manifest import window_buckets
from sae_train.config.file import with_values
from tests.support.configs import make_config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train.batch_size": 65}, "train.batch_size 65 is larger than a bucket of the rolling"),
        (
            {"train.tokens": 1024},
            "train.tokens makes 16 batches of 64, which read 1024 rows of the store, and "
            "cache.tokens 1000 is fewer. A rolling store deletes a row once it is read",
        ),
        ({"cache.rolling": {}}, "give the window's size once, as buckets"),
        ({"cache.rolling": {"buckets": 1, "bytes": 1}}, "give the window's size once, as buckets"),
        ({"cache.rolling.buckets": 0}, "cache.rolling.buckets"),
    ],
)
def test_what_a_rolling_store_can_not_give_is_refused(values: dict[str, Any], words: str) -> None:
    config = with_values(make_config(), {"cache.rolling": {"buckets": 2}}, source="test")
    with pytest.raises(UserError, match=re.escape(words)):
        with_values(config, values, source="test")


def test_the_advice_against_a_second_epoch_is_right() -> None:
    """Each of the three ways out that the refusal names is one."""
    rolling: dict[str, Any] = {"cache.rolling": {"buckets": 2}}
    values = rolling | {"train.tokens": 1064}  # a part of a batch is not read
    with pytest.raises(UserError) as refused:
        with_values(make_config(), values, source="test")
    assert "raise cache.tokens to 1024 (more text, no more disk) or lower" in str(refused.value)
    for way_out in ({"cache.tokens": 1024}, {"train.tokens": 1000}, {"cache.rolling": None}):
        with_values(make_config(), values | way_out, source="test")


def test_a_window_in_bytes_leaves_room_for_one_bucket_more() -> None:
    rolling = with_values(make_config(), {"cache.rolling": {"bytes": 1000}}, source="test")
    assert rolling.cache.rolling is not None
    assert window_buckets(rolling.cache.rolling, bucket_bytes=200) == 4
    assert window_buckets(rolling.cache.rolling, bucket_bytes=500) == 1
    with pytest.raises(
        UserError, match=r"the smallest window and the bucket after it take 1\.2 kB"
    ):
        window_buckets(rolling.cache.rolling, bucket_bytes=600)
