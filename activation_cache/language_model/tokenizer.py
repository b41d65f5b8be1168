"""The model's own tokenizer, from tokenizer.json, tokenizer.model or a GGUF file."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from activation_cache.config import ModelConfig
from activation_cache.gemma.config import GemmaConfig
from activation_cache.language_model.gguf_file import GgufFile, open_gguf
from activation_cache.language_model.locate import file_identity, is_gguf, locate_weights
from activation_cache.language_model.shape import read_gemma_config
from activation_cache.language_model.tokenizer_vocabulary import (
    SPACE,
    Pieces,
    pieces_from_model_file,
    tokenizer_from_pieces,
)
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import read_json

logger = logging.getLogger(__name__)

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, and the ids of its special tokens."""

    backend: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    pad_id: int

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS or EOS; neither cut nor padded."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text the ids, as `encode_batch` gives them, and where each token begins in it."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(one.ids, np.int32), np.array([begin for begin, _ in one.offsets], np.int32))
            for one in encodings
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the definition: vocabulary, merges, rules, special ids."""
        definition = f"{self.backend.to_str()}{self.bos_id},{self.eos_id},{self.pad_id}"
        return hashlib.sha256(definition.encode()).hexdigest()


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """Load the tokenizer that belongs to `model.weights`, without the weights.

    From a GGUF file or a `tokenizer.model` it is built in about 3 s; while its files stay as they
    are, it is loaded once.

    Raises:
        UserError: there is none, it is damaged, it has no BOS, EOS or padding token, or it
            doesn't match the model (more ids than the embedding has rows, another BOS).
    """
    path = locate_weights(model, with_weights=False)
    files = [path] if is_gguf(path) else [path / name for name in _FILES]
    identity = tuple(file_identity(file) for file in files)
    return _loaded(path, identity, read_gemma_config(model))


# A harvest needs it to tokenise, to convert the weights and to load the model.
@functools.lru_cache(maxsize=2)
def _loaded(path: Path, identity: tuple[tuple[int, ...], ...], config: GemmaConfig) -> Tokenizer:
    tokenizer = tokenizer_from_gguf(open_gguf(path)) if is_gguf(path) else _from_folder(path)
    return _fitted(tokenizer, config, source=path)


def _fitted(tokenizer: Tokenizer, config: GemmaConfig, *, source: Path) -> Tokenizer:
    """The tokenizer without added tokens past the model's embedding.

    Every Gemma 3 tokenizer has `<image_soft_token>` with the id 262144, and the models without
    vision have 262,144 rows. Without it a text that spells it out is tokenised as any other.

    Raises:
        UserError: the tokenizer can't be the model's.
    """
    rows = config.vocab_size
    special = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, "padding": tokenizer.pad_id}
    for name, token_id in special.items():
        if token_id >= rows:
            raise UserError(
                f"the tokenizer of {source} has {name} id {token_id} and the model embeds {rows} "
                "ids, from 0 on: resize the embedding, or name a token that the model knows in "
                "tokenizer_config.json."
            )
    added = tokenizer.backend.get_added_tokens_decoder()
    past = {token.content for token_id, token in added.items() if token_id >= rows}
    if past:
        tokenizer = replace(tokenizer, backend=_without(past, tokenizer.backend))
        logger.info(
            "the tokenizer of %s has %d added tokens that the model doesn't embed (%s): text that "
            "spells one out is read as plain text",
            source,
            len(past),
            ", ".join(sorted(past)[:3]),
        )
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer of {source} has ids up to {tokenizer.vocab_size - 1} and the model "
            f"embeds {rows}: they don't belong together. Use the model's tokenizer."
        )
    if config.bos_id not in (None, tokenizer.bos_id):
        raise UserError(
            f"the tokenizer of {source} has BOS id {tokenizer.bos_id} and the model's config says "
            f"{config.bos_id}: they don't belong together. Use the model's tokenizer."
        )
    return tokenizer


def _without(tokens: set[str], backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer without some of its added tokens; the package can add tokens, not remove any."""
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = [
        token for token in definition["added_tokens"] if token["content"] not in tokens
    ]
    model = definition["model"]
    if model["type"] != "BPE":  # no Gemma's; `_fitted` then refuses it for its ids
        return backend
    model["vocab"] = {piece: one for piece, one in model["vocab"].items() if piece not in tokens}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in tokens]
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Build the tokenizer from a GGUF file's vocabulary; raises `UserError` if it has none."""
    keys: dict[str, Any] = {"tokens": str, "scores": (float, int), "token_type": int}
    found: list[Any] = [file.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    missing = [
        f"tokenizer.ggml.{key}"
        for values, (key, kind) in zip(found, keys.items(), strict=True)
        if not isinstance(values, list) or not all(isinstance(one, kind) for one in values)
    ]
    if missing or file.metadata.get("tokenizer.ggml.model") != "llama":
        raise UserError(
            f"{file.path} holds no SentencePiece vocabulary (tokenizer.ggml.model is "
            f"'{file.metadata.get('tokenizer.ggml.model')}', missing keys: {missing or 'none'}). "
            "Use a GGUF file converted with its tokenizer."
        )
    tokens, scores, types = found
    # llama.cpp's converter writes runs of spaces as they are, SentencePiece as runs of "▁".
    pieces = Pieces([piece.replace(" ", SPACE) for piece in tokens], scores, types)
    backend = tokenizer_from_pieces(pieces, source=str(file.path))
    ids = (
        (name, file.metadata.get(f"tokenizer.ggml.{key}_token_id", backend.token_to_id(name)))
        for name, key in ((BOS, "bos"), (EOS, "eos"), (PAD, "padding"))
    )
    return _with_special_ids(backend, ids, source=file.path)


def _from_folder(folder: Path) -> Tokenizer:
    definition, model, _ = (folder / name for name in _FILES)
    if definition.is_file():
        backend = _from_definition(definition)
    elif model.is_file():
        backend = tokenizer_from_pieces(pieces_from_model_file(model), source=str(model))
    else:
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model: text is cut into tokens "
            "with the model's own tokenizer. Put one of them there."
        )
    return _with_special_ids(backend, _named_ids(folder, backend), source=folder)


