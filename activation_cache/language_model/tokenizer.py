"""The model's own tokenizer, from tokenizer.json, tokenizer.model or a GGUF file."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    config = read_gemma_config(model)
    files = [path] if is_gguf(path) else [path / name for name in _FILES]
    tokenizer = _loaded(path, tuple(file_identity(file) for file in files))
    check_matches(tokenizer, config, source=path)
    return tokenizer


# A harvest needs it to tokenise, to convert the weights and to load the model.
@functools.lru_cache(maxsize=2)
def _loaded(path: Path, identity: tuple[tuple[int, ...], ...]) -> Tokenizer:
    return tokenizer_from_gguf(open_gguf(path)) if is_gguf(path) else _from_folder(path)


def check_matches(tokenizer: Tokenizer, config: GemmaConfig, *, source: Path) -> None:
    """Raises `UserError` when the tokenizer can't be the model's."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has ids up to {tokenizer.vocab_size - 1} and the model "
            f"embeds {config.vocab_size}: they don't belong together. Use the model's tokenizer."
        )
    if tokenizer.bos_id != config.bos_id:
        raise UserError(
            f"the tokenizer of {source} has BOS id {tokenizer.bos_id} and the model's config says "
            f"{config.bos_id}: they don't belong together. Use the model's tokenizer."
        )


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Build the tokenizer from a GGUF file's vocabulary; raises `UserError` if it has none."""
    keys = {key: f"tokenizer.ggml.{key}" for key in ("tokens", "scores", "token_type")}
    missing = [key for key in keys.values() if key not in file.metadata]
    if missing or file.metadata.get("tokenizer.ggml.model") != "llama":
        raise UserError(
            f"{file.path} holds no SentencePiece vocabulary (tokenizer.ggml.model is "
            f"'{file.metadata.get('tokenizer.ggml.model')}', missing keys: {missing or 'none'}). "
            "Use a GGUF file converted with its tokenizer."
        )
    pieces = Pieces(
        # llama.cpp's converter writes runs of spaces as they are, SentencePiece as runs of "▁".
        pieces=[piece.replace(" ", SPACE) for piece in file.metadata[keys["tokens"]]],
        scores=file.metadata[keys["scores"]],
        types=file.metadata[keys["token_type"]],
    )
    backend = tokenizer_from_pieces(pieces, source=str(file.path))
    ids = {
        name: file.metadata.get(f"tokenizer.ggml.{key}_token_id", backend.token_to_id(name))
        for name, key in ((BOS, "bos"), (EOS, "eos"), (PAD, "padding"))
    }
    return _with_special_ids(backend, ids, source=file.path)


def _from_folder(folder: Path) -> Tokenizer:
    definition, model, _ = (folder / name for name in _FILES)
    if definition.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(definition))
        except Exception as error:  # the package raises bare Exception
            raise UserError(
                f"{definition} is not a tokenizer definition ({error}). Download it again."
            ) from error
        backend.no_truncation()
        backend.no_padding()
    elif model.is_file():
        backend = tokenizer_from_pieces(pieces_from_model_file(model), source=str(model))
    else:
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model: text is cut into tokens "
            "with the model's own tokenizer. Put one of them there."
        )
    return _with_special_ids(backend, _named_ids(folder, backend), source=folder)


def _named_ids(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, int | None]:
    """Ids of BOS, EOS and padding: as tokenizer_config.json names them, else by Gemma's names."""
    path = folder / _FILES[-1]
    named = read_json(path) if path.is_file() else {}
    ids = {}
    for default, key in ((BOS, "bos_token"), (EOS, "eos_token"), (PAD, "pad_token")):
        token = named.get(key) or default
        text = token["content"] if isinstance(token, dict) else token
        ids[text] = backend.token_to_id(text)
    return ids


def _with_special_ids(
    backend: tokenizers.Tokenizer, ids: dict[str, int | None], *, source: Path
) -> Tokenizer:
    missing = [name for name, token_id in ids.items() if token_id is None]
    if missing:
        raise UserError(
            f"the tokenizer of {source} has no {', '.join(missing)} token: every sequence begins "
            "with BOS, and EOS and padding are told apart. Use the model's own tokenizer."
        )
    bos_id, eos_id, pad_id = (token_id for token_id in ids.values() if token_id is not None)
    return Tokenizer(backend=backend, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
