"""From documents to tokens: tokenised, packed and stored once as a `TokenTable`.

`packing` says how documents become sequences. Text that spells out a special token is tokenised to
that token, which is then not usable. Legend: S sequence length, N sequences.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Int32

from activation_cache.config import Section, TextConfig
from activation_cache.language_model.chat_template import ChatTemplate
from activation_cache.language_model.tokenizer import Tokenizer
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.arrays import ArrayLayout, write_shards
from activation_cache.storage.files import StoragePath, make_folder, remove_tree
from activation_cache.storage.records import FORMAT_VERSION, write_record
from activation_cache.text.masked import encode_chats, masked_tokens, split_masks
from activation_cache.text.mixture import read_documents
from activation_cache.text.packing import pack, pack_by_subset, pack_vocabulary
from activation_cache.text.sources import Document, Source, find_sources
from activation_cache.text.token_table import (
    TOKENS_FILE,
    SourceEntry,
    SpecialIds,
    TokenSummary,
    TokenTable,
    count_layout,
    mask_layout,
    masks,
    open_tokens,
    subset_layout,
    token_layout,
    usable_tokens,
)

logger = logging.getLogger(__name__)

_BATCH_CHARACTERS = 2_000_000  # tokenised at once, by all of the tokenizer's threads
_BATCH_DOCUMENTS = 1024
_MOST_SUBSETS = 1000  # each keeps the start of a sequence in memory, and leaves one half empty


class Recipe(Section):
    """All that a token table depends on; equal recipes make equal tables."""

    text: TextConfig
    sources: list[SourceEntry]
    tokenizer_hash: str
    template_hash: str | None = None  # of the chat template, with `text.chat`
    rows_wanted: int | None  # at which reading streams ends; None if all sources are files
    vocabulary: int | None = None  # number of ids, which come before text that is all held out

    def difference(self, stored: TokenSummary) -> str | None:
        """The first field in which a stored table differs, in words; None if there is none."""
        old, new = stored.text.model_dump(), self.text.model_dump()
        pairs: list[tuple[str, object, object]] = [(f"text.{k}", old[k], new[k]) for k in old]
        files, stored_files = ({s.name: s for s in r.sources} for r in (self, stored))
        pairs.append(("text.source (the files it matches)", list(stored_files), list(files)))
        for name, entry in files.items():
            if name in stored_files:
                pairs.append((f"file {name}", str(stored_files[name]), str(entry)))
        pairs += [
            ("the tokenizer", stored.tokenizer_hash, self.tokenizer_hash),
            ("the chat template", stored.template_hash, self.template_hash),
            ("cache.tokens (the text is a stream)", stored.rows_wanted, self.rows_wanted),
            ("the vocabulary (of the embedding)", stored.vocabulary, self.vocabulary),
        ]
        for name, before, now in pairs:
            if before != now:
                return f"{name} was {before!r} and is {now!r}"
        return None


def prepare_tokens(
    text: TextConfig,
    *,
    tokenizer: Tokenizer,
    path: StoragePath,
    rows: int,
    template: ChatTemplate | None = None,
    vocabulary: int | None = None,
    keep: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> TokenTable:
    """Make the token table at `path`, or open the one that is there if nothing has changed.

    Files are read to their end. A stream of the Hub is read until there are `rows` usable tokens
    and the held-out sequences.

    Args:
        template: of the model; needed with `text.chat`.
        vocabulary: a number of ids to harvest, each once, instead of text; text is then read for
            the held-out sequences alone.
        keep: refuse to replace a table of other text, because a harvest depends on it.

    Raises:
        UserError: bad text; too few sequences; a disk error; or, with `keep`, a table of other
            text, naming the field that differs.
        Interrupted: `stop` turned true; next time the table is begun again.
    """
    sources = find_sources(text)
    recipe = _recipe(
        text,
        sources,
        tokenizer_hash=tokenizer.fingerprint,
        template_hash=None if template is None else template.fingerprint,
        rows=rows,
        vocabulary=vocabulary,
    )
    if (path / TOKENS_FILE).exists():
        table = open_tokens(path)
        difference = recipe.difference(table.summary)
        if difference is None:
            logger.info("tokens, as stored: %s", table.summary)
            return table
        if keep:
            raise UserError(
                f"the store at {path.parent} was begun with other text: {difference}. Go back to "
                "what it was, or choose another cache.path (nothing was changed)."
            )
        logger.info("tokens are made again: %s", difference)
    summary = _TableBuilder(path, recipe, tokenizer, template, stop).run(sources)
    logger.info("tokens: %s", summary)
    return TokenTable(path, summary)


def describe_text(text: TextConfig, *, like: TokenSummary) -> Recipe:
    """The recipe of `text` as its files are now, with the tokenizer and rows of a stored table.

    Raises:
        UserError: a source can't be found or read.
    """
    rows = like.rows_wanted or 1
    return _recipe(
        text,
        find_sources(text),
        tokenizer_hash=like.tokenizer_hash,
        template_hash=like.template_hash,
        rows=rows,
        vocabulary=like.vocabulary,
    )


def _recipe(
    text: TextConfig,
    sources: list[Source],
    *,
    tokenizer_hash: str,
    template_hash: str | None,
    rows: int,
    vocabulary: int | None,
) -> Recipe:
    return Recipe(
        vocabulary=vocabulary,
        text=text,
        sources=[SourceEntry(name=s.name, size=s.size, sha256=s.content_hash()) for s in sources],
        tokenizer_hash=tokenizer_hash,
        template_hash=template_hash,
        rows_wanted=rows if any(source.streamed for source in sources) else None,
    )


def regroup(parts: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in arrays of `rows` rows each; the last may be shorter."""
    waiting: list[np.ndarray] = []
    for part in parts:
        waiting.append(part)
        while sum(map(len, waiting)) >= rows:
            joined = np.concatenate(waiting)
            yield joined[:rows]
            waiting = [joined[rows:]]
    if any(map(len, waiting)):
        yield np.concatenate(waiting)


