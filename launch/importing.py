"""`sae import`: activations in files become a store, without a language model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from activation_cache.config import RowDtype
from activation_cache.runtime.errors import UserError
from launch.processes.signals import StopFlag

if TYPE_CHECKING:
    from activation_cache.gemma.taps import Tap
    from activation_cache.rows.source import Address

SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--to", {"required": True, "metavar": "STORE", "help": "the store: a folder or a bucket"}),
    (
        "--tokens",
        {
            "metavar": "PATH[::NAME]",
            "help": "token ids of the rows, integers [sequences, rows]; a column token_ids beside "
            "the rows is taken by itself",
        },
    ),
    (
        "--tokenizer",
        {
            "metavar": "MODEL",
            "help": "the Gemma whose tokenizer made the ids: its BOS, EOS and padding make no rows",
        },
    ),
    (
        "--special-ids",
        {"metavar": "ID,ID", "help": "of another tokenizer: up to three ids that make no rows"},
    ),
    (
        "--held-out",
        {
            "type": float,
            "metavar": "ROWS",
            "help": "rows for evaluation, the last: a share below 1 or a number (default 0.01)",
        },
    ),
    (
        "--sequence-length",
        {
            "type": int,
            "metavar": "ROWS",
            "help": "consecutive rows that are kept or held out together, where rows are given "
            "without sequences (default 1024, fewer of few rows)",
        },
    ),
    ("--dtype", {"choices": get_args(RowDtype), "help": "of the stored rows (default float32)"}),
    ("--shuffle-rows", {"type": float, "help": "rows of a shuffle bucket (default 1000000)"}),
    ("--block-rows", {"type": int, "help": "rows of a block, read together (default 256)"}),
    ("--seed", {"type": int, "help": "of the order (default 0)"}),
    (
        "--max-norm-over-median",
        {"type": float, "help": "drop rows whose norm is above so many times the median"},
    ),
    (
        "--scratch",
        {
            "metavar": "FOLDER",
            "help": "a disk for the rows of Parquet files, which are unpacked before they are "
            "shuffled (default: in the store, where that is a folder)",
        },
    ),
)


def import_rows(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae import`: make a store of rows in files, or finish one that was begun; returns 0.

    Raises:
        UserError: files that can't be read, or rows that don't fit together.
    """
    from activation_cache.rows.source import find_rows
    from activation_cache.rows.write_rows import check_settings
    from activation_cache.rows.write_rows import import_rows as run

    given = {
        "dtype": arguments.dtype,
        "shuffle_rows": arguments.shuffle_rows,
        "block_rows": arguments.block_rows,
        "seed": arguments.seed,
        "held_out": arguments.held_out,
        "sequence_length": arguments.sequence_length,
        "max_norm_over_median": arguments.max_norm_over_median,
        "special_ids": _ids(arguments.special_ids),
    }
    settings = check_settings({key: value for key, value in given.items() if value is not None})
    rows = _rows([arguments.target, *arguments.overrides])
    tokens = find_rows(arguments.tokens) if arguments.tokens else _tokens_beside(rows)
    run(
        rows,
        to=arguments.to,
        settings=settings,
        tokens=tokens,
        tokenizer=arguments.tokenizer,
        scratch=arguments.scratch,
        stop=stop,
    )
    return 0


def _rows(words: Sequence[str]) -> dict[Tap, Address]:
    """The rows of each tap: words are PATH, PATH::NAME, or either after TAP=."""
    from activation_cache.gemma.taps import Tap
    from activation_cache.rows.settings import parse_tap
    from activation_cache.rows.source import find_rows
    from sae_train.inference.hook_names import parse_hook

    found: dict[Tap, Address] = {}
    for word in words:
        name, mark, place = word.partition("=")
        address = find_rows(place if mark else word)
        # Other tools name a column after the hook.
        hook = None if mark else parse_hook(address.row_column)
        tap = parse_tap(name) if mark else Tap(*hook) if hook else parse_tap("rows.0")
        if tap in found:
            raise UserError(
                f"{tap.name} is given twice: name files of one tap together, as a folder or a "
                "quoted glob, and those of several taps as TAP=PATH"
            )
        found[tap] = address
    return found


def _tokens_beside(rows: dict[Tap, Address]) -> Address | None:
    """The column of token ids beside rows, if there is one."""
    from activation_cache.rows.unpack import TOKEN_IDS

    first = next(iter(rows.values()))
    return first.with_column(TOKEN_IDS) if TOKEN_IDS in first.names else None


def _ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--special-ids is {text}: give whole numbers, as 50256,0")
    return [int(part) for part in parts]
