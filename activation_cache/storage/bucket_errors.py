"""Errors of object storage: transient and permanent ones, and their messages.

In every function `url` is gs://bucket/key or s3://bucket/key.
"""

from __future__ import annotations

import os

from activation_cache.runtime.errors import StorageError, UserError

PATIENCE = "SAE_STORAGE_SECONDS"
_PATIENCE_SECONDS = 120.0
_INTACT = "What was finished before is intact: give the same command again"
_TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "INTERNAL", "UNKNOWN",
            "RESOURCE_EXHAUSTED", "CANCELLED")  # fmt: skip
_CREDENTIALS = {
    "gs": "Google's application default credentials (GOOGLE_APPLICATION_CREDENTIALS, "
    "`gcloud auth application-default login`, or the machine's service account)",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
}


def patience() -> float:
    """Seconds for which transient errors are retried; raises `UserError` for a bad setting."""
    text = os.environ.get(PATIENCE, str(_PATIENCE_SECONDS))
    try:
        seconds = float(text)
        if not 1 <= seconds <= 86_400:
            raise ValueError(text)
    except ValueError as error:
        raise UserError(f"{PATIENCE} must be a number of seconds from 1 to 86400; it is {text!r}") \
            from error  # fmt: skip
    return seconds


def denied(url: str, *, doing: str, reason: str) -> StorageError:
    """The error for credentials that are missing, wrong or lack a permission."""
    return StorageError(
        f"cannot {doing} {url}: the server refuses the credentials ({reason}). They come from "
        f"{_CREDENTIALS[_scheme(url)]}: check that they belong to an account that may list, "
        f"read, write and delete in {_bucket(url)}. {_INTACT}."
    )


def no_bucket(url: str, *, doing: str) -> StorageError:
    """The error for a bucket that doesn't exist."""
    return StorageError(
        f"cannot {doing} {url}: there is no bucket {_bucket(url)} at "
        f"{_endpoint(url)}. Create it, or correct its name."
    )


def no_answer(url: str, *, doing: str, reason: str) -> StorageError:
    """The error for a server whose transient errors lasted too long."""
    return StorageError(
        f"cannot {doing} {url}: {_endpoint(url)} failed again and again for "
        f"{patience():g} s ({reason}). {_INTACT} when the storage answers, or wait longer with "
        f"{PATIENCE}."
    )


def array_error(url: str, text: str, *, doing: str) -> StorageError | None:
    """TensorStore's message, which begins with a status, as ours; None if it tells of a bug."""
    status, reason = text.partition(":")[0], text.partition(" [")[0][:300]
    if status in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return denied(url, doing=doing, reason=reason)
    if status == "NOT_FOUND":
        return no_bucket(url, doing=doing)
    if status in _TRANSIENT:
        return no_answer(url, doing=doing, reason=reason)
    return None


def _scheme(url: str) -> str:
    return url.partition("://")[0]


def _bucket(url: str) -> str:
    return "/".join(url.split("/")[:3])


def _endpoint(url: str) -> str:
    scheme = _scheme(url)
    names = {"gs": ("STORAGE_EMULATOR_HOST",), "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")}
    chosen = (os.environ[name] for name in names[scheme] if os.environ.get(name))
    return next(chosen, {"gs": "Google Cloud Storage", "s3": "Amazon S3"}[scheme])


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def refuses_credentials(error: Exception) -> bool:
    """Did the server, or the library before it, refuse the credentials?"""
    names = {kind.__name__ for kind in type(error).__mro__}
    known = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "RefreshError",
             "DefaultCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}  # fmt: skip
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")  # gcsfs' 403
    return bool(names & known) or forbidden or _status(error) in (401, 403)


def is_transient(error: Exception) -> bool:
    """May the same request succeed a moment later?"""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if modules & {"aiohttp", "botocore", "requests", "urllib3", "google"}:
        return True
    return isinstance(error, OSError | TimeoutError)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of gcsfs or s3fs, or in an error that caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        found = getattr(error, "code", None) or getattr(error, "status", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(found, int):
            return found
        error = error.__cause__
    return None