def _batches(text: TextConfig, sources: list[Source]) -> Iterator[tuple[list[Document], int]]:
    """Documents in batches for the tokenizer, and how many bytes of all sources lie before."""
    documents: list[Document] = []
    characters = position = 0
    for document, position in read_documents(text, sources):
        documents.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(documents) >= _BATCH_DOCUMENTS:
            yield documents, position
            documents, characters = [], 0
    if documents:
        yield documents, position


class _TableBuilder:
    """Writes one table, shard by shard; memory holds a batch of text and one shard."""

    def __init__(
        self,
        path: StoragePath,
        recipe: Recipe,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        stop: Callable[[], bool],
    ) -> None:
        self.path, self.recipe, self.tokenizer, self.stop = path, recipe, tokenizer, stop
        self.template = template
        self.masks = masks(recipe.text)
        self.masked_ids = tokenizer.encode_batch(recipe.text.masked_text)
        self.length = recipe.text.sequence_length
        self.held_out = recipe.text.held_out_sequences
        self.special = SpecialIds(bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
        self.documents = self.tokens = self.usable_total = 0
        self.usable: list[np.ndarray] = []
        self.subset_of: list[np.ndarray] = []
        self.subsets: dict[str, int] = {}
        self.digest = hashlib.sha256()

    def run(self, sources: list[Source]) -> TokenSummary:
        """Build the table; `tokens.json`, written last, makes it a finished one."""
        remove_tree(self.path)
        make_folder(self.path)
        written = 0
        shard_rows = token_layout(self.path, 0, self.length).shard_rows
        for rows in regroup(self._counted(self._packed(sources)), shard_rows):
            # The arrays are described at the end, when the number of sequences is known.
            for layout, part in self._columns(rows, sequences=written + len(rows)):
                write_shards(layout.open(assume=True), layout, start=written, rows=part)
            written += len(rows)
        self._require_sequences(written)
        for layout, _ in self._columns(np.empty((0, self.length), np.int32), sequences=written):
            layout.open(create=True)
        counts = self._write_counts(written)
        summary = TokenSummary(
            format_version=FORMAT_VERSION,
            special_ids=self.special,
            token_hash=self.digest.hexdigest(),
            documents=self.documents,
            tokens=self.tokens,
            sequences=written,
            usable_rows=int(counts[: written - self.held_out].sum(dtype=np.int64)),
            subsets=list(self.subsets),
            **dict(self.recipe),
        )
        write_record(self.path / TOKENS_FILE, summary)
        return summary

    def _columns(
        self, packed: Int32[np.ndarray, "N S"], *, sequences: int
    ) -> Iterator[tuple[ArrayLayout, np.ndarray]]:
        """The arrays of that many sequences, and their parts of packed rows."""
        tokens, masked = split_masks(packed)
        yield token_layout(self.path, sequences, self.length), tokens
        if self.masks:
            yield mask_layout(self.path, sequences, self.length), masked.astype(np.uint8)

    def _packed(self, sources: list[Source]) -> Iterator[np.ndarray]:
        """Yield sequences; if documents have subsets, note the subset of each sequence."""
        encoded = self._encoded(sources)
        if self.recipe.vocabulary is not None:
            yield from self._vocabulary_and_text(encoded)
            return
        numbered = ([(self._number(name), ids) for name, ids in batch] for batch in encoded)
        for rows, subsets in pack_by_subset(numbered, length=self.length, special=self.special):
            if self.subsets:
                self.subset_of.append(subsets)
            yield rows

    def _vocabulary_and_text(
        self, encoded: Iterator[list[tuple[str | None, list[int]]]]
    ) -> Iterator[np.ndarray]:
        """The vocabulary's sequences, then as many of the text's as are to be held out."""
        assert self.recipe.vocabulary is not None
        yield pack_vocabulary(self.recipe.vocabulary, length=self.length, special=self.special)
        missing = self.held_out
        ids = ([ids for _, ids in documents] for documents in encoded)
        for rows in pack(ids, length=self.length, special=self.special):
            if not missing:
                return
            yield rows[:missing]
            missing -= len(rows[:missing])
        if missing:
            raise UserError(
                f"the text makes {self.held_out - missing} sequences of {self.length} tokens and "
                f"text.held_out_sequences asks for {self.held_out}: lower it, or add text."
            )

    def _number(self, subset: str | None) -> int:
        """A number for a subset, in the order in which they are met; 0 without subsets."""
        if subset is None:
            return 0
        number = self.subsets.setdefault(subset, len(self.subsets))
        if number >= _MOST_SUBSETS:
            raise UserError(
                f"text.subset_field {self.recipe.text.subset_field} has more than {_MOST_SUBSETS} "
                "values, and each is packed by itself: name a field with few, such as the corpus "
                "a document is from"
            )
        return number

    def _encoded(self, sources: list[Source]) -> Iterator[list[tuple[str | None, list[int]]]]:
        """Subset and token ids of the documents, batch by batch, with a progress meter."""
        streamed = any(source.streamed for source in sources)
        total = None if streamed else sum(source.size or 0 for source in sources)
        unit = "documents" if streamed else "B"
        with ProgressMeter("tokenising", total=total, unit=unit) as meter:
            for documents, position in _batches(self.recipe.text, sources):
                if self.stop():
                    raise Interrupted("stopped while tokenising: next time it begins again")
                encoded = self._encode(documents)
                self.documents += len(encoded)
                self.tokens += sum(map(len, encoded))
                yield [(one.subset, ids) for one, ids in zip(documents, encoded, strict=True)]
                # The consumer has packed and counted what was yielded by now.
                meter.update(self.documents if streamed else position)
                if self._enough():
                    return

    def _encode(self, documents: list[Document]) -> list[list[int]]:
        """Token ids; those of a conversation that are masked are complemented."""
        chat = self.recipe.text.chat
        if chat is None:
            return self.tokenizer.encode_batch([one.text for one in documents])
        assert self.template is not None
        return encode_chats(
            [one.messages for one in documents],
            tokenizer=self.tokenizer,
            template=self.template,
            roles=chat.roles,
        )

    def _enough(self) -> bool:
        """Whether a stream has given the rows asked for, besides all that may be held out."""
        if self.recipe.rows_wanted is None:
            return False
        held_out = self.held_out * (self.length - 1)
        return self.usable_total >= self.recipe.rows_wanted + held_out

    def _counted(self, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Mask the texts to be masked; hash sequences and count their usable tokens."""
        for packed in parts:
            tokens, masked = split_masks(packed)
            masked |= masked_tokens(tokens, self.masked_ids)
            marked = np.where(masked, ~tokens, tokens)
            self.digest.update(np.ascontiguousarray(marked, "<i4").data)
            usable = usable_tokens(tokens, self.special) & ~masked
            counts = usable.sum(axis=1, dtype=np.int32)
            self.usable.append(counts)
            self.usable_total += int(counts.sum(dtype=np.int64))
            yield marked

    def _require_sequences(self, sequences: int) -> None:
        if self.documents == 0 and self.recipe.vocabulary is None:
            raise UserError(f"text.source {self.recipe.text.source} holds no documents at all.")
        if sequences <= self.held_out:
            raise UserError(
                f"the text makes {sequences} sequences of {self.length} tokens and "
                f"text.held_out_sequences keeps {self.held_out} of them from being harvested: none "
                "is left. Lower text.held_out_sequences or text.sequence_length, or add text."
            )

    def _write_counts(self, sequences: int) -> Int32[np.ndarray, " N"]:
        counts = np.concatenate(self.usable)
        layout = count_layout(self.path, sequences)
        write_shards(layout.open(create=True), layout, start=0, rows=counts)
        if self.subset_of:
            layout = subset_layout(self.path, sequences)
            rows = np.concatenate(self.subset_of)
            write_shards(layout.open(create=True), layout, start=0, rows=rows)
        return counts
