"""The GGUF format: header, metadata and dequantised tensors.

The layout is that of llama.cpp's `docs/gguf.md`, versions 2 and 3. The `gguf` package's own
reader builds an array object for every string of the vocabulary (26 s for Gemma 3 270M); reading
the header directly takes 0.3 s. The package's dequantisation is used as it is.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from activation_cache.language_model.locate import file_identity
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import refuse_lfs_pointer

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_INITIAL_HEADER_BYTES = 16 * 2**20
# Rows dequantised at a time: the temporaries of a 262,144-row embedding would be gigabytes.
_ROWS_AT_A_TIME = 8192


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's entry in the header; `shape` in NumPy's order ([out, in] for a projection)."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of one file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    header_bytes: bytes

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor, or a part of it, as float32 values; quantised blocks are dequantised."""
        tensor = self.tensors[name]
        *rows, row_length = tensor.shape
        *of_rows, of_columns = (*index, *[slice(None)] * (len(tensor.shape) - len(index)))
        data = np.memmap(
            self.path, mode="r", offset=tensor.offset, shape=(tensor.num_bytes,), dtype=np.uint8
        ).reshape(*rows, -1)[tuple(of_rows)]
        shape = (*data.shape[:-1], len(range(row_length)[of_columns]))
        data = data.reshape(-1, data.shape[-1])
        values = np.empty((len(data), shape[-1]), np.float32)
        for start in range(0, len(data), _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            values[part] = dequantize(np.asarray(data[part]), tensor.kind)[:, of_columns]
        return values.reshape(shape)


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        fmt = f"<{count}{code}"
        values = struct.unpack_from(fmt, self.data, self.position)
        self.position += struct.calcsize(fmt)
        return values

    def integer(self, code: str = "Q") -> int:
        return int(self.scalars(code)[0])

    def string(self) -> str:
        length = self.integer()
        if self.position + length > len(self.data):
            raise struct.error("string past the end")
        raw = self.data[self.position : self.position + length]
        self.position += length
        # A vocabulary may hold pieces cut inside a character.
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalars(_SCALARS[kind])[0]
        kind, count = self.integer("I"), self.integer()
        if kind in _SCALARS:
            return list(self.scalars(_SCALARS[kind], count))
        return [self.value(kind) for _ in range(count)]


def open_gguf(path: Path) -> GgufFile:
    """Read and check a file's header; a process reads it once while the file stays as it is.

    Raises:
        UserError: not a GGUF file, a version other than 2 and 3, a truncated file, or a tensor of a
            type that the `gguf` package can't dequantise.
    """
    return _opened(path, file_identity(path))


# A vocabulary of 262,144 pieces takes a second to read, and a command needs it several times.
@functools.lru_cache(maxsize=2)
def _opened(path: Path, identity: tuple[int, ...]) -> GgufFile:
    size, wanted = path.stat().st_size, _INITIAL_HEADER_BYTES
    while True:
        with open(path, "rb") as file:
            data = file.read(wanted)
        refuse_lfs_pointer(path, data)
        if data[:4] != b"GGUF":
            raise UserError(
                f"{path} is not a GGUF file: it must start with the bytes 'GGUF' and starts with "
                f"{data[:4]!r}. Download it again or name another file."
            )
        try:
            parsed = _parse(path, data)
            break
        except struct.error as error:  # the header is longer than what was read
            if len(data) == size:
                raise UserError(
                    f"{path} ends inside its header, at {size} bytes: the file is truncated. "
                    "Download it again."
                ) from error
            wanted *= 4
        except UserError:
            raise
        except (KeyError, ValueError, RecursionError) as error:
            raise UserError(f"{path} has a damaged header ({error}): download it again.") from error
    expected = max((t.offset + t.num_bytes for t in parsed.tensors.values()), default=0)
    if size < expected:
        raise UserError(
            f"{path} has {size} bytes and its header promises {expected}: the file is truncated. "
            "Download it again."
        )
    return parsed


def _parse(path: Path, data: bytes) -> GgufFile:
    cursor = _Cursor(data)
    cursor.position = 4
    version = cursor.integer("I")
    if version not in (2, 3):
        raise UserError(
            f"{path} is GGUF version {version}; versions 2 and 3 are read. Convert it anew."
        )
    num_tensors, num_keys = cursor.integer(), cursor.integer()
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.integer("I"))
    raw = []
    for _ in range(num_tensors):
        name, num_dims = cursor.string(), cursor.integer("I")
        dims = cursor.scalars("Q", num_dims)
        kind = _readable(cursor.integer("I"), tensor=f"{path}: tensor {name}")
        raw.append((name, tuple(reversed(dims)), kind, cursor.integer()))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}, and must be a number above 0")
    start = cursor.position + (-cursor.position % alignment)
    tensors = {
        name: GgufTensor(shape, kind, start + offset, _num_bytes(shape, kind))
        for name, shape, kind, offset in raw
    }
    return GgufFile(path, metadata, tensors, data[: cursor.position])


def _num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(f"a tensor of shape {list(shape)} isn't made of {kind.name} blocks")
    return math.prod(shape) // block * block_bytes


def _readable(number: int, *, tensor: str) -> GGMLQuantizationType:
    """The type with this number; raises `UserError` if the package can't dequantise it."""
    try:
        kind = GGMLQuantizationType(number)
        _try_dequantising(kind)
        return kind
    except (ValueError, KeyError, NotImplementedError) as error:
        known = GGMLQuantizationType(number).name if number in list(GGMLQuantizationType) else "new"
        raise UserError(
            f"{tensor} is of GGML type {number} ({known}), which the installed gguf "
            f"{importlib.metadata.version('gguf')} can't dequantise: upgrade it with `pip install "
            "--upgrade gguf`, or take another quantisation of the model, such as Q8_0 or BF16."
        ) from error


@functools.cache
def _try_dequantising(kind: GGMLQuantizationType) -> None:
    with np.errstate(all="ignore"):
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