def _from_definition(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        definition = read_json(path)
        whole = isinstance(definition, dict) and "model" in definition
        raise UserError(
            f"{path} is not a tokenizer definition that tokenizers {tokenizers.__version__}, as "
            f"installed here, reads ({error}). "
            + ("Upgrade it: `pip install --upgrade tokenizers`." if whole else "Download it again.")
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _named_ids(folder: Path, backend: tokenizers.Tokenizer) -> list[tuple[str, int | None]]:
    """BOS, EOS and padding: as tokenizer_config.json names them, else by Gemma's names.

    A name is text, or an object that has it as `content` (an `AddedToken` of `transformers`).
    """
    path = folder / _FILES[-1]
    named = read_json(path) if path.is_file() else {}
    if not isinstance(named, dict):
        raise UserError(
            f"{path} is not a JSON object with keys such as bos_token: the file is damaged. "
            "Download it again."
        )
    ids = []
    for default, key in ((BOS, "bos_token"), (EOS, "eos_token"), (PAD, "pad_token")):
        given = named.get(key) or default
        text = given.get("content") if isinstance(given, dict) else given
        if not isinstance(text, str):
            raise UserError(
                f"{path} has {key} = {given!r}: one token's text is needed, or an object with it "
                "as 'content'. Correct it there."
            )
        ids.append((text, backend.token_to_id(text)))
    return ids


def _with_special_ids(
    backend: tokenizers.Tokenizer, ids: Iterable[tuple[str, Any]], *, source: Path
) -> Tokenizer:
    """A tokenizer with these names and ids of BOS, EOS and padding; two of them may coincide."""
    ids = list(ids)
    missing = [name for name, token_id in ids if not isinstance(token_id, int) or token_id < 0]
    if missing:
        raise UserError(
            f"the tokenizer of {source} has no {', '.join(missing)} token: sequences begin with "
            "BOS, documents end with EOS, and the last sequence is filled with padding. Use the "
            "model's own tokenizer, or name its tokens in tokenizer_config.json."
        )
    (_, bos_id), (_, eos_id), (_, pad_id) = ids
    return Tokenizer(backend=backend, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
