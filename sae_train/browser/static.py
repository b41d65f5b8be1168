"""The browser as a folder for any web server: the same pages over files, without the live parts.

index.html, *.js, style.css
data/index.json                     as the server's
data/SAE/columns-N.json             what the list shows and sorts by, `COLUMNS_SHARD` latents each
data/SAE/latents-N.json             everything about `LATENTS_SHARD` latents each
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from activation_cache.runtime.errors import UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import disk_errors
from sae_train.browser.catalogue import Shown, index, latent_json
from sae_train.browser.listing import Listing, Sort
from sae_train.browser.server import SITE

COLUMNS_SHARD = 8192
LATENTS_SHARD = 16


def write_static(folder: Path, shown: list[Shown]) -> Path:
    """Write the folder; returns it.

    Raises:
        UserError: it exists and isn't empty, or the disk refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and isn't empty: name a fresh folder, or delete that one first"
        )
    with disk_errors(folder, doing="write in"):
        shutil.copytree(SITE, folder, dirs_exist_ok=True)
        facts = index(shown, live=False)
        shards = {"columns_shard": COLUMNS_SHARD, "latents_shard": LATENTS_SHARD}
        _write(folder / "data" / "index.json", facts | shards)
        for one in shown:
            if one.latents is not None:
                _write_sae(folder / "data" / one.id, shown, one)
    return folder


def _write_sae(folder: Path, shown: list[Shown], one: Shown) -> None:
    assert one.latents is not None
    listing = Listing(one.latents)
    sorts = [name for name in get_args(Sort) if name != "latent"]
    columns = {name: listing.column(name) for name in sorts}
    width = len(one.latents)
    for number, start in enumerate(range(0, width, COLUMNS_SHARD)):
        chosen = np.arange(start, min(start + COLUMNS_SHARD, width))
        rows = listing.rows(chosen)
        for row, place in zip(rows, chosen, strict=True):
            row |= {name: _finite(values[place]) for name, values in columns.items()}
        _write(folder / f"columns-{number}.json", rows)
    with ProgressMeter(f"write {one.name}", total=width, unit="latents") as meter:
        for number, start in enumerate(range(0, width, LATENTS_SHARD)):
            end = min(start + LATENTS_SHARD, width)
            found = [latent_json(shown, one, latent) for latent in range(start, end)]
            _write(folder / f"latents-{number}.json", found)
            meter.update(end)


def _finite(value: Any) -> float | None:
    number = float(f"{float(value):.6g}")
    return number if math.isfinite(number) else None


def _write(path: Path, content: dict[str, Any] | Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
