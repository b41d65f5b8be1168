"""Addresses in object storage, as text: `gs://bucket/some/key` and `s3://bucket/some/key`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from activation_cache.runtime.errors import UserError

SCHEMES = ("gs", "s3")


def is_url(text: str) -> bool:
    """Is this a URL, of whatever kind, rather than a path on a disk? `gs:/x` is taken for one."""
    return re.match(r"[A-Za-z0-9+.-]+://|(gs|s3):", text) is not None


@dataclass(frozen=True, order=True)
class Address:
    """A name in a bucket, or the bucket itself.

    Attributes:
        scheme: `gs` or `s3`.
        key: without slashes at its ends; empty for the bucket itself.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")


def parse_address(text: str) -> Address:
    """Read `gs://bucket/some/key`.

    Raises:
        UserError: another kind of URL, one without a bucket, or a key with `.` or `..` in it.
    """
    scheme, separator, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if not separator or scheme not in SCHEMES or not bucket:
        raise UserError(
            f"nothing can be written to {text}: use a folder, gs://bucket/path or s3://bucket/path"
        )
    parts = [part for part in key.split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise UserError(f"{text}: '.' and '..' have no meaning in a bucket: write the whole key")
    return Address(scheme, bucket, "/".join(parts))
