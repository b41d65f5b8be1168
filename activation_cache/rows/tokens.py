"""Token ids that came with rows, as the token table of a store. Legend: N sequences, S length."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from activation_cache.config import LARGEST_INT32, TextConfig
from activation_cache.rows.row_array import RowArray
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import write_shards
from activation_cache.storage.files import StoragePath, make_folder, remove_tree
from activation_cache.storage.records import FORMAT_VERSION, write_record
from activation_cache.text.token_table import (
    TOKENS_FILE,
    SourceEntry,
    SpecialIds,
    TokenSummary,
    TokenTable,
    count_layout,
    open_tokens,
    token_layout,
    usable_tokens,
)
from activation_cache.text.tokenise import regroup

NO_ID = LARGEST_INT32  # stands for a special token that there isn't


def special_ids(ids: Sequence[int]) -> SpecialIds:
    """Up to three ids that make no rows, in the order BOS, EOS, padding."""
    bos, eos, pad = (*ids, *[NO_ID] * (3 - len(ids)))
    return SpecialIds(bos=bos, eos=eos, pad=pad)


def check_tokens(arrays: Sequence[RowArray], *, sequences: int, length: int) -> None:
    """Raises `UserError` unless the arrays are token ids of that many sequences."""
    found = sum(array.shape[0] for array in arrays)
    for array in arrays:
        if not array.dtype.startswith(("int", "uint")):
            raise UserError(f"{array} holds {array.dtype}, and token ids are integers")
        if len(array.shape) != 2 or array.shape[1] != length or found != sequences:
            raise UserError(
                f"{array} holds token ids of shape {list(array.shape)} ({found} sequences in all), "
                f"and the rows are {sequences} sequences of {length}: each row needs its token. "
                "Rows without sequences, [rows, width], are imported without token ids"
            )


def write_tokens(
    arrays: Sequence[RowArray],
    *,
    path: StoragePath,
    special: SpecialIds,
    tokenizer_hash: str,
    held_out: int,
    keep: bool,
    check: Callable[[], None],
) -> TokenTable:
    """Write the table, or read it if it is there.

    Args:
        keep: refuse to replace a table of other ids, because buckets depend on it.
        check: called between shards; may raise.

    Raises:
        UserError: an id is negative or above 32 bits; or, with `keep`, other ids.
    """
    text = TextConfig(source=[], sequence_length=arrays[0].shape[1], held_out_sequences=held_out)
    sources = [SourceEntry(name=str(a), size=None, sha256=a.sha256) for a in arrays]
    recipe = (text, sources, special, tokenizer_hash)
    if (present := _present(path, recipe, keep=keep)) is not None:
        return present
    remove_tree(path)
    make_folder(path)
    length, sequences = arrays[0].shape[1], sum(array.shape[0] for array in arrays)
    layout, digest, counts, written = token_layout(path, sequences, length), hashlib.sha256(), [], 0
    target = layout.open(create=True)
    parts = (part for array in arrays for part in _checked(array, layout.shard_rows))
    for tokens in regroup(parts, layout.shard_rows):
        check()
        write_shards(target, layout, start=written, rows=tokens)
        digest.update(np.ascontiguousarray(tokens, "<i4").data)
        counts.append(usable_tokens(tokens, special).sum(axis=1, dtype=np.int32))
        written += len(tokens)
    usable = np.concatenate(counts)
    usable_layout = count_layout(path, sequences)
    write_shards(usable_layout.open(create=True), usable_layout, start=0, rows=usable)
    summary = TokenSummary(
        format_version=FORMAT_VERSION,
        text=text,
        sources=sources,
        tokenizer_hash=tokenizer_hash,
        rows_wanted=None,
        special_ids=special,
        token_hash=digest.hexdigest(),
        documents=0,
        tokens=sequences * length,
        sequences=sequences,
        usable_rows=int(usable[: sequences - held_out].sum(dtype=np.int64)),
    )
    write_record(path / TOKENS_FILE, summary)
    return TokenTable(path, summary)


def _present(path: StoragePath, recipe: tuple[object, ...], *, keep: bool) -> TokenTable | None:
    """The table that is there, if it was made so; with `keep` another is refused."""
    if not (path / TOKENS_FILE).exists():
        return None
    table = open_tokens(path)
    found = table.summary
    if (found.text, found.sources, found.special_ids, found.tokenizer_hash) == recipe:
        return table
    if keep:
        raise UserError(
            f"the import at {path.parent} was begun with other token ids, other special ones "
            "among them, or another number of held-out rows: change that back to go on, or "
            "choose another folder (nothing was changed)"
        )
    return None


def _checked(array: RowArray, rows: int) -> Iterator[Int32[np.ndarray, "N S"]]:
    """The ids of an array, at most `rows` sequences at once."""
    for start in range(0, array.shape[0], rows):
        part = array.read(start, min(start + rows, array.shape[0]))
        bad = np.argwhere((part < 0) | (part >= NO_ID))
        if len(bad):
            sequence, position = bad[0]
            raise UserError(
                f"{array}, sequence {start + sequence}: token id {part[sequence, position]} at "
                f"position {position} is outside of 0 to {NO_ID - 1}"
            )
        yield part.astype(np.int32)
