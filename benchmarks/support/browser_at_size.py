"""The browser at size: a made-up SAE of many latents, and how long its pages take.

    python -m benchmarks.support.browser_at_size FOLDER [--width N] [--contexts 4] [--explained]

FOLDER gets files of made-up latents, written as `sae latents` writes them, unless it has them
already. The server's answers are made in this process, each the first time and again; CPU seconds
are told, which other programs don't change. Pages open in Chromium, at 1280 and at 390 pixels, of a
server that has read nothing yet (first) and again: seconds from the request until the page is laid
out, and the CPU seconds that this process and the page's main thread spent on it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_cache.storage.records import write_record
from benchmarks.support.measure import markdown, prepare
from sae_train.browser.catalogue import catalogue, index
from sae_train.browser.server import Site, bound_socket, serve
from sae_train.latents import schema
from sae_train.latents.activity import lists
from sae_train.latents.reader import open_latents
from sae_train.latents.schema import ACTIVITY, CONTEXTS, DIRECTIONS, SUMMARY, Record, SaeEntry
from sae_train.latents.writer import write_table, write_vocabulary
from tests.support.browser import Browser, open_browser

logger = logging.getLogger("browser")

VOCABULARY = 262_144  # Gemma 3's
CONTEXT = 64  # tokens
ROUNDS = 5


def main() -> None:
    """Write the folder if need be, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=1_000_000)
    parser.add_argument("--contexts", type=int, default=4, help="of each latent; a real one has 45")
    parser.add_argument("--explained", action="store_true", help="each latent has an explanation")
    chosen = parser.parse_args()
    prepare(keep_memory=False)
    logger.setLevel(logging.INFO)
    if not (chosen.folder / schema.RECORD).exists():
        write_folder(chosen.folder, width=chosen.width, contexts=chosen.contexts)
    explanations = chosen.folder / schema.EXPLANATIONS
    explanations.unlink(missing_ok=True)
    if chosen.explained:
        write_explanations(explanations, width=len(open_latents(chosen.folder)))
    logger.info("%s\n", markdown(("request", "first, CPU s", "again"), answers(chosen.folder)))
    head = (
        "page",
        "width",
        "first, s",
        "CPU s of server",
        "of page",
        "again, s",
        "CPU s",
        "of page",
    )
    logger.info("%s", markdown(head, pages(chosen.folder)))


