"""A SentencePiece BPE vocabulary as a `tokenizers` tokenizer.

Gemma's tokenizer was trained with SentencePiece: pieces with scores, merged greedily by score,
unknown characters as bytes. A GGUF file and a `tokenizer.model` both hold exactly the pieces,
scores and types, from which the merge list of `tokenizers` is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from activation_cache.runtime.errors import UserError

SPACE = "▁"

# SentencePiece's piece types; llama.cpp uses the same numbers.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Pieces:
    """A vocabulary: piece i has id i."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]


def tokenizer_from_pieces(vocabulary: Pieces, *, source: str) -> Tokenizer:
    """Build the tokenizer that gives SentencePiece's ids.

    User-defined pieces (type 4: runs of line breaks, tabs and spaces, HTML tags) are matched,
    the longest first, before anything is merged; without them runs of whitespace come out wrong.
    They are matched in normalised text, as SentencePiece does.

    Raises:
        UserError: lists of unequal lengths, no unknown piece, or no byte pieces.
    """
    pieces, types = vocabulary.pieces, vocabulary.types
    if not len(pieces) == len(vocabulary.scores) == len(types):
        raise UserError(
            f"{source} holds {len(pieces)} pieces, {len(vocabulary.scores)} scores and "
            f"{len(types)} types: one of each belongs to a token. The file is damaged."
        )
    ids = {piece: index for index, piece in enumerate(pieces)}
    unknown = [piece for piece, kind in zip(pieces, types, strict=True) if kind == _UNKNOWN]
    # Some converters mark <unk> as a control piece.
    unknown_piece = unknown[0] if unknown else "<unk>"
    if unknown_piece not in ids or _BYTE not in types:
        raise UserError(
            f"{source} holds a vocabulary of {len(pieces)} pieces without an unknown piece or "
            "without byte pieces: Gemma's has both. Use the tokenizer that came with the model."
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(vocabulary, ids),
            unk_token=unknown_piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    kinds = zip(pieces, types, strict=True)
    added = [
        AddedToken(piece, normalized=kind == _USER_DEFINED, special=kind != _USER_DEFINED)
        for piece, kind in kinds
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _merges(vocabulary: Pieces, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, the best-scored piece first."""
    scored: list[tuple[float, int, int, str, str]] = []
    for piece, score in zip(vocabulary.pieces, vocabulary.scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                scored.append((-score, ids[left], ids[right], left, right))
    scored.sort(key=lambda merge: merge[0])
    return [(left, right) for *_, left, right in scored]


def pieces_from_model_file(path: Path) -> Pieces:
    """Read a SentencePiece `tokenizer.model`.

    Raises:
        UserError: not such a file, or one whose rules aren't Gemma's.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(
            f"{path} is not a SentencePiece model: the file is damaged. Download it again."
        ) from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    rules = {
        "model type BPE": trainer.model_type == _BPE,
        "byte fallback": trainer.byte_fallback,
        "no dummy prefix": not normalizer.add_dummy_prefix,
        "no normalisation": normalizer.name == "identity",
        "extra whitespace kept": not normalizer.remove_extra_whitespaces,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise UserError(
            f"{path} is not Gemma's tokenizer: it lacks {', '.join(broken)}. Use the tokenizer "
            "that came with the model."
        )
    return Pieces(
        pieces=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
    )
