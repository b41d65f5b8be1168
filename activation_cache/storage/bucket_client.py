"""Requests to object storage: the libraries that make them, and what is retried.

Whole objects go through fsspec's one interface, which gcsfs has for Google Cloud Storage and s3fs
for S3. Arrays and leases go through TensorStore, for which `key_value_spec` describes a bucket:
fsspec has neither zarr3 shards nor conditional writes (docs/storage.md says why both are needed).
All of them take credentials and endpoints from the environment, in the libraries' own variables.

Transient errors (a server that answers 503, a connection that breaks) are retried for
`SAE_STORAGE_SECONDS`, here and by TensorStore alike. When that time is over, and at once for
permanent errors (wrong credentials, no such bucket), a `UserError` says what failed.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from activation_cache.runtime.addresses import Address
from activation_cache.storage.bucket_errors import (
    denied,
    first_line,
    is_transient,
    no_answer,
    no_bucket,
    patience,
    refuses_credentials,
)

logger = logging.getLogger(__name__)

_CONNECT_SECONDS, _READ_SECONDS = 20, 60

Result = TypeVar("Result")


def plain(path: Address) -> str:
    """The name by which fsspec knows an object or a folder: `bucket/some/key`."""
    return f"{path.bucket}/{path.key}".rstrip("/")


@functools.cache
def file_system(scheme: str) -> Any:
    """gcsfs or s3fs, without a cache of listings.

    Both retry a single request, such as a part of a large object, a few times: gcsfs for half a
    minute, s3fs for a second. `_retried` repeats the whole when they have given up.
    """
    if scheme == "gs":
        # Without it gcsfs asks of every new bucket, through gRPC, whether it has real folders.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs

        # It logs a traceback where it gives up; `no_answer` has the words for that.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
        return gcsfs.GCSFileSystem(token=token, use_listings_cache=False, skip_instance_cache=True)
    import s3fs

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "retries": {"max_attempts": 0},
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
        },
    )


_known_buckets: set[tuple[str, str]] = set()


def check_bucket(path: Address) -> None:
    """Check, once for each bucket, that it exists: a missing one would look like an empty one.

    Raises:
        UserError: it doesn't exist, or can't be listed.
    """
    if (path.scheme, path.bucket) in _known_buckets:
        return
    files = file_system(path.scheme)

    def listed() -> None:
        if path.scheme == "gs":
            files.call("GET", "b/{}/o", path.bucket, maxResults=1, json_out=True)
        else:
            files.call_s3("list_objects_v2", Bucket=path.bucket, MaxKeys=1)

    try:
        _retried(path, listed, doing="look at")
    except FileNotFoundError as error:
        raise no_bucket(str(path), doing="use") from error
    _known_buckets.add((path.scheme, path.bucket))


def request(path: Address, call: Callable[[], Result], *, doing: str) -> Result:
    """Make a request, and make it again while its errors are transient.

    Args:
        doing: a verb for messages, as in "cannot read gs://...".

    Raises:
        FileNotFoundError: there is no such object.
        UserError: there is no such bucket, the credentials are refused, or transient errors lasted
            for `SAE_STORAGE_SECONDS`.
    """
    check_bucket(path)
    return _retried(path, call, doing=doing)


def _retried(path: Address, call: Callable[[], Result], *, doing: str) -> Result:
    deadline = time.monotonic() + patience()
    pause = min(0.25, patience() / 64)
    while True:
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:
            reason = first_line(error)
            if refuses_credentials(error):
                raise denied(str(path), doing=doing, reason=reason) from error
            if not is_transient(error):
                raise
            if time.monotonic() + pause > deadline:
                raise no_answer(str(path), doing=doing, reason=reason) from error
            if pause > 2:
                logger.warning("cannot %s %s yet (%s): retrying", doing, path, reason)
        time.sleep(pause * random.uniform(0.75, 1.25))  # so that processes don't retry all at once
        pause = min(2 * pause, patience() / 4)


def key_value_spec(path: Address) -> dict[str, Any]:
    """TensorStore's description of a folder in a bucket, with its retries.

    Raises:
        UserError: there is no such bucket, or it can't be listed.
    """
    check_bucket(path)
    spec: dict[str, Any] = {
        "driver": {"gs": "gcs", "s3": "s3"}[path.scheme],
        "bucket": path.bucket,
        "path": f"{path.key}/" if path.key else "",
    }
    # Pauses of p/64, p/32, ... p/4, p/4: together about the patience p.
    unit = patience() / 64
    retries = {
        "max_retries": 7,
        "initial_delay": f"{unit * 1e3:.0f}ms",
        "max_delay": f"{unit * 16e3:.0f}ms",
    }
    if path.scheme == "gs":
        _name_emulator_to_tensorstore()
        return {**spec, "gcs_request_retries": retries}
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if endpoint:
        # Another server than Amazon's can't be asked for the bucket's region.
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec |= {"aws_region": region}
    if environment.get("AWS_ACCESS_KEY_ID"):
        spec |= {"aws_credentials": {"type": "environment"}}
    return {**spec, "s3_request_retries": retries}


def _name_emulator_to_tensorstore() -> None:
    """Google's libraries find an emulator by one variable, TensorStore by one of its own."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        address = emulator if "://" in emulator else f"http://{emulator}"
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")
