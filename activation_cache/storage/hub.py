"""The Hugging Face Hub: repositories are fetched into its local cache, and uploaded to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from activation_cache.runtime.errors import UserError


def fetch(repository: str, *, revision: str | None, patterns: Sequence[str], named_by: str) -> Path:
    """The local folder with the files that match `patterns`; without a network, from the cache.

    Args:
        named_by: the config key or the argument that named the repository, for messages.

    Raises:
        UserError: huggingface_hub isn't installed, or neither the Hub nor the cache has it.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(
            f"{named_by} is the Hub id {repository}, and huggingface_hub is not installed "
            "here. Install it with `pip install open-gemma-scope[hub]`, or give a folder."
        ) from error
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the Hub does not give {repository} (revision {revision or 'main'}), and it "
            f"is not wholly in the local cache: {reason}. Check the name, the network and, for "
            "Gemma's licence, that you accepted it and ran `hf auth login`; or give a folder."
        ) from error
    return Path(folder)


def upload(folder: Path, *, repository: str, last: Sequence[str]) -> str:
    """Upload a folder to a repository of the Hub, which is created, private, if there is none.

    The next upload finds again what a broken one has sent.

    Args:
        last: names of files at its root that are sent when all others are there.

    Returns:
        The repository's address.

    Raises:
        UserError: huggingface_hub isn't installed, or the Hub can't be reached or refuses.
    """
    try:
        from huggingface_hub import HfApi, errors
    except ImportError as error:
        raise UserError(
            "--upload needs huggingface_hub, which is not installed here: "
            "`pip install open-gemma-scope[hub]`"
        ) from error
    try:
        hub = HfApi()
        url = hub.create_repo(repository, private=True, exist_ok=True)
        ignored = [".*", "**/.*", *last]
        hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=ignored)
        hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(last))
    except (errors.HfHubHTTPError, errors.HTTPError, OSError, ValueError) as error:
        # Of OSError come no network, no token, and offline mode; of ValueError a bad name.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the Hub doesn't take {repository}: {reason}. Check the name, the network and that "
            f"`hf auth login` gave a token that may write; {folder} is whole, and the same "
            "command sends what is missing"
        ) from error
    return str(url)