def write_folder(folder: Path, *, width: int, contexts: int) -> None:
    """Files of `width` latents; every 4,096th has the same details."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for table, part in (
        (CONTEXTS, made_up_contexts(random, contexts)),
        (ACTIVITY, made_up_activity(random)),
        (DIRECTIONS, made_up_directions(random)),
    ):
        write_table(folder, table, repeated(part, width=width), width=width)
    write_table(folder, SUMMARY, [made_up_summary(random, width)], width=width)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = random.choice(letters, (VOCABULARY, 5))
    write_vocabulary(
        folder, ["▁" * (number % 3 > 0) + "".join(word) for number, word in enumerate(words)]
    )
    record = Record(
        name="made up",
        step=1,
        model="none",
        site="resid_post",
        layer=0,
        architecture="jumprelu",
        width=width,
        sequences=1000,
        sequence_length=1024,
        tokens=10**6,
        cofiring_tokens=10**6,
        alive=width,
        mean_abs_cosine=0.03,
        saes=[SaeEntry(name="made up", folder=".", width=width, fingerprint="made up")],
        settings={},
        fingerprints={},
    )
    write_record(folder / schema.RECORD, record)


def repeated(part: pa.Table, *, width: int) -> Iterator[pa.Table]:
    """A table of `PART_ROWS` latents again and again, until there are enough."""
    for first in range(0, width, schema.PART_ROWS):
        latents = part["latent"].to_numpy() + np.int32(first)
        column = pa.array(latents.astype(np.int32))
        moved = part.set_column(part.schema.get_field_index("latent"), "latent", column)
        yield moved.slice(0, int(np.searchsorted(latents, width)))


def made_up_contexts(random: np.random.Generator, number: int) -> pa.Table:
    """`number` contexts of each latent, half of them of the greatest values."""
    rows = schema.PART_ROWS * number
    # Few ids are frequent and many are rare, as in a text.
    ids = (VOCABULARY ** random.random((rows, CONTEXT))).astype(np.int32) - 1
    values = np.where(random.random((rows, CONTEXT)) < 0.1, random.random((rows, CONTEXT)), 0)
    values[:, 3 * CONTEXT // 4] = 1
    half = (number + 1) // 2
    interval = [*[0] * half, *(1 + np.arange(number - half) * 5 // max(1, number - half))]
    return pa.table(
        [
            pa.array(np.repeat(np.arange(schema.PART_ROWS, dtype=np.int32), number)),
            pa.array(np.tile(np.array(interval, np.int8), schema.PART_ROWS)),
            pa.array(random.integers(0, 1000, rows)),
            pa.array(np.full(rows, 3 * CONTEXT // 4, np.int32)),
            pa.array(np.zeros(rows, np.int32)),
            pa.nulls(rows, CONTEXTS.schema.field("subset").type),
            lists(ids),
            lists(values.astype(np.float32)),
        ],
        schema=CONTEXTS.schema,
    )


def made_up_activity(random: np.random.Generator) -> pa.Table:
    """A row of activity.parquet for each latent."""
    return made_up(ACTIVITY.schema, random, counts={"histogram_counts": schema.BINS})


def made_up_directions(random: np.random.Generator) -> pa.Table:
    """A row of directions.parquet for each latent of an SAE: nothing of an encoder."""
    bins = dict.fromkeys(("logit_counts", "plain_logit_counts"), schema.BINS)
    none = [name for name in DIRECTIONS.schema.names if name.startswith("encoder")]
    return made_up(DIRECTIONS.schema, random, counts=bins | dict.fromkeys(none, 0))


def made_up(columns: pa.Schema, random: np.random.Generator, *, counts: dict[str, int]) -> pa.Table:
    """Random columns; lists have ten entries, or as many as `counts` says."""
    arrays = []
    for field in columns:
        rows = schema.PART_ROWS
        if field.name == "latent":
            arrays.append(pa.array(np.arange(rows, dtype=np.int32)))
        elif not pa.types.is_list(field.type):
            arrays.append(pa.array(random.standard_normal(rows)).cast(field.type))
        else:
            one_of = 1 if field.name.endswith("saes") else schema.PART_ROWS
            values = random.integers(0, one_of, (rows, counts.get(field.name, schema.RANKED)))
            kind = field.type.value_type.to_pandas_dtype()
            arrays.append(lists(values.astype(kind)))
    return pa.table(arrays, schema=columns)


def made_up_summary(random: np.random.Generator, width: int) -> pa.Table:
    """A row of summary.parquet for each latent."""
    arrays = []
    for field in SUMMARY.schema:
        if field.name == "latent":
            values = np.arange(width)
        elif pa.types.is_integer(field.type):
            values = random.integers(0, VOCABULARY, width)
        else:
            values = random.random(width)
        arrays.append(pa.array(values).cast(field.type))
    return pa.table(arrays, schema=SUMMARY.schema)


def write_explanations(path: Path, *, width: int) -> None:
    """One explanation of each latent."""
    score = '{{"detection": {{"balanced_accuracy": {}, "auc": 0.8, "shuffled": 0.5}}}}'
    columns = {
        "latent": pa.array(np.arange(width, dtype=np.int32)),
        "text": pa.array([f"words about the number {number}" for number in range(width)]),
        "method": pa.array(["examples"] * width),
        "model": pa.array(["a model"] * width),
        "scores": pa.array([score.format(number % 97 / 100) for number in range(width)]),
    }
    pq.write_table(pa.table(columns, schema=schema.EXPLANATIONS_SCHEMA), path, compression="zstd")


def answers(folder: Path) -> Iterator[list[str]]:
    """Seconds of each of the server's answers."""
    before = memory()
    site = Site(catalogue([folder]))
    (sae,) = site.by_id
    half = len(site.of(sae).latents or ()) // 2
    asked: dict[str, Callable[[], Any]] = {
        "the SAEs": lambda: index(site.shown, live=True),
        f"latent {half}": lambda: site.latent(sae, str(half)),
        "list by frequency": lambda: site.page(sae, {}),
        "list by maximum": lambda: site.page(sae, {"sort": "maximum"}),
        "its middle page": lambda: site.page(sae, {"sort": "maximum", "offset": str(half)}),
        "list by score": lambda: site.page(sae, {"sort": "score"}),
        "tokens with 'abc'": lambda: site.page(sae, {"text": "abc"}),
        "explanations with '1234'": lambda: site.page(
            sae, {"text": "1234", "where": "explanation"}
        ),
        "contexts with 'zzz zz'": lambda: site.page(sae, {"text": "zzz zz", "where": "context"}),
    }
    for name, ask in asked.items():
        seconds = [timed(ask) for _ in range(1 + ROUNDS)]
        yield [name, f"{seconds[0]:.3f}", f"{statistics.median(seconds[1:]):.3f}"]
    yield ["memory, GB", f"{before:.2f}", f"{memory():.2f}"]


def timed(ask: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    ask()
    return time.process_time() - start


def memory() -> float:
    """Resident memory of this process, GB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e9


def opened(browser: Browser, address: str, width: int, ready: str) -> tuple[float, float, float]:
    """Seconds until a page is laid out, CPU seconds of this process and of the page's thread."""
    browser.show("about:blank", width=width)
    before, own, start = browser.busy(), time.process_time(), time.perf_counter()
    browser.show(address, width=width, until=ready)
    browser.evaluate("document.documentElement.scrollHeight")  # lays it out
    seconds = time.perf_counter() - start
    return seconds, time.process_time() - own, browser.busy() - before


def pages(folder: Path) -> Iterator[list[str]]:
    """Seconds until Chromium has drawn each page, at both widths."""
    with open_browser() as browser:
        browser.show("about:blank", width=1280)
        for width in (1280, 390):
            shown = catalogue([folder])
            (one,) = shown
            half = len(one.latents or ()) // 2
            own, stop = bound_socket("127.0.0.1", 0), threading.Event()
            host = {"host": "127.0.0.1", "stop": stop.is_set}
            server = threading.Thread(target=serve, args=(Site(shown), own), kwargs=host)
            server.start()
            for page in (f"{one.id}/{half}", one.id):
                address = f"http://127.0.0.1:{own.getsockname()[1]}/#/{page}"
                ready = f"document.getElementById('main')?.dataset.ready === '#/{page}'"
                rounds = [opened(browser, address, width, ready) for _ in range(1 + ROUNDS)]
                again = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]
                told = [f"{seconds:.2f}" for seconds in (*rounds[0], *again)]
                yield [page, str(width), *told]
            stop.set()
            server.join()


if __name__ == "__main__":
    main()
