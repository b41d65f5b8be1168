"""`sae inspect`: what an activation store, a run's folder or a released SAE holds, in tables."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from activation_cache.runtime.amounts import bytes_text
from activation_cache.runtime.errors import UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import StoragePath, file_sizes
from launch.console import print_table
from launch.show.status import status_table
from launch.targets import target_config
from sae_train.config.file import FILE_NAME

if TYPE_CHECKING:
    from activation_cache.gemma.taps import Tap
    from activation_cache.store.manifest import Manifest
    from activation_cache.store.store import Store
    from sae_train.inference.sae import Sae

logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 4096
_SHOWN_FILES = 6
_READ_BYTES = 64 * 2**20  # of one tap, held at a time while verifying
_QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
# A mean over billions of float32 squares, summed in another order.
_NORM_TOLERANCE = 1e-6


def inspect_path(path: StoragePath, *, verify: bool) -> None:
    """Print tables about whatever `path` is.

    Args:
        verify: read a store whole, check every checksum and its mean squared norms.

    Raises:
        UserError: it is none of the three, is unfinished, or is damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    store = any((path / name).exists() for name in ("manifest.json", "plan.json"))
    if verify and not store:
        raise UserError(f"--verify is for an activation store, and {path} is none")
    if store:
        inspect_store(path, verify=verify)
    elif (path / FILE_NAME).exists():
        inspect_run(path)
    elif path.suffix in (".yaml", ".yml"):
        raise UserError(f"{path} is a config: give the store or the output folder that it names")
    else:
        inspect_sae(path)


def inspect_store(path: StoragePath, *, verify: bool) -> None:
    """Print a store's manifest, sizes and statistics of its first rows; verify it if asked."""
    from activation_cache.store.store import open_store

    store = open_store(path)
    manifest = store.manifest
    facts = {
        **(_origin(manifest) if manifest.imported is None else _imported(manifest)),
        "rows": f"{manifest.rows:,} per tap, {manifest.dtype}",
        **_outlying(manifest),
        "buckets": f"{manifest.num_buckets} of {manifest.shuffling.bucket_rows:,} rows",
        **_window(path, manifest),
        "blocks": f"{manifest.shuffling.block_rows} rows",
        "size": bytes_text(sum(file_sizes(path).values())),
    }
    print_table(_facts(f"activation store {path}", facts))
    if manifest.window is not None:
        if verify:
            raise UserError(
                f"--verify reads a whole store, and {path} is a rolling one, whose rows come and "
                "go: training checks every block that it reads"
            )
        return
    taps = Table(title=f"taps (means over the first {min(_SAMPLE_ROWS, store.rows):,} rows)")
    for heading in ("tap", "width", "mean |x|²", "mean |x|", "max |x|", "|mean x|²/mean |x|²", "γ"):
        taps.add_column(heading, justify="left" if heading == "tap" else "right")
    for tap in store.taps:
        taps.add_row(*_tap_row(store, tap))
    print_table(taps)
    if verify:
        verify_store(store)


def _window(path: StoragePath, manifest: Manifest) -> dict[str, str]:
    """The window of a rolling store, in words."""
    if manifest.window is None:
        return {}
    from activation_cache.store.rolling import buckets_there

    there = buckets_there(path)
    now = f"now {there[0] + 1} to {there[-1] + 1}" if there else "none now"
    return {"on the disk": f"a window of {manifest.window} buckets, {now}"}


def _origin(manifest: Manifest) -> dict[str, str]:
    """The model and the text of a harvested store."""
    assert manifest.model is not None
    assert manifest.text is not None
    return {
        "model": f"{manifest.model.weights} in {manifest.model.dtype}",
        "products": manifest.model.precision,
        "weights": manifest.model.fingerprint[:16],
        "sequences": f"{manifest.num_sequences:,}, "
        f"{manifest.text.held_out_sequences:,} of them held out",
        "sequence length": str(manifest.text.sequence_length),
        "text": ", ".join(manifest.text.source),
    }


def _imported(manifest: Manifest) -> dict[str, str]:
    """What rows were imported from."""
    imported = manifest.imported
    assert imported is not None
    names = [source.name for source in imported.sources]
    shown = ", ".join(names[:_SHOWN_FILES])
    if len(names) > _SHOWN_FILES:
        shown += f" and {len(names) - _SHOWN_FILES} more"
    cut = "of" if imported.in_sequences else "that were cut, of"
    tokenizer = f", tokenizer {manifest.tokenizer_hash[:16]}" if manifest.tokenizer_hash else ""
    return {
        "imported from": shown,
        "sequences": f"{manifest.num_sequences:,} {cut} {imported.sequence_length} rows, "
        f"{imported.held_out_sequences:,} of them held out",
        "token ids": f"yes{tokenizer}" if manifest.token_hash else "no",
    }


