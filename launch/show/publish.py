"""`sae export --upload`: list what would go to the Hub, or send it."""

from __future__ import annotations

import re
from pathlib import Path

from rich.table import Table

from activation_cache.runtime.amounts import bytes_text
from activation_cache.runtime.errors import UserError
from activation_cache.storage import hub
from activation_cache.storage.files import StoragePath, file_sizes
from launch.console import print_table, print_text
from sae_train.release.export import CARD
from sae_train.release.index import INDEX

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


def check_repository(name: str) -> None:
    """Raise `UserError` for what can't be a repository's name."""
    if re.fullmatch(f"{_PART}/{_PART}", name) is None:
        raise UserError(
            f"--upload {name} is no repository of the Hub: write organisation/name, of letters, "
            "digits, '.', '_' and '-'"
        )


def publish(release: StoragePath, *, repository: str, dry_run: bool) -> None:
    """Send a release to the Hub; with `dry_run` list its files and touch no network.

    Raises:
        UserError: it is in a bucket; the Hub can't be reached or refuses.
    """
    if not isinstance(release, Path):
        raise UserError(
            f"--upload sends folders of this machine and {release} is in a bucket: copy it here "
            "and upload it with `hf upload`"
        )
    files = {
        path.relative_to(release).as_posix(): size
        for path, size in file_sizes(release).items()
        if isinstance(path, Path) and not any(p[0] == "." for p in path.relative_to(release).parts)
    }
    words = f"{len(files)} files, {bytes_text(sum(files.values()))}"
    if dry_run:
        table = Table(title=f"{release} to {repository}", title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("size", justify="right")
        for name, size in files.items():
            table.add_row(name, bytes_text(size))
        print_table(table)
        print_text(f"{words}; nothing was sent")
        return
    last = [name for name in (CARD, INDEX) if name in files]
    url = hub.upload(release, repository=repository, last=last)
    print_text(f"{words} sent to {url}")
