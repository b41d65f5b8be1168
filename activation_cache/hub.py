"""Files of a repository on the Hugging Face Hub, fetched once and kept in its local cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from activation_cache.errors import UserError


def fetch(repository: str, *, revision: str | None, patterns: Sequence[str], named_by: str) -> Path:
    """The local folder with what matches `patterns`; without a network, what it kept.

    Args:
        named_by: what in the config or command named the repository, for messages.

    Raises:
        UserError: huggingface_hub isn't installed, or the Hub gives nothing and nothing is kept.
    """
    try:
        import httpx
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(
            f"{named_by} is the Hub id {repository}, and huggingface_hub is not installed "
            "here. Install it with `pip install open-gemma-scope[hub]`, or give a folder."
        ) from error
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the Hub does not give {repository} (revision {revision or 'main'}), and it "
            f"is not wholly in the local cache: {reason}. Check the name, the network and, for "
            "Gemma's licence, that you accepted it and ran `hf auth login`; or give a folder."
        ) from error
    return Path(folder)