def _outlying(manifest: Manifest) -> dict[str, str]:
    outlying = manifest.outlying
    if outlying is None:
        return {}
    dropped = outlying.dropped or 0
    words = (
        f"{dropped:,} rows ({dropped / manifest.rows:.3%}), longer than "
        f"{outlying.max_norm_over_median:g} times the median; others have their places"
    )
    return {"dropped": words}


def _tap_row(store: Store, tap: Tap) -> list[str]:
    from activation_cache.store.centring import gamma

    info = store.tap_info(tap)
    x_ND = store.read(tap, start=0, stop=min(_SAMPLE_ROWS, store.rows)).astype(np.float64)
    norms_N = np.linalg.norm(x_ND, axis=1)
    share = float(np.sum(x_ND.mean(axis=0) ** 2) / np.mean(norms_N**2))
    sizes = (info.mean_squared_norm, norms_N.mean(), norms_N.max())
    return [
        tap.name,
        str(info.width),
        *(f"{size:.5g}" for size in sizes),
        f"{share:.1%}",
        f"{gamma(x_ND):.2f}",
    ]


def verify_store(store: Store, *, is_whole: bool = True) -> None:
    """Read every row of every array, which checks its checksum.

    Args:
        is_whole: it isn't the part of an imported store that is held out.

    Raises:
        UserError: a damaged file, named; or norms other than the manifest's.
    """
    total = store.rows * len(store.taps)
    with ProgressMeter("verify", total=total, unit="rows") as meter:
        done = 0
        for tap in store.taps:
            info = store.tap_info(tap)
            step = max(1, _READ_BYTES // (8 * info.width))
            squares = 0.0
            for start in range(0, store.rows, step):
                stop = min(start + step, store.rows)
                rows = store.read(tap, start=start, stop=stop).astype(np.float64)
                squares += float(np.sum(rows * rows))
                done += stop - start
                meter.update(done, note=tap.name)
            _check_norm(tap, found=squares / store.rows, stated=info.mean_squared_norm)
        for start in range(0, store.rows, 2**20):
            store.provenance(start=start, stop=min(start + 2**20, store.rows))
        if store.manifest.token_hash and is_whole:
            tokens = store.tokens
            for first in range(0, tokens.num_sequences, 4096):
                tokens.read(range(first, min(first + 4096, tokens.num_sequences)))
    imported = store.manifest.imported
    if imported is not None and imported.held_out_sequences and is_whole:
        verify_store(store.held_out, is_whole=False)
    logger.info("the store at %s is whole: every checksum and norm is right", store.path)


def _check_norm(tap: Tap, *, found: float, stated: float) -> None:
    if abs(found - stated) > _NORM_TOLERANCE * stated:
        raise UserError(
            f"{tap.name}: the mean squared norm of its rows is {found:.9g} and the manifest says "
            f"{stated:.9g}: the store is not what was harvested. Harvest it again."
        )


def inspect_run(path: StoragePath) -> None:
    """Print how far a run or a sweep is, and the SAE of a run that has been released."""
    print_table(status_table(target_config(str(path))))
    if (path / "release").is_dir():
        inspect_sae(path)


def inspect_sae(path: StoragePath) -> None:
    """Print a released SAE's shapes, origin, thresholds and norms."""
    from sae_train.inference.read_formats import load_sae

    sae = load_sae(path)
    d_model, width = sae.W_enc.shape
    facts = {"width": f"{width:,} latents", "reads": f"activations of width {d_model:,}"}
    if sae.W_skip is not None:
        facts["affine skip"] = f"norm {np.linalg.norm(np.asarray(sae.W_skip, np.float64)):.5g}"
    for name in ("model_name", "hook_name", "hook_name_out", "context_size"):
        if sae.metadata.get(name) is not None:
            facts[name.replace("_", " ")] = str(sae.metadata[name])
    facts["|b_dec|"] = f"{np.linalg.norm(np.asarray(sae.b_dec, np.float64)):.5g}"
    print_table(_facts(f"{'transcoder' if sae.is_transcoder else 'SAE'} {path}", facts))
    print_table(_quantiles(sae))


def _quantiles(sae: Sae) -> Table:
    table = Table(title="per latent")
    table.add_column("")
    for quantile in _QUANTILES:
        words = {0.0: "least", 0.5: "median", 1.0: "greatest"}.get(quantile, f"{quantile:.0%}")
        table.add_column(words, justify="right")
    encoder, decoder = np.asarray(sae.W_enc), np.asarray(sae.W_dec)
    rows: Mapping[str, Any] = {
        "threshold": np.asarray(sae.threshold),
        "encoder bias": np.asarray(sae.b_enc),
        "encoder norm": np.sqrt(np.einsum("df,df->f", encoder, encoder)),
        "decoder norm": np.sqrt(np.einsum("fd,fd->f", decoder, decoder)),
    }
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.4g}" for value in np.quantile(values, _QUANTILES)))
    return table


def _facts(title: str, facts: Mapping[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table
